"""Connections: one request each, bounded in number and time, and answered before stopping."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from hpkvd.service import Limits, Service
from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE

REQUEST = bytes(range(256)) * (REQUEST_SIZE // 256) + bytes(REQUEST_SIZE % 256)
REPLY = b"r" * REPLY_SIZE


class Running:
    """A service on loopback with a handler that answers when it may."""

    def __init__(self) -> None:
        self.stop = trio.Event()
        self.stopped = trio.Event()
        self.may_answer = trio.Event()
        self.may_answer.set()
        self.asked: list[bytes] = []
        self.port = 0

    async def answer(self, frame: bytes) -> bytes:
        self.asked.append(frame)
        await self.may_answer.wait()
        return REPLY

    async def run(self, limits: Limits, listener: socket.socket) -> None:
        await Service(self.answer, limits).run([listener], self.stop)
        self.stopped.set()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[Running]:
    running = Running()
    listener = socket.create_server(("127.0.0.1", 0))
    running.port = listener.getsockname()[1]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            chosen = Limits(**limits)  # type: ignore[arg-type]  # connections is an int
            nursery.start_soon(running.run, chosen, listener)
            yield running
            running.stop.set()


async def everything(stream: trio.SocketStream) -> bytes:
    return b"".join([part async for part in stream])


async def test_a_request_gets_a_reply_and_the_connection_ends() -> None:
    async with serving() as running, await running.connect() as stream:
        await stream.send_all(REQUEST)
        assert await everything(stream) == REPLY
        assert running.asked == [REQUEST]


async def test_a_request_may_arrive_in_any_pieces() -> None:
    async with serving() as running, await running.connect() as stream:
        for start in range(0, REQUEST_SIZE, 997):
            await stream.send_all(REQUEST[start : start + 997])
            await trio.sleep(0)
        assert await everything(stream) == REPLY
        assert running.asked == [REQUEST]


async def test_a_request_that_is_cut_short_is_not_looked_at() -> None:
    async with serving() as running:
        async with await running.connect() as stream:
            await stream.send_all(REQUEST[:-1])
            await stream.send_eof()
            assert await everything(stream) == b""
        assert running.asked == []


async def test_who_hangs_up_disturbs_nobody() -> None:
    async with serving() as running:
        running.may_answer = trio.Event()
        async with await running.connect() as stream:
            await stream.send_all(REQUEST)
            while not running.asked:
                await trio.sleep(0.001)
        running.may_answer.set()
        async with await running.connect() as stream:
            await stream.send_all(REQUEST)
            assert await everything(stream) == REPLY


async def test_idle_and_slow_connections_are_cut_off() -> None:
    async with serving(seconds=0.1) as running:
        async with await running.connect() as idle, await running.connect() as slow:
            await slow.send_all(REQUEST[:100])
            assert await everything(idle) == b""
            assert await everything(slow) == b""
        assert running.asked == []


async def test_who_does_not_read_his_reply_holds_up_nobody() -> None:
    async with serving(seconds=0.1, connections=1) as running, await running.connect() as deaf:
        await deaf.send_all(REQUEST)
        async with await running.connect() as stream:
            await stream.send_all(REQUEST)
            assert await everything(stream) == REPLY


async def test_connections_beyond_the_limit_wait_their_turn() -> None:
    async with serving(connections=2) as running:
        running.may_answer = trio.Event()
        streams = [await running.connect() for _ in range(5)]
        for stream in streams:
            await stream.send_all(REQUEST)
        await trio.sleep(0.05)
        assert len(running.asked) == 2
        running.may_answer.set()
        for stream in streams:
            assert await everything(stream) == REPLY
            await stream.aclose()


async def test_stopping_answers_who_has_asked_and_cuts_off_who_has_not() -> None:
    async with serving(stop_seconds=1) as running:
        running.may_answer = trio.Event()
        async with await running.connect() as asked, await running.connect() as idle:
            await asked.send_all(REQUEST)
            while not running.asked:
                await trio.sleep(0.001)
            running.stop.set()
            assert await everything(idle) == b""
            assert not running.stopped.is_set()
            running.may_answer.set()
            assert await everything(asked) == REPLY
        await running.stopped.wait()


async def test_stopping_does_not_wait_for_ever() -> None:
    async with serving(stop_seconds=0.1) as running:
        running.may_answer = trio.Event()
        async with await running.connect() as stream:
            await stream.send_all(REQUEST)
            running.stop.set()
            await running.stopped.wait()
