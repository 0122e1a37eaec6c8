"""The way to an onion service: each request on a Tor circuit of its own.

tor puts streams with different SOCKS logins on different circuits (IsolateSOCKSAuth), so a fresh
random login gives a connection its own rendezvous circuit and its own introduction circuit:
the server sees nothing that two of them have in common. No login is used twice, and a circuit
is closed when its stream is.

    dial:  ready connection -> one being made -> a new one, with optimistic data

Building a circuit takes longer than a request. So connections are made ahead, as many as the
observed rate of requests uses up while one is built (Little's law, twice for good measure),
and each is used once. Those that nobody takes are closed at random times; with no requests for
a while there are none. Where none is ready, the request is sent right behind SOCKS CONNECT,
before tor has a circuit, which saves a round trip; whoever reads then meets the answer to
CONNECT first. At most MAX_PENDING are being built at a time: more slow each other down.

Failures are not retried here: net/line.py sends the same frame again, and gets another circuit.
"""

from __future__ import annotations

import math
import select
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio
from trio.abc import Stream

from hpkvfs import tor
from hpkvfs.address import Address
from hpkvfs.errors import Unreachable, UserError
from hpkvfs.net.transport import NOTHING_LOST, connect_tcp
from hpkvfs.tor import Endpoint, Tor, TorError

MAX_PENDING: Final = 32
MAX_READY: Final = 16
RATE_SECONDS: Final = 2.0
"""The rate of requests is that of so many last seconds ..."""
WARM_SECONDS: Final = 15.0
"""... and one connection is kept ready for so long after a request."""
AGES: Final = (15.0, 45.0)
"""Seconds until a ready connection is closed: drawn from here, below the server's minute."""
TOR_SECONDS: Final = 20.0
"""How long to wait for a tor that is starting, since it last got on."""
PROBE_SECONDS: Final = 30.0
PATIENCE_SECONDS: Final = 120.0
WIND_UP_SECONDS: Final = 0.5

_LOGIN: Final = 16
_VERSION, _PASSWORD_METHOD, _CONNECT, _NAME = 5, 2, 1, 3
_REFUSALS: Final = {
    1: "no circuit to it could be made",
    4: "it cannot be found: it is down, or its address is wrong",
    5: "it refused the connection",
    6: "no circuit to it could be made in time",
}


@dataclass(frozen=True, slots=True)
class TorSettings:
    """Which tor: see tor.running. `tell` is told what the user should see while it starts."""

    where: Endpoint | str
    data: Path
    password: str | None = field(default=None, repr=False)
    more: str = ""
    tell: Callable[[str], None] = lambda phase: None

    @classmethod
    def parse(
        cls, where: str, data: Path, password: str | None, tell: Callable[[str], None]
    ) -> TorSettings:
        """From what the user says; with `data`/torrc, if there is one. UserError."""
        try:
            found = tor.parse_where(where)
        except ValueError as error:
            raise UserError(
                str(error), "write auto, own, a control port, or the path of a control socket"
            ) from None
        try:
            more = tor.further_settings(data)
        except TorError as error:
            raise UserError(error.message, error.hint) from None
        return cls(found, data, password, more, tell)


