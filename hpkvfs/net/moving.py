"""When tokens move into the newest epoch, so that the moment tells nothing.

Each pair of credentials waits for a time of its own, exponential: it does not matter when the
epoch was noticed or how often this was interrupted, nor does the size of the pool show. Only what
is about to be lost, or is wanted at once, goes in a hurry, and then with random pauses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import log
from operator import itemgetter
from typing import Final

import trio

from hpkvfs.errors import StoreError
from hpkvfs.net.tender import Tender
from hpkvfs.protocol.epoch import EpochParameters


@dataclass(frozen=True, slots=True)
class Pace:
    """Mean seconds, each time drawn at random: between questions for new epochs; until each of the
    connections asks that compare what they are told; until a pair of
    tokens moves into the newest epoch, from the one before and from older ones; between looks for
    such pairs; between two that move in a hurry."""

    notice: float = 6 * 3_600.0
    apart: float = 300.0
    move: float = 3_600.0
    move_late: float = 300.0
    look: float = 60.0
    pause: float = 0.5


PACE: Final = Pace()


class Mover:
    """Notices new epochs and moves tokens into them."""

    def __init__(
        self, tender: Tender, slots: trio.Semaphore, pace: Pace, rng: Callable[[int], bytes]
    ) -> None:
        """`slots`: one is taken for each request."""
        self._tender = tender
        self._slots = slots
        self._pace = pace
        self._rng = rng

    async def notice_in_time(self) -> None:
        """Ask for the epochs now and then, until cancelled; what differs from before is raised by
        whoever pays."""
        while True:
            await trio.sleep(self._random_time(self._pace.notice))
            with suppress(StoreError):
                await self._tender.refresh(lambda: self._random_time(self._pace.apart))

    async def move_in_time(self) -> None:
        """Each pair of an older epoch leaves it at a random time of its own; until cancelled."""
        while True:
            pairs = self._pairs_behind()
            if not pairs:
                await trio.sleep(self._random_time(self._pace.look))
                continue
            number = await self._next_to_move(pairs)
            with suppress(StoreError):
                await self._move_one(number)

    async def move_late(self) -> None:
        """Move what is left in epochs that may end soon; StoreError."""
        await self._move([one for one in self._tender.behind() if self._tender.is_late(one)])

    async def move_all(self) -> None:
        """Move everything; StoreError."""
        await self._move(self._tender.behind())

    async def _next_to_move(self, pairs: list[tuple[EpochParameters, float]]) -> EpochParameters:
        """Sleep until the first of the pairs moves: each has a mean time of its own."""
        times = [(self._random_time(mean), epoch) for epoch, mean in pairs]
        time, epoch = min(times, key=itemgetter(0))
        await trio.sleep(time)
        return epoch

    def _pairs_behind(self) -> list[tuple[EpochParameters, float]]:
        """For each pair of credentials of an older epoch, the epoch and its mean time to move.

        An epoch that two have followed may end at the next one: its tokens are in a hurry.
        """
        pairs: list[tuple[EpochParameters, float]] = []
        for epoch in self._tender.behind():
            mean = self._pace.move_late if self._tender.is_late(epoch) else self._pace.move
            pairs += [(epoch, mean)] * -(-self._tender.left_behind(epoch) // 2)
        return pairs

    async def _move(self, epochs: Sequence[EpochParameters]) -> None:
        for epoch in epochs:
            while await self._move_one(epoch):
                await trio.sleep(self._random_time(self._pace.pause))

    async def _move_one(self, epoch: EpochParameters) -> bool:
        async with self._slots:
            return await self._tender.move(epoch)

    def _random_time(self, mean: float) -> float:
        """Exponential, in seconds."""
        uniform = (int.from_bytes(self._rng(8), "big") + 1) / 2**64
        return -mean * log(uniform)
