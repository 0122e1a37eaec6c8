"""Planted bugs, by name: the simulator has to find each.

Each breaks one rule that the real code keeps, as a plausible mistake would. A mutation is a
list of (owner, attribute, what to put there) made from the real thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final
from unittest.mock import patch

import trio

import hpkvfs.errors
import hpkvfs.fs.publisher
import hpkvfs.fs.redolog
import hpkvfs.net.epochs
import hpkvfs.volume.volume
import hpkvfs.wallet.journal
from hpkvd.handler import Handler
from hpkvd.ledger import Delete, Transaction
from hpkvd.ledger.group import Group
from hpkvd.ledger.rules import Posting
from hpkvd.ledger.sqlite_tables import SqliteTables
from hpkvfs import threads
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.redolog import RedoLog
from hpkvfs.net.ended import Ended
from hpkvfs.net.teller import Teller
from hpkvfs.net.till import Till
from hpkvfs.net.transport import NoReply
from hpkvfs.protocol.messages import Done, Fact
from hpkvfs.protocol.tariff import Operation
from hpkvfs.session import Session
from hpkvfs.session.footing import Footing
from hpkvfs.session.records import LocalRecords
from hpkvfs.types import ANCHOR_BIT
from hpkvfs.volume.commit import Insert, Step, publish
from hpkvfs.wallet import rows
from hpkvfs.wallet.journal import Journal
from hpkvfs.wallet.wallet import Book, Pending, Settled, Wallet

Replacement = tuple[object, str, object]
MUTATIONS: Final[dict[str, Callable[[], list[Replacement]]]] = {}


def _mutation(make: Callable[[], list[Replacement]]) -> Callable[[], list[Replacement]]:
    MUTATIONS[make.__name__.strip("_").replace("_", " ")] = make
    return make


@contextmanager
def planted(mutation: str | Callable[[], list[Replacement]] | None) -> Iterator[None]:
    """The code with this mutation, of here by its name; None leaves it as it is."""
    make = MUTATIONS[mutation] if isinstance(mutation, str) else mutation
    with ExitStack() as stack:
        for owner, attribute, value in make() if make else ():
            stack.enter_context(patch.object(owner, attribute, value))
        yield


# -- the server ------------------------------------------------------------------------------


@_mutation
def _reply_not_stored() -> list[Replacement]:
    """The ledger keeps the fact of a request but not what was issued for it."""
    record = SqliteTables.record

    def forgetful(self: SqliteTables, transaction: Transaction, fact: Fact) -> None:
        record(self, replace(transaction, issued=bytes(len(transaction.issued))), fact)

    return [(SqliteTables, "record", forgetful)]


@_mutation
def _serial_not_recorded() -> list[Replacement]:
    """A spent credential can be spent by another request."""
    record = SqliteTables.record

    def careless(self: SqliteTables, transaction: Transaction, fact: Fact) -> None:
        record(self, replace(transaction, serials=()), fact)

    return [(SqliteTables, "record", careless)]


@_mutation
def _reply_before_commit() -> list[Replacement]:
    """Callers hear the verdict from memory while the disk is still writing."""

    async def hasty(self: Any) -> None:
        batch = [self._queue.popleft() for _ in range(len(self._queue))]
        ledger = self._perform.__self__
        await ledger._begin()
        results = ledger._write_all([waiting.job for waiting in batch])
        for waiting, result in zip(batch, results, strict=True):
            waiting.result = result
            waiting.decided.set()
        try:
            await threads.in_thread(lambda: ledger._write.execute("COMMIT"))
        except Exception:
            ledger._roll_back()

    return [(Group, "_next_batch", hasty)]


@_mutation
def _request_recorded_under_another_name() -> list[Replacement]:
    """A repeated request is not recognised, only that its credentials were spent."""
    record = SqliteTables.record

    def confused(self: SqliteTables, transaction: Transaction, fact: Fact) -> None:
        record(self, replace(transaction, fingerprint=transaction.fingerprint[::-1]), fact)

    return [(SqliteTables, "record", confused)]


@_mutation
def _refund_credited_twice() -> list[Replacement]:
    """The server's books count a refund once for the blob and once for its serials."""
    add = Posting.add

    def generous(self: Posting, transaction: Transaction) -> None:
        add(self, transaction)
        if isinstance(transaction.change, Delete):
            self.refunded += transaction.delta
            self.outstanding += transaction.delta

    return [(Posting, "add", generous)]


