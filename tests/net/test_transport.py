"""Exchanges over real sockets of this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from hpkvfs.errors import Unreachable
from hpkvfs.net.transport import NoReply, TcpDialer, exchange
from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE

FRAME = bytes(range(256)) * (REQUEST_SIZE // 256) + bytes(REQUEST_SIZE % 256)

Serve = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[TcpDialer]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield TcpDialer("127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream) -> bytes:
    frame = b""
    while len(frame) < REQUEST_SIZE:
        frame += await stream.receive_some()
    return frame


async def test_one_frame_each_way() -> None:
    received = []

    async def serve(stream: trio.SocketStream) -> None:
        received.append(await receive(stream))
        for at in range(0, REPLY_SIZE, 1_000):
            await stream.send_all(b"r" * min(1_000, REPLY_SIZE - at))

    async with server(serve) as dialer:
        assert await exchange(dialer, FRAME) == b"r" * REPLY_SIZE
    assert received == [FRAME]


async def test_a_name_is_looked_up() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await receive(stream)
        await stream.send_all(bytes(REPLY_SIZE))

    async with server(serve) as dialer:
        named = TcpDialer("localhost", dialer.port)
        assert await exchange(named, FRAME) == bytes(REPLY_SIZE)


@pytest.mark.parametrize("size", [0, 1, REPLY_SIZE - 1])
async def test_a_reply_that_breaks_off(size: int) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await receive(stream)
        await stream.send_all(bytes(size))
        await stream.aclose()

    async with server(serve) as dialer:
        with pytest.raises(NoReply) as caught:
            await exchange(dialer, FRAME)
    assert caught.value.sent


async def test_a_server_that_hangs_up_at_once() -> None:
    async with server(trio.SocketStream.aclose) as dialer:
        with pytest.raises(NoReply) as caught:
            await exchange(dialer, FRAME)
    assert caught.value.sent


async def test_a_server_that_is_silent() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with server(serve) as dialer:
        with pytest.raises(NoReply, match="no answer") as caught:
            await exchange(dialer, FRAME, 0.1)
    assert caught.value.sent


async def test_nobody_listens() -> None:
    async with server(receive) as dialer:  # type: ignore[arg-type]  # it never serves
        pass
    with pytest.raises(Unreachable) as caught:
        await exchange(dialer, FRAME)
    assert isinstance(caught.value, NoReply) and not caught.value.sent
