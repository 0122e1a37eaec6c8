"""Proofs, made where they hold nobody up.

Two to three milliseconds of CPU go into the proofs of each request, most of them Python under
the interpreter's lock: a second thread would only take turns with the one that answers the
kernel. So a mounted vault has helper processes for them, which yield the processor to whoever
else wants it. What they compute are functions of their arguments and fresh randomness; wallet
and journal stay where they are, and a helper that dies loses nothing: its request is worked out
here instead.

    mount --socketpair--> python -P -m hpkvfs.net.proving

    frame    u32 length || msgpack
    request  [issuer, epoch, operation, context, delta, [credential, ...], [amount, amount], into]
             or [issuer, secrets, issued]: to prepare a request, or to finish it
    reply    [request, secrets] or [credential, credential], bytes all; or ["why not"]

`issuer` and `into` are encoded IssuerParameters; credentials and `secrets` are encoded as
protocol/credential.py does it.

Invariants
  - secrets come and go through the socket alone; a helper leaves no core and can't be traced by
    others of this user, as the process that started it;
  - a helper serves one request at a time and ends when the socket does, however its owner ended.
"""

from __future__ import annotations

import logging
import os
import secrets as randomness
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, Protocol

import msgpack
import trio

from hpkvfs.guard import guard_memory
from hpkvfs.protocol.credential import Credential, Draft, IssuerParameters, Statement, prepare
from hpkvfs.protocol.errors import BadIssuance, ProtocolError
from hpkvfs.protocol.tariff import Operation

log = logging.getLogger(__name__)

MOST_HELPERS: Final = 4
NICENESS: Final = 10
MOST_STARTS: Final = 32
END_SECONDS: Final = 2.0
_LENGTH: Final = struct.Struct(">I")


class Prover(Protocol):
    """Makes requests' proofs, and checks replies'."""

    async def prepare(
        self,
        issuer: IssuerParameters,
        statement: Statement,
        presented: Sequence[Credential],
        amounts: tuple[int, int],
        into: IssuerParameters | None = None,
    ) -> Draft:
        """As credential.prepare; ValueError, BadIssuance."""
        ...

    async def finish(
        self, issuer: IssuerParameters, draft: Draft, issued: bytes
    ) -> tuple[Credential, Credential]:
        """As draft.finish; ProtocolError."""
        ...


class Here:
    """A Prover that does it on this thread, a request's at a time.

    In between, what is ready goes out: were all proofs made that can be, their requests would
    leave, be answered and come back together, and client and server take turns at waiting.
    """

    def __init__(self, rng: Callable[[int], bytes]) -> None:
        self._rng = rng
        self._turn = trio.Lock()

    async def prepare(
        self,
        issuer: IssuerParameters,
        statement: Statement,
        presented: Sequence[Credential],
        amounts: tuple[int, int],
        into: IssuerParameters | None = None,
    ) -> Draft:
        """See Prover.prepare."""
        async with self._turn:
            return self.prepared(issuer, statement, presented, amounts, into)

    def prepared(
        self,
        issuer: IssuerParameters,
        statement: Statement,
        presented: Sequence[Credential],
        amounts: tuple[int, int],
        into: IssuerParameters | None = None,
    ) -> Draft:
        """The same at once, for callers that let nobody in between."""
        return prepare(issuer, statement, presented, amounts, self._rng, into)

    async def finish(
        self, issuer: IssuerParameters, draft: Draft, issued: bytes
    ) -> tuple[Credential, Credential]:
        """See Prover.finish."""
        return draft.finish(issuer, issued)


