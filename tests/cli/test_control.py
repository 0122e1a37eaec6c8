"""The socket of a mounting process: what other programs can do to it."""

from __future__ import annotations

import json
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from hpkvfs import commands, control
from hpkvfs.commands import Arguments, Commands, Result
from hpkvfs.control import Progress
from hpkvfs.errors import EmptyWallet, HpkvError


class Double(Commands):
    """Commands without a session."""

    def __init__(self) -> None:
        super().__init__(None, str)  # type: ignore[arg-type]  # none of these needs a session
        self._free = {"count": self._count, "fail": self._fail, "crash": self._crash}
        self._in_turn = {"group": self._group}

    async def _count(self, arguments: Arguments, progress: Progress) -> Result:
        for done in range(arguments["to"]):
            progress(done + 1, arguments["to"])
            await trio.sleep(0.001)
        return {"counted": arguments["to"]}

    async def _fail(self, arguments: Arguments, progress: Progress) -> Result:
        raise EmptyWallet("no tokens", "redeem a voucher")

    async def _group(self, arguments: Arguments, progress: Progress) -> Result:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fail, arguments, progress)
        return {}

    async def _crash(self, arguments: Arguments, progress: Progress) -> Result:
        raise KeyError("a secret that must not get out")


class Serving:
    """The server's half on a thread of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        listener = commands.listen(self._path)
        self._ready.set()
        await commands.serve(listener, Double(), self._stop)

    def __enter__(self) -> None:
        self._thread.start()
        self._ready.wait(10)

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()


def ask(
    path: Path, name: str, progress: Progress = control.no_progress, **arguments: Any
) -> Result:
    connection = control.reach(path)
    assert connection is not None
    with connection:
        return control.ask(connection, name, arguments, progress)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Longer than a socket's address may be."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    return deep / "control"


def test_results_and_progress_come_back(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Serving(path):
        result = ask(path, "count", lambda done, total: seen.append((done, total)), to=20)
    assert result == {"counted": 20}
    assert seen == sorted(seen) and seen[-1][1] == 20


def test_errors_come_back_as_they_were(path: Path) -> None:
    with Serving(path):
        for name in ("fail", "group"):
            with pytest.raises(HpkvError) as caught:
                ask(path, name)
            error = caught.value
            assert (error.message, error.hint) == ("no tokens", "redeem a voucher")
            assert error.exit_code == EmptyWallet.exit_code
        with pytest.raises(HpkvError, match="there is no command 'none'"):
            ask(path, "none")


def test_a_bug_is_told_without_its_details(path: Path) -> None:
    with Serving(path), pytest.raises(HpkvError) as caught:
        ask(path, "crash")
    assert "secret" not in caught.value.message + caught.value.hint


def test_only_its_user_can_open_the_socket(path: Path) -> None:
    with Serving(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("nonsense", [b"\n", b"{}\n", b"[]\n", b'"x"\n', b"\xff\xfe\n", b"nothing"])
def test_nonsense_is_refused_and_does_no_harm(path: Path, nonsense: bytes) -> None:
    with Serving(path):
        connection = control.reach(path)
        assert connection is not None
        with connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            reply = json.loads(connection.makefile("rb").read())
        assert reply["error"]["exit_code"] == 2
        assert ask(path, "count", to=1) == {"counted": 1}


def test_who_hangs_up_stops_nothing(path: Path) -> None:
    with Serving(path):
        connection = control.reach(path)
        assert connection is not None
        connection.sendall(control.encode({"command": "count", "arguments": {"to": 500}}))
        connection.close()
        assert ask(path, "count", to=1) == {"counted": 1}


def test_a_socket_that_was_left_behind_is_nobody(path: Path) -> None:
    assert control.reach(path) is None
    with socket.socket(socket.AF_UNIX) as left, control.short_path(path) as short:
        left.bind(short)
    assert control.reach(path) is None
    with Serving(path):
        assert ask(path, "count", to=1) == {"counted": 1}
