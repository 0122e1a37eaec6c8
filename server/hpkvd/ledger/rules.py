"""What a ledger decides, whatever keeps its rows.

An engine (sqlite.py, postgresql.py) performs jobs in batches: one database transaction holds
many. It shows the rules its rows through Tables, as they are after every job decided before in
the same batch, and adds what the rules posted to the books. So both engines decide alike, and
differ only in how rows are read, written and made durable.

Invariant: nothing is written for a job before every check of it has passed, so that a refused one
leaves no trace in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from hpkvd.ledger import (
    Begin,
    Change,
    Delete,
    GiveUp,
    Insert,
    Known,
    Opening,
    Paid,
    Read,
    Redeem,
    Sale,
    Settle,
    StoredEntry,
    StoreEntry,
    Transaction,
    Verdict,
)
from hpkvfs.protocol.messages import Done, Fact, Outcome, Reason, Refused, StoredFact
from hpkvfs.protocol.tariff import Operation


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete the breakglass entries that are gone at this hour."""

    now: int


@dataclass(frozen=True, slots=True)
class Retire:
    """No epoch below this one can be presented any more."""

    oldest: int


Account: TypeAlias = Begin | Settle | GiveUp
Job: TypeAlias = Transaction | Opening | Drop | Retire | Account
Result: TypeAlias = Verdict | StoredEntry | Sale | Paid | None


@dataclass(slots=True)
class Posting:
    """What a batch adds to the books; the fields are its columns, in order."""

    issued: int = 0
    charged: int = 0
    refunded: int = 0
    outstanding: int = 0
    requests: int = 0
    serials: int = 0
    blobs: int = 0

    def add(self, transaction: Transaction) -> None:
        """Post a transaction that was performed."""
        delta = transaction.delta
        if transaction.operation is Operation.ISSUE:
            self.issued += delta
        elif delta < 0:
            self.charged -= delta
        else:
            self.refunded += delta
        self.outstanding += delta
        self.requests += 1
        self.serials += len(transaction.serials)
        self.blobs += isinstance(transaction.change, Insert)
        self.blobs -= isinstance(transaction.change, Delete)


class Reading(Protocol):
    """Rows, as far as deciding needs them."""

    def known(self, fingerprint: bytes, serials: Sequence[bytes]) -> tuple[StoredFact, ...]:
        """The requests with this fingerprint or one of these serials."""
        ...

    def digest(self, key: bytes) -> bytes | None:
        """The digest of the blob under a key."""
        ...

    def voucher(self, digest: bytes) -> tuple[int, bool] | None:
        """A voucher's amount, and whether it is spent."""
        ...

    def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """The breakglass entry under a key, unless its timer has fired."""
        ...

    def sale(self, voucher: bytes) -> Sale | None:
        """The unsettled sale of a voucher."""
        ...


