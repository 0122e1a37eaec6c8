"""What the client owns and what it has asked for: the wallet's states, without any I/O.

    Held --select--> Selection --begin--> Pending --settle--> Settled (two new Held)
     ^                   |                   |
     +----- put_back ----+----- release -----+    only while no byte of it has left

Some of what is held can be the *reserve*: its credentials are also in the breakglass entry, from
which the words alone recover them, and so `select` takes one of them only when nothing else
could pay. What was ever part of a Pending is in the entry in vain.

A Pending is its inputs and the one or two requests made with them. The first is the operation
itself. If its answer never comes it is not known whether it was performed; then the second, a
reissue of the same inputs, is made: the server performs only one of the two, and either answer
tells which (net/teller.py). So the outputs of one of the two, and only one, will be held.

Invariants, between any two calls:
  - a credential is in one place only: a pool, the reserve, set aside by a Selection, or in one
    Pending;
  - bought + refunded == held + pending + spent + expired + lost, what is set aside or reserved
    counting as held;
  - credentials of two epochs are never in one Selection.

When an epoch has ended its credentials are worth nothing: `expire` takes them out. A Pending of it
stays one until it is known what became of it (`conclude`) or that this cannot be known (`lose`).

Nothing here is durable: the journal records each Pending before it is spoken of to anyone, and
each Settled after (wallet/journal.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace

from hpkvfs.errors import EmptyWallet
from hpkvfs.protocol.credential import Credential, Draft
from hpkvfs.protocol.tariff import Operation


@dataclass(frozen=True, slots=True)
class Held:
    """A credential that can be spent; `number` names it in the journal."""

    number: int
    epoch: bytes
    credential: Credential = field(repr=False)

    @property
    def amount(self) -> int:
        """Its worth in tokens."""
        return self.credential.amount


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that may have reached the server, and what it takes to use the answer.

    `secrets` is Draft.encode(), and `draft` what it encodes, in the process that made it. `body`
    is the request itself, for requests that are repeated after a restart, and empty for those
    that are then resolved by a reissue. `into` is the epoch of its outputs, empty if that is the
    epoch of its inputs.
    """

    operation: Operation
    delta: int
    fingerprint: bytes
    secrets: bytes = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    into: bytes = b""
    draft: Draft | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Pending:
    """Inputs of which it is not known yet which attempt spent them; none for new credentials.

    `place`: of an insertion or deletion the storage key and the blob's SHA-256 (33 + 32 bytes),
    where it shows for good, also after the epoch, whether it happened; empty for others.
    """

    number: int
    epoch: bytes
    inputs: tuple[Held, ...]
    attempts: tuple[Attempt, ...]
    memo: bytes = b""
    place: bytes = b""

    @property
    def amount(self) -> int:
        """Tokens in it: the sum of its inputs."""
        return sum(held.amount for held in self.inputs)

    def attempt(self, fingerprint: bytes) -> Attempt | None:
        """The attempt with this fingerprint, if there is one."""
        return next((one for one in self.attempts if one.fingerprint == fingerprint), None)


