"""What became of requests that were cut short.

A request that was refused, or never answered, is *resolved* before its inputs are used again: a
reissue of the same inputs is asked for, which is free. The server performs one of the two, ever,
and the answer to the reissue tells which, with the credentials that belong to it. So no token is
lost, it becomes known whether the operation happened, and no two operations ever show the same
serials, which would betray that one client made both.

What has no inputs is asked for again as it was. What is of an epoch that has ended is found out
about elsewhere (net/ended.py).
"""

from __future__ import annotations

from hpkvfs.errors import Refusal, StoreError, Unreachable
from hpkvfs.net.ended import Ended, LookUp
from hpkvfs.net.order import Answer
from hpkvfs.net.tender import Tender
from hpkvfs.net.till import Till
from hpkvfs.protocol import codec
from hpkvfs.protocol.messages import ReissueRequest
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Pending, split


class Resolver:
    """Settles pendings that nobody deals with."""

    def __init__(self, till: Till, tender: Tender, look_up: LookUp) -> None:
        """`look_up`: see Ended."""
        self._till = till
        self._wallet = till.wallet
        self._tender = tender
        self._ended = Ended(till, tender, look_up)
        self._stuck: set[int] = set()

    def stranded(self) -> list[Pending]:
        """Pendings that nobody drives and that are not stuck, oldest first."""
        return [one for one in self._till.undriven() if one.number not in self._stuck]

    def unstick(self) -> None:
        """Let stuck pendings be tried once more."""
        self._stuck.clear()

    async def any_stranded(self) -> None:
        """Return when there is something to resolve."""
        while not self.stranded():
            await self._till.left_pending()

    async def resolve(self, pending: Pending) -> Answer | None:
        """Settle a stranded pending: find out which of its attempts was performed.

        None: its epoch has ended, and its operation was not performed, or nobody can tell; or
        somebody else has settled it meanwhile. Unreachable leaves it stranded; any other error
        leaves it stuck until `unstick`.
        """
        try:
            return await self._tender.surviving(lambda: self._resolve(pending.number))
        except Unreachable:
            raise
        except StoreError:
            self._stuck.add(pending.number)
            raise

    async def resolve_like(self, operation: Operation, memo: bytes) -> None:
        """Have an earlier call of the same operation and memo resolved, if there is one."""
        while memo and (pending := self._find(operation, memo)) is not None:
            if self._till.is_driven(pending.number):
                await self._till.change()
            else:
                await self.resolve(pending)

    async def resolve_purchase(self, memo: bytes) -> None:
        """As `resolve_like`; VoucherSpent, once, if what was bought turned out to have expired.

        Also when that was found out in the background, where nobody is told.
        """
        try:
            await self.resolve_like(Operation.ISSUE, memo)
        finally:
            in_vain = self._ended.forget_vain(memo)
        if in_vain is not None:
            raise in_vain

    def _find(self, operation: Operation, memo: bytes) -> Pending | None:
        for one in self._wallet.pending.values():
            if one.memo == memo and one.attempts[0].operation is operation:
                return one
        return None

    async def _resolve(self, number: int) -> Answer | None:
        while self._till.is_driven(number):
            await self._till.change()  # somebody else has taken it up meanwhile
        pending = self._wallet.pending.get(number)
        if pending is None:
            return None
        if self._tender.epochs.has_ended(pending.epoch):
            return await self._ended.find_out(pending)
        if pending.inputs and len(pending.attempts) == 1:
            return await self._resolve_by_reissue(pending)
        return await self._repeat(pending)

    async def _resolve_by_reissue(self, pending: Pending) -> Answer:
        with self._till.driving(pending):
            epoch = await self._tender.epochs.get(pending.epoch)
            amounts = split(pending.amount, epoch.tariff.insert)
            request = ReissueRequest(epoch.digest, 2)
            attempt = self._till.prove(epoch, request, pending.inputs, amounts)
            pending = self._wallet.retry(pending, attempt)
            await self._till.journal.begin(pending)
            return await self._till.answer(pending, codec.REQUEST.wrap(attempt.body))

    async def _repeat(self, pending: Pending) -> Answer:
        with self._till.driving(pending):
            await self._till.journal.flush()
            if len(pending.attempts) == 2 and not pending.inputs:
                return await self._ended.repeat_voucher(pending)
            try:
                body = pending.attempts[-1].body
                return await self._till.answer(pending, codec.REQUEST.wrap(body))
            except Refusal as refused:
                self._till.give_up(pending, refused)
                raise
