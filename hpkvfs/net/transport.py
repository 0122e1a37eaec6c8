"""One request, one connection, one reply: the way to the server.

A connection carries one frame each way and is closed, so that nothing but timing relates two
requests. Frames all have one size, hence a reply is read without looking into it, and a reply
that breaks off is a reply that never came.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import trio
from trio.abc import Stream

from hpkvfs.errors import Unreachable
from hpkvfs.protocol.codec import REPLY_SIZE

EXCHANGE_SECONDS: Final = 10.0


class NoReply(Unreachable):
    """An exchange without a reply; `sent` tells whether the server can have seen the request."""

    def __init__(self, message: str, hint: str = "", *, sent: bool) -> None:
        super().__init__(message, hint)
        self.sent = sent


class Dialer(Protocol):
    """A way to the server."""

    async def dial(self) -> Stream:
        """A new connection, used for one exchange; OSError or Unreachable when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class TcpDialer:
    """A plain TCP connection: for tests, and for servers on the same machine."""

    host: str
    port: int

    async def dial(self) -> Stream:
        """See Dialer.dial."""
        family = _numeric_family(self.host)
        if family is None:
            return await trio.open_tcp_stream(self.host, self.port)
        # Without the name look-up in a thread, which costs more than the rest of an exchange.
        connection = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await connection.connect((self.host, self.port))
        except BaseException:
            connection.close()
            raise
        return trio.SocketStream(connection)


async def exchange(dialer: Dialer, frame: bytes, seconds: float = EXCHANGE_SECONDS) -> bytes:
    """Send a request's frame on a new connection and return the REPLY_SIZE bytes of its reply.

    NoReply when the server cannot be reached, breaks off, or takes longer than `seconds`.
    """
    sent = False
    try:
        with trio.fail_after(seconds):
            stream = await dialer.dial()
            try:
                sent = True
                await stream.send_all(frame)
                return await _read(stream, REPLY_SIZE)
            finally:
                await stream.aclose()
    except (OSError, trio.BrokenResourceError) as error:
        raise NoReply(f"the server cannot be reached: {error}", _HINT, sent=sent) from error
    except trio.TooSlowError as error:
        raise NoReply(f"no answer in {seconds:g} seconds", _HINT, sent=sent) from error
    except Unreachable as error:
        raise NoReply(error.message, error.hint, sent=sent) from error


_HINT: Final = "nothing is lost; it will be tried again"


async def _read(stream: Stream, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = await stream.receive_some(size - len(parts))
        if not part:
            raise OSError("the connection was closed before the whole answer came")
        parts += part
    return bytes(parts)


@lru_cache(maxsize=16)
def _numeric_family(host: str) -> socket.AddressFamily | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return socket.AF_INET if version == 4 else socket.AF_INET6
