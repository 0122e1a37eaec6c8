"""Through a private Tor network: what our half of it does, and what can be seen of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import secrets
import shutil
import socket
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from hpkvfs import tor
from hpkvfs.address import Address
from hpkvfs.errors import Unreachable
from hpkvfs.net.circuits import Circuits, TorSettings
from hpkvfs.net.line import Line
from hpkvfs.net.purchases import Purchases
from hpkvfs.net.transport import exchange
from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.messages import Parameters, ParametersRequest, decode_reply
from tests.commands import ENVIRONMENT, command
from tests.mounted.client import eventually, tree
from tests.server.support import read_all
from tests.tor.network import Namespace, Network
from tests.tor.parties import (
    PORT,
    OnionClient,
    OnionServer,
    Saboteur,
    SellingServer,
    debian_tor,
    echo,
    publish,
)

NOWHERE = Path("/nonexistent")
REQUESTS = 40
FLOOD, FLOOD_SECONDS = 60, 5.0
BOUGHT = 500
NO_JOURNAL: Any = None


# -- one circuit for each request, seen from both sides ----------------------------------------


@dataclass
class Witness:
    """What the control ports of client and service tell of one onion address, which is this
    test's alone: what another test left behind ends whenever it likes."""

    onion: str
    streams: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    logins: dict[str, str] = field(default_factory=dict)
    joined: set[str] = field(default_factory=set)

    @property
    def circuits(self) -> set[str]:
        """The client's circuits that carried streams."""
        return {circuit for circuits in self.streams.values() for circuit in circuits}

    def see_stream(self, event: Any) -> None:
        if event.target_address == self.onion and event.circ_id:
            self.streams[event.id].add(event.circ_id)
            self.logins[event.id] = event.keyword_args["SOCKS_USERNAME"]

    def see_circuit(self, event: Any) -> None:
        ours = f"{event.rend_query}.onion" == self.onion
        if event.hs_state == "HSSR_JOINED" and ours:
            self.joined.add(event.id)


@contextlib.contextmanager
def watching(network: Network, onion: str) -> Iterator[Witness]:
    witness = Witness(onion)
    with network.controller("client") as client, network.controller("service") as service:
        client.add_event_listener(witness.see_stream, "STREAM")
        service.add_event_listener(witness.see_circuit, "CIRC", "CIRC_MINOR")
        yield witness


def circuits(
    network: Network,
    onion: str,
    *,
    warm: bool,
    rng: Callable[[int], bytes] = secrets.token_bytes,
) -> Circuits:
    settings = TorSettings(network.control("client"), NOWHERE)
    return Circuits(Address.parse(onion), settings, rng, warm=warm)


async def ask(way: Circuits, count: int, at_once: int) -> None:
    left = iter(range(count))

    async def asker() -> None:
        for _ in left:
            await exchange(way, bytes(REQUEST_SIZE), 60)

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(asker)


@pytest.fixture
def echoing(network: Network) -> Iterator[str]:
    with echo(network) as onion:
        yield onion


