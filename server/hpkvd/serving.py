"""One process that answers: the listeners, the handler, the ledger's writer, from start to drain.

It runs alone (`hpkvd serve --workers 0`) or as one of several workers under supervisor.py; they
share the listening sockets, so a connection that waits in the kernel is taken by whoever has
time, and outlives the death of any of them.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from hpkvd.service import Limits, Service

# So many new objects before Python looks for cycles among them, instead of 700: nearly all that a
# request makes is gone without.
GARBAGE: Final = 20_000


class Handles(Protocol):
    """What answers: handler.Handler."""

    async def answer(self, frame: bytes) -> bytes:
        """One reply's frame for one request's."""
        ...

    async def keep_time(self) -> None:
        """What is due by the hour; until cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def bind(address: Address) -> list[socket.socket]:
    """Listening sockets for an address, one for each family it has; OSError."""
    found = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, where in dict.fromkeys(found):
            one = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(where)
            one.listen(socket.SOMAXCONN)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket of its owner alone, in the place of one left over; OSError.

    EADDRINUSE when what is there is another server's, or no socket.
    """
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            path.unlink()
        one.bind(str(path))
        path.chmod(0o600)
        one.listen(socket.SOMAXCONN)
    except OSError:
        one.close()
        raise
    return one


def _is_left_over(path: Path) -> bool:
    """Whether there is something, which is a socket that nobody listens on; OSError."""
    if not os.path.lexists(path):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        if path.is_socket() and caller.connect_ex(str(path)) == errno.ECONNREFUSED:
            return True
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def name(listening: socket.socket) -> str:
    """The address of a listening socket; for a Unix socket, its path."""
    if listening.family == socket.AF_UNIX:
        return os.fsdecode(listening.getsockname())
    host, port, *_ = listening.getsockname()
    return str(Address(host, port))


async def answer(
    sockets: Sequence[socket.socket],
    handler: Handles,
    limits: Limits,
    stop: trio.Event,
    ready: Callable[[], None],
) -> None:
    """Answer on these sockets until `stop`, then finish what was asked. They are closed then."""
    async with trio.open_nursery() as clockwork:
        clockwork.start_soon(handler.keep_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Service(handler.answer, limits).run, sockets, stop)
            gc.freeze()  # what lives as long as the server is not worth looking at again
            gc.set_threshold(GARBAGE)
            ready()
        clockwork.cancel_scope.cancel()