class Circuits:
    """A transport.Way to one onion service."""

    patience = PATIENCE_SECONDS

    def __init__(
        self,
        address: Address,
        settings: TorSettings,
        rng: Callable[[int], bytes],
        *,
        warm: bool = True,
    ) -> None:
        """`warm`: whether to make connections ahead."""
        self._address = address
        self._settings = settings
        self._rng = rng
        self._max_ready = MAX_READY if warm else 0
        self._pending = trio.CapacityLimiter(MAX_PENDING)
        self._starting = trio.Lock()
        self._ready: deque[_Ready] = deque()
        self._waiters: deque[_Waiter] = deque()
        self._warming = 0
        self._rate = _Rate()
        self._build_seconds = 0.1
        self._beneath: trio.Nursery | None = None
        self._nursery: trio.Nursery | None = None
        self._tor: Tor | None = None

    # -- transport.Way -----------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Connections can be made while the block runs; tor is found or started when needed."""
        async with trio.open_nursery() as beneath:
            self._beneath = beneath
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._close_aged)
                    try:
                        yield
                    finally:
                        nursery.cancel_scope.cancel()
            finally:
                await self._wind_up()
                beneath.cancel_scope.cancel()

    async def _wind_up(self) -> None:
        """Close what was made ahead, and its circuits."""
        self._nursery = None
        while self._ready:
            self._ready.popleft().stream.close()
        used, self._tor = self._tor, None
        if used is not None:
            with trio.move_on_after(WIND_UP_SECONDS) as scope:
                scope.shield = True
                await used.idle()

    async def dial(self) -> Stream:
        """A connection on a circuit that nothing else uses; Unreachable, OSError."""
        self._rate.note(trio.current_time())
        stream = self._take()
        waits = stream is None and self._warming > len(self._waiters)
        waiter = self._wait_for_one() if waits else None
        self._refill()
        if stream is None and waiter is not None:
            stream = await self._handed_over(waiter)
        return stream or await self._open()

    async def probe(self) -> None:
        """Return when there is a connection to the server, kept ready; Unreachable."""
        await self._socks()
        try:
            with trio.fail_after(PROBE_SECONDS):
                stream = await self._connected()
        except trio.TooSlowError:
            raise Unreachable(
                f"no answer over Tor in {PROBE_SECONDS:g} seconds", _IS_IT_THERE
            ) from None
        except OSError as error:
            raise Unreachable(
                f"the server cannot be reached over Tor: {error}", _IS_IT_THERE
            ) from None
        self._keep(stream)

    def describe(self) -> str:
        """How the server is reached, for people."""
        if self._tor is None:
            return "over Tor"
        whose = "a tor of our own" if self._tor.owned_pid else "the tor that runs here"
        return f"over Tor, through {whose}: {self._tor.phase}"

    # -- making connections --------------------------------------------------------------------

    async def _open(self) -> _Connection:
        """Ask for a new connection; the answer is still to come."""
        socks = await self._socks()
        assert self._tor is not None
        username, password = (self._rng(_LOGIN).hex() for _ in range(2))
        borrower = object()
        await self._pending.acquire_on_behalf_of(borrower)
        try:
            plain = await _connect(socks)
        except BaseException:
            self._pending.release_on_behalf_of(borrower)
            raise
        stream = _Connection(plain, lambda: self._pending.release_on_behalf_of(borrower))
        try:
            self._tor.expect(username)
            await stream.ask(username, password, self._address)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _connected(self) -> _Connection:
        """A new connection that the server has accepted."""
        start = trio.current_time()
        stream = await self._open()
        try:
            await stream.established()
        except BaseException:
            stream.close()
            raise
        took = trio.current_time() - start
        self._build_seconds += (took - self._build_seconds) / 8
        return stream

    async def _socks(self) -> Endpoint:
        """tor's SOCKS port; waits for a tor that starts, as long as it gets on."""
        used = await self._running_tor()
        phase = ""
        try:
            while phase != used.phase:
                phase = used.phase
                with trio.move_on_after(TOR_SECONDS):
                    return await used.socks()
        except TorError as error:
            raise Unreachable(error.message, error.hint or NOTHING_LOST) from None
        raise Unreachable(phase, "it goes on; try again in a moment")

    async def _running_tor(self) -> Tor:
        """Found or started once, when first needed."""
        async with self._starting:
            if self._tor is None:
                assert self._beneath is not None, "not running"
                self._tor = await self._beneath.start(self._keep_tor)
            return self._tor

    async def _keep_tor(self, task_status: trio.TaskStatus[Tor]) -> None:
        of = self._settings
        async with tor.running(
            of.where, of.data, password=of.password, more=of.more, tell=of.tell
        ) as found:
            task_status.started(found)
            await trio.sleep_forever()

    # -- connections made ahead ----------------------------------------------------------------

    @property
    def ready(self) -> int:
        """How many connections are ready."""
        return len(self._ready)

    @property
    def making(self) -> int:
        """How many connections are being made ahead."""
        return self._warming

    def _take(self) -> Stream | None:
        """The oldest ready connection that is still one."""
        while self._ready:
            stream = self._ready.popleft().stream
            if not stream.is_dead:
                return stream
            stream.close()
        return None

    def _wait_for_one(self) -> _Waiter:
        waiter = _Waiter()
        self._waiters.append(waiter)
        return waiter

    async def _handed_over(self, waiter: _Waiter) -> Stream | None:
        """A connection that was being made; None when that failed."""
        try:
            await waiter.event.wait()
        except BaseException:
            if waiter.stream is not None:
                self._keep(waiter.stream)
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise
        return waiter.stream

    def _refill(self) -> None:
        """Start making what is lacking."""
        assert self._nursery is not None, "not running"
        idle = len(self._ready) + self._warming - len(self._waiters)
        for _ in range(self._target() - idle):
            self._warming += 1
            self._nursery.start_soon(self._warm)

    def _target(self) -> int:
        rate, recent = self._rate.at(trio.current_time())
        wanted = math.ceil(2 * rate * self._build_seconds)
        return min(max(wanted, int(recent)), self._max_ready)

    async def _warm(self) -> None:
        stream: _Connection | None = None
        try:
            with trio.move_on_after(PROBE_SECONDS):
                stream = await self._connected()
        except (Unreachable, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # who waits for it asks for one himself, and is told why there is none
        finally:
            self._warming -= 1
            if stream is None and self._waiters:
                self._waiters.popleft().event.set()
        if stream is not None:
            self._keep(stream)

    def _keep(self, stream: _Connection) -> None:
        """To the first who waits, or else ready for the next request."""
        if self._waiters:
            waiter = self._waiters.popleft()
            waiter.stream = stream
            waiter.event.set()
            return
        low, high = AGES
        age = low + (high - low) * int.from_bytes(self._rng(4), "big") / 2**32
        self._ready.append(_Ready(stream, trio.current_time() + age))

    async def _close_aged(self) -> None:
        while True:
            await trio.sleep(1)
            now = trio.current_time()
            for ready in [one for one in self._ready if one.until <= now or one.stream.is_dead]:
                self._ready.remove(ready)
                ready.stream.close()


_IS_IT_THERE: Final = "is it running, and is this its address? nothing is lost; try again later"


@dataclass(frozen=True, slots=True)
class _Ready:
    stream: _Connection
    until: float


@dataclass(slots=True, eq=False)
class _Waiter:
    event: trio.Event = field(default_factory=trio.Event)
    stream: _Connection | None = None


class _Rate:
    """How many requests there were lately."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def note(self, now: float) -> None:
        self._times.append(now)

    def at(self, now: float) -> tuple[float, bool]:
        """Requests a second, and whether there was any in the last WARM_SECONDS."""
        while self._times and self._times[0] < now - WARM_SECONDS:
            self._times.popleft()
        lately = 0
        for time in reversed(self._times):
            if time < now - RATE_SECONDS:
                break
            lately += 1
        return lately / RATE_SECONDS, bool(self._times)


async def _connect(endpoint: Endpoint) -> trio.SocketStream:
    if isinstance(endpoint, Path):
        return await trio.open_unix_socket(str(endpoint))
    return await connect_tcp(*endpoint)


class _Connection(Stream):
    """A stream through tor's SOCKS port (RFC 1928, RFC 1929, tor's socks-extensions).

    It can be written to as soon as CONNECT is asked for; reading waits for its answer.
    """

    def __init__(self, plain: trio.SocketStream, settled: Callable[[], None]) -> None:
        """`settled` is called once, when CONNECT was answered or will not be any more."""
        self._plain = plain
        self._settled: Callable[[], None] | None = settled
        self._rest = b""

    async def ask(self, username: str, password: str, address: Address) -> None:
        """Log in and ask for the connection. Each message waits for the answer to the last:
        tor 0.4.9 does not take them in one go."""
        await self._plain.send_all(bytes([_VERSION, 1, _PASSWORD_METHOD]))
        await self._expect(bytes([_VERSION, _PASSWORD_METHOD]))
        login = b"".join(bytes([len(one)]) + one.encode() for one in (username, password))
        await self._plain.send_all(b"\1" + login)
        await self._expect(b"\1\0")
        host = address.host.encode()
        head = bytes([_VERSION, _CONNECT, 0, _NAME, len(host)])
        await self._plain.send_all(head + host + address.port.to_bytes(2, "big"))

    async def established(self) -> None:
        """Return when the server has accepted; Unreachable, OSError."""
        if self._settled is None:
            return
        try:
            head = await self._read(4)
            await self._read({1: 6, 4: 18}.get(head[3], 6))
        finally:
            self._settle()
        if head[1]:
            why = _REFUSALS.get(head[1], f"tor says no (SOCKS {head[1]})")
            raise OSError(why)

    @property
    def is_dead(self) -> bool:
        """Whether the other end is gone: it never speaks first, so there is nothing to read."""
        poll = select.poll()
        poll.register(self._plain.socket.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._plain.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._plain.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await self.established()
        if self._rest:
            part, self._rest = self._rest[:max_bytes], self._rest[len(self._rest[:max_bytes]) :]
            return part
        return await self._plain.receive_some(max_bytes)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """As aclose, which has nothing to wait for."""
        self._settle()
        self._plain.socket.close()

    def _settle(self) -> None:
        settled, self._settled = self._settled, None
        if settled is not None:
            settled()

    async def _expect(self, answer: bytes) -> None:
        if await self._read(len(answer)) != answer:
            raise OSError("tor's SOCKS port does not let us in")

    async def _read(self, size: int) -> bytes:
        while len(self._rest) < size:
            part = await self._plain.receive_some(4096)
            if not part:
                raise OSError("tor closed the connection")
            self._rest += part
        answer, self._rest = self._rest[:size], self._rest[size:]
        return answer
