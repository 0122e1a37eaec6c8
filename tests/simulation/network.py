"""Everything that can happen to a frame between a client and its server, chosen by chance."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import trio
from trio.abc import Stream

from tests.simulation.points import Point, Side

Deliver = Callable[[bytes], Awaitable[bytes | None]]
"""To a server: its reply, or None if it is not there or dies first."""


@dataclass
class Weather:
    """How bad the network is: chances of each fault for each exchange, and delays in seconds."""

    refuse: float = 0.0  # no connection
    lose_request: float = 0.0
    lose_reply: float = 0.0
    break_reply: float = 0.0  # half of it comes
    duplicate: float = 0.0  # the request comes once more, later, by itself
    hang: float = 0.0  # what was lost is noticed by its silence only
    delay: float = 0.05

    @classmethod
    def draw(cls, chance: random.Random) -> Weather:
        """Fine for some seeds, and in others any faults at any rate."""
        rates = [0.0, 0.0, 0.02, 0.1, 0.3]
        if chance.random() < 0.25:
            return cls()
        faults = cls(*(chance.choice(rates) for _ in range(5)))
        return replace(faults, hang=chance.random(), delay=chance.choice([0.01, 0.1, 1.0, 4.0]))


FINE = Weather()


class Network:
    """Carries frames; `weather` is what it does to them. Couriers outlive who sent them.

    `swallows`: whether this reply to this frame of that side is lost, whatever the weather.
    """

    def __init__(
        self,
        chance: random.Random,
        nursery: trio.Nursery,
        deliver: Deliver,
        tell: Callable[[str, bytes], None],
    ) -> None:
        self.weather = FINE
        self.swallows: Callable[[bytes, bytes, Side], bool] = lambda frame, reply, side: False
        self._chance = chance
        self._nursery = nursery
        self._deliver = deliver
        self._tell = tell

    def dialer(self, side: Side) -> SimulatedDialer:
        """A side's way to the server."""
        return SimulatedDialer(self, side)

    def happens(self, chance: float) -> bool:
        """Whether something of this chance happens now."""
        return self._chance.random() < chance

    def pause(self) -> float:
        """Seconds that the next frame takes."""
        return self._chance.expovariate(1 / self.weather.delay)

    def send(self, frame: bytes, connection: Connection) -> None:
        """Take a frame on its way."""
        self._tell("sent", frame)
        self._nursery.start_soon(self._carry, frame, connection)
        if self.happens(self.weather.duplicate):
            self._nursery.start_soon(self._carry_again, frame)

    async def _carry_again(self, frame: bytes) -> None:
        await trio.sleep(self._chance.choice([0.0, 0.1, 5.0, 60.0]) + self.pause())
        self._tell("again", frame)
        await self._deliver(frame)

    async def _carry(self, frame: bytes, connection: Connection) -> None:
        weather = self.weather
        await trio.sleep(self.pause())
        reply = None
        if not self.happens(weather.lose_request):
            reply = await self._deliver(frame)
            if reply is not None and self.swallows(frame, reply, connection.side):
                return
            await trio.sleep(self.pause())
            if self.happens(weather.lose_reply):
                reply = None
        if reply is not None and self.happens(weather.break_reply):
            reply = reply[: len(reply) // 2]
        if reply is None and self.happens(weather.hang):
            return
        connection.answered(reply or b"")


class SimulatedDialer:
    """See transport.Dialer."""

    def __init__(self, network: Network, side: Side) -> None:
        self._network = network
        self._side = side

    async def dial(self) -> Stream:
        """A connection for one exchange; OSError when there is none."""
        self._side.check()
        await trio.lowlevel.checkpoint()
        if self._network.happens(self._network.weather.refuse):
            raise OSError("no route")
        return Connection(self._network, self._side)


class Connection(Stream):
    """One exchange."""

    def __init__(self, network: Network, side: Side) -> None:
        self._network = network
        self.side = side
        self._reply = b""
        self._came = trio.Event()
        self._told = False

    def answered(self, reply: bytes) -> None:
        """The reply, all of it that comes, is here."""
        self._reply = reply
        self._came.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio.abc.SendStream."""
        self.side.at(Point.SEND_BEFORE)
        await trio.lowlevel.checkpoint()
        self.side.check()
        self._network.send(bytes(data), self)
        self.side.at(Point.SEND_AFTER)

    async def wait_send_all_might_not_block(self) -> None:
        """See trio.abc.SendStream."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio.abc.ReceiveStream."""
        await self._came.wait()
        if not self._told:
            self._told = True
            self.side.at(Point.REPLY_CAME)
        part, self._reply = self._reply[:max_bytes], self._reply[max_bytes:]
        return part

    async def aclose(self) -> None:
        """See trio.abc.AsyncResource."""
        await trio.lowlevel.checkpoint()
