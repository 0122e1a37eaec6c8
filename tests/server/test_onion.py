"""What `hpkvd serve --onion` tells and what it asks of tor; tests/tor has it published."""

from __future__ import annotations

import io
import socket
import sys
from pathlib import Path

import pytest
import trio

from hpkvd.commands.serve import _announce_onion
from hpkvfs.tor import process
from tests.server.support import hpkvd

ADDRESS = f"{'a' * 56}.onion:7387"
LINE = f"hpkvd: onion service at {ADDRESS}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_shown_the_address_as_a_qr_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Terminal())
    _announce_onion(ADDRESS)
    assert isinstance(sys.stdout, Terminal)
    first, *code = sys.stdout.getvalue().splitlines(keepends=True)
    assert first == LINE
    assert len(code) > 15 and all(set(line) <= set(" ▄▀█\n") for line in code)
    assert max(map(len, code)) < 80


def test_what_is_no_terminal_is_told_the_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    _announce_onion(ADDRESS)
    assert capsys.readouterr().out == LINE


def test_a_burst_below_the_rate_is_refused_in_one_sentence(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    done = hpkvd("serve", "--onion", "--pow-rate", "9", "--pow-burst", "8", data=data)
    assert done.returncode == 2
    assert "a burst of 8 is less than the 9 of each second" in done.stderr


def test_a_tor_that_can_not_limit_introductions_is_refused_at_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    done = hpkvd("serve", "--onion", "--tor", "9051", "--intro-rate", "9", data=data)
    assert done.returncode == 2
    assert "--intro-rate takes a tor of our own: give --tor own" in done.stderr


@pytest.mark.parametrize("heard", [False, True])
async def test_a_tor_of_our_own_does_not_tell_our_service_manager_that_it_is_ready(
    heard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if heard:  # as without the measure
        monkeypatch.setattr(process, "MANAGER", ())
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        async with (
            trio.open_nursery() as nursery,
            process.owned(tmp_path / "tor", "DisableNetwork 1", nursery) as tor,
        ):
            assert isinstance(tor.control, tuple)
            async with await trio.open_tcp_stream(*tor.control) as control:
                await control.send_all(b"PROTOCOLINFO\r\n")
                assert await control.receive_some()  # it answers, so it has told
        told = b""
        try:
            while True:
                told += manager.recv(1000)
        except BlockingIOError:
            pass
        assert (b"READY=1" in told) is heard
