"""A tor that is found, watched and told of services, at a control port of ours."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from stem.response import ControlMessage
from trio.testing import MockClock

from hpkvfs import tor
from hpkvfs.protocol.identity import Identity
from hpkvfs.tor import Limits, Onion, Throttle, Tor, TorError, keeper, services
from hpkvfs.tor.control import progress, socks_of
from tests.mounted.client import eventually
from tests.net.tors import ControlPort

ONION = Onion(7387, "127.0.0.1:5", Identity(bytes(32)).expanded())
NO_KEYWORD = '512 Bad arguments to ADD_ONION: Unrecognized keyword argument "PoWDefensesEnabled"'


def test_progress_in_the_words_of_everybody() -> None:
    said = (
        'NOTICE BOOTSTRAP PROGRESS=45 TAG=loading_descriptors SUMMARY="Loading relay descriptors"'
    )
    assert progress(said) == "tor is at 45 %: loading relay descriptors"
    said = (
        'WARN BOOTSTRAP PROGRESS=5 TAG=conn SUMMARY="Connecting to a relay" WARNING="a=b c" COUNT=3'
    )
    assert progress(said) == "tor is at 5 %: connecting to a relay"
    assert progress("") == "tor is at 0 %: starting"


async def test_how_far_it_got_is_told_and_then_that_it_is_up(tmp_path: Path) -> None:
    fake, told = ControlPort(), list[str]()
    fake.info["status/bootstrap-phase"] = (
        'NOTICE BOOTSTRAP PROGRESS=45 TAG=x SUMMARY="Loading relay descriptors"'
    )
    async with fake.at(tmp_path / "c") as path, tor.running(path, tmp_path, tell=told.append) as t:
        with trio.fail_after(60):
            while t.phase != "tor is at 45 %: loading relay descriptors":
                await trio.sleep(0.01)
            fake.info["status/bootstrap-phase"] = "NOTICE BOOTSTRAP PROGRESS=100 TAG=done"
            await t.ready()
    assert told == [
        "looking for tor", "tor is at 45 %: loading relay descriptors",
        "connected to the Tor network",
    ]  # fmt: skip


async def test_while_it_is_down_it_says_so_at_once_and_tries_ever_less_often(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    @asynccontextmanager
    async def control(self: Tor) -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        tries.append(trio.current_time())
        raise TorError("no tor answers at port 9051", "start it")
        yield

    monkeypatch.setattr(Tor, "_control", control)
    async with tor.running(("127.0.0.1", 9051), Path("/nonexistent")) as found:
        await trio.sleep(0.1)
        start = trio.current_time()
        with pytest.raises(TorError, match="no tor answers at port 9051"):
            await found.socks()
        assert trio.current_time() == start
        await trio.sleep(200)
    pauses = [round(b - a, 3) for a, b in itertools.pairwise(tries)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 30, 30]


# -- a password ----------------------------------------------------------------------------------

PASSWORD = "correct horse"


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """The control socket of a real tor, which never goes on the network, with a password."""
    hashed = subprocess.run(
        ["tor", "--quiet", "--hash-password", PASSWORD], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    control, torrc = tmp_path / "control", tmp_path / "torrc"
    torrc.write_text(
        f"DataDirectory {tmp_path}/data\nDisableNetwork 1\nSocksPort 0\nLog err stderr\n"
        f"ControlSocket {control}\nHashedControlPassword {hashed}\n"
    )
    line = ["tor", "--quiet", "--defaults-torrc", str(tmp_path / "none"), "-f", str(torrc)]
    with subprocess.Popen(line) as process:
        eventually(control.exists, "tor to start")
        yield control
        process.terminate()


async def test_a_control_password_right_wrong_and_missing(locked: Path, tmp_path: Path) -> None:
    async def trouble(password: str | None) -> TorError:
        async with tor.running(locked, tmp_path, password=password) as found:
            with trio.fail_after(60), pytest.raises(TorError) as caught:
                await found.ready()
        return caught.value

    wrong, none = await trouble("battery staple"), await trouble(None)
    assert wrong.message == f"the tor at {locked} refuses the password"
    assert none.message == f"the tor at {locked} wants a password"
    assert "--tor-password-file" in wrong.hint and "--tor-password-file" in none.hint
    async with tor.running(locked, tmp_path, password=PASSWORD) as found:
        with trio.fail_after(60):
            while found.phase != "tor is at 0 %: starting":
                await trio.sleep(0.02)


# -- which SOCKS port --------------------------------------------------------------------------


class Settings:
    """A Controller, as far as socks_of needs one."""

    def __init__(self, listeners: list[str], **conf: list[str]) -> None:
        self._listeners, self._conf = listeners, conf

    def get_conf(self, name: str, default: list[str], multiple: bool) -> list[str]:
        return self._conf.get(name, default)

    def get_info(self, name: str) -> str:
        return " ".join(f'"{one}"' for one in self._listeners)


SHARED = [
    (["127.0.0.1:9050"], {"SocksPort": ["9050 NoIsolateSOCKSAuth"]}),
    (["127.0.0.1:9050"], {"SocksPort": ["127.0.0.1:9050 IPv6Traffic noisolatesocksauth"]}),
    (["127.0.0.1:34567"], {"SocksPort": ["auto NoIsolateSOCKSAuth"]}),
    (["127.0.0.1:34567"], {"SocksPort": ["127.0.0.1:auto NoIsolateSOCKSAuth"]}),
    (["127.0.0.1:9150"], {"__SocksPort": ["9150 NoIsolateSOCKSAuth"]}),
    (["unix:/run/tor/socks"], {"SocksPort": ["unix:/run/tor/socks NoIsolateSOCKSAuth"]}),
    (["unix:/a b/socks"], {"SocksPort": ['unix:"/a b/socks" NoIsolateSOCKSAuth']}),
]


@pytest.mark.parametrize(("listeners", "conf"), SHARED)
def test_a_port_that_mixes_logins_is_not_used(
    listeners: list[str], conf: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpkvfs.tor.control._answers", lambda endpoint: True)
    with pytest.raises(TorError, match="does not keep requests apart") as caught:
        socks_of(Settings(listeners, **conf))
    assert "NoIsolateSOCKSAuth" in caught.value.hint
    apart = {name: [line.split(" ")[0] for line in lines] for name, lines in conf.items()}
    socks_of(Settings(listeners, **apart))  # the negative control


def test_of_several_ports_one_that_keeps_logins_apart_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hpkvfs.tor.control._answers", lambda endpoint: True)
    lines = ["unix:/run/tor/socks NoIsolateSOCKSAuth", "9050"]
    both = Settings(["unix:/run/tor/socks", "127.0.0.1:9050"], SocksPort=lines)
    assert socks_of(both) == ("127.0.0.1", 9050)


# -- what it is told of a service ----------------------------------------------------------------


@asynccontextmanager
async def told_by(fake: ControlPort, base: Path) -> AsyncIterator[Tor]:
    async with fake.at(base / "c") as path, tor.running(path, base) as found:
        yield found


LIMITED = Limits(streams=1, work=Throttle(5, 7), introductions=Throttle(25, 200))


def onion(limits: Limits) -> Onion:
    return Onion(ONION.port, ONION.target, ONION.key, limits)


async def test_an_older_tor_without_proof_of_work_is_told_of_in_one_sentence(
    tmp_path: Path,
) -> None:
    fake = ControlPort("0.4.7.16", refuse={"ADD_ONION": NO_KEYWORD})
    async with told_by(fake, tmp_path) as found:
        with pytest.raises(TorError) as caught:
            await found.publish(onion(Limits(work=Throttle(5, 7))))
    assert caught.value.message.startswith("tor does not publish the service: ")
    assert "PoWDefensesEnabled" in caught.value.message
    assert "tor 0.4.8" in caught.value.hint and "--no-pow" in caught.value.hint
    assert not any(ONION.key.hex() in line for line in (caught.value.message, caught.value.hint))


async def test_a_tor_that_runs_is_told_in_words_of_add_onion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has none for introductions, and what else it publishes is left alone: no SETCONF."""
    monkeypatch.setattr(keeper, "PUBLISH_SECONDS", 0.01)
    fake, said = ControlPort(refuse={"ADD_ONION": "250-ServiceID=abc\r\n250 OK"}), list[str]()
    async with fake.at(tmp_path / "c") as path, tor.running(path, tmp_path, tell=said.append) as t:
        assert await t.publish(onion(LIMITED)) == "abc.onion"
    (line,) = [line for line in fake.heard if line.startswith("ADD_ONION")]
    assert line.split()[2:] == [
        "Flags=DiscardPK", "MaxStreams=1", "PoWDefensesEnabled=1", "PoWQueueRate=5",
        "PoWQueueBurst=7", "Port=7387,127.0.0.1:5",
    ]  # fmt: skip
    assert not any(line.startswith("SETCONF") for line in fake.heard)
    assert said[-1] == "how many introductions come is not limited: that takes --tor own"


