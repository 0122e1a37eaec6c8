"""What became of requests that were cut short, and whose epoch then ended.

Nobody performs such a request any more, nor answers it. It stays pending until something else has
told what became of it, which then is final, and one commit of the journal takes it out with the
books and, if what it asked for is so, a receipt: a crash before that finds it again and asks again.

    insertion, deletion    whether its blob is there: looked up, and paid anew; one that is not may
                           never have been, or be deleted: then nobody can tell what was performed
    move                   the same frame, as long as the epoch lives that it went to
    voucher                redeemed anew in the newest epoch; spent if the first time was performed
    anything else          nothing; what it presented is lost either way
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from hpkvfs.errors import Refusal
from hpkvfs.net.order import Answer
from hpkvfs.net.refusals import EpochEnded, VoucherSpent
from hpkvfs.net.tender import Tender
from hpkvfs.net.till import Till
from hpkvfs.protocol import codec
from hpkvfs.protocol.messages import IssueRequest, decode_request
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Pending

log = logging.getLogger(__name__)

KEY_BYTES: Final = 33

LookUp = Callable[[bytes], Awaitable[bytes | None]]


class Ended:
    """Finds out about pendings of epochs that have ended."""

    def __init__(self, till: Till, tender: Tender, look_up: LookUp) -> None:
        """`look_up`: the blob under a key, paid for; whatever that may raise, `find_out` does."""
        self._till = till
        self._wallet = till.wallet
        self._tender = tender
        self._look_up = look_up
        self._in_vain: dict[bytes, int] = {}

    async def find_out(self, pending: Pending) -> Answer | None:
        """Conclude a pending; the answer if what it asked for is so."""
        first = pending.attempts[0]
        with self._till.driving(pending):
            if first.operation is Operation.ISSUE:
                return await self._redeem_again(pending)
            if first.into and first.body and not self._tender.epochs.has_ended(first.into):
                return await self._ask_where_it_went(pending)
            if not pending.place:
                self._lose(pending, done=False)
                return None
            is_there = await self._is_there(pending)
            done = is_there == (first.operation is Operation.INSERT)
            if is_there:
                self._conclude(pending, performed=done)
            else:  # it may never have been, or been deleted, and by another of the vault's clients
                self._lose(pending, done=done)
            return Answer(first) if done else None

    async def _is_there(self, pending: Pending) -> bool:
        """Whether the server has the blob that was to be stored or to be deleted."""
        key, digest = pending.place[:KEY_BYTES], pending.place[KEY_BYTES:]
        blob = await self._look_up(key)
        return blob is not None and hashlib.sha256(blob).digest() == digest

    async def _ask_where_it_went(self, pending: Pending) -> Answer | None:
        """What was moved out of the epoch in time is on record as long as where it was moved to."""
        first = pending.attempts[0]
        try:
            return await self._till.answer(pending, codec.REQUEST.wrap(first.body), first)
        except EpochEnded:
            self._conclude(pending, performed=False)
            return None

    # Vouchers.

    async def _redeem_again(self, pending: Pending) -> Answer:
        """Redeem a voucher in the newest epoch; VoucherSpent if the first time it was performed.

        What it was worth then is lost: the server has forgotten what became of the credentials of
        that epoch, so it could not tell who has not got them from who has spent them.
        """
        request = decode_request(codec.REQUEST.wrap(pending.attempts[-1].body))
        assert isinstance(request, IssueRequest)
        epoch = await self._tender.newest()
        again = replace(request, epoch=epoch.digest)
        attempt = self._till.prove_purchase(epoch, again, request.amount)
        pending = self._wallet.renew(pending, epoch.digest, attempt)
        await self._till.journal.begin(pending)
        return await self.repeat_voucher(pending)

    async def repeat_voucher(self, pending: Pending) -> Answer:
        """Ask once more for what `find_out` asked for, for who drives it; it is a pending of its
        own epoch by then."""
        attempt = pending.attempts[-1]
        try:
            return await self._till.answer(pending, codec.REQUEST.wrap(attempt.body), attempt)
        except VoucherSpent as refused:
            amount = pending.attempts[0].delta
            self._in_vain[pending.memo] = amount
            self._conclude(pending, performed=True)
            raise _redeemed_in_vain(amount) from refused
        except Refusal as refused:
            self._till.give_up(pending, refused)
            raise

    def forget_vain(self, memo: bytes) -> VoucherSpent | None:
        """What to tell whoever redeems the voucher of this memo, if it was found out that its
        tokens expired; once."""
        amount = self._in_vain.pop(memo, 0)
        return _redeemed_in_vain(amount) if amount else None

    # The books.

    def _conclude(self, pending: Pending, *, performed: bool) -> None:
        before = self._wallet.book.expired
        self._wallet.conclude(pending, performed=performed)
        self._till.journal.conclude(pending, self._wallet.book, done=performed)
        _tell_loss(self._wallet.book.expired - before)

    def _lose(self, pending: Pending, *, done: bool) -> None:
        """`done`: what was asked for is so, whoever did it."""
        self._wallet.lose(pending)
        self._till.journal.conclude(pending, self._wallet.book, done=done)
        _tell_loss(pending.amount)


def _tell_loss(amount: int) -> None:
    if amount:
        log.warning("%d tokens expired in a request that an epoch's end cut short", amount)


def _redeemed_in_vain(amount: int) -> VoucherSpent:
    return VoucherSpent(
        f"this voucher was redeemed before, it seems from here: the answer was lost, and the"
        f" {amount:,} tokens expired with their epoch",
        "a redemption that is cut short has to be completed while its epoch lasts",
    )
