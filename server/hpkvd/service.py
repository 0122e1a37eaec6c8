"""TCP: one request per connection, exactly REQUEST_SIZE bytes in and REPLY_SIZE out.

Connections are bounded in number (more wait in the kernel's queue) and in time, so that idle or
slow ones cost little. Nothing about a connection outlives it. On `stop` nobody new is accepted;
who has not sent a whole request soon after is cut off, and the others are answered.

A connection lives for one exchange, so its cost counts: plain sockets, a try before each wait,
and no cancel scope around what does not wait. (trio's streams take four times as long.)
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio
from trio.lowlevel import checkpoint, wait_readable, wait_writable

from hpkvfs.protocol.codec import REQUEST_SIZE

Answer: TypeAlias = Callable[[bytes], Awaitable[bytes]]

# What accept() fails with when it is we who ran out of something: wait, then go on.
OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# And with when it is they: they are gone already, or the network is (accept(2)).
GONE: Final = (
    errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT,
    errno.EHOSTDOWN, errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH,
    errno.ETIMEDOUT,
)  # fmt: skip
PAUSE_SECONDS: Final = 0.1
# Accepted one after the other before anything else is done: enough for their requests to share a
# commit, and not so many that another worker has nothing to do. Half as many as there are here
# already, within these bounds.
BURST: Final = range(8, 33)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of each process: connections at a time, requests in work at a time; seconds for a request
    to arrive, and for a reply to leave.

    Connections beyond the first limit wait; requests beyond the second are refused as busy.
    """

    connections: int = 512
    queue: int = 256
    seconds: float = 60.0
    stop_seconds: float = 10.0


class Service:
    """Answers whoever connects, until it is told to stop."""

    def __init__(self, answer: Answer, limits: Limits) -> None:
        self._answer = answer
        self._limits = limits
        self._slots = trio.Semaphore(limits.connections)
        self._receiving: set[trio.CancelScope] = set()

    async def run(self, listeners: Sequence[socket.socket], stop: trio.Event) -> None:
        """Serve until `stop` is set, then until those being served have their answers."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    listener.setblocking(False)
                    accepting.start_soon(self._accept, listener, connections)
                await stop.wait()
                accepting.cancel_scope.cancel()
            for listener in listeners:
                listener.close()
            now, patience = trio.current_time(), self._limits.stop_seconds
            connections.cancel_scope.deadline = now + patience
            for scope in self._receiving:
                scope.deadline = min(scope.deadline, now + patience / 10)

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
        while True:
            await checkpoint()
            for _ in range(self._burst):
                await self._slot()
                connection = await _accepted(listener)
                connections.start_soon(self._serve, connection)

    @property
    def _burst(self) -> int:
        here = self._limits.connections - self._slots.value
        return min(max(here // 2, BURST[0]), BURST[-1])

    async def _slot(self) -> None:
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()

    async def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                await self._converse(connection)
        except OSError:
            pass  # they hung up; a request that was performed can be repeated
        finally:
            self._slots.release()

    async def _converse(self, connection: socket.socket) -> None:
        frame = _received(connection)
        if len(frame) < REQUEST_SIZE:
            frame = await self._whole(connection, frame)
        if not frame:
            return
        reply = await self._answer(frame)
        sent = _send(connection, reply)
        if sent < len(reply):
            with trio.move_on_after(self._limits.seconds):
                await _send_rest(connection, memoryview(reply)[sent:])

    async def _whole(self, connection: socket.socket, begun: bytes) -> bytes:
        """A request of which so much is here; empty if they stop, or take too long."""
        with trio.move_on_after(self._limits.seconds) as scope:
            self._receiving.add(scope)
            try:
                return await _receive_rest(connection, begun)
            finally:
                self._receiving.discard(scope)
        return b""


async def _accepted(listener: socket.socket) -> socket.socket:
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            await wait_readable(listener)
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                await trio.sleep(PAUSE_SECONDS)
            elif error.errno not in GONE:
                raise
        else:
            connection.setblocking(False)
            return connection


def _received(connection: socket.socket) -> bytes:
    """What is here of a request without waiting; all of it, as a rule."""
    try:
        return connection.recv(REQUEST_SIZE)
    except BlockingIOError:
        return b""


async def _receive_rest(connection: socket.socket, begun: bytes) -> bytes:
    """A whole request frame; empty if the peer stops before that."""
    frame = bytearray(begun)
    while len(frame) < REQUEST_SIZE:
        await wait_readable(connection)
        try:
            part = connection.recv(REQUEST_SIZE - len(frame))
        except BlockingIOError:
            continue
        if not part:
            return b""
        frame += part
    return bytes(frame)


def _send(connection: socket.socket, part: bytes | memoryview) -> int:
    """How much the kernel takes without waiting; a whole reply, as a rule."""
    try:
        return connection.send(part)
    except BlockingIOError:
        return 0


async def _send_rest(connection: socket.socket, rest: memoryview) -> None:
    while rest:
        await wait_writable(connection)
        rest = rest[_send(connection, rest) :]