class Helpers:
    """A Prover that has processes of its own do it, started when they are first needed."""

    def __init__(self, here: Here, count: int) -> None:
        """`here` stands in when there are none; `count`: how many there may be at a time."""
        self._here = here
        self._idle: list[_Helper] = []
        self._turns = trio.Semaphore(count)
        self._starts = 0
        self._closed = False

    async def prepare(
        self,
        issuer: IssuerParameters,
        statement: Statement,
        presented: Sequence[Credential],
        amounts: tuple[int, int],
        into: IssuerParameters | None = None,
    ) -> Draft:
        """See Prover.prepare."""
        reply = await self._ask(
            [
                issuer.encoded,
                statement.epoch,
                statement.operation.value,
                statement.context,
                statement.delta,
                [one.encode() for one in presented],
                list(amounts),
                into.encoded if into else b"",
            ]
        )
        if len(reply) != 2:
            return await self._here.prepare(issuer, statement, presented, amounts, into)
        return Draft.decode(reply[1], reply[0])

    async def finish(
        self, issuer: IssuerParameters, draft: Draft, issued: bytes
    ) -> tuple[Credential, Credential]:
        """See Prover.finish."""
        reply = await self._ask([issuer.encoded, draft.encode(), issued])
        if len(reply) != 2:
            return await self._here.finish(issuer, draft, issued)
        return Credential.decode(reply[0]), Credential.decode(reply[1])

    async def _ask(self, message: list[Any]) -> list[Any]:
        """A helper's reply; another than two things when it failed: then it is done here, which
        raises what is to be raised."""
        with trio.CancelScope(shield=True):  # it is soon done, and half an exchange is none
            await self._turns.acquire()
            try:
                reply = await self._exchange(message)
            finally:
                self._turns.release()
        return reply

    async def _exchange(self, message: list[Any]) -> list[Any]:
        helper = self._idle.pop() if self._idle else self._start()
        if helper is None:
            return []
        try:
            reply = await helper.ask(message)
        except (OSError, trio.BrokenResourceError, ValueError):
            log.warning("a helper process ended; its work is done here")
            helper.close()
            return []
        except BaseException:
            helper.close()
            raise
        if self._closed:
            helper.close()
        else:
            self._idle.append(helper)
        return reply

    def _start(self) -> _Helper | None:
        if self._closed or self._starts >= MOST_STARTS:
            return None
        self._starts += 1
        try:
            return _Helper()
        except OSError as error:
            log.warning("no helper process can be started: %s", error.strerror)
            return None

    def close(self) -> None:
        """End them."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class _Helper:
    """One process, and this end of its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "hpkvfs.net.proving"],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                )
        except BaseException:
            ours.close()
            raise
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def ask(self, message: list[Any]) -> list[Any]:
        """Its reply; OSError, BrokenResourceError or ValueError when there is none."""
        body = msgpack.packb(message)
        await self._stream.send_all(_LENGTH.pack(len(body)) + body)
        (length,) = _LENGTH.unpack(await self._receive(_LENGTH.size))
        reply = msgpack.unpackb(await self._receive(length))
        if not isinstance(reply, list):
            raise ValueError("not a reply")
        return reply

    async def _receive(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = await self._stream.receive_some(size - len(parts))
            if not part:
                raise OSError("it ended")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        """End it."""
        self._stream.socket.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def helpers_here() -> int:
    """How many helpers suit this machine: one processor is for whoever is waiting."""
    return max(1, min(MOST_HELPERS, len(os.sched_getaffinity(0)) - 1))


# The helper's side.


def serve(connection: socket.socket) -> None:
    """Answer until the other side closes."""
    with connection, connection.makefile("rb") as requests:
        while len(head := requests.read(_LENGTH.size)) == _LENGTH.size:
            body = requests.read(_LENGTH.unpack(head)[0])
            reply = msgpack.packb(_answer(msgpack.unpackb(body)))
            connection.sendall(_LENGTH.pack(len(reply)) + reply)


def _answer(message: list[Any]) -> list[Any]:
    try:
        return _finish(*message) if len(message) == 3 else _prepare(*message)
    except (ProtocolError, BadIssuance, ValueError) as error:
        return [str(error)]


def _prepare(
    issuer: bytes,
    epoch: bytes,
    operation: int,
    context: bytes,
    delta: int,
    presented: list[bytes],
    amounts: list[int],
    into: bytes,
) -> list[Any]:
    draft = prepare(
        _issuer(issuer),
        Statement(epoch, Operation(operation), context, delta),
        list(map(Credential.decode, presented)),
        (amounts[0], amounts[1]),
        randomness.token_bytes,
        _issuer(into) if into else None,
    )
    return [draft.request, draft.encode()]


def _finish(issuer: bytes, secrets: bytes, issued: bytes) -> list[Any]:
    return [one.encode() for one in Draft.decode(secrets).finish(_issuer(issuer), issued)]


@lru_cache(maxsize=8)
def _issuer(encoded: bytes) -> IssuerParameters:
    return IssuerParameters.decode(encoded)


def main() -> None:
    """Serve the socket that is standard input."""
    guard_memory()
    os.nice(NICENESS)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # its owner ends it
    with suppress(ConnectionError):
        serve(socket.socket(fileno=os.dup(0)))


if __name__ == "__main__":
    main()
