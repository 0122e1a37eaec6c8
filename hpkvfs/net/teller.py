"""Paid requests: out of one wallet, in whichever epoch can pay, whatever that takes.

    order --> which epoch pays --> two credentials of it --> the till --> answer
                                                               |
                                        refused or unanswered: resolved, before anything else

Invariants:
  - a request presents credentials of one epoch only, the oldest that can pay, since that one ends
    first; a refund goes to the newest;
  - what a request presented is used again only when it is resolved (net/resolving.py);
  - an operation with a memo happens once, however often it is called, in this process or a later
    one.
"""

from __future__ import annotations

from typing import Final

from hpkvfs.errors import EmptyWallet, Refusal, StoreError
from hpkvfs.net.order import Answer, Make, Order
from hpkvfs.net.refusals import UnknownEpoch
from hpkvfs.net.resolving import Resolver
from hpkvfs.net.tender import Tender
from hpkvfs.net.till import Till
from hpkvfs.protocol import codec
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import LookUpRequest
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Pending, Selection


class Teller:
    """Pays for requests; the number of calls at a time is its caller's."""

    def __init__(self, till: Till, tender: Tender, pool_size: int) -> None:
        """`pool_size`: how many credentials to have when many calls want some at once."""
        self.resolver: Final = Resolver(till, tender, self.look_up)
        self._till = till
        self._wallet = till.wallet
        self._tender = tender
        self._pool_size = pool_size

    async def pay(self, order: Order) -> Answer:
        """Perform an operation that takes two credentials, whatever that takes.

        EmptyWallet, a Refusal (nothing was spent), Misbehaviour, Unreachable (it is pending
        unless `sent` is false), VaultError.
        """

        async def pay() -> Answer:
            return await self.pay_in(order, await self._paying_epoch(order.operation))

        return await self._tender.surviving(pay)

    async def pay_once(self, order: Order) -> None:
        """As `pay`, unless an earlier call with its memo, also of an earlier process, did it.

        Raises what resolving that may raise, too.
        """

        async def once() -> None:
            await self.resolver.resolve_like(order.operation, order.memo)
            if not self._till.journal.has_receipt(order.operation, order.memo):
                await self.pay_in(order, await self._paying_epoch(order.operation))

        await self._tender.surviving(once)

    async def look_up(self, key: bytes) -> bytes | None:
        """The blob under a key; as `pay`."""
        order = Order(Operation.LOOK_UP, lambda epoch: LookUpRequest(epoch, key))
        return (await self.pay(order)).value

    async def pay_in(self, order: Order, epoch: EpochParameters) -> Answer:
        """As `pay`, out of one epoch's tokens; UnknownEpoch when it has ended."""
        selection = await self._select(epoch, epoch.tariff.delta(order.operation))
        pending, frame = await self._till.begin_elsewhere(epoch, selection, order)
        try:
            return await self._till.perform(pending, frame)
        except Refusal as refused:
            if isinstance(refused, UnknownEpoch):
                await self._tender.refresh()
            answer = await self._resolved_at_once(pending)
            if answer is None or answer.attempt is not pending.attempts[0]:
                raise
            if order.operation is Operation.LOOK_UP:
                raise  # it was performed after all, but what it found is not told twice
            return answer

    async def buy(self, make: Make, amount: int, memo: bytes) -> None:
        """Exchange what `make` pays with for credentials, unless that was begun and ends well now.

        A Refusal leaves nothing behind.
        """
        self._till.bought.discard(memo)  # what was over before this call does not count

        async def buy() -> None:
            await self.resolver.resolve_purchase(memo)
            if memo not in self._till.bought:
                epoch = await self._tender.newest()
                attempt = self._till.prove_purchase(epoch, make(epoch.digest), amount)
                pending = self._wallet.begin(epoch.digest, (), attempt, memo)
                await self._till.perform(pending, codec.REQUEST.wrap(attempt.body))

        await self._tender.surviving(buy)

    async def _resolved_at_once(self, pending: Pending) -> Answer | None:
        """Resolve what was refused; None if that fails, which leaves it to be done later."""
        try:
            return await self.resolver.resolve(pending)
        except StoreError:
            return None

    # Which credentials pay.

    async def _paying_epoch(self, operation: Operation) -> EpochParameters:
        """The oldest epoch with tokens enough, since that one ends first; else the newest.

        A refund goes to the newest. When no epoch has enough alone, the newest is given what the
        others have, since a request presents credentials of one epoch only.
        """
        newest = await self._tender.newest()
        if newest.tariff.delta(operation) >= 0:
            return newest
        live = self._tender.epochs.live
        for can_pay in (self._has, self._may_come_to_have):
            for epoch in live:
                if can_pay(epoch, -epoch.tariff.delta(operation)):
                    return epoch
        cost = -newest.tariff.delta(operation)
        for reserved in (False, True):
            if len(live) > 1 and not self._has(newest, cost) and self._wallet.balance.total >= cost:
                await self._tender.gather(live[:-1], reserved=reserved)
        return newest

    def _has(self, epoch: EpochParameters, cost: int) -> bool:
        return self._wallet.worth(epoch.digest) >= max(1, cost)

    def _may_come_to_have(self, epoch: EpochParameters, cost: int) -> bool:
        return self._wallet.could_pay(epoch.digest, max(1, cost))

    async def _select(self, epoch: EpochParameters, delta: int) -> Selection:
        bare = self._wallet.count(epoch.digest) < 2 and not self._wallet.could_pay(epoch.digest, 0)
        if delta >= 0 and bare:
            await self._till.grow(epoch)  # two of no value are enough to have a refund
        while True:
            selection = self._wallet.select(epoch.digest, delta, epoch.tariff.insert)
            if selection is None:
                await self._wait_for_more(epoch)
            elif selection.merges:
                await self._till.reissue(epoch, selection)
            else:
                return selection

    async def _wait_for_more(self, epoch: EpochParameters) -> None:
        """Return when there may be other credentials to select from, doing what can be done."""
        stranded = [one for one in self.resolver.stranded() if one.epoch == epoch.digest]
        if stranded:
            await self.resolver.resolve(stranded[0])
        elif not self._till.is_busy(epoch.digest):
            raise EmptyWallet(
                "the wallet's tokens are in requests that cannot be settled",
                "run again when the server has recovered, or redeem a voucher",
            )
        elif self._wallet.size < self._pool_size:
            await self._till.grow(epoch)
        else:
            await self._till.change()
