"""A service that answers any request at once with as many bytes as a reply has: what the
network alone costs. `python -m tests.tor.echo` prints its port."""

from __future__ import annotations

import trio

from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE

REPLY = bytes(REPLY_SIZE)


async def answer(stream: trio.SocketStream) -> None:
    left = REQUEST_SIZE
    while left:
        part = await stream.receive_some(left)
        if not part:
            return
        left -= len(part)
    await stream.send_all(REPLY)


async def main() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=128)
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(answer, listeners)


if __name__ == "__main__":
    trio.run(main)