@_mutation
def _deletion_answered_and_not_done() -> list[Replacement]:
    """A blob that was refunded stays."""

    def lazy(self: SqliteTables, key: bytes) -> None:
        pass

    return [(SqliteTables, "delete_blob", lazy)]


@_mutation
def _repeated_look_up_issues_anew() -> list[Replacement]:
    """The answer to a repeated request is made again instead of remembered."""
    recalled = Handler._recalled

    async def anew(self: Handler, *arguments: Any) -> Any:
        reply = await recalled(self, *arguments)
        if isinstance(reply, Done):
            return replace(reply, issued=reply.issued[::-1])
        return reply

    return [(Handler, "_recalled", anew)]


# -- the wallet ------------------------------------------------------------------------------


@_mutation
def _journal_after_send() -> list[Replacement]:
    """A request leaves while the journal is still to be written."""

    async def begin(self: Journal, pending: Pending) -> None:
        row = rows.pack_pending(pending)
        self._add(hpkvfs.wallet.journal._ADD_PENDING, "pendings", pending.number, row)
        await trio.lowlevel.checkpoint()

    return [(Journal, "begin", begin)]


@_mutation
def _unanswered_request_released() -> list[Replacement]:
    """What was never answered counts as never sent."""
    perform = Till.perform

    async def hopeful(self: Till, pending: Pending, frame: bytes) -> Any:
        try:
            return await perform(self, pending, frame)
        except NoReply as failure:
            if failure.sent and pending.number in self.wallet.pending:
                self.release(pending)
            raise

    return [(Till, "perform", hopeful)]


@_mutation
def _settled_twice() -> list[Replacement]:
    """The journal keeps the inputs of a settled request along with its outputs."""

    def settle(self: Journal, settled: Settled, book: Book) -> None:
        keeping = copy.copy(settled)
        object.__setattr__(keeping, "pending", replace(settled.pending, inputs=()))
        real_settle(self, keeping, book)

    real_settle = Journal.settle
    return [(Journal, "settle", settle)]


@_mutation
def _refused_credentials_shown_again() -> list[Replacement]:
    """After a refusal the same credentials go into another operation, and link the two."""
    perform = Till.perform

    async def careless(self: Till, pending: Pending, frame: bytes) -> Any:
        try:
            return await perform(self, pending, frame)
        except hpkvfs.errors.Refusal:
            if pending.number in self.wallet.pending:
                self.release(pending)
            raise

    async def nothing(self: Teller, pending: Pending) -> None:
        return None

    return [(Till, "perform", careless), (Teller, "_resolved_at_once", nothing)]


@_mutation
def _full_disk_ends_the_mount() -> list[Replacement]:
    """A background task that cannot write takes the whole client with it."""

    async def once(self: Session) -> None:
        await self.store.run()

    return [(Session, "_run_store", once)]


# -- epochs that end ---------------------------------------------------------------------------


@_mutation
def _expired_tokens_still_held() -> list[Replacement]:
    """What is of an epoch that ended stays in the wallet."""
    return [(Wallet, "expire", lambda self, epoch: [])]


@_mutation
def _ended_epoch_still_paid_with() -> list[Replacement]:
    """The client takes every epoch that it knows for one in use."""
    refresh = hpkvfs.net.epochs.Epochs._refresh

    async def trusting(self: Any, apart: Any) -> None:
        await refresh(self, apart)
        self._live = sorted(self._known.values(), key=lambda one: one.number)

    return [(hpkvfs.net.epochs.Epochs, "_refresh", trusting)]


@_mutation
def _replies_dropped_an_epoch_too_soon() -> list[Replacement]:
    """Records go while their epoch can still be presented."""
    record = SqliteTables.record

    def short(self: SqliteTables, transaction: Transaction, fact: Fact) -> None:
        record(self, replace(transaction, epoch=transaction.epoch - 1, into=0), fact)

    return [(SqliteTables, "record", short)]


@_mutation
def _moves_forgotten_with_the_epoch_they_left() -> list[Replacement]:
    """Tokens on their way into a later epoch are lost with the earlier one."""
    record = SqliteTables.record

    def short(self: SqliteTables, transaction: Transaction, fact: Fact) -> None:
        record(self, replace(transaction, into=0), fact)

    return [(SqliteTables, "record", short)]


