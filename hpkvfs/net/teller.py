"""Paid requests: wallet, journal and line made into one cycle.

    select two credentials -> prove -> journal -> ask until answered -> check -> settle

Invariants:
  - no byte of a request leaves before the journal has its inputs and the secrets to use its
    answer; what left is settled only by an answer with the issuer's proof in it;
  - a request that was refused, or never answered, is *resolved* before its inputs are used
    again: a reissue of the same inputs is asked for, which is free. The server performs one of
    the two, ever, and the answer to the reissue tells which, with the credentials that belong
    to it. So no token is lost, it becomes known whether the operation happened, and no two
    operations ever show the same serials, which would betray that one client made both;
  - when the epoch of a pending has ended, it is not performed any more, nor answered: it stays
    pending until something else has told what became of it (`_find_out`);
  - everything runs on one trio thread, and the wallet changes only between two awaits.

Proofs of ordinary requests and checks of replies are a Prover's (net/proving.py), which may have
other processes do them: meanwhile the inputs are set aside, and count as held. What is rare, and
what must let nobody in between, is proved at once.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, TypeVar

import trio

from hpkvfs.errors import (
    EmptyWallet,
    Misbehaviour,
    Refusal,
    SpentElsewhere,
    StoreError,
    Unreachable,
)
from hpkvfs.net.epochs import Epochs
from hpkvfs.net.line import Line
from hpkvfs.net.proving import Here, Prover
from hpkvfs.net.refusals import (
    EpochEnded,
    NoRoom,
    UnknownEpoch,
    VoucherSpent,
    out_of_place,
    refusal,
)
from hpkvfs.net.transport import NoReply
from hpkvfs.protocol import codec
from hpkvfs.protocol.credential import Credential, Draft, IssuerParameters, Statement
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    Done,
    Fact,
    IssueRequest,
    LookUpRequest,
    Refused,
    ReissueRequest,
    Spent,
    decode_request,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.journal import Journal
from hpkvfs.wallet.wallet import Attempt, Held, Pending, Selection, Wallet, split

log = logging.getLogger(__name__)

T = TypeVar("T")
KEY_BYTES: Final = 33
CLAIM: Final = b"claim"
"""The memo of a reissue that takes in a credential out of a breakglass entry."""

Make: TypeAlias = Callable[[bytes], CredentialedRequest]
Complete: TypeAlias = Callable[[CredentialedRequest, bytes], CredentialedRequest]


def _complete(request: CredentialedRequest, credentials: bytes) -> CredentialedRequest:
    return replace(request, credentials=credentials)


@dataclass(frozen=True, slots=True)
class Order:
    """What to ask for: `make` a request of an epoch, `complete` it with its credentials.

    `memo`, `place`: see wallet.Pending.
    """

    operation: Operation
    make: Make
    complete: Complete = _complete
    memo: bytes = b""
    place: bytes = b""


@dataclass(frozen=True, slots=True)
class _Task:
    """A request to be proved."""

    request: CredentialedRequest
    statement: Statement
    epoch: EpochParameters
    presented: tuple[Credential, ...]
    amounts: tuple[int, int]
    into: EpochParameters | None

    @property
    def arguments(
        self,
    ) -> tuple[
        IssuerParameters,
        Statement,
        tuple[Credential, ...],
        tuple[int, int],
        IssuerParameters | None,
    ]:
        """What Prover.prepare takes."""
        into = self.into.issuer if self.into else None
        return self.epoch.issuer, self.statement, self.presented, self.amounts, into

    def attempt(self, draft: Draft, complete: Complete = _complete) -> tuple[bytes, Attempt]:
        """The body, with its proof, and what it takes to use the answer."""
        body = complete(self.request, draft.request).body()
        fingerprint, into = hashlib.sha256(body).digest(), self.into.digest if self.into else b""
        about, secrets = self.statement, draft.encode()
        return body, Attempt(
            about.operation, about.delta, fingerprint, secrets, into=into, draft=draft
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Which attempt was performed, and the blob if it was a look-up that found one."""

    attempt: Attempt
    value: bytes | None = None


