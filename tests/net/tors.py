"""Stand-ins for tor: a control port that says what it is told to, and a SOCKS port that connects,
or does not, when the test says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

UP = 'NOTICE BOOTSTRAP PROGRESS=100 TAG=done SUMMARY="Done"'
_GREETING = '250-PROTOCOLINFO 1\r\n250-AUTH METHODS=NULL\r\n250-VERSION Tor="{}"\r\n250 OK\r\n'


@dataclass
class ControlPort:
    """A tor's control port (control-spec): answers with `info`, `conf`, and what `refuse` has for
    the beginning of a command."""

    version: str = "0.4.9.11"
    info: dict[str, str] = field(default_factory=dict)
    conf: dict[str, list[str]] = field(default_factory=dict)
    refuse: dict[str, str] = field(default_factory=dict)
    heard: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.info |= {"version": self.version, "status/bootstrap-phase": UP}
        self.info |= {"net/listeners/socks": ""}

    @asynccontextmanager
    async def at(self, path: Path) -> AsyncIterator[Path]:
        """Serve on a Unix socket while the block runs."""
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(str(path))
        listening.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._talk, [trio.SocketListener(listening)])
            yield path
            nursery.cancel_scope.cancel()

    async def _talk(self, stream: trio.SocketStream) -> None:
        rest = b""
        async for part in stream:
            *lines, rest = (rest + part).split(b"\r\n")
            for line in lines:
                self.heard.append(line.decode())
                await stream.send_all(self._answer(line.decode()).encode())

    def _answer(self, line: str) -> str:
        for beginning, answer in self.refuse.items():
            if line.startswith(beginning):
                return f"{answer}\r\n"
        match line.split():
            case ["PROTOCOLINFO", *_]:
                return _GREETING.format(self.version)
            case ["GETINFO", *names]:
                said = "".join(f"250-{name}={self.info[name]}\r\n" for name in names)
                return f"{said}250 OK\r\n"
            case ["GETCONF", *names]:
                found = [f"{name}={one}" for name in names for one in self.conf.get(name, [])]
                found += [name for name in names if name not in self.conf]
                return "".join(f"250-{one}\r\n" for one in found[:-1]) + f"250 {found[-1]}\r\n"
        return "250 OK\r\n"


@dataclass
class Socks:
    """A Tor (tor.Tor) whose SOCKS port connects after `takes` seconds, or never while it `holds`;
    what comes through it is echoed. `asked` has the user name of each CONNECT."""

    takes: float = 0.1
    holds: bool = False
    failures: int = 0
    """So many coming CONNECTs are refused."""
    phase: str = "connected to the Tor network"
    owned_pid: int | None = None
    asked: list[str] = field(default_factory=list)
    heard: bytearray = field(default_factory=bytearray)
    open: int = 0
    most_open: int = 0
    let_go: trio.Event = field(default_factory=trio.Event)
    nursery: trio.Nursery | None = None

    async def socks(self) -> Path:
        return Path("/nonexistent")

    def expect(self, username: str) -> None: ...

    async def idle(self) -> None: ...

    async def connect(self, _: object) -> trio.SocketStream:
        """In place of circuits._connect."""
        ours, theirs = trio.socket.socketpair()
        assert self.nursery is not None
        self.nursery.start_soon(self._serve, trio.SocketStream(theirs))
        return trio.SocketStream(ours)

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async with stream:
                await _read(stream, 3)
                await stream.send_all(b"\5\2")
                _, size = await _read(stream, 2)
                self.asked.append((await _read(stream, size)).decode())
                await _read(stream, (await _read(stream, 1))[0])
                await stream.send_all(b"\1\0")
                await _read(stream, (await _read(stream, 5))[4] + 2)
                await trio.sleep(self.takes)
                if self.holds:
                    await self.let_go.wait()
                fails, self.failures = self.failures > 0, max(0, self.failures - 1)
                await stream.send_all((b"\5\4" if fails else b"\5\0") + b"\0\1" + bytes(6))
                if fails:
                    return
                async for part in stream:
                    self.heard += part
                    await stream.send_all(part)
        except (trio.BrokenResourceError, EOFError):
            pass
        finally:
            self.open -= 1


async def _read(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.receive_some(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data