@pytest.mark.parametrize("warm", [False, True])
async def test_each_request_has_a_circuit_that_nothing_else_uses(
    network: Network, echoing: str, warm: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with watching(network, echoing) as seen:
        way = circuits(network, echoing, warm=warm)
        async with way.running():
            await ask(way, REQUESTS, 8)
            await until(lambda: not way.making and len(seen.streams) >= REQUESTS + way.ready)
            made_ahead = way.ready
        await until(lambda: len(seen.joined) >= len(seen.streams) > 0)
    if warm:  # also those that were made ahead and not used in the end
        assert len(seen.streams) == REQUESTS + made_ahead
    else:
        assert len(seen.streams) == REQUESTS
    assert len(seen.circuits) == len(seen.streams)
    assert len(seen.joined) == len(seen.streams)
    assert all(len(used) == 1 for used in seen.streams.values())
    assert len(set(seen.logins.values())) == len(seen.streams)
    assert not any(login in caplog.text for login in seen.logins.values())


async def test_with_a_shared_login_it_is_one_circuit(network: Network, echoing: str) -> None:
    """The negative control: what sees separate circuits sees that these are not."""
    way = circuits(network, echoing, warm=False, rng=bytes)
    with watching(network, echoing) as seen:
        async with way.running():
            for _ in range(REQUESTS // 4):
                await way.probe()  # which leaves the connection open
            await until(lambda: seen.joined and len(seen.streams) >= REQUESTS // 4)
    assert len(seen.streams) == REQUESTS // 4
    assert len(seen.circuits) == len(seen.joined) == 1


async def until(condition: Any) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.05)


async def test_circuits_are_closed_after_use(network: Network, echoing: str) -> None:
    with network.controller("client") as controller:
        way = circuits(network, echoing, warm=True)
        async with way.running():
            await ask(way, REQUESTS, 8)

            def lingering() -> int:
                return sum(
                    one.purpose == "HS_CLIENT_REND" and one.hs_state == "HSCR_JOINED"
                    for one in controller.get_circuits()
                )

            await until(lambda: lingering() <= way.ready)


# -- tor comes and goes ---------------------------------------------------------------------------


async def test_a_tor_that_died_is_noticed_and_found_again(network: Network) -> None:
    told: list[str] = []
    async with tor.running(network.control("client"), NOWHERE, tell=told.append) as found:
        assert await found.socks() == network.socks
        network.kill("client")
        while found.is_up:
            await trio.sleep(0.01)
        network.start("client")
        with trio.fail_after(60):
            while not found.is_up:
                await trio.sleep(0.05)
        assert found.starts == 2
    assert "tor stopped" in told
    assert any(phase.startswith("tor is at ") for phase in told)


def test_a_tor_of_our_own_is_started_and_ends_with_us(
    network: Network, echoing: str, tmp_path: Path
) -> None:
    """Its further settings, here those of the private network, are read from `torrc`."""
    data = tmp_path / "tor"
    network.prepare(data)
    line = network.inside(command("tests.tor.owner", data, echoing))
    done = subprocess.run(
        line, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=True
    )
    said = json.loads(done.stdout)
    assert said["sizes"] == [REPLY_SIZE, REPLY_SIZE] and said["again"]
    assert said["told"].startswith("over Tor, through a tor of our own")
    assert "tor stopped" in said["phases"]
    assert any(phase.startswith("tor is at ") for phase in said["phases"])
    assert not (data / "port").exists()  # tor removes it as the last thing it does
    assert (data / "state").exists() or (data / "lock").exists()


async def test_a_tor_that_does_not_keep_logins_apart_is_not_used(
    network: Network, echoing: str
) -> None:
    way = circuits(network, echoing, warm=False)
    shared = network.base / "client" / "shared"
    with network.controller("client") as controller:
        controller.set_conf("SocksPort", f"unix:{shared} NoIsolateSOCKSAuth")
        try:
            async with way.running():
                with pytest.raises(Unreachable) as caught:
                    await way.dial()
        finally:
            controller.set_conf("SocksPort", f"unix:{network.socks}")
    assert caught.value.message == "tor's SOCKS port does not keep requests apart"
    assert "NoIsolateSOCKSAuth" in caught.value.hint and "--tor own" in caught.value.hint
    way = circuits(network, echoing, warm=False)
    async with way.running():  # the negative control
        assert len(await exchange(way, bytes(REQUEST_SIZE), 60)) == REPLY_SIZE


def test_debians_tor_is_used_by_members_of_its_group(network: Network, echoing: str) -> None:
    """As /usr/share/tor/tor-service-defaults-torrc has it: the socket and the cookie are for the
    group. Others are told what to do. (Where we are not root, it is all one user.)"""
    with debian_tor(network) as control:
        group, nobody = control.stat().st_gid, 65_534
        member = visit(network, control, echoing, nobody, nobody, group)
        assert member == {"size": REPLY_SIZE}
        if os.geteuid() == 0:
            stranger = visit(network, control, echoing, nobody, nobody)
            assert stranger == {
                "message": f"the tor at {control} is not yours to control",
                "hint": "join the group debian-tor and log in again, or give --tor own",
            }


def visit(
    network: Network, control: Path, onion: str, user: int, *groups: int
) -> dict[str, object]:
    arguments = map(str, (control, onion, user, *groups))
    line = network.inside(command("tests.tor.visitor", *arguments))
    done = subprocess.run(
        line, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True
    )
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def server(network: Network, tmp_path: Path) -> Iterator[OnionServer]:
    server = OnionServer(network, tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def cut_off() -> Iterator[Namespace | None]:
    """A network namespace without any network; None where none can be made."""
    try:
        namespace = Namespace(loopback=False)
    except (OSError, RuntimeError):
        yield None
        return
    yield namespace
    namespace.close()


@pytest.fixture
def client(network: Network, cut_off: Namespace | None, tmp_path: Path) -> Iterator[OnionClient]:
    directory = tmp_path / "mnt"
    directory.mkdir()
    client = OnionClient(
        tmp_path / "state",
        directory,
        tmp_path / "words",
        tor=network.control("client"),
        namespace=cut_off,
    )
    yield client
    client.discard()


# -- hpkvd publishes itself ------------------------------------------------------------------------


def connected(network: Network, host: str, login: bytes) -> socket.socket | None:
    """A connection to the server behind an onion address, on the circuit of a login of 32 bytes;
    None if it is refused."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(20)
    try:
        stream.connect(str(network.socks))
        stream.sendall(b"\5\1\2")
        assert stream.recv(2) == b"\5\2"
        stream.sendall(b"\1" + 2 * (bytes([len(login)]) + login))
        assert stream.recv(2) == b"\1\0"
        name = host.encode()
        stream.sendall(b"\5\1\0\3" + bytes([len(name)]) + name + PORT.to_bytes(2, "big"))
        code, kind = stream.recv(4)[1::2]
        stream.recv(16 + 2 if kind == 4 else 4 + 2)  # the address and port it is bound to
    except OSError:
        code = -1
    if code:
        stream.close()
        return None
    return stream


def new_login() -> bytes:
    return secrets.token_hex(16).encode()


def told(network: Network, host: str) -> Parameters | None:
    """What the server behind an onion address says of its epochs; None if it is not reached."""
    stream = connected(network, host, new_login())
    if stream is None:
        return None
    with stream:
        try:
            stream.sendall(ParametersRequest().encode())
            reply = decode_reply(read_all(stream)[:REPLY_SIZE])
        except (OSError, Malformed):
            return None
    assert isinstance(reply, Parameters)
    return reply


def most_streams(network: Network, host: str) -> int:
    """How many connections at a time the server takes on one circuit; of four at most."""
    login, held = new_login(), list[socket.socket]()
    with contextlib.ExitStack() as stack:
        while len(held) < 4 and (stream := connected(network, host, login)) is not None:
            held.append(stack.enter_context(stream))
        assert takes_one(network, host, new_login()), "more on another circuit"
        assert len(held) == 4 or not takes_one(network, host, login)
    eventually(lambda: takes_one(network, host, login), "room on the same circuit again")
    return len(held)


def takes_one(network: Network, host: str, login: bytes) -> bool:
    stream = connected(network, host, login)
    if stream is not None:
        stream.close()
    return stream is not None


def test_a_server_publishes_its_identity_and_again_when_tor_was_killed(
    network: Network, server: OnionServer
) -> None:
    host = server.onion.removesuffix(f":{PORT}")
    reply = told(network, host)
    assert reply is not None and reply.is_genuine
    assert reply.identity == server.identity.public
    assert most_streams(network, host) == 1
    network.kill("service")
    network.start("service")
    network.wait_until_up("service")
    eventually(lambda: told(network, host) == reply, "it to be reached again", 60)


async def flood(way: Circuits) -> float:
    """The share of FLOOD requests that come at once and are answered."""
    answered = 0

    async def one() -> None:
        nonlocal answered
        with contextlib.suppress(Unreachable):
            await exchange(way, ParametersRequest().encode(), FLOOD_SECONDS)
            answered += 1

    async with way.running():
        await trio.sleep(0)
        async with trio.open_nursery() as nursery:
            for _ in range(FLOOD):
                nursery.start_soon(one)
    return answered / FLOOD


async def test_introductions_are_limited_by_a_tor_of_its_own(
    network: Network, server: OnionServer, tmp_path: Path
) -> None:
    """At each of three introduction points two a second, after a first four: of a flood few are
    answered. The negative control is the same server, under the same address, without limit."""
    host = server.onion.removesuffix(f":{PORT}")
    assert await flood(circuits(network, host, warm=False)) == 1
    server.stop()
    limits = ("--intro-rate", "2", "--intro-burst", "4", "--max-streams", "3")
    server.options = ("--tor", "own", *limits)
    await trio.to_thread.run_sync(server.start)
    assert server.onion == f"{host}:{PORT}"
    with network.controller(server.control) as controller:
        options = str(controller.msg("GETCONF HiddenServiceOptions")).splitlines()
    assert {
        "HiddenServiceEnableIntroDoSDefense=1",
        "HiddenServiceEnableIntroDoSRatePerSec=2",
        "HiddenServiceEnableIntroDoSBurstPerSec=4",
        "HiddenServicePoWDefensesEnabled=1",
        "HiddenServiceMaxStreams=3",
    } <= set(options)
    await trio.to_thread.run_sync(eventually, lambda: told(network, host), "it to be reached", 60)
    assert await trio.to_thread.run_sync(most_streams, network, host) == 3
    start = trio.current_time()
    share = await flood(circuits(network, host, warm=False))
    assert share * FLOOD <= 3 * (4 + 2 * math.ceil(trio.current_time() - start))


def test_a_client_refuses_a_server_whose_identity_is_not_its_address(
    network: Network, server: OnionServer, client: OnionClient
) -> None:
    """Who publishes another's server under an address of his own signs nothing with its key."""
    port = int(server.address.rpartition(":")[2])
    impostor = publish(network, port, Identity(secrets.token_bytes(32)))
    client.run("init", "--server", impostor, "--no-password", "--words-file", client.words)
    done = client.run("redeem", "-", stdin=server.voucher(100), code=5)
    assert "the server's parameters are signed by another identity" in done.stderr
    assert server.status()["vouchers"]["unspent"] == 1


# -- the first end to end, over Tor --------------------------------------------------------------


def make_files(directory: Path, count: int) -> None:
    draw = random.Random(7)
    for number in range(count):
        path = directory / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(draw.randbytes(draw.choice((0, 10, 900, 3_000, 9_000))))


def set_up(client: OnionClient, server: OnionServer) -> None:
    client.run("init", "--server", server.onion, "--no-password", "--words-file", client.words)
    client.run("redeem", "-", stdin=server.voucher(20_000))


def check_books(client: OnionClient, server: OnionServer, lost: int = 0) -> None:
    """All tokens that the server says are out are in the wallet, but for those lost with one."""
    balance = client.json("balance")
    assert balance["pending"] == 0
    assert server.status()["tokens"]["outstanding"] == balance["held"] + lost


@pytest.fixture
def selling(network: Network, tmp_path: Path) -> Iterator[OnionServer]:
    server = SellingServer(network, tmp_path / "server")
    yield server
    server.stop()


def buy(network: Network, server: OnionServer, client: OnionClient) -> None:
    """By Lightning: order, invoice, voucher, each request on a circuit of its own."""
    before, host = server.status()["tokens"]["issued"], server.onion.removesuffix(f":{PORT}")
    with watching(network, host) as seen:
        said = client.run("buy", "--tokens", str(BOUGHT), "--lightning", "--json").stdout
    bill, bought = map(json.loads, said.splitlines())
    assert (bill["state"], bought["state"], bought["tokens"]) == ("open", "paid", BOUGHT)
    assert server.status()["tokens"]["issued"] == before + BOUGHT
    assert len(seen.circuits) == len(seen.streams) == len(set(seen.logins.values())) >= 3
    assert all(len(used) == 1 for used in seen.streams.values())
    with watching(network, host) as seen:  # the negative control
        trio.run(ask_for_offers, circuits(network, host, warm=False, rng=bytes))
    assert len(seen.circuits) < len(seen.streams)


async def ask_for_offers(way: Circuits) -> None:
    """Twice at once, as `hpkvfs buy` does once."""
    async with way.running(), trio.open_nursery() as nursery:
        line = Line(way, secrets.token_bytes, patience=60)
        for _ in range(2):
            nursery.start_soon(Purchases(NO_JOURNAL, line, secrets.token_bytes).offers)


def test_the_whole_first_end_to_end_goes_through_tor_alone(
    network: Network, selling: OnionServer, client: OnionClient, tmp_path: Path
) -> None:
    source, server = tmp_path / "source", selling
    source.mkdir()
    make_files(source, 300)
    set_up(client, server)
    client.mount()
    buy(network, server, client)
    assert client.json("status")["way"].startswith("over Tor, through the tor that runs here")
    shutil.copytree(source, client.directory, dirs_exist_ok=True, symlinks=True)
    client.umount()
    check_books(client, server)
    lost = client.json("balance")["held"]

    shutil.rmtree(client.state)
    voucher = client.words.with_name("voucher")
    voucher.write_text(server.voucher(20_000))
    client.run(
        "recover", "--server", server.onion, "--seed", client.words, "--no-password",
        "--voucher-file", voucher,
    )  # fmt: skip
    client.mount()
    assert {p: e.content for p, e in tree(client.directory).items() if p != "."} == {
        p: e.content for p, e in tree(source).items() if p != "."
    }
    for number in range(3):
        shutil.rmtree(client.directory / f"d{number}")
    client.umount()
    assert client.json("gc")["deleted"] > 0
    client.fsck()
    check_books(client, server, lost)

    own = {str(client.state / "control"), str(network.control("client")), str(network.socks)}
    assert client.connections() <= own | short(client)
    assert str(network.socks) in client.connections()


def short(client: OnionClient) -> set[str]:
    """Other names of the vault's own control socket, for a path too long for an address."""
    return {one for one in client.connections() if one.startswith("/proc/self/fd/")}


def test_what_watches_the_connections_sees_one_that_is_not_through_tor(
    server: OnionServer, client: OnionClient
) -> None:
    """The negative control. Where there is a namespace, nothing even gets out."""
    arguments = ("init", "--server", server.address, "--no-password", "--words-file", client.words)
    client.run(*arguments)
    voucher = server.voucher(100)
    client.run("redeem", "-", stdin=voucher, code=4 if client.namespace else 0)
    assert server.address in client.connections()


def _is_published(client: OnionClient) -> bool:
    return bool(client.json("status")["unpublished_bytes"] == 0)


def test_a_copy_survives_whatever_happens_to_tor_and_the_server(
    network: Network, server: OnionServer, client: OnionClient, tmp_path: Path
) -> None:
    """Both tors killed, the server killed, a fifth of the connections refused: all gets there
    once."""
    source = tmp_path / "source"
    source.mkdir()
    make_files(source, 120)
    set_up(client, server)
    client.mount("--publish-interval", "0.5")
    saboteur = Saboteur(network, 0.2, seed=3)
    with saboteur.at_work():
        shutil.copytree(source, client.directory / "first")
        eventually(lambda: saboteur.seen > 5, "requests to be sabotaged")
        server.stop()
        (client.directory / "while-the-server-is-down").write_bytes(b"x" * 20_000)
        server.start()
        client.run("sync")
    for name in ("client", "service"):
        network.kill(name)
        (client.directory / f"while-the-{name}s-tor-is-down").write_bytes(b"y" * 20_000)
        network.start(name)
        network.wait_until_up(name)
    later = Saboteur(network, 0.2, seed=4)
    with later.at_work():
        shutil.copytree(source, client.directory / "second")
        eventually(lambda: _is_published(client), "all to be published", 120)
    assert saboteur.closed + later.closed > 0
    written = {p: e.content for p, e in tree(client.directory).items()}
    client.umount()
    check_books(client, server)
    client.fsck()

    lost = client.json("balance")["held"]
    shutil.rmtree(client.state)
    set_up_again = ("--server", server.onion, "--seed", client.words, "--no-password")
    voucher = client.words.with_name("voucher")
    voucher.write_text(server.voucher(5_000))
    client.run("recover", *set_up_again, "--voucher-file", voucher, client.directory)
    client.pid = client.json("status")["pid"]
    assert {p: e.content for p, e in tree(client.directory).items()} == written
    client.umount()
    check_books(client, server, lost)