@_mutation
def _pending_of_an_ended_epoch_written_off_blindly() -> list[Replacement]:
    """Nobody asks whether it was performed."""

    async def blind(self: Ended, pending: Pending) -> None:
        await trio.lowlevel.checkpoint()
        self._lose(pending, done=False)

    return [(Ended, "find_out", blind)]


@_mutation
def _pending_of_an_ended_epoch_taken_for_performed() -> list[Replacement]:
    """It gets its receipt without a look."""

    async def hopeful(self: Ended, pending: Pending) -> bool:
        await trio.lowlevel.checkpoint()
        return pending.attempts[0].operation is Operation.INSERT

    return [(Ended, "_is_there", hopeful)]


# -- publication -----------------------------------------------------------------------------


@_mutation
def _anchor_before_barrier() -> list[Replacement]:
    """The anchor is stored before all that it names."""

    def hasty(*arguments: Any) -> Generator[Step, None, Any]:
        steps, held, step = publish(*arguments), list[Step](), None
        while True:
            try:
                step = next(steps)
            except StopIteration as stop:
                yield from held
                return stop.value
            is_anchor = isinstance(step, Insert) and step.blobs[0].ref.id & ANCHOR_BIT
            if isinstance(step, Insert) and not is_anchor:
                held.append(step)
            else:
                yield step

    return [(hpkvfs.fs.publisher, "publish", hasty)]


@_mutation
def _receipt_forgotten_early() -> list[Replacement]:
    """Receipts go when a publication begins, not when its anchor accounts for them."""
    mark = LocalRecords.mark

    def early(self: LocalRecords) -> int:
        self.settle(mark(self))
        return mark(self)

    return [(LocalRecords, "mark", early)]


@_mutation
def _orphans_not_absorbed() -> list[Replacement]:
    """After a crash nobody looks which ids were used: they are used again, or leak."""
    return [(Footing, "absorb", lambda self, receipts: None)]


@_mutation
def _redo_log_truncated_before_anchor() -> list[Replacement]:
    """The log goes when its changes are frozen, not when they are published."""
    freeze = Filesystem.freeze

    def early(self: Filesystem) -> int:
        covered = freeze(self)
        self._log.drop(covered)
        return covered

    return [(Filesystem, "freeze", early)]


@_mutation
def _generation_noted_before_it_is_stored() -> list[Replacement]:
    """A client that dies before the anchor is there believes in it."""
    store_one = hpkvfs.fs.publisher.Publisher._store_one

    async def early(self: Any, sealed: Any) -> None:
        if sealed.ref.id & ANCHOR_BIT:
            generation = sealed.ref.id & ~ANCHOR_BIT
            known = hpkvfs.volume.volume.open_anchor(self._volume.sealer, generation, sealed.blob)
            await self._records.save_known(known)
        await store_one(self, sealed)

    return [(hpkvfs.fs.publisher.Publisher, "_store_one", early)]


@_mutation
def _own_newer_generation_not_adopted() -> list[Replacement]:
    """After a crash between anchor and note, the totals of the layers are counted again."""
    return [(Filesystem, "rebase", lambda self, size, files: None)]


# -- the redo log ----------------------------------------------------------------------------


@_mutation
def _fsync_does_nothing() -> list[Replacement]:
    """What fsync returned for is in the page cache."""
    return [(RedoLog, "syncer", lambda self: lambda: None)]


@_mutation
def _fsync_forgets_the_file_before() -> list[Replacement]:
    """fsync flushes the file that is written to, not the ones being published."""
    syncer = RedoLog.syncer

    def partial(self: RedoLog) -> Callable[[], None]:
        retired, self._retired = self._retired, {}
        try:
            return syncer(self)
        finally:
            self._retired = retired

    return [(RedoLog, "syncer", partial)]


@_mutation
def _log_not_durable_before_the_anchor() -> list[Replacement]:
    """What is published may be missing from the log that is replayed over it."""

    async def skip(self: LocalRecords) -> None:
        await trio.lowlevel.checkpoint()

    return [(LocalRecords, "sync_log", skip)]


@_mutation
def _replay_skips_nothing() -> list[Replacement]:
    """A log file is replayed also when the one before it lost its end."""

    def always(self: RedoLog, number: int, raw: bytes, covered: int) -> bool:
        return len(raw.rstrip(b"\0")) >= hpkvfs.fs.redolog._HEADER.size

    return [(RedoLog, "_follows", always)]