class Teller:
    """Pays for requests out of one wallet; the number of calls at a time is its caller's."""

    def __init__(
        self,
        journal: Journal,
        line: Line,
        epochs: Epochs,
        rng: Callable[[int], bytes],
        pool_size: int,
        prover: Prover | None = None,
    ) -> None:
        """`pool_size`: how many credentials to have when many calls want some at once; `prover`:
        who makes the proofs, this thread if None."""
        self.wallet: Final[Wallet] = journal.load()
        self.epochs: Final = epochs
        self._journal = journal
        self._line = line
        self._rng = rng
        self._pool_size = pool_size
        self._here = Here(rng)
        self._prover = prover or self._here
        self._proving: Counter[bytes] = Counter()
        self._driven: set[int] = set()
        self._stuck: set[int] = set()
        self._bought: set[bytes] = set()
        self._in_vain: dict[bytes, int] = {}
        self._changed = trio.Event()
        self._stranding = trio.Event()

    # Paying.

    async def newest(self) -> EpochParameters:
        """The epoch that the server issues in; what is held of ended ones is written off."""
        newest = await self.epochs.newest()
        self._write_off_ended()
        return newest

    async def refresh(self) -> None:
        """Ask which epochs there are, and write off what is held of ended ones."""
        await self.epochs.refresh()
        self._write_off_ended()

    async def _paying_epoch(self, operation: Operation) -> EpochParameters:
        """The oldest epoch with tokens enough, since that one ends first; else the newest.

        A refund goes to the newest. When no epoch has enough alone, the newest is given what the
        others have, since a request presents credentials of one epoch only.
        """
        newest = await self.newest()
        if newest.tariff.delta(operation) >= 0:
            return newest
        live = self.epochs.live
        for can_pay in (self._has, self._may_come_to_have):
            for epoch in live:
                if can_pay(epoch, -epoch.tariff.delta(operation)):
                    return epoch
        cost = -newest.tariff.delta(operation)
        for reserved in (False, True):
            if len(live) > 1 and not self._has(newest, cost) and self.wallet.balance.total >= cost:
                await self._gather(live[:-1], reserved)
        return newest

    async def _gather(self, older: Sequence[EpochParameters], reserved: bool) -> None:
        for epoch in older:
            if reserved:
                self._release_reserve(epoch)
            while await self.move(epoch):
                pass

    def _has(self, epoch: EpochParameters, cost: int) -> bool:
        return self.wallet.worth(epoch.digest) >= max(1, cost)

    def _may_come_to_have(self, epoch: EpochParameters, cost: int) -> bool:
        return self.wallet.could_pay(epoch.digest, max(1, cost))

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

    async def pay(self, order: Order) -> Answer:
        """Perform an operation that takes two credentials, whatever that takes.

        EmptyWallet, a Refusal (nothing was spent), Misbehaviour, Unreachable (it is pending
        unless `sent` is false), VaultError.
        """

        async def pay() -> Answer:
            return await self._pay(order, await self._paying_epoch(order.operation))

        return await self.surviving(pay)

    async def pay_once(self, order: Order) -> None:
        """As `pay`, unless an earlier call with its memo, also of an earlier process, did it.

        Raises what resolving that may raise, too.
        """

        async def once() -> None:
            await self.resolve_like(order.operation, order.memo)
            if not self._journal.has_receipt(order.operation, order.memo):
                await self._pay(order, await self._paying_epoch(order.operation))

        await self.surviving(once)

    async def resolve_like(self, operation: Operation, memo: bytes) -> None:
        """Have an earlier call of the same operation and memo resolved, if there is one."""
        while memo and (pending := self._find(operation, memo)) is not None:
            if pending.number in self._driven:
                await self._changed.wait()
            else:
                await self.resolve(pending)

    def _find(self, operation: Operation, memo: bytes) -> Pending | None:
        for one in self.wallet.pending.values():
            if one.memo == memo and one.attempts[0].operation is operation:
                return one
        return None

    async def _pay(self, order: Order, epoch: EpochParameters) -> Answer:
        selection = await self._select(epoch, epoch.tariff.delta(order.operation))
        pending, frame = await self._begin_elsewhere(epoch, selection, order)
        try:
            return await self._perform(pending, frame)
        except Refusal as refused:
            if isinstance(refused, UnknownEpoch):
                await self.refresh()
            answer = await self._resolved_at_once(pending)
            if answer is None or answer.attempt is not pending.attempts[0]:
                raise
            if order.operation is Operation.LOOK_UP:
                raise  # it was performed after all, but what it found is not told twice
            return answer

    async def _select(self, epoch: EpochParameters, delta: int) -> Selection:
        bare = self.wallet.count(epoch.digest) < 2 and not self.wallet.could_pay(epoch.digest, 0)
        if delta >= 0 and bare:
            await self.grow(epoch)  # two of no value are enough to have a refund
        while True:
            selection = self.wallet.select(epoch.digest, delta, epoch.tariff.insert)
            if selection is None:
                await self._wait_for_more(epoch)
            elif selection.merges:
                await self._reissue(epoch, selection)
            else:
                return selection

    async def _wait_for_more(self, epoch: EpochParameters) -> None:
        """Return when there may be other credentials to select from, doing what can be done."""
        stranded = [one for one in self.stranded() if one.epoch == epoch.digest]
        if stranded:
            await self.resolve(stranded[0])
        elif not self._is_driven(epoch):
            raise EmptyWallet(
                "the wallet's tokens are in requests that cannot be settled",
                "run again when the server has recovered, or redeem a voucher",
            )
        elif self.wallet.size < self._pool_size:
            await self.grow(epoch)
        else:
            await self._changed.wait()

    def _is_driven(self, epoch: EpochParameters) -> bool:
        """Whether anybody is about to have other credentials of this epoch."""
        if self._proving[epoch.digest]:
            return True
        pending = self.wallet.pending
        return any(pending[one].epoch == epoch.digest for one in self._driven if one in pending)

    async def _reissue(self, epoch: EpochParameters, selection: Selection) -> None:
        order = Order(Operation.REISSUE, lambda digest: ReissueRequest(digest, 2))
        await self._perform(*self._begin(epoch, selection, order))

    # Moving into the newest epoch.

    def behind(self) -> list[EpochParameters]:
        """The live epochs but the newest of which something is to be moved, oldest first."""
        return [one for one in self.epochs.live[:-1] if self.left_behind(one)]

    def left_behind(self, epoch: EpochParameters) -> int:
        """How many credentials of an older epoch are to be moved.

        What is reserved stays until the breakglass entry that has it is replaced, or the epoch
        may end soon.
        """
        reserved = self.wallet.count_reserved(epoch.digest) if self.is_late(epoch) else 0
        return self.wallet.count(epoch.digest) + reserved

    def is_late(self, epoch: EpochParameters) -> bool:
        """Whether it may end when the next one begins."""
        return self.epochs.live[-1].number - epoch.number >= 2

    def _release_reserve(self, epoch: EpochParameters) -> None:
        if self.wallet.count_reserved(epoch.digest):
            self.wallet.release_reserve(epoch.digest)
            self._journal.reserve(self.wallet.reserve)

    async def move(self, epoch: EpochParameters) -> bool:
        """Reissue two credentials of an epoch in the newest; False if there are none to move.

        The statement names both epochs: what is presented is of one, what is issued of the other.
        """
        return await self.surviving(lambda: self._move(epoch))

    async def _move(self, epoch: EpochParameters) -> bool:
        newest = await self.newest()
        if self.epochs.has_ended(epoch.digest):
            return False
        if self.is_late(epoch):
            self._release_reserve(epoch)
        if not self.wallet.worth(epoch.digest):
            self._expire(epoch.digest)  # those of no value are not worth a request
            return False
        if self.wallet.count(epoch.digest) == 1 and not self.wallet.could_pay(epoch.digest, 0):
            await self.grow(epoch)
        selection = self.wallet.select_any(epoch.digest, newest.tariff.insert)
        if selection is None:
            return False
        into = newest.digest
        order = Order(Operation.REISSUE, lambda digest: ReissueRequest(digest, 2, into))
        await self._perform(*self._begin(epoch, selection, order, newest))
        return True

    def _write_off_ended(self) -> None:
        """What is held of an epoch that ended is worth nothing; what is pending has yet to be
        found out."""
        for digest in self.wallet.epochs:
            if self.epochs.has_ended(digest):
                self._expire(digest)

    def _expire(self, digest: bytes) -> None:
        held = self.wallet.expire(digest)
        if held:
            self._journal.expire(held, self.wallet.book)

    async def grow(self, epoch: EpochParameters) -> None:
        """Two more credentials, of no value, for free. Nothing is at stake, so no journal."""
        body, attempt = self._prove(epoch, ReissueRequest(epoch.digest, 0), (), (0, 0))
        pending = self.wallet.begin(epoch.digest, (), attempt)
        with self._driving(pending):
            try:
                await self._answer(pending, codec.REQUEST.wrap(body))
            finally:
                self._abandon(pending)

    # Buying.

    async def buy(self, make: Make, amount: int, memo: bytes) -> None:
        """Exchange what `make` pays with for credentials, unless that was begun and ends well now.

        A Refusal leaves nothing behind.
        """
        self._bought.discard(memo)  # what was over before this call does not count

        async def buy() -> None:
            try:
                await self.resolve_like(Operation.ISSUE, memo)
            finally:
                in_vain = self._in_vain.pop(memo, 0)
            if in_vain:  # others have settled it, and nobody has told who redeemed it
                raise _redeemed_in_vain(in_vain)
            if memo not in self._bought:
                epoch = await self.newest()
                attempt = self._prove_purchase(epoch, make(epoch.digest), amount)
                pending = self.wallet.begin(epoch.digest, (), attempt, memo)
                await self._perform(pending, codec.REQUEST.wrap(attempt.body))

        await self.surviving(buy)

    def _prove_purchase(
        self, epoch: EpochParameters, request: CredentialedRequest, amount: int
    ) -> Attempt:
        body, attempt = self._prove(epoch, request, (), split(amount, epoch.tariff.insert))
        return replace(attempt, body=body)

    # Breakglass entries.

    async def pay_in(self, order: Order, epoch: EpochParameters) -> Answer:
        """As `pay`, out of one epoch's tokens."""
        return await self._pay(order, epoch)

    async def fill_reserve(self, epoch: EpochParameters, amounts: Sequence[int]) -> None:
        """Have credentials of just these amounts in the reserve, which the journal then has.

        It is not durable yet. What fails leaves an empty reserve: half of one is in no entry.
        """
        self.wallet.release_reserve()
        try:
            for amount in amounts:
                await self._fill_one(epoch, amount)
        except BaseException:
            self.wallet.release_reserve()
            raise
        self._journal.reserve(self.wallet.reserve)

    async def _fill_one(self, epoch: EpochParameters, amount: int) -> None:
        merges = True
        while merges:
            selection = self.wallet.carve(epoch.digest, amount)
            if selection is None:
                await self.grow(epoch)
                continue
            merges = selection.merges
            await self._reissue(epoch, selection)
        self.wallet.reserve_one(epoch.digest, amount)  # nobody ran since that was settled

    async def claim(self, digest: bytes, credential: Credential, note: tuple[str, bytes]) -> None:
        """Take in a credential that an entry had; SpentElsewhere if it is worth nothing now.

        `note` becomes durable together with the claim.
        """
        epoch = await self.epochs.get(digest)
        while (inputs := self.wallet.take_in(epoch.digest, credential)) is None:
            await self.grow(epoch)
        order = Order(Operation.REISSUE, lambda epoch: ReissueRequest(epoch, 2), memo=CLAIM)
        amounts = split(credential.amount, epoch.tariff.insert)
        selection = Selection(epoch.digest, inputs, amounts, False)
        pending, frame = self._begin(epoch, selection, order)
        with self._driving(pending):
            self._journal.put_meta(*note)
            await self._journal.begin_claim(pending, inputs[0], self.wallet.book)
            await self._answer(pending, frame)

    # Resolving.

    def stranded(self) -> list[Pending]:
        """Pendings that nobody drives and that are not stuck, oldest first."""
        return [one for one in self._undriven() if one.number not in self._stuck]

    def _undriven(self) -> list[Pending]:
        if len(self.wallet.pending) == len(self._driven):
            return []
        return [one for one in self.wallet.pending.values() if one.number not in self._driven]

    def unstick(self) -> None:
        """Let stuck pendings be tried once more."""
        self._stuck.clear()

    async def any_stranded(self) -> None:
        """Return when there is something to resolve."""
        while not self.stranded():
            await self._stranding.wait()

    async def resolve(self, pending: Pending) -> Answer | None:
        """Settle a stranded pending: find out which of its attempts was performed.

        None: its epoch has ended, and its operation was not performed, or nobody can tell; or
        somebody else has settled it meanwhile. Unreachable leaves it stranded; any other error
        leaves it stuck until `unstick`.
        """
        try:
            return await self.surviving(lambda: self._resolve(pending.number))
        except Unreachable:
            raise
        except StoreError:
            self._stuck.add(pending.number)
            raise

    async def _resolve(self, number: int) -> Answer | None:
        while number in self._driven:
            await self._changed.wait()  # somebody else has taken it up meanwhile
        pending = self.wallet.pending.get(number)
        if pending is None:
            return None
        if self.epochs.has_ended(pending.epoch):
            return await self._find_out(pending)
        return await self._ask_again(pending)

    async def _ask_again(self, pending: Pending) -> Answer:
        if pending.inputs and len(pending.attempts) == 1:
            return await self._resolve_by_reissue(pending)
        with self._driving(pending):
            await self._journal.flush()
            return await self._repeat(pending, pending.attempts[-1])

    async def _repeat(self, pending: Pending, attempt: Attempt) -> Answer:
        try:
            return await self._answer(pending, codec.REQUEST.wrap(attempt.body), attempt)
        except VoucherSpent as refused:
            if len(pending.attempts) == 1:
                self._release(pending)
                raise
            amount = pending.attempts[0].delta
            self._in_vain[pending.memo] = amount
            self._conclude(pending, performed=True)
            raise _redeemed_in_vain(amount) from refused
        except Refusal as refused:
            self._give_up(pending, refused)
            raise

    def _give_up(self, pending: Pending, refused: Refusal) -> None:
        """A refusal for good of what has no inputs undoes it."""
        if isinstance(refused, NoRoom | UnknownEpoch):
            return  # the request, or a copy of it, may be performed yet, or was before
        if not pending.inputs:
            self._release(pending)

    async def _resolve_by_reissue(self, pending: Pending) -> Answer:
        with self._driving(pending):
            epoch = await self.epochs.get(pending.epoch)
            amounts = split(pending.amount, epoch.tariff.insert)
            request = ReissueRequest(epoch.digest, 2)
            body, attempt = self._prove(epoch, request, pending.inputs, amounts)
            pending = self.wallet.retry(pending, replace(attempt, body=body))
            await self._journal.begin(pending)
            return await self._answer(pending, codec.REQUEST.wrap(body))

    # What became of requests whose epoch has ended: nobody answers them any more.

    async def _find_out(self, pending: Pending) -> Answer | None:
        """Conclude a pending of an ended epoch; the answer if what it asked for is so.

        No request of that epoch is performed any more, so what the server shows now is the end of
        it: whether a blob is there, or a voucher spent, or what was moved is on record.
        """
        first = pending.attempts[0]
        with self._driving(pending):
            if first.operation is Operation.ISSUE:
                return await self._redeem_again(pending)
            if first.into and first.body and not self.epochs.has_ended(first.into):
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
        order = Order(Operation.LOOK_UP, lambda epoch: LookUpRequest(epoch, key))
        blob = (await self.pay(order)).value
        return blob is not None and hashlib.sha256(blob).digest() == digest

    async def _ask_where_it_went(self, pending: Pending) -> Answer | None:
        """What was moved out of the epoch in time is on record as long as where it was moved to."""
        try:
            return await self._repeat(pending, pending.attempts[0])
        except EpochEnded:
            self._conclude(pending, performed=False)
            return None

    async def _redeem_again(self, pending: Pending) -> Answer:
        """Redeem a voucher in the newest epoch; VoucherSpent if the first time it was performed.

        What it was worth then is lost: the server has forgotten what became of the credentials of
        that epoch, so it could not tell who has not got them from who has spent them.
        """
        request = decode_request(codec.REQUEST.wrap(pending.attempts[-1].body))
        assert isinstance(request, IssueRequest)
        epoch = await self.newest()
        again = replace(request, epoch=epoch.digest)
        attempt = self._prove_purchase(epoch, again, request.amount)
        pending = self.wallet.renew(pending, epoch.digest, attempt)
        await self._journal.begin(pending)
        return await self._repeat(pending, attempt)

    def _conclude(self, pending: Pending, *, performed: bool) -> None:
        before = self.wallet.book.expired
        self.wallet.conclude(pending, performed=performed)
        self._journal.conclude(pending, self.wallet.book, done=performed)
        self._tell_loss(self.wallet.book.expired - before)

    def _lose(self, pending: Pending, *, done: bool) -> None:
        """`done`: what was asked for is so, whoever did it."""
        self.wallet.lose(pending)
        self._journal.conclude(pending, self.wallet.book, done=done)
        self._tell_loss(pending.amount)

    def _tell_loss(self, amount: int) -> None:
        if amount:
            log.warning("%d tokens expired in a request that an epoch's end cut short", amount)

    async def _resolved_at_once(self, pending: Pending) -> Answer | None:
        """Resolve what was refused; None if that fails, which leaves it to be done later."""
        try:
            return await self.resolve(pending)
        except StoreError:
            return None

    # One request.

    def _begin(
        self,
        epoch: EpochParameters,
        selection: Selection,
        order: Order,
        into: EpochParameters | None = None,
    ) -> tuple[Pending, bytes]:
        """The pending of an order and its frame; the journal does not have it yet."""
        request = order.make(epoch.digest)
        try:
            body, attempt = self._prove(
                epoch, request, selection.inputs, selection.amounts, order.complete, into
            )
        except BaseException:
            self.wallet.put_back(selection)
            raise
        if into is not None:
            attempt = replace(attempt, body=body)  # it can be repeated when its epoch has ended
        where = selection.inputs, attempt, order.memo, order.place
        return self.wallet.begin(epoch.digest, *where), codec.REQUEST.wrap(body)

    async def _begin_elsewhere(
        self, epoch: EpochParameters, selection: Selection, order: Order
    ) -> tuple[Pending, bytes]:
        """As _begin, by the prover; others go on meanwhile."""
        task = self._task(epoch, order.make(epoch.digest), selection.inputs, selection.amounts)
        self._proving[epoch.digest] += 1
        try:
            draft = await self._prover.prepare(*task.arguments)
        except BaseException:
            self.wallet.put_back(selection)
            self._change()
            raise
        finally:
            self._proving[epoch.digest] -= 1
        body, attempt = task.attempt(draft, order.complete)
        where = selection.inputs, attempt, order.memo, order.place
        return self.wallet.begin(epoch.digest, *where), codec.REQUEST.wrap(body)

    def _task(
        self,
        epoch: EpochParameters,
        request: CredentialedRequest,
        inputs: tuple[Held, ...],
        amounts: tuple[int, int],
        into: EpochParameters | None = None,
    ) -> _Task:
        presented = tuple(held.credential for held in inputs)
        return _Task(request, request.statement(epoch.tariff), epoch, presented, amounts, into)

    def _prove(
        self,
        epoch: EpochParameters,
        request: CredentialedRequest,
        inputs: tuple[Held, ...],
        amounts: tuple[int, int],
        complete: Complete = _complete,
        into: EpochParameters | None = None,
    ) -> tuple[bytes, Attempt]:
        """The body of the request, with its proof, and what it takes to use the answer.

        `into`: the epoch of the outputs, if that is another.
        """
        task = self._task(epoch, request, inputs, amounts, into)
        return task.attempt(self._here.prepared(*task.arguments), complete)

    async def _perform(self, pending: Pending, frame: bytes) -> Answer:
        """Journal, ask, settle. A refusal for good of what has no inputs undoes it."""
        with self._driving(pending):
            try:
                await self._journal.begin(pending)
            except BaseException:
                self._release(pending)
                raise
            try:
                return await self._answer(pending, frame)
            except NoReply as failure:
                if not failure.sent:
                    self._release(pending)
                raise
            except Refusal as refused:
                self._give_up(pending, refused)
                raise

    async def _answer(
        self, pending: Pending, frame: bytes, attempt: Attempt | None = None
    ) -> Answer:
        """Ask, and settle by whatever the answer proves; it may prove an earlier attempt.

        `attempt`: the one that the frame is of, if that is not the last.
        """
        reply = await self._line.ask(frame)
        match reply:
            case Done(fact, issued, value):
                attempt = attempt or pending.attempts[-1]
            case Spent():
                attempt, fact, issued = self._own(pending, reply)
                value = None
            case Refused(reason):
                raise refusal(reason)
            case _:
                raise out_of_place()
        await self._settle(pending, attempt, fact, issued)
        return Answer(attempt, value)

    async def _settle(self, pending: Pending, attempt: Attempt, fact: Fact, issued: bytes) -> None:
        if (fact.operation, fact.delta) != (attempt.operation, attempt.delta):
            raise Misbehaviour("the server charged for something else than was asked for")
        epoch = await self.epochs.get(attempt.into or pending.epoch)
        try:
            draft = attempt.draft or Draft.decode(attempt.secrets)
            outputs = await self._prover.finish(epoch.issuer, draft, issued)
        except ProtocolError as error:
            raise Misbehaviour(f"the server's credentials are worthless: {error}") from error
        settled = self.wallet.settle(pending, attempt, outputs)
        if attempt.operation is Operation.ISSUE:
            self._bought.add(pending.memo)
        self._journal.settle(settled, self.wallet.book)

    def _own(self, pending: Pending, reply: Spent) -> tuple[Attempt, Fact, bytes]:
        try:
            return _own(pending, reply)
        except SpentElsewhere:
            if pending.memo == CLAIM:
                self.wallet.write_off(pending)
                self._journal.write_off(pending, self.wallet.book)
            raise

    def _release(self, pending: Pending) -> None:
        self.wallet.release(pending)
        self._journal.release(pending)

    def _abandon(self, pending: Pending) -> None:
        if pending.number in self.wallet.pending:
            self.wallet.release(pending)

    def _change(self) -> None:
        """Have whoever waits for other credentials look again."""
        self._changed.set()
        self._changed = trio.Event()

    @contextmanager
    def _driving(self, pending: Pending) -> Iterator[None]:
        """The pending is being dealt with; afterwards whoever waits for a change looks again."""
        self._driven.add(pending.number)
        try:
            yield
        finally:
            self._driven.discard(pending.number)
            self._change()
            if pending.number in self.wallet.pending:
                self._stranding.set()
                self._stranding = trio.Event()
            if not self._driven:
                self._journal.nudge()


def _redeemed_in_vain(amount: int) -> VoucherSpent:
    return VoucherSpent(
        f"this voucher was redeemed before, it seems from here: the answer was lost, and the"
        f" {amount:,} tokens expired with their epoch",
        "a redemption that is cut short has to be completed while its epoch lasts",
    )


def _own(pending: Pending, reply: Spent) -> tuple[Attempt, Fact, bytes]:
    """The attempt that a server says spent the inputs, and what it kept of it."""
    for stored in reply.facts:
        attempt = pending.attempt(stored.fingerprint)
        if attempt is not None:
            return attempt, stored.fact, stored.issued
    raise SpentElsewhere(
        "tokens of this wallet were spent by a request that is not in its journal",
        "was the state directory copied or restored? recover the vault from its words",
    )