@dataclass(frozen=True, slots=True)
class Settled:
    """A pending whose outcome is known: `attempt` was performed and gave `outputs`."""

    pending: Pending
    attempt: Attempt
    outputs: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Two credentials set aside, and the amounts of the two that shall replace them.

    `merges` says that they cannot pay alone: reissue them as these amounts, then select again.
    """

    epoch: bytes
    inputs: tuple[Held, Held]
    amounts: tuple[int, int]
    merges: bool


@dataclass(frozen=True, slots=True)
class Book:
    """Tokens ever bought, refunded and spent, and those that ended with their epoch.

    `expired`: in credentials of it. Of some requests of it that were cut short nobody can tell any
    more whether they were performed: `lost` are their prices, which are spent or expired, and
    `forgone` their refunds, which expired or were never given.
    """

    bought: int = 0
    refunded: int = 0
    spent: int = 0
    expired: int = 0
    lost: int = 0
    forgone: int = 0

    def entered(self, operation: Operation, delta: int) -> Book:
        """The book after one performed operation."""
        if operation is Operation.ISSUE:
            return replace(self, bought=self.bought + delta)
        if delta > 0:
            return replace(self, refunded=self.refunded + delta)
        return replace(self, spent=self.spent - delta)


@dataclass(frozen=True, slots=True)
class Balance:
    """Tokens that can be spent now, and tokens whose request is not settled yet."""

    held: int
    pending: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.held + self.pending


@dataclass(frozen=True, slots=True)
class Conservation:
    """The sum that no crash and no lost answer may change."""

    book: Book
    balance: Balance

    @property
    def holds(self) -> bool:
        """Whether bought + refunded == held + pending + spent + expired + lost."""
        book = self.book
        gone = book.spent + book.expired + book.lost
        return book.bought + book.refunded == self.balance.total + gone


def split(total: int, whole: int) -> tuple[int, int]:
    """Two amounts that make `total`: halves, unless a half would be less than `whole`.

    With `whole` the dearest price, each half pays any operation alone, so halves serve two
    operations at once; smaller halves would only scatter a small balance.
    """
    if total >= 2 * whole:
        return total - total // 2, total // 2
    return total, 0


class Wallet:
    """All credentials and pendings of one vault; starts from what the journal holds."""

    def __init__(
        self,
        held: Iterable[Held] = (),
        pending: Iterable[Pending] = (),
        book: Book = Book(),
        reserve: Container[int] = (),
    ) -> None:
        """`reserve`: the numbers of held credentials that are in the breakglass entry."""
        self.book = book
        self.pending: dict[int, Pending] = {one.number: one for one in pending}
        self._pools: dict[bytes, list[Held]] = {}
        self._aside: dict[int, Held] = {}
        self._reserve: dict[int, Held] = {}
        taken = {one.number: one for pending in self.pending.values() for one in pending.inputs}
        everything = [*held, *taken.values()]
        self._last = max([0, *self.pending, *(one.number for one in everything)])
        for one in everything:
            if one.number in taken:
                continue
            if one.number in reserve:
                self._reserve[one.number] = one
            else:
                self._add(one)

    # Where the tokens are.

    @property
    def balance(self) -> Balance:
        """What can be spent now (with what is set aside), and what is pending."""
        held = sum(self.worth(epoch) for epoch in self._pools)
        kept = sum(one.amount for one in (*self._aside.values(), *self._reserve.values()))
        return Balance(held + kept, sum(one.amount for one in self.pending.values()))

    @property
    def conservation(self) -> Conservation:
        """The sum that must hold between any two calls."""
        return Conservation(self.book, self.balance)

    @property
    def size(self) -> int:
        """How many credentials there are to work with, counting two for each pending."""
        return len(self._aside) + 2 * len(self.pending) + sum(map(len, self._pools.values()))

    def worth(self, epoch: bytes) -> int:
        """Tokens of one epoch that are held, neither set aside nor reserved."""
        return sum(one.amount for one in self._pools.get(epoch, ()))

    def count(self, epoch: bytes) -> int:
        """How many credentials of one epoch are held and not set aside."""
        return len(self._pools.get(epoch, ()))

    def count_reserved(self, epoch: bytes) -> int:
        """How many credentials of one epoch are reserved."""
        return sum(one.epoch == epoch for one in self._reserve.values())

    @property
    def epochs(self) -> set[bytes]:
        """The epochs of what is held, reserved, set aside or pending."""
        aside = {one.epoch for one in self._aside.values()}
        pending = {one.epoch for one in self.pending.values()}
        reserved = {one.epoch for one in self._reserve.values()}
        return {epoch for epoch, pool in self._pools.items() if pool} | aside | pending | reserved

    def held(self) -> list[Held]:
        """Every held credential that is neither set aside nor reserved."""
        return [one for pool in self._pools.values() for one in pool]

    @property
    def reserve(self) -> list[Held]:
        """What is in the breakglass entry and was not taken for anything, richest first."""
        return sorted(self._reserve.values(), key=_amount, reverse=True)

    # Transitions.

    def select(self, epoch: bytes, delta: int, whole: int) -> Selection | None:
        """Set two credentials aside for an operation that adds `delta` to them.

        The richest goes with the poorest that suffices, so that amounts even out and small
        ones disappear. None: only credentials now in flight could pay, so wait for a change.
        The reserve comes last. EmptyWallet: not even that could. `whole`: see `split`.
        """
        pool = self._pools.get(epoch, [])
        cost = max(0, -delta)
        if len(pool) >= 2 and pool[-1].amount + pool[-2].amount >= cost:
            return self._pair(epoch, cost, delta, whole)
        if len(pool) >= 2 and self.worth(epoch) >= cost:
            inputs = self._set_aside(pool, len(pool) - 2)
            return Selection(epoch, inputs, (inputs[0].amount + inputs[1].amount, 0), True)
        if self.could_pay(epoch, cost):
            return None
        if self._draw(epoch):
            return self.select(epoch, delta, whole)
        gone = self.book.expired + self.book.lost
        lost = f"; {gone} expired" if gone else ""
        held, pending = self.balance.held, self.balance.pending
        waiting = f", and {pending} in requests that are not settled" if pending else ""
        raise EmptyWallet(
            f"the operation costs {cost} tokens and the wallet has {held}{waiting}{lost}",
            "redeem a voucher",
        )

    def carve(self, epoch: bytes, amount: int) -> Selection | None:
        """The next reissue on the way to a credential of just this amount, to be reserved.

        The last of them is the one that does not merge. None: there are not two credentials, so
        `grow` first. EmptyWallet when the pool has less.
        """
        pool = self._pools.get(epoch, [])
        if self.worth(epoch) < amount:
            raise EmptyWallet(
                f"there are not {amount} tokens to set aside for recovery", "redeem a voucher"
            )
        if len(pool) < 2:
            return None
        rich, next_ = self._set_aside(pool, len(pool) - 2)
        both = rich.amount + next_.amount
        merges = both < amount
        return Selection(
            epoch, (rich, next_), (both, 0) if merges else (amount, both - amount), merges
        )

    def reserve_one(self, epoch: bytes, amount: int) -> None:
        """Move a credential of just this amount, which `carve` led to, into the reserve.

        To be durable before the breakglass entry that has it is stored.
        """
        pool = self._pools[epoch]
        chosen = pool.pop(bisect_left(pool, amount, key=_amount))
        if chosen.amount != amount:
            raise ValueError("what was carved is not there any more")
        self._reserve[chosen.number] = chosen

    def release_reserve(self, epoch: bytes | None = None) -> None:
        """No entry has these any more, or soon none will; of one epoch or of all."""
        for one in list(self._reserve.values()):
            if epoch in (None, one.epoch):
                self._add(self._reserve.pop(one.number))

    def take_in(self, epoch: bytes, credential: Credential) -> tuple[Held, Held] | None:
        """A credential out of a breakglass entry, set aside with one of no value to be reissued.

        It counts as bought; see `write_off`. None: there is none of no value, so `grow` first.
        """
        pool = self._pools.get(epoch, [])
        if not pool or pool[0].amount:
            return None
        taken, poorest = Held(self._number(), epoch, credential), pool.pop(0)
        self._aside.update((one.number, one) for one in (taken, poorest))
        self.book = replace(self.book, bought=self.book.bought + taken.amount)
        return taken, poorest

    def write_off(self, pending: Pending) -> None:
        """What was taken in had been spent by somebody else: it was never bought here."""
        del self.pending[pending.number]
        self.book = replace(self.book, bought=self.book.bought - pending.amount)

    def select_any(self, epoch: bytes, whole: int) -> Selection | None:
        """Set two credentials aside to be moved into another epoch, the richest and the poorest.

        None if there are not two. `whole`: see `split`.
        """
        pool = self._pools.get(epoch, [])
        if len(pool) < 2:
            return None
        inputs = self._set_aside(pool, 0)
        amounts = split(inputs[0].amount + inputs[1].amount, whole)
        return Selection(epoch, inputs, amounts, False)

    def put_back(self, selection: Selection) -> None:
        """Undo a selection of which nothing has been journalled."""
        for one in selection.inputs:
            self._add(self._aside.pop(one.number))

    def begin(
        self,
        epoch: bytes,
        inputs: Sequence[Held],
        attempt: Attempt,
        memo: bytes = b"",
        place: bytes = b"",
    ) -> Pending:
        """Selected inputs (or none, for new credentials) become those of a pending.

        It must be durable before a byte of the attempt leaves.
        """
        for one in inputs:
            del self._aside[one.number]
        pending = Pending(self._number(), epoch, tuple(inputs), (attempt,), memo, place)
        self.pending[pending.number] = pending
        return pending

    def retry(self, pending: Pending, attempt: Attempt) -> Pending:
        """A second attempt with the same inputs; to be durable before a byte of it leaves."""
        if len(pending.attempts) != 1:
            raise ValueError("a pending has one attempt or two")
        both = replace(pending, attempts=(*pending.attempts, attempt))
        self.pending[pending.number] = both
        return both

    def renew(self, pending: Pending, epoch: bytes, attempt: Attempt) -> Pending:
        """Ask for new credentials in another epoch, since the one that was asked in has ended.

        The first attempt stays, as a sign that it may have been performed. To be durable before a
        byte of the new one leaves.
        """
        if pending.inputs:
            raise ValueError("credentials belong to one epoch")
        attempts = (pending.attempts[0], attempt)
        renewed = replace(pending, epoch=epoch, attempts=attempts)
        self.pending[pending.number] = renewed
        return renewed

    def settle(
        self, pending: Pending, attempt: Attempt, outputs: tuple[Credential, Credential]
    ) -> Settled:
        """The attempt was performed, which these credentials of the issuer prove."""
        if sum(one.amount for one in outputs) != pending.amount + attempt.delta:
            raise ValueError("a settlement that does not balance")
        del self.pending[pending.number]
        self.book = self.book.entered(attempt.operation, attempt.delta)
        epoch = attempt.into or pending.epoch
        held = tuple(Held(self._number(), epoch, one) for one in outputs)
        for one in held:
            self._add(one)
        return Settled(pending, attempt, held)

    def release(self, pending: Pending) -> None:
        """No byte of it was ever sent, or it has no inputs and was refused: undo it."""
        del self.pending[pending.number]
        for one in pending.inputs:
            self._add(one)

    def expire(self, epoch: bytes) -> list[Held]:
        """The epoch has ended: its credentials, reserved ones too, which are held no longer."""
        reserved = [one for one in self._reserve.values() if one.epoch == epoch]
        for one in reserved:
            del self._reserve[one.number]
        expired = [*self._pools.pop(epoch, []), *reserved]
        self._write_down(sum(one.amount for one in expired))
        return expired

    def discard(self, epoch: bytes) -> list[Held]:
        """Those of no value that are held of an epoch which is being left. The reserve stays: what
        is in the breakglass entry is worth something for as long as the epoch lasts."""
        worthless = [one for one in self._pools.get(epoch, []) if not one.amount]
        self._pools[epoch] = [one for one in self._pools.get(epoch, []) if one.amount]
        return worthless

    def conclude(self, pending: Pending, *, performed: bool) -> None:
        """The epoch of a pending has ended, and it is known whether its first attempt happened.

        What it presented, or was issued for it, is worth nothing now.
        """
        del self.pending[pending.number]
        first, left = pending.attempts[0], pending.amount
        if performed:
            self.book = self.book.entered(first.operation, first.delta)
            left += first.delta
        self._write_down(left)

    def lose(self, pending: Pending) -> None:
        """The epoch of a pending has ended, and what became of it will never be known."""
        del self.pending[pending.number]
        delta, book = pending.attempts[0].delta, self.book
        price, refund = max(0, -delta), max(0, delta)
        self.book = replace(book, lost=book.lost + price, forgone=book.forgone + refund)
        self._write_down(pending.amount - price)

    def _write_down(self, amount: int) -> None:
        self.book = replace(self.book, expired=self.book.expired + amount)

    def _pair(self, epoch: bytes, cost: int, delta: int, whole: int) -> Selection:
        pool = self._pools[epoch]
        enough = bisect_left(pool, cost - pool[-1].amount, key=_amount)
        rich, poor = self._set_aside(pool, min(enough, len(pool) - 2))
        amounts = split(rich.amount + poor.amount + delta, whole)
        return Selection(epoch, (rich, poor), amounts, False)

    def _set_aside(self, pool: list[Held], poor: int) -> tuple[Held, Held]:
        pair = pool.pop(), pool.pop(poor)
        self._aside.update((one.number, one) for one in pair)
        return pair

    def _draw(self, epoch: bytes) -> bool:
        """Give up the poorest of the reserve, whose place in the entry is then in vain."""
        mine = [one for one in self._reserve.values() if one.epoch == epoch]
        if mine:
            self._add(self._reserve.pop(min(mine, key=_amount).number))
        return bool(mine)

    def could_pay(self, epoch: bytes, cost: int) -> bool:
        """Whether credentials now in flight could, with the others, pay so much when they land."""
        moving = [one for one in self._aside.values() if one.epoch == epoch]
        pending = [one for one in self.pending.values() if one.epoch == epoch]
        coming = sum(
            max(one.amount, *(one.amount + a.delta for a in one.attempts)) for one in pending
        )
        worth = self.worth(epoch) + coming + sum(one.amount for one in moving)
        return bool(moving or pending) and worth >= cost

    def _add(self, held: Held) -> None:
        insort(self._pools.setdefault(held.epoch, []), held, key=_amount)

    def _number(self) -> int:
        self._last += 1
        return self._last


def _amount(held: Held) -> int:
    return held.credential.amount
