"""A batch in PostgreSQL: the rows that it needs in memory, and the statements that it writes.

    write():  jobs      -> fetch and lock | decide (rules.py) | write, COMMIT
    answer(): questions -> fetch          | answer

Why no two servers can spend one serial. READ COMMITTED is enough, since each decision rests on

- the absence of a row (a serial, a fingerprint, a key) that the same transaction then inserts:
  its primary key lets one of two do so, and the other, told so, decides its whole batch anew;
- or on a row that was read FOR UPDATE (a blob to delete, a voucher, an entry), or FOR SHARE (the
  oldest epoch in use): nobody changes it before COMMIT, so no serial is forgotten under a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Final, TypeAlias

import psycopg

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
    rules,
    till,
)
from hpkvd.ledger.postgresql_connection import Connection
from hpkvd.ledger.rules import Drop, Job, Posting, Result, Retire
from hpkvfs.protocol.messages import Fact, Outcome, Reason, StoredFact
from hpkvfs.protocol.tariff import Operation

_OLDEST: Final = "SELECT oldest FROM ended FOR SHARE"
_FACTS: Final = """
SELECT fingerprint, operation, outcome, delta, issued FROM request WHERE fingerprint = ANY(%b)
"""
# Of what is asked for, whatever is there, and the request that it leads to.
_KNOWN: Final = """
SELECT serial, fingerprint FROM serial WHERE serial = ANY(%b)
UNION ALL SELECT fingerprint, fingerprint FROM request WHERE fingerprint = ANY(%b)
"""
_DIGESTS: Final = "SELECT key, digest FROM blob WHERE key = ANY(%b)"
_BLOBS: Final = "SELECT key, blob FROM blob WHERE key = ANY(%b)"
_VOUCHERS: Final = "SELECT digest, amount, spent FROM voucher WHERE digest = ANY(%b)"
_ENTRIES: Final = """
SELECT key, hours, counter, digest, value, gone_at FROM entry WHERE key = ANY(%b)
"""
_SALES: Final = f"{till.SALE} WHERE voucher = ANY(%b)"
_FOR_UPDATE: Final = " ORDER BY 1 FOR UPDATE"
_RECORD: Final = """
WITH spent AS (
    INSERT INTO serial (serial, fingerprint) SELECT * FROM unnest(%b::bytea[], %b::bytea[])
)
INSERT INTO request (fingerprint, epoch, operation, outcome, delta, issued)
SELECT * FROM unnest(%b::bytea[], %b::bigint[], %b::bigint[], %b::bigint[], %b::bigint[],
    %b::bytea[])
"""
_BLOB_ROWS: Final = """
INSERT INTO blob (key, digest, blob)
SELECT * FROM unnest(%b::bytea[], %b::bytea[], %b::bytea[])
"""
_BOOKS: Final = """
UPDATE books SET issued = issued + %b, charged = charged + %b, refunded = refunded + %b,
    outstanding = outstanding + %b, requests = requests + %b, serials = serials + %b,
    blobs = blobs + %b
