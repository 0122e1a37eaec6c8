"""Which of our tokens the server takes: moved into its newest epoch, written off with an ended one.

Invariants:
  - nothing is written off because of a refusal, only because a list that is signed and the same
    to all witnesses no longer has its epoch (net/epochs.py);
  - no caller hears of an epoch's end who can pay from another: `surviving` calls again there;
  - what is reserved stays where it is until the breakglass entry that has it is replaced, or its
    epoch may end soon.

When something moves is decided elsewhere (net/moving.py), and that is what a server sees of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from hpkvfs.net.epochs import Apart, Epochs
from hpkvfs.net.order import Order
from hpkvfs.net.refusals import UnknownEpoch
from hpkvfs.net.reserve import Reserve
from hpkvfs.net.till import Till
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import ReissueRequest
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Held

T = TypeVar("T")


class Tender:
    """A wallet's tokens by epoch."""

    def __init__(self, till: Till, epochs: Epochs, reserve: Reserve) -> None:
        self.epochs: Final = epochs
        self._till = till
        self._wallet = till.wallet
        self._reserve = reserve

    async def newest(self) -> EpochParameters:
        """The epoch that the server issues in; what is held of ended ones is written off."""
        newest = await self.epochs.newest()
        self._write_off_ended()
        return newest

    async def refresh(self, apart: Apart | None = None) -> None:
        """Ask which epochs there are (see Epochs.refresh), and write off what is held of ended
        ones."""
        await self.epochs.refresh(apart)
        self._write_off_ended()

    async def surviving(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns; it is called again when epochs ended that it relied on.

        UnknownEpoch is raised only while the server lists what it refuses, which is a lie.
        """
        while True:
            told = self.epochs.digests
            try:
                return await call()
            except UnknownEpoch:
                if self.epochs.digests == told:
                    await self.refresh()
                if self.epochs.digests == told:
                    raise

    def behind(self) -> list[EpochParameters]:
        """The live epochs but the newest of which something is to be moved, oldest first."""
        return [one for one in self.epochs.live[:-1] if self.left_behind(one)]

    def left_behind(self, epoch: EpochParameters) -> int:
        """How many credentials of an older epoch are to be moved."""
        reserved = self._wallet.count_reserved(epoch.digest) if self.is_late(epoch) else 0
        return self._wallet.count(epoch.digest) + reserved

    def is_late(self, epoch: EpochParameters) -> bool:
        """Whether it may end when the next one begins."""
        return self.epochs.live[-1].number - epoch.number >= 2

    async def move(self, epoch: EpochParameters) -> bool:
        """Reissue two credentials of an epoch in the newest; False if there are none to move.

        The statement names both epochs: what is presented is of one, what is issued of the other.
        """
        return await self.surviving(lambda: self._move(epoch))

    async def gather(self, older: Sequence[EpochParameters], *, reserved: bool) -> None:
        """Move all that older epochs have, at once, for a request that no epoch can pay alone."""
        for epoch in older:
            if reserved:
                self._reserve.release(epoch)
            while await self.move(epoch):
                pass

    async def _move(self, epoch: EpochParameters) -> bool:
        newest = await self.newest()
        if self.epochs.has_ended(epoch.digest):
            return False
        if self.is_late(epoch):
            self._reserve.release(epoch)
        if not self._wallet.worth(epoch.digest):
            self._let_go(self._wallet.discard(epoch.digest))  # they are not worth a request
            return False
        if self._wallet.count(epoch.digest) == 1 and not self._wallet.could_pay(epoch.digest, 0):
            await self._till.grow(epoch)
        selection = self._wallet.select_any(epoch.digest, newest.tariff.insert)
        if selection is None:
            return False
        into = newest.digest
        order = Order(Operation.REISSUE, lambda digest: ReissueRequest(digest, 2, into))
        await self._till.perform(*self._till.begin(epoch, selection, order, newest))
        return True

    def _write_off_ended(self) -> None:
        """What is held of an epoch that ended is worth nothing; what is pending has yet to be
        found out (net/ended.py)."""
        for digest in self._wallet.epochs:
            if self.epochs.has_ended(digest):
                self._expire(digest)

    def _expire(self, digest: bytes) -> None:
        self._let_go(self._wallet.expire(digest))

    def _let_go(self, held: Sequence[Held]) -> None:
        if held:
            self._till.journal.expire(held, self._wallet.book)
