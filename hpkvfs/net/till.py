"""One request at a time, from the credentials that it presents to those that it is answered with.

    selection -> prove -> journal -> ask until answered -> check -> settle

Invariants:
  - no byte of a request leaves before the journal has its inputs and the secrets to use its
    answer; what left is settled only by an answer with the issuer's proof in it;
  - wallet and journal change together, between two awaits of the one trio thread: what the one
    has, the other writes down with its next commit;
  - a pending has one driver at most; whoever waits for a change looks again after each.

Proofs of ordinary requests and checks of replies are a Prover's (net/proving.py), which may have
other processes do them: meanwhile the inputs are set aside, and count as held. What is rare, and
what must let nobody in between, is proved at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import trio

from hpkvfs.errors import Misbehaviour, Refusal, SpentElsewhere
from hpkvfs.net.epochs import Epochs
from hpkvfs.net.line import Line
from hpkvfs.net.order import Answer, Order, Task
from hpkvfs.net.proving import Here, Prover
from hpkvfs.net.refusals import NoRoom, UnknownEpoch, out_of_place, refusal
from hpkvfs.net.transport import NoReply
from hpkvfs.protocol import codec
from hpkvfs.protocol.credential import Draft
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    Done,
    Fact,
    Refused,
    ReissueRequest,
    Spent,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.journal import Journal
from hpkvfs.wallet.wallet import Attempt, Held, Pending, Selection, Wallet, split

CLAIM: Final = b"claim"
"""The memo of a reissue that takes in a credential out of a breakglass entry."""


class Till:
    """The wallet, its journal, and the line to the server that issues what is in it."""

    def __init__(
        self,
        journal: Journal,
        line: Line,
        epochs: Epochs,
        rng: Callable[[int], bytes],
        prover: Prover | None = None,
    ) -> None:
        """`prover`: who makes the proofs, this thread if None. VaultError if damaged."""
        self.journal: Final = journal
        self.wallet: Final[Wallet] = journal.load()
        self.bought: Final[set[bytes]] = set()
        """Memos of the purchases that were settled since the process began."""
        self._line = line
        self._epochs = epochs
        self._here = Here(rng)
        self._prover = prover or self._here
        self._proving: Counter[bytes] = Counter()
        self._driven: set[int] = set()
        self._changed = trio.Event()
        self._left = trio.Event()

    # Beginning.

    def begin(
        self,
        epoch: EpochParameters,
        selection: Selection,
        order: Order,
        into: EpochParameters | None = None,
    ) -> tuple[Pending, bytes]:
        """The pending of an order and its frame; the journal does not have it yet.

        `into`: the epoch of what it asks for, if that is another.
        """
        request = order.make(epoch.digest)
        task = Task.of(epoch, request, selection.inputs, selection.amounts, into)
        try:
            attempt = task.attempt(self._here.prepared(*task.arguments), order.complete)
        except BaseException:
            self.wallet.put_back(selection)
            raise
        return self._begin(selection, order, attempt)

    async def begin_elsewhere(
        self, epoch: EpochParameters, selection: Selection, order: Order
    ) -> tuple[Pending, bytes]:
        """As `begin`, by the prover; others go on meanwhile."""
        request = order.make(epoch.digest)
        task = Task.of(epoch, request, selection.inputs, selection.amounts)
        self._proving[epoch.digest] += 1
        try:
            attempt = task.attempt(await self._prover.prepare(*task.arguments), order.complete)
        except BaseException:
            self.wallet.put_back(selection)
            self._change()
            raise
        finally:
            self._proving[epoch.digest] -= 1
        return self._begin(selection, order, attempt)

    def _begin(self, selection: Selection, order: Order, attempt: Attempt) -> tuple[Pending, bytes]:
        frame = codec.REQUEST.wrap(attempt.body)
        if not attempt.into:  # else it can be repeated when its epoch has ended
            attempt = replace(attempt, body=b"")
        where = selection.inputs, attempt, order.memo, order.place
        return self.wallet.begin(selection.epoch, *where), frame

    def prove(
        self,
        epoch: EpochParameters,
        request: CredentialedRequest,
        inputs: tuple[Held, ...],
        amounts: tuple[int, int],
    ) -> Attempt:
        """A request to be repeated as it is, also after a restart: it keeps its body."""
        task = Task.of(epoch, request, inputs, amounts)
        return task.attempt(self._here.prepared(*task.arguments))

    def prove_purchase(
        self, epoch: EpochParameters, request: CredentialedRequest, amount: int
    ) -> Attempt:
        """A request for credentials of so many tokens in all."""
        return self.prove(epoch, request, (), split(amount, epoch.tariff.insert))

    # Asking.

    async def perform(self, pending: Pending, frame: bytes) -> Answer:
        """Journal, ask, settle; Refusal, NoReply, Misbehaviour, VaultError.

        What has not left, or has no inputs and was refused for good, is undone.
        """
        with self.driving(pending):
            try:
                await self.journal.begin(pending)
            except BaseException:
                self.release(pending)
                raise
            try:
                return await self.answer(pending, frame)
            except NoReply as failure:
                if not failure.sent:
                    self.release(pending)
                raise
            except Refusal as refused:
                self.give_up(pending, refused)
                raise

    async def answer(
        self, pending: Pending, frame: bytes, attempt: Attempt | None = None
    ) -> Answer:
        """Ask, and settle by whatever the answer proves; it may prove an earlier attempt.

        For who drives the pending, which the journal has. `attempt`: the one that the frame is of,
        if that is not the last.
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

    async def reissue(self, epoch: EpochParameters, selection: Selection) -> None:
        """Have two credentials replaced by two of the selection's amounts."""
        order = Order(Operation.REISSUE, lambda digest: ReissueRequest(digest, 2))
        await self.perform(*self.begin(epoch, selection, order))

    async def grow(self, epoch: EpochParameters) -> None:
        """Two more credentials, of no value, for free. Nothing is at stake, so no journal."""
        attempt = self.prove(epoch, ReissueRequest(epoch.digest, 0), (), (0, 0))
        pending = self.wallet.begin(epoch.digest, (), attempt)
        with self.driving(pending):
            try:
                await self.answer(pending, codec.REQUEST.wrap(attempt.body))
            finally:
                if pending.number in self.wallet.pending:
                    self.wallet.release(pending)

    async def _settle(self, pending: Pending, attempt: Attempt, fact: Fact, issued: bytes) -> None:
        if (fact.operation, fact.delta) != (attempt.operation, attempt.delta):
            raise Misbehaviour("the server charged for something else than was asked for")
        epoch = await self._epochs.get(attempt.into or pending.epoch)
        try:
            draft = attempt.draft or Draft.decode(attempt.secrets)
            outputs = await self._prover.finish(epoch.issuer, draft, issued)
        except ProtocolError as error:
            raise Misbehaviour(f"the server's credentials are worthless: {error}") from error
        settled = self.wallet.settle(pending, attempt, outputs)
        if attempt.operation is Operation.ISSUE:
            self.bought.add(pending.memo)
        self.journal.settle(settled, self.wallet.book)

    def _own(self, pending: Pending, reply: Spent) -> tuple[Attempt, Fact, bytes]:
        try:
            return _own(pending, reply)
        except SpentElsewhere:
            if pending.memo == CLAIM:
                self.wallet.write_off(pending)
                self.journal.write_off(pending, self.wallet.book)
            raise

    # Undoing.

    def give_up(self, pending: Pending, refused: Refusal) -> None:
        """A refusal for good of what has no inputs undoes it."""
        if isinstance(refused, NoRoom | UnknownEpoch):
            return  # the request, or a copy of it, may be performed yet, or was before
        if not pending.inputs:
            self.release(pending)

    def release(self, pending: Pending) -> None:
        """Undo it: no byte of it was sent, or it has no inputs and was refused."""
        self.wallet.release(pending)
        self.journal.release(pending)

    # Who is at it.

    @contextmanager
    def driving(self, pending: Pending) -> Iterator[None]:
        """The pending is being dealt with; afterwards whoever waits for a change looks again."""
        self._driven.add(pending.number)
        try:
            yield
        finally:
            self._driven.discard(pending.number)
            self._change()
            if pending.number in self.wallet.pending:
                self._left.set()
                self._left = trio.Event()
            if not self._driven:
                self.journal.nudge()

    def is_driven(self, number: int) -> bool:
        """Whether somebody deals with the pending of this number."""
        return number in self._driven

    def undriven(self) -> list[Pending]:
        """Pendings that nobody deals with, oldest first."""
        if len(self.wallet.pending) == len(self._driven):
            return []
        return [one for one in self.wallet.pending.values() if one.number not in self._driven]

    def is_busy(self, epoch: bytes) -> bool:
        """Whether anybody is about to have other credentials of this epoch."""
        if self._proving[epoch]:
            return True
        pending = self.wallet.pending
        return any(pending[one].epoch == epoch for one in self._driven if one in pending)

    async def change(self) -> None:
        """Return when somebody is done with a pending, or did not come to have one."""
        await self._changed.wait()

    async def left_pending(self) -> None:
        """Return when somebody is done with what is pending all the same."""
        await self._left.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


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
