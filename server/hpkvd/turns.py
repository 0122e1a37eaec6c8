"""Turns at what keeps the processor busy, so that the loop gets to other things in between.

Proofs take over a millisecond each and nobody else runs meanwhile. If all that came together were
verified in one go, they would also be committed and answered together, their clients would come
back together, and of two sides one would always wait for the other. One at a time, a request is on
its way to the disk while the next one's proof is verified, and so on along the whole way.

But each look at the network, and each commit, costs something. In a crowd there is always enough
to do, and nobody waits for a turn.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final

import trio

CROWD: Final = 24
"""So many that wait are a crowd."""


class Turns:
    """`async with turns:` around work that does not wait for anything. First come, first served,
    but for a crowd, which goes on at once."""

    def __init__(self) -> None:
        self._working = 0
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def crowd(self) -> int:
        """So many are at it or wait, if they are a crowd; else 0."""
        here = self._working + len(self._waiting)
        return here if here >= CROWD else 0

    async def __aenter__(self) -> None:
        if len(self._waiting) >= CROWD:
            self._working += 1
        elif self._working:
            await self._waiting.park()  # counted by who wakes it
        else:
            self._working = 1
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._working -= 1
        if not self._working:
            waiting = len(self._waiting)
            next_ones = self._waiting.unpark(count=waiting if waiting >= CROWD else 1)
            self._working = len(next_ones)
