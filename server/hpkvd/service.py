"""TCP: one request per connection, exactly REQUEST_SIZE bytes in and REPLY_SIZE out.

Connections are bounded in number (more wait in the kernel's queue) and in time, so that idle or
slow ones cost little. Nothing about a connection outlives it. On `stop` nobody new is accepted;
who has not sent a whole request soon after is cut off, and the others are answered.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

from hpkvfs.protocol.codec import REQUEST_SIZE

Answer: TypeAlias = Callable[[bytes], Awaitable[bytes]]

# What accept() fails with when it is we who ran out of something: wait, then go on.
OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
PAUSE_SECONDS: Final = 0.1


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

    async def run(self, listeners: list[trio.SocketListener], stop: trio.Event) -> None:
        """Serve until `stop` is set, then until those being served have their answers."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener, connections)
                await stop.wait()
                accepting.cancel_scope.cancel()
            for listener in listeners:
                await listener.aclose()
            now, patience = trio.current_time(), self._limits.stop_seconds
            connections.cancel_scope.deadline = now + patience
            for scope in self._receiving:
                scope.deadline = min(scope.deadline, now + patience / 10)

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        while True:
            await self._slots.acquire()
            stream = await _accepted(listener)
            connections.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await self._converse(stream)
        except trio.BrokenResourceError:
            pass  # they hung up; a request that was performed can be repeated
        finally:
            self._slots.release()

    async def _converse(self, stream: trio.SocketStream) -> None:
        with trio.move_on_after(self._limits.seconds) as scope:
            self._receiving.add(scope)
            try:
                frame = await _receive(stream)
            finally:
                self._receiving.discard(scope)
        if scope.cancelled_caught or frame is None:
            return
        reply = await self._answer(frame)
        with trio.move_on_after(self._limits.seconds):
            await stream.send_all(reply)


async def _accepted(listener: trio.SocketListener) -> trio.SocketStream:
    while True:
        try:
            return await listener.accept()
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                raise
        await trio.sleep(PAUSE_SECONDS)


async def _receive(stream: trio.SocketStream) -> bytes | None:
    """One request frame; None if the peer stops before it is whole."""
    frame = bytearray()
    while len(frame) < REQUEST_SIZE:
        part = await stream.receive_some(REQUEST_SIZE - len(frame))
        if not part:
            return None
        frame += part
    return bytes(frame)