"""
_STORE_ENTRY: Final = """
INSERT INTO entry (key, epoch, counter, digest, value, hours) VALUES (%b, %b, %b, %b, %b, %b)
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What is known of a request; else why its change would be refused."""

    fingerprint: bytes
    serials: Sequence[bytes]
    change: Change


@dataclass(frozen=True, slots=True)
class Blob:
    """The blob under a key."""

    key: bytes


@dataclass(frozen=True, slots=True)
class EntryAt:
    """The breakglass entry under a key, unless its timer has fired at this hour."""

    key: bytes
    now: int


@dataclass(frozen=True, slots=True)
class PaidFor:
    """How far paying for the voucher with this digest is."""

    voucher: bytes


Question: TypeAlias = Request | Blob | EntryAt | PaidFor
Answer: TypeAlias = Known | Reason | bytes | StoredEntry | Sale | Paid | None


def write(connection: Connection, jobs: Sequence[Job]) -> tuple[Sequence[Result], int]:
    """Perform and COMMIT: the results, and the oldest epoch that can be presented then."""
    needs, sheet, posting = _Needs(), _Sheet(), Posting()
    for job in jobs:
        needs.job(job)
    sheet.fetch(connection, needs, lock=True)
    results = [rules.perform(sheet, job, posting) for job in jobs]
    sheet.write(connection, posting)
    return results, sheet.oldest_epoch


def answer(
    connection: Connection,
    questions: Sequence[Question],
    has_room: Callable[[Connection], bool],
) -> Sequence[Answer]:
    """One for each question; `has_room` is asked if one of them is about an insertion."""
    needs, sheet = _Needs(), _Sheet()
    for question in questions:
        needs.job(question)
    sheet.fetch(connection, needs, lock=False)
    full = any(_grows(question) for question in questions) and not has_room(connection)
    return [_answered(sheet, question, full) for question in questions]


@dataclass(frozen=True, slots=True)
class _StoredRow:
    hours: int
    stored: StoredEntry


class _Needs:
    """The keys of all rows that a batch needs."""

    def __init__(self) -> None:
        self.fingerprints: set[bytes] = set()
        self.serials: set[bytes] = set()
        self.digests: set[bytes] = set()
        self.doomed: set[bytes] = set()
        self.blobs: set[bytes] = set()
        self.vouchers: set[bytes] = set()
        self.sales: set[bytes] = set()
        self.entries: set[bytes] = set()

    def job(self, job: Job | Question) -> None:
        match job:
            case Transaction(fingerprint=fingerprint, serials=serials, change=change):
                self._request(fingerprint, serials)
                self._change(change)
                if isinstance(change, Read):
                    self.blobs.add(change.key)
            case Request(fingerprint, serials, change):
                self._request(fingerprint, serials)
                self._change(change)
            case Blob(key):
                self.blobs.add(key)
            case Opening(key) | EntryAt(key):
                self.entries.add(key)
            case Begin(sale) | Settle(sale):
                self._payment(sale.voucher)
            case GiveUp(voucher) | PaidFor(voucher):
                self._payment(voucher)
            case Drop() | Retire():
                pass

    def _payment(self, voucher: bytes) -> None:
        self.vouchers.add(voucher)
        self.sales.add(voucher)

    def _request(self, fingerprint: bytes, serials: Iterable[bytes]) -> None:
        self.fingerprints.add(fingerprint)
        self.serials.update(serials)

    def _change(self, change: Change) -> None:
        match change:
            case Insert(key):
                self.digests.add(key)
            case Delete(key):
                self.doomed.add(key)
            case Redeem(voucher):
                self.vouchers.add(voucher)
            case StoreEntry(key):
                self.entries.add(key)
            case _:
                pass


class _Sheet:
    """rules.Tables: the rows of a batch in memory, and the statements that it will write."""

    def __init__(self) -> None:
        self._facts: dict[bytes, StoredFact] = {}
        self._leads_to: dict[bytes, bytes] = {}  # to a request: its fingerprint and its serials
        self._digests: dict[bytes, bytes] = {}
        self._blobs: dict[bytes, bytes] = {}
        self._vouchers: dict[bytes, tuple[int, bool]] = {}
        self._sales: dict[bytes, Sale] = {}
        self._entries: dict[bytes, _StoredRow] = {}
        self.oldest_epoch = 0
        self._recorded: list[tuple[Transaction, Fact]] = []
        self._inserted: list[tuple[bytes, bytes, bytes]] = []
        self._statements: list[tuple[str, tuple[object, ...]]] = []

    def fetch(self, connection: Connection, needs: _Needs, *, lock: bool) -> None:
        """One round trip; one more if anything is known of a request."""
        more = _FOR_UPDATE if lock else ""
        wanted: list[tuple[str, set[bytes], Callable[..., None]]] = [
            (_DIGESTS, needs.digests - needs.doomed, self._digests.__setitem__),
            (_DIGESTS + more, needs.doomed, self._digests.__setitem__),
            (_BLOBS, needs.blobs, self._blobs.__setitem__),
            (_VOUCHERS + more, needs.vouchers, self._add_voucher),
            (_SALES + more, needs.sales, self._add_sale),
            (_ENTRIES + more, needs.entries, self._add_entry),
        ]
        asked: list[tuple[psycopg.Cursor[tuple[Any, ...]], Callable[..., None]]] = []
        with connection.pipeline():
            if needs.fingerprints:
                names = list(needs.serials), list(needs.fingerprints)
                known = connection.execute(_KNOWN, names, binary=True)
                asked.append((known, self._leads_to.__setitem__))
            for query, keys, add in wanted:
                if keys:
                    asked.append((connection.execute(query, (list(keys),), binary=True), add))
            if lock:
                asked.append((connection.execute(_OLDEST), self._set_oldest))
        for cursor, add in asked:
            for row in cursor.fetchall():
                add(*row)
        if self._leads_to:
            found = list(set(self._leads_to.values()))
            for row in connection.execute(_FACTS, (found,), binary=True):
                self._add_fact(*row)

    def _set_oldest(self, oldest: int) -> None:
        self.oldest_epoch = oldest

    def _add_fact(
        self, fingerprint: bytes, operation: int, outcome: int, delta: int, issued: bytes
    ) -> None:
        fact = Fact(Operation(operation), Outcome(outcome), delta)
        self._facts[fingerprint] = StoredFact(fingerprint, fact, issued)

    def _add_voucher(self, digest: bytes, amount: int, spent: int) -> None:
        self._vouchers[digest] = amount, bool(spent)

    def _add_sale(self, *row: Any) -> None:
        sale = till.stored(*row)
        self._sales[sale.voucher] = sale

    def _add_entry(self, key: bytes, hours: int, *stored: Any) -> None:
        self._entries[key] = _StoredRow(hours, StoredEntry(*stored))

    # rules.Reading

    def known(self, fingerprint: bytes, serials: Sequence[bytes]) -> tuple[StoredFact, ...]:
        """See rules.Reading."""
        found = dict.fromkeys(map(self._leads_to.get, (fingerprint, *serials)))
        return tuple(self._facts[one] for one in found if one in self._facts)

    def digest(self, key: bytes) -> bytes | None:
        """See rules.Reading."""
        return self._digests.get(key)

    def blob(self, key: bytes) -> bytes | None:
        """See rules.Tables."""
        return self._blobs.get(key)

    def voucher(self, digest: bytes) -> tuple[int, bool] | None:
        """See rules.Reading."""
        return self._vouchers.get(digest)

    def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """See rules.Reading."""
        row = self._entries.get(key)
        if row is None or (row.stored.gone_at is not None and row.stored.gone_at <= now):
            return None
        return row.stored

    def sale(self, voucher: bytes) -> Sale | None:
        """See rules.Reading."""
        return self._sales.get(voucher)

    # rules.Tables

    def put_sale(self, sale: Sale) -> None:
        """See rules.Tables."""
        self._sales[sale.voucher] = sale
        self._till(till.putting(sale))

    def drop_sale(self, voucher: bytes) -> None:
        """See rules.Tables."""
        self._sales.pop(voucher, None)
        self._till(till.dropping(voucher))

    def settle(self, settlement: Settle) -> None:
        """See rules.Tables."""
        bought = settlement.sale
        self._vouchers[bought.voucher] = bought.tokens, False
        for statement in till.settling(settlement):
            self._till(statement)

    def _till(self, statement: till.Statement) -> None:
        text, parameters = statement
        self._later(text.replace("?", "%b"), *parameters)

    def put_blob(self, insert: Insert) -> None:
        """See rules.Tables."""
        self._digests[insert.key] = insert.digest
        self._blobs[insert.key] = insert.blob
        self._inserted.append((insert.key, insert.digest, insert.blob))

    def delete_blob(self, key: bytes) -> None:
        """See rules.Tables."""
        del self._digests[key]
        self._blobs.pop(key, None)
        self._later("DELETE FROM blob WHERE key = %b", key)

    def spend_voucher(self, digest: bytes) -> None:
        """See rules.Tables."""
        self._vouchers[digest] = self._vouchers[digest][0], True
        self._later("UPDATE voucher SET spent = 1 WHERE digest = %b", digest)

    def put_entry(self, entry: StoreEntry, epoch: int) -> None:
        """See rules.Tables."""
        stored = StoredEntry(entry.counter, entry.digest, entry.value, None)
        self._entries[entry.key] = _StoredRow(entry.hours, stored)
        self._later("DELETE FROM entry WHERE key = %b", entry.key)
        row = (entry.key, epoch, entry.counter, entry.digest, entry.value, entry.hours)
        self._later(_STORE_ENTRY, *row)

    def start_timer(self, opening: Opening) -> None:
        """See rules.Tables."""
        row = self._entries[opening.key]
        if row.stored.gone_at is not None:
            return
        gone_at = opening.now + row.hours + 1
        self._entries[opening.key] = replace(row, stored=replace(row.stored, gone_at=gone_at))
        self._later("UPDATE entry SET gone_at = %b WHERE key = %b", gone_at, opening.key)

    def drop_entries(self, now: int) -> None:
        """See rules.Tables."""
        self._later("DELETE FROM entry WHERE gone_at <= %b", now)

    def retire(self, oldest: int) -> None:
        """See rules.Tables."""
        if oldest > self.oldest_epoch:
            self.oldest_epoch = oldest
            self._later("UPDATE ended SET oldest = %b", oldest)

    def record(self, transaction: Transaction, fact: Fact) -> None:
        """See rules.Tables."""
        fingerprint = transaction.fingerprint
        self._facts[fingerprint] = StoredFact(fingerprint, fact, transaction.issued)
        names = (fingerprint, *transaction.serials)
        self._leads_to.update(dict.fromkeys(names, fingerprint))
        self._recorded.append((transaction, fact))

    def _later(self, statement: str, *parameters: object) -> None:
        self._insert()
        self._statements.append((statement, parameters))

    def _insert(self) -> None:
        """The blobs put so far, in one statement, which comes before whatever is to follow."""
        if self._inserted:
            self._statements.append((_BLOB_ROWS, _columns(self._inserted)))
            self._inserted = []

    def write(self, connection: Connection, posting: Posting) -> None:
        """Everything, and COMMIT; one round trip. Sorted: equal orders do not deadlock."""
        self._insert()
        if not self._statements and not self._recorded:
            connection.rollback()
            return
        self._recorded.sort(key=lambda one: one[0].fingerprint)
        serials = sorted(
            (serial, transaction.fingerprint)
            for transaction, _ in self._recorded
            for serial in transaction.serials
        )
        with connection.pipeline():
            if self._recorded:
                spent = _columns(serials) or ([], [])
                rows = _columns(_row(transaction, fact) for transaction, fact in self._recorded)
                connection.execute(_RECORD, (*spent, *rows))
            for statement, parameters in self._statements:
                connection.execute(statement, parameters)
            if self._recorded:
                connection.execute(_BOOKS, astuple(posting))
            connection.commit()


def _columns(rows: Iterable[tuple[object, ...]]) -> tuple[list[object], ...]:
    return tuple(map(list, zip(*rows, strict=True)))


def _row(transaction: Transaction, fact: Fact) -> tuple[object, ...]:
    return (
        transaction.fingerprint,
        transaction.kept_with,
        int(fact.operation),
        int(fact.outcome),
        fact.delta,
        transaction.issued,
    )


def _grows(question: Question) -> bool:
    return isinstance(question, Request) and isinstance(question.change, Insert | StoreEntry)


def _answered(sheet: _Sheet, question: Question, full: bool) -> Answer:
    match question:
        case Request(fingerprint, serials, change):
            known = sheet.known(fingerprint, serials)
            if known:
                return Known(known)
            return Reason.FULL if full and _grows(question) else rules.refusal(sheet, change)
        case Blob(key):
            return sheet.blob(key)
        case EntryAt(key, now):
            return sheet.entry(key, now)
        case PaidFor(voucher):
            return rules.paid_for(sheet, voucher)
