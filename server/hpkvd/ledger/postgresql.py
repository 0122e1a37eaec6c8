"""The ledger in PostgreSQL: several servers on one database, a standby that takes over.

A batch takes two round trips whatever its size, each one pipeline: fetch every row that deciding
needs, decide (rules.py), write and COMMIT. (One more fetches what is known of a request, if
anything is.) All that blocks runs in threads.

    submit() x n -> fetch | decide | write, COMMIT -> wake n callers

Why no two servers can spend one serial. READ COMMITTED is enough, since each decision rests on

- the absence of a row (a serial, a fingerprint, a key) that the same transaction then inserts:
  its primary key lets one of two do so, and the other, told so, decides its whole batch anew;
- or on a row that was read FOR UPDATE (a blob to delete, a voucher, an entry), or FOR SHARE (the
  oldest epoch in use): nobody changes it before COMMIT, so no serial is forgotten under a batch.

When the answer to COMMIT is lost (the server died, a standby took over) the batch is decided anew
on a new connection. What had been committed is then found as known, with its stored reply, and
the callers cannot tell the difference.

A read does not show what a crash can undo: PostgreSQL lets nobody see a transaction before its
COMMIT is durable, with `synchronous_standby_names` also on the standby. That holds as long as
nobody cancels that wait, so we set no statement timeout, and as long as the old primary is shut
out after a fail-over (docs/operator.md).

The statements are of the dialect that CockroachDB and YugabyteDB share; those were not tried.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
import trio
from psycopg import errors

from hpkvd.ledger import (
    Begin,
    Change,
    Delete,
    GiveUp,
    Insert,
    Known,
    LedgerBusy,
    LedgerError,
    LedgerFull,
    NewestEpoch,
    Opening,
    Paid,
    Read,
    Redeem,
    Sale,
    Settle,
    StoredEntry,
    StoreEntry,
    Taking,
    Totals,
    Transaction,
    Verdict,
    newest,
    rules,
    sweep,
    till,
)
from hpkvd.ledger.group import Group
from hpkvd.ledger.rules import Account, Drop, Job, Posting, Result, Retire
from hpkvd.ledger.sweep import Sweep
from hpkvd.log import Complaints
from hpkvfs import threads
from hpkvfs.protocol.messages import Done, Fact, Outcome, Reason, Refused, StoredFact
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher

SCHEMA_VERSION: Final = 6
SWEEP_ROWS: Final = 500
FAILOVER_SECONDS: Final = 20.0
CONNECT_SECONDS: Final = 3
SERVING: Final = "hpkvd serve"  # the application_name of servers
LONGEST_PAUSE: Final = 0.5

SCHEMA: Final = """
CREATE TABLE hpkvd (
    id          BIGINT PRIMARY KEY CHECK (id = 0),
    version     BIGINT NOT NULL,    -- of this schema
    state       TEXT NOT NULL       -- 'ready'; 'filling' or 'moved' by hpkvd migrate
);
CREATE TABLE request (
    fingerprint BYTEA PRIMARY KEY,  -- SHA-256 of the request's body
    epoch       BIGINT NOT NULL,    -- number of the last epoch it names: it goes when that ends
    operation   BIGINT NOT NULL,
    outcome     BIGINT NOT NULL,
    delta       BIGINT NOT NULL,    -- tokens added to its credentials
    issued      BYTEA NOT NULL      -- the issuer's reply
);
CREATE TABLE serial (
    serial      BYTEA PRIMARY KEY,  -- of a spent credential
    fingerprint BYTEA NOT NULL      -- the request that spent it
);
CREATE TABLE blob (
    key         BYTEA PRIMARY KEY,
    digest      BYTEA NOT NULL,     -- SHA-256 of the blob
    blob        BYTEA NOT NULL
);
CREATE TABLE voucher (
    digest      BYTEA PRIMARY KEY,  -- of its secret
    amount      BIGINT NOT NULL,
    spent       BIGINT NOT NULL DEFAULT 0
);
CREATE TABLE entry (
    key         BYTEA PRIMARY KEY,  -- of a breakglass entry
    epoch       BIGINT NOT NULL,    -- number of the epoch it was paid in
    counter     BIGINT NOT NULL,    -- greater than that of whatever it replaced
    digest      BYTEA NOT NULL,     -- SHA-256 of the value
    value       BYTEA NOT NULL,
    hours       BIGINT NOT NULL,    -- how long it can be opened once it was opened
    gone_at     BIGINT              -- the hour from which on it is gone; NULL: never opened
);
CREATE TABLE books (
    id          BIGINT PRIMARY KEY CHECK (id = 0),
    issued      BIGINT NOT NULL,    -- tokens sold
    charged     BIGINT NOT NULL,    -- tokens paid for look-ups and insertions
    refunded    BIGINT NOT NULL,    -- tokens given back for deletions
    outstanding BIGINT NOT NULL CHECK (outstanding >= 0), -- sum of every delta
    requests    BIGINT NOT NULL,
    serials     BIGINT NOT NULL,
    blobs       BIGINT NOT NULL,
    CHECK (issued = outstanding + charged - refunded)
);
INSERT INTO books VALUES (0, 0, 0, 0, 0, 0, 0, 0);
"""
_OLDEST: Final = "SELECT oldest FROM ended FOR SHARE"
_SWEPT: Final = "UPDATE books SET requests = requests - %b, serials = serials - %b"
# Ciphertext does not compress: PostgreSQL need not try. Others may not know the word.
TUNING: Final = "ALTER TABLE blob ALTER COLUMN blob SET STORAGE EXTERNAL"
# A server finds rows by their keys. Those of a young ledger, of which there are no statistics yet,
# PostgreSQL would find by walking through whole tables. (And where it has to, it would think that
# worth compiling.)
BY_KEY: Final = "SET enable_seqscan = off; SET jit = off"

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
_TOTALS: Final = f"""
SELECT issued, charged, refunded, outstanding, requests, serials, blobs,
    (SELECT count(*) FROM entry),
    (SELECT count(*) FROM voucher WHERE spent = 0),
    (SELECT coalesce(sum(amount), 0)::bigint FROM voucher WHERE spent = 0), {till.TOTALS}
