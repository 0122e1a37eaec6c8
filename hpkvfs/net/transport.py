"""One request, one connection, one reply: the way to the server.

A connection carries one frame each way and is closed, so that nothing but timing relates two
requests. Frames all have one size, hence a reply is read without looking into it, and a reply
that breaks off is a reply that never came.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import trio
from trio.abc import Stream

from hpkvfs.errors import Unreachable
from hpkvfs.protocol.codec import REPLY_SIZE

EXCHANGE_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 20.0
PROBE_SECONDS: Final = 5.0
NOTHING_LOST: Final = "nothing is lost; it will be tried again"
_IS_IT_THERE: Final = "is it running? nothing is lost; try again later"


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


class Way(Dialer, Protocol):
    """A way to the server as a whole vault uses it."""

    @property
    def patience(self) -> float:
        """Seconds after which to give a request up, when nobody says."""
        ...

    def running(self) -> AbstractAsyncContextManager[None]:
        """What makes connections runs in the background of this block; dial inside it only."""
        ...

    async def probe(self) -> None:
        """Return if the server can be reached; Unreachable, sooner than a request would."""
        ...

    def describe(self) -> str:
        """How the server is reached, for people."""
        ...


@dataclass(frozen=True, slots=True)
class TcpDialer:
    """A Way of plain TCP connections: for tests, and for servers on the same machine."""

    host: str
    port: int

    @property
    def patience(self) -> float:
        """See Way.patience."""
        return PATIENCE_SECONDS

    async def dial(self) -> Stream:
        """See Dialer.dial."""
        return await connect_tcp(self.host, self.port)

    def running(self) -> AbstractAsyncContextManager[None]:
        """See Way.running."""
        return nullcontext()

    async def probe(self) -> None:
        """See Way.probe."""
        try:
            with trio.fail_after(PROBE_SECONDS):
                await trio.aclose_forcefully(await self.dial())
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise Unreachable(f"the server cannot be reached: {reason}", _IS_IT_THERE) from None
        except trio.TooSlowError:
            raise Unreachable(f"no answer in {PROBE_SECONDS:g} seconds", _IS_IT_THERE) from None

    def describe(self) -> str:
        """See Way.describe."""
        return "directly"


async def connect_tcp(host: str, port: int) -> trio.SocketStream:
    """A TCP connection; OSError."""
    family = _numeric_family(host)
    if family is None:
        return await trio.open_tcp_stream(host, port)
    # Without the name look-up in a thread, which costs more than the rest of an exchange.
    connection = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await connection.connect((host, port))
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
        raise NoReply(f"the server cannot be reached: {error}", NOTHING_LOST, sent=sent) from error
    except trio.TooSlowError as error:
        raise NoReply(f"no answer in {seconds:g} seconds", NOTHING_LOST, sent=sent) from error
    except Unreachable as error:
        raise NoReply(error.message, error.hint, sent=sent) from error


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