async def test_who_insists_on_limited_introductions_gets_them_or_a_sentence(
    tmp_path: Path,
) -> None:
    fake = ControlPort()
    async with told_by(fake, tmp_path) as found:
        with pytest.raises(TorError, match="can't be told how many introductions") as caught:
            await found.publish(onion(Limits(introductions=Throttle(25, 200), insist=True)))
    assert caught.value.hint == "give --tor own, or --intro-rate 0"
    assert not any(line.startswith("ADD_ONION") for line in fake.heard)


def test_a_burst_is_not_less_than_the_rate() -> None:
    with pytest.raises(ValueError, match="a burst of 8 is less than the 9 of each second"):
        Throttle(9, 8)


class Told:
    """A Controller of a tor of our own, as far as services.publish needs one."""

    def __init__(self, data: Path, configured: str = "HiddenServiceOptions") -> None:
        self._hostname = data / "service" / "hostname"
        self._configured = configured
        self.settings = ""

    def msg(self, command: str) -> Any:
        if command.startswith("SETCONF"):
            self.settings = command
            self._hostname.write_text("abc.onion\n")
            return ControlMessage.from_str("250 OK\r\n")
        return ControlMessage.from_str(f"250 {self._configured}\r\n")


def test_a_tor_of_our_own_gets_settings_and_a_copy_of_the_key(tmp_path: Path) -> None:
    controller = Told(tmp_path)
    assert services.publish(controller, onion(LIMITED), tmp_path) == "abc.onion"
    assert controller.settings.split(" HiddenService")[1:] == [
        f'Dir="{tmp_path}/service"', 'Port="7387 127.0.0.1:5"', "MaxStreams=1",
        "PoWDefensesEnabled=1", "PoWQueueRate=5", "PoWQueueBurst=7", "EnableIntroDoSDefense=1",
        "EnableIntroDoSRatePerSec=25", "EnableIntroDoSBurstPerSec=200",
    ]  # fmt: skip
    secret = tmp_path / "service" / "hs_ed25519_secret_key"
    assert secret.read_bytes() == b"== ed25519v1-secret: type0 ==\0\0\0" + ONION.key
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.parent.stat().st_mode & 0o777 == 0o700
    services.publish(controller, onion(Limits()), tmp_path)  # the negative control
    assert "IntroDoS" not in controller.settings and "PoW" not in controller.settings