FROM books
"""

# What can be tried again at once: somebody else was quicker (class 40: serialisation, deadlock).
_CONFLICTS: Final = (errors.UniqueViolation, errors.SerializationFailure, errors.DeadlockDetected)
_AGAIN: Final = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    errors.ReadOnlySqlTransaction,
)
_ROOM: Final = (errors.DiskFull, errors.OutOfMemory)

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Request:
    fingerprint: bytes
    serials: Sequence[bytes]
    change: Change


@dataclass(frozen=True, slots=True)
class _Blob:
    key: bytes


@dataclass(frozen=True, slots=True)
class _EntryAt:
    key: bytes
    now: int


@dataclass(frozen=True, slots=True)
class _PaidFor:
    voucher: bytes


_Question: TypeAlias = _Request | _Blob | _EntryAt | _PaidFor
_Answer: TypeAlias = Known | Reason | bytes | StoredEntry | Sale | Paid | None


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

    def job(self, job: Job | _Question) -> None:
        match job:
            case Transaction(fingerprint=fingerprint, serials=serials, change=change):
                self._request(fingerprint, serials)
                self._change(change)
                if isinstance(change, Read):
                    self.blobs.add(change.key)
            case _Request(fingerprint, serials, change):
                self._request(fingerprint, serials)
                self._change(change)
            case _Blob(key):
                self.blobs.add(key)
            case Opening(key) | _EntryAt(key):
                self.entries.add(key)
            case Begin(sale) | Settle(sale):
                self._payment(sale.voucher)
            case GiveUp(voucher) | _PaidFor(voucher):
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


class _Session:
    """One connection, made anew when it breaks; used by one thread at a time."""

    def __init__(self, url: str, *, autocommit: bool) -> None:
        self._url = url
        self._autocommit = autocommit
        self._connection: Connection | None = None
        self._closing = threading.Event()

    def run(self, work: Callable[[Connection], T]) -> T:
        """Do this on the connection, again and again until nothing transient is in its way.

        LedgerBusy after FAILOVER_SECONDS; LedgerFull; LedgerError.
        """
        end, pause = time.monotonic() + FAILOVER_SECONDS, 0.001
        while True:
            try:
                return work(self._connected())
            except _CONFLICTS as error:
                self._roll_back()
                failure: psycopg.Error = error
            except _ROOM as error:
                self._roll_back()
                raise LedgerFull("the database's disk is full; free some space") from error
            except _AGAIN as error:
                self._drop()
                failure = error
                pause = max(pause, 0.05)
            except psycopg.Error as error:
                self._drop()
                raise LedgerError(f"the database failed ({_name(error)}); see its log") from error
            if time.monotonic() + pause > end or self._closing.is_set():
                raise LedgerBusy(
                    f"the database does not answer ({_name(failure)}); is it up, and the primary?"
                ) from failure
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """End it; nothing is retried any more."""
        self._closing.set()
        self._drop()

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._url, autocommit=True, name=SERVING)
            self._check()
        return self._connection

    def _check(self) -> None:
        """Nobody moved the ledger away while we had no connection; LedgerError."""
        assert self._connection is not None
        try:
            check_version(self._connection)
        except LedgerError:
            self._drop()
            raise
        self._connection.autocommit = self._autocommit

    def _roll_back(self) -> None:
        if self._connection is not None:
            try:
                self._connection.rollback()
            except psycopg.Error:
                self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None


class PostgresqlLedger:
    """A Ledger (inside `serving`) and a Desk. `max_blobs`: insertions stop there; 0: never."""

    def __init__(self, url: str, *, max_blobs: int = 0) -> None:
        """Open a ledger that exists; LedgerError when it cannot be reached or is not one."""
        self._url = url
        self._max_blobs = max_blobs
        self._room = True, 0.0
        self._complaints = Complaints()
        self._writer = _Session(url, autocommit=False)
        self._reader = _Session(url, autocommit=True)
        self._writing: Group[Job, Result] = Group(self._perform, self._sweep_some)
        self._reading: Group[_Question, _Answer] = Group(self._ask)
        with translated(), connect(url, autocommit=True) as connection:
            check_version(connection)
            self._sweep = Sweep(connection, "%b")

    @classmethod
    def create(cls, url: str) -> None:
        """Make an empty ledger in an empty database; LedgerError if there is one already."""
        with translated(), connect(url, autocommit=False) as connection:
            if _version(connection) is not None:
                raise LedgerError("the database has a ledger already")
            later = sweep.SCHEMA + till.schema("BYTEA") + newest.SCHEMA
            connection.execute((SCHEMA + later).encode())
            connection.execute(
                "INSERT INTO hpkvd (id, version, state) VALUES (0, %s, 'ready')", (SCHEMA_VERSION,)
            )
            connection.commit()
            with suppress(psycopg.Error):
                connection.execute(TUNING)
                connection.commit()

    def close(self) -> None:
        """End the connections; idempotent."""
        self._writer.close()
        self._reader.close()

    # -- Desk ---------------------------------------------------------------------------------

    def add_vouchers(self, vouchers: Sequence[Voucher]) -> None:
        """Make these redeemable; durable on return."""
        digests = [voucher.digest for voucher in vouchers]
        amounts = [voucher.amount for voucher in vouchers]
        query = (
            "INSERT INTO voucher (digest, amount) SELECT * FROM unnest(%b::bytea[], %b::bigint[])"
        )
        with translated(), connect(self._url, autocommit=True) as connection:
            connection.execute(query, (digests, amounts))

    def totals(self) -> Totals:
        """One consistent view of the books."""
        with translated(), connect(self._url, autocommit=True) as connection:
            row = connection.execute(_TOTALS).fetchone()
            assert row is not None
            return Totals(*row)

    def takings(self, *, again: bool = False) -> list[Taking]:
        """Ecash that was not taken out yet, or (`again`) all that ever came in."""
        with translated(), connect(self._url, autocommit=True) as connection:
            return till.takings(connection, again=again)

    def mark_taken(self, takings: Sequence[Taking]) -> None:
        """These were taken out; durable on return."""
        with translated(), connect(self._url, autocommit=False) as connection:
            till.mark_taken(connection, takings, "%b")
            connection.commit()

    def claim_epoch(self, epoch: NewestEpoch) -> NewestEpoch:
        """See Desk."""
        session = _Session(self._url, autocommit=True)
        try:
            return session.run(lambda connection: newest.claim(connection, epoch, "%b"))
        finally:
            session.close()

    # -- Ledger -------------------------------------------------------------------------------

    async def foresee(
        self, fingerprint: bytes, serials: Sequence[bytes], change: Change = None
    ) -> Known | Reason | None:
        """What is known of a request, durably; else why its change would be refused."""
        answer = await self._reading.submit(_Request(fingerprint, serials, change))
        assert answer is None or isinstance(answer, Known | Reason)
        return answer

    async def read(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        answer = await self._reading.submit(_Blob(key))
        assert answer is None or isinstance(answer, bytes)
        return answer

    async def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """The breakglass entry under a key, unless its timer has fired."""
        answer = await self._reading.submit(_EntryAt(key, now))
        assert answer is None or isinstance(answer, StoredEntry)
        return answer

    async def apply(self, transaction: Transaction, behind: int = 0) -> Verdict:
        """Perform it unless it is known or refused; durable on return."""
        verdict = await self._writing.submit(transaction, behind)
        assert isinstance(verdict, Done | Refused | Known)
        return verdict

    async def open_entry(self, opening: Opening) -> StoredEntry | None:
        """The entry with its timer running, durably; None if it is not there or another."""
        opened = await self._writing.submit(opening)
        assert opened is None or isinstance(opened, StoredEntry)
        return opened

    async def sale(self, voucher: bytes) -> Sale | Paid | None:
        """How far paying for the voucher with this digest is."""
        answer = await self._reading.submit(_PaidFor(voucher))
        assert answer is None or isinstance(answer, Sale | Paid)
        return answer

    async def account(self, job: Account) -> Sale | Paid | None:
        """Keep, settle or forget a sale; what is there then, durably."""
        found = await self._writing.submit(job)
        assert found is None or isinstance(found, Sale | Paid)
        return found

    async def sales(self, now: int) -> list[Sale]:
        """The sales that are due at this hour."""
        query = f"{till.SALE} WHERE due <= %b".encode()
        rows = await trio.to_thread.run_sync(self._rows, query, (now,))
        return [till.stored(*row) for row in rows]

    async def open_sales(self) -> int:
        """How many sales are not settled."""
        rows = await trio.to_thread.run_sync(self._rows, b"SELECT count(*) FROM sale", ())
        return int(rows[0][0])

    def _rows(self, query: bytes, what: tuple[int, ...]) -> list[tuple[Any, ...]]:
        with translated(), connect(self._url, autocommit=True) as connection:
            return connection.execute(query, what, binary=True).fetchall()

    async def drop_entries(self, now: int) -> None:
        """Delete what is gone by now from the disk too."""
        await self._writing.submit(Drop(now))

    async def retire(self, oldest: int) -> None:
        """No epoch below this one is presented any more, durably; what is kept of them goes."""
        await self._writing.submit(Retire(oldest))

    @property
    def oldest_epoch(self) -> int:
        """Number of the oldest epoch that can be presented, as far as this process knows."""
        return self._sweep.oldest

    async def _sweep_some(self) -> bool:
        """Drop some rows of ended epochs; False if there are none."""
        if not self._sweep.due:
            return False
        try:
            await trio.to_thread.run_sync(self._writer.run, self._step)
        except LedgerError as error:
            self._complaints.complain(f"what is kept of ended epochs stays for now: {error}")
            return False
        return True

    def _step(self, connection: Connection) -> None:
        try:
            self._sweep.refresh(connection)
            if self._sweep.due:
                connection.execute(_SWEPT, self._sweep.step(connection, SWEEP_ROWS))
            connection.commit()
        except psycopg.Error:
            self._sweep.restart()
            raise

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[PostgresqlLedger]:
        """Run reader and writer; what was queued is performed before this ends."""
        async with self._reading.serving(), self._writing.serving():
            yield self

    async def _perform(self, jobs: Sequence[Job]) -> Sequence[Result]:
        try:
            results, oldest = await threads.in_thread(
                lambda: self._writer.run(lambda connection: _write(connection, jobs))
            )
        except LedgerError as error:
            self._complaints.complain(f"requests are refused, nothing is lost: {error}")
            raise
        self._sweep.learn(oldest)  # here, where no step of it is under way
        await self._sweep_some()
        return results

    async def _ask(self, questions: Sequence[_Question]) -> Sequence[_Answer]:
        return await threads.in_thread(
            lambda: self._reader.run(lambda connection: self._answer(connection, questions))
        )

    def _answer(self, connection: Connection, questions: Sequence[_Question]) -> Sequence[_Answer]:
        needs, sheet = _Needs(), _Sheet()
        for question in questions:
            needs.job(question)
        sheet.fetch(connection, needs, lock=False)
        full = any(_grows(question) for question in questions) and not self._has_room(connection)
        return [_answered(sheet, question, full) for question in questions]

    def _has_room(self, connection: Connection) -> bool:
        """As of at most a second ago."""
        if not self._max_blobs:
            return True
        room, known_at = self._room
        if time.monotonic() - known_at > 1:
            row = connection.execute("SELECT blobs FROM books").fetchone()
            assert row is not None
            room = row[0] < self._max_blobs
            self._room = room, time.monotonic()
        return room


def _write(connection: Connection, jobs: Sequence[Job]) -> tuple[Sequence[Result], int]:
    """The results, and the oldest epoch that can be presented then."""
    needs, sheet, posting = _Needs(), _Sheet(), Posting()
    for job in jobs:
        needs.job(job)
    sheet.fetch(connection, needs, lock=True)
    results = [rules.perform(sheet, job, posting) for job in jobs]
    sheet.write(connection, posting)
    return results, sheet.oldest_epoch


def _grows(question: _Question) -> bool:
    return isinstance(question, _Request) and isinstance(question.change, Insert | StoreEntry)


def _answered(sheet: _Sheet, question: _Question, full: bool) -> _Answer:
    match question:
        case _Request(fingerprint, serials, change):
            known = sheet.known(fingerprint, serials)
            if known:
                return Known(known)
            return Reason.FULL if full and _grows(question) else rules.refusal(sheet, change)
        case _Blob(key):
            return sheet.blob(key)
        case _EntryAt(key, now):
            return sheet.entry(key, now)
        case _PaidFor(voucher):
            return rules.paid_for(sheet, voucher)


def connect(url: str, *, autocommit: bool, name: str = "hpkvd") -> Connection:
    """A connection to whichever of the URL's hosts takes writes; psycopg.Error.

    Its commits are durable before they return, whatever the database's default is.
    """
    connection = psycopg.connect(
        url,
        autocommit=True,
        connect_timeout=CONNECT_SECONDS,
        target_session_attrs="read-write",
        application_name=name,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=10_000,
    )
    row = connection.execute("SHOW synchronous_commit").fetchone()
    if row in [("off",), ("local",)]:
        connection.execute("SET synchronous_commit = 'on'")
    if name == SERVING:
        with suppress(psycopg.Error):
            connection.execute(BY_KEY)
    connection.autocommit = autocommit
    return connection


def check_version(connection: Connection) -> None:
    """LedgerError unless the database has a ledger that this program knows and may use."""
    version = _version(connection)
    if version is None:
        raise LedgerError("the database has no ledger; run `hpkvd init` or `hpkvd migrate` first")
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"the database was written by a newer hpkvd (schema {version}, this one knows"
            f" {SCHEMA_VERSION}); upgrade hpkvd"
        )
    row = connection.execute("SELECT state FROM hpkvd").fetchone()
    if version < SCHEMA_VERSION:
        later = (sweep.SCHEMA, till.schema("BYTEA"), newest.SCHEMA)
        added = "".join(later[max(0, version - 3) :])
        noted = f"UPDATE hpkvd SET version = {SCHEMA_VERSION};"
        connection.execute(f"BEGIN; {added} {noted} COMMIT;".encode())
    if row == ("filling",):
        raise LedgerError("this ledger is not complete; run `hpkvd migrate` again, to its end")
    if row == ("moved",):
        raise LedgerError(
            "this ledger was moved elsewhere by `hpkvd migrate`; change `ledger` in hpkvd.toml"
        )


def _version(connection: Connection) -> int | None:
    found = connection.execute(
        "SELECT 1 FROM information_schema.tables"
        " WHERE table_name = 'hpkvd' AND table_schema = current_schema()"
    ).fetchone()
    if found is None:
        return None
    row = connection.execute("SELECT version FROM hpkvd").fetchone()
    return None if row is None else row[0]


def _name(error: psycopg.Error) -> str:
    """What can be told of an error: its text may have addresses, users, or a row's contents."""
    return error.sqlstate or type(error).__name__


@contextmanager
def translated() -> Iterator[None]:
    """psycopg.Error as LedgerError, of which the message tells no more than a code."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise LedgerBusy(
            f"the database cannot be reached ({_name(error)}); is it up, and are its URL, user and"
            " password right?"
        ) from error
    except psycopg.Error as error:
        raise LedgerError(f"the database failed ({_name(error)}); see its log") from error