class Tables(Reading, Protocol):
    """Rows that can be changed; what is changed can be read at once."""

    def blob(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        ...

    def put_blob(self, insert: Insert) -> None:
        """Its key is not in use."""
        ...

    def delete_blob(self, key: bytes) -> None:
        """There is one."""
        ...

    def spend_voucher(self, digest: bytes) -> None:
        """It is unspent."""
        ...

    def put_sale(self, sale: Sale) -> None:
        """There is none of its voucher."""
        ...

    def drop_sale(self, voucher: bytes) -> None:
        """If there is one."""
        ...

    def settle(self, settlement: Settle) -> None:
        """Make its voucher, of which there is none; keep its takings; add to what was sold."""
        ...

    def put_entry(self, entry: StoreEntry, epoch: int) -> None:
        """In the place of the one under its key, if there is one."""
        ...

    def start_timer(self, opening: Opening) -> None:
        """Unless it runs: the entry stays for its whole hours and what is left of this one."""
        ...

    def drop_entries(self, now: int) -> None:
        """Those whose timers have fired."""
        ...

    @property
    def oldest_epoch(self) -> int:
        """Number of the oldest epoch that can be presented; it stays so until COMMIT."""
        ...

    def retire(self, oldest: int) -> None:
        """Unless it is that or a later one already."""
        ...

    def record(self, transaction: Transaction, fact: Fact) -> None:
        """The request and its serials; neither is there yet."""
        ...


def perform(tables: Tables, job: Job, posting: Posting) -> Result:
    """Do one job, or find that it is known or refused."""
    match job:
        case Transaction():
            return _apply(tables, job, posting)
        case Opening(key, digest, now):
            stored = tables.entry(key, now)
            if stored is None or stored.digest != digest:
                return None
            tables.start_timer(job)
            return tables.entry(key, now)
        case Retire(oldest):
            tables.retire(oldest)
            return None
        case Drop(now):
            tables.drop_entries(now)
            return None
        case Begin() | Settle() | GiveUp():
            _account(tables, job)
            return paid_for(tables, job.voucher if isinstance(job, GiveUp) else job.sale.voucher)


def paid_for(tables: Reading, voucher: bytes) -> Sale | Paid | None:
    """How far paying for a voucher is."""
    stored = tables.voucher(voucher)
    return tables.sale(voucher) if stored is None else Paid(stored[0])


def _account(tables: Tables, job: Account) -> None:
    match job:
        case Begin(sale):
            if paid_for(tables, sale.voucher) is None:
                tables.put_sale(sale)
        case Settle(sale):
            if tables.voucher(sale.voucher) is None:
                tables.settle(job)
            tables.drop_sale(sale.voucher)
        case GiveUp(voucher):
            tables.drop_sale(voucher)


def refusal(tables: Reading, change: Change) -> Reason | None:
    """Why a change cannot be, if it cannot."""
    match change:
        case Insert(key):
            return None if tables.digest(key) is None else Reason.KEY_EXISTS
        case Delete(key, digest):
            return _deletion_refusal(tables.digest(key), digest)
        case Redeem(voucher, amount):
            return _redemption_refusal(tables.voucher(voucher), amount)
        case StoreEntry(key, counter, now=now):
            stored = tables.entry(key, now)
            newer = stored is None or counter > stored.counter
            return None if newer else Reason.OLD_COUNTER
        case _:
            return None


def _apply(tables: Tables, transaction: Transaction, posting: Posting) -> Verdict:
    has_ended = transaction.epoch < tables.oldest_epoch
    if transaction.kept_with < tables.oldest_epoch:
        return Refused(Reason.EPOCH_ENDED)
    known = tables.known(transaction.fingerprint, () if has_ended else transaction.serials)
    if known:
        return Known(known)
    if has_ended:
        return Refused(Reason.EPOCH_ENDED)
    reason = refusal(tables, transaction.change)
    if reason is not None:
        return Refused(reason)
    outcome, value = _change(tables, transaction)
    fact = Fact(transaction.operation, outcome, transaction.delta)
    tables.record(transaction, fact)
    posting.add(transaction)
    return Done(fact, transaction.issued, value)


def _change(tables: Tables, transaction: Transaction) -> tuple[Outcome, bytes | None]:
    match transaction.change:
        case Read(key):
            value = tables.blob(key)
            return (Outcome.ABSENT if value is None else Outcome.FOUND), value
        case Insert() as insert:
            tables.put_blob(insert)
            return Outcome.INSERTED, None
        case Delete(key):
            tables.delete_blob(key)
            return Outcome.DELETED, None
        case StoreEntry() as entry:
            tables.put_entry(entry, transaction.epoch)
            return Outcome.STORED, None
        case Redeem(voucher):
            tables.spend_voucher(voucher)
            return Outcome.ISSUED, None
        case None:
            return Outcome.REISSUED, None


def _deletion_refusal(stored: bytes | None, digest: bytes) -> Reason | None:
    if stored is None:
        return Reason.KEY_ABSENT
    return None if stored == digest else Reason.DIGEST_MISMATCH


def _redemption_refusal(stored: tuple[int, bool] | None, amount: int) -> Reason | None:
    if stored is None:
        return Reason.UNKNOWN_VOUCHER
    worth, spent = stored
    if spent:
        return Reason.VOUCHER_SPENT
    return None if worth == amount else Reason.VOUCHER_AMOUNT