def test_another_identity_leaves_nothing_of_the_last(tmp_path: Path) -> None:
    """As after `hpkvd restore` into a directory that had another: tor stops at keys that differ."""
    controller = Told(tmp_path)
    services.publish(controller, ONION, tmp_path)
    derived = tmp_path / "service" / "hs_ed25519_public_key"
    derived.write_bytes(b"of the first")
    services.publish(controller, ONION, tmp_path)
    assert derived.exists()
    other = Onion(7387, "127.0.0.1:5", Identity(bytes([1] * 32)).expanded())
    services.publish(controller, other, tmp_path)
    assert not derived.exists()
    assert (derived.parent / "hs_ed25519_secret_key").read_bytes().endswith(other.key)


def test_a_service_in_the_further_settings_is_not_lost_without_a_word(tmp_path: Path) -> None:
    controller = Told(tmp_path, "HiddenServiceDir=/var/lib/shop")
    with pytest.raises(TorError, match="have an onion service of their own"):
        services.publish(controller, ONION, tmp_path)
    assert controller.settings == ""


async def test_a_tor_with_several_control_ports_is_reached(tmp_path: Path) -> None:
    """Its file names one in each line. A real tor, which never goes on the network."""
    more = f"DisableNetwork 1\nControlSocket {tmp_path}/socket\nControlPort 127.0.0.1:auto\n"
    (tmp_path / "torrc").write_text(more)
    told: list[str] = []
    async with tor.running(
        tor.OWN, tmp_path / "tor", more=tor.further_settings(tmp_path), tell=told.append
    ) as found:
        with trio.fail_after(60):
            while not found.phase.startswith("tor is at 0 %"):
                await trio.sleep(0.05)
    assert told[:2] == ["looking for tor", "starting tor"]
