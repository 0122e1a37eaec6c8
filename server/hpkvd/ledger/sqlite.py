"""The ledger in one SQLite file; for a machine of its own.

Statements take microseconds and run on the trio thread; only COMMIT, which waits for the disk,
runs in a thread, where SQLite holds no interpreter lock. (A thread for the statements as well
would fight the proofs for that lock.) While one COMMIT waits, the transactions that arrive
queue up and share the next: group commit.

    apply() x n -> queue -> BEGIN IMMEDIATE, up to BATCH transactions, COMMIT -> wake n callers

Invariants. Nothing is read by `_read` before it is durable, since that is another connection.
`_apply` writes only after every check of its transaction has passed, so that a refused one
leaves no trace in the batch. A batch that fails is rolled back as a whole, and every caller in
it told so. No await separates BEGIN from the last statement of a batch.

The order of rows tells nothing of the order of arrival: tables are ordered by hashes or random
numbers. (How the file was laid out over time still tells something to who seizes the disk.)
"""

from __future__ import annotations

import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import trio

from hpkvd.ledger import (
    Change,
    Delete,
    Insert,
    Known,
    LedgerBusy,
    LedgerError,
    LedgerFull,
    Opening,
    Read,
    Redeem,
    StoredEntry,
    StoreEntry,
    Totals,
    Transaction,
    Verdict,
)
from hpkvd.ledger import sweep as ended
from hpkvd.ledger.sweep import Sweep
from hpkvd.log import Complaints
from hpkvfs.protocol.messages import Done, Fact, Outcome, Reason, Refused, StoredFact
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher

APPLICATION: Final = int.from_bytes(b"hpkv", "big")
SCHEMA_VERSION: Final = 3
BATCH: Final = 64
LOCK_SECONDS: Final = 5.0
RESERVE: Final = 64 * 2**20
VACUUM_PAGES: Final = 1024
SWEEP_ROWS: Final = 500
SWEEP_ROWS_WHEN_BUSY: Final = 64

SCHEMA: Final = """
CREATE TABLE request (
    fingerprint BLOB PRIMARY KEY,   -- SHA-256 of the request's body
    epoch       INTEGER NOT NULL,   -- number of the epoch it was paid in
    operation   INTEGER NOT NULL,
    outcome     INTEGER NOT NULL,
    delta       INTEGER NOT NULL,   -- tokens added to its credentials
    issued      BLOB NOT NULL       -- the issuer's reply
) WITHOUT ROWID;
CREATE TABLE serial (
    serial      BLOB PRIMARY KEY,   -- of a spent credential
    fingerprint BLOB NOT NULL       -- the request that spent it
) WITHOUT ROWID;
CREATE TABLE blob (
    id          INTEGER PRIMARY KEY, -- random: rows in no order
    key         BLOB NOT NULL UNIQUE,
    digest      BLOB NOT NULL,      -- SHA-256 of the blob
    blob        BLOB NOT NULL
);
CREATE TABLE voucher (
    digest      BLOB PRIMARY KEY,   -- of its secret
    amount      INTEGER NOT NULL,
    spent       INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE books (
    id          INTEGER PRIMARY KEY CHECK (id = 0),
    issued      INTEGER NOT NULL,   -- tokens sold
    charged     INTEGER NOT NULL,   -- tokens paid for look-ups and insertions
    refunded    INTEGER NOT NULL,   -- tokens given back for deletions
    outstanding INTEGER NOT NULL CHECK (outstanding >= 0), -- sum of every delta
    requests    INTEGER NOT NULL,
    serials     INTEGER NOT NULL,
    blobs       INTEGER NOT NULL,
    CHECK (issued = outstanding + charged - refunded)
);
INSERT INTO books VALUES (0, 0, 0, 0, 0, 0, 0, 0);
"""
# Since schema 2.
ENTRIES: Final = """
CREATE TABLE entry (
    key         BLOB PRIMARY KEY,   -- of a breakglass entry
    epoch       INTEGER NOT NULL,   -- number of the epoch it was paid in
    counter     INTEGER NOT NULL,   -- greater than that of whatever it replaced
    digest      BLOB NOT NULL,      -- SHA-256 of the value
    value       BLOB NOT NULL,
    hours       INTEGER NOT NULL,   -- how long it can be opened once it was opened
    gone_at     INTEGER             -- the hour from which on it is gone; NULL: never opened
) WITHOUT ROWID;
"""

_RECALL: Final = """
SELECT fingerprint, operation, outcome, delta, issued FROM request
WHERE fingerprint = ?1 OR fingerprint IN (SELECT fingerprint FROM serial WHERE serial IN (?2, ?3))
"""
_BOOKS: Final = """
UPDATE books SET issued = issued + ?, charged = charged + ?, refunded = refunded + ?,
    outstanding = outstanding + ?, requests = requests + ?, serials = serials + ?, blobs = blobs + ?
"""
_STORE_ENTRY: Final = """
INSERT INTO entry (key, epoch, counter, digest, value, hours) VALUES (?, ?, ?, ?, ?, ?)
"""
_ENTRY: Final = """
SELECT counter, digest, value, gone_at FROM entry
WHERE key = ? AND (gone_at IS NULL OR gone_at > ?)
"""
# It stays open for `hours` whole hours and what is left of the one in which it was opened.
_START_TIMER: Final = """
UPDATE entry SET gone_at = ? + hours + 1 WHERE key = ? AND digest = ? AND gone_at IS NULL
"""
_TOTALS: Final = """
SELECT issued, charged, refunded, outstanding, requests, serials, blobs,
    (SELECT count(*) FROM entry),
    (SELECT count(*) FROM voucher WHERE spent = 0),
    (SELECT coalesce(sum(amount), 0) FROM voucher WHERE spent = 0)
FROM books
"""


@dataclass(slots=True)
class _Posting:
    """What a batch adds to the books; the fields are the parameters of _BOOKS, in order."""

    issued: int = 0
    charged: int = 0
    refunded: int = 0
    outstanding: int = 0
    requests: int = 0
    serials: int = 0
    blobs: int = 0

    def add(self, transaction: Transaction) -> None:
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


@dataclass(frozen=True, slots=True)
class _Drop:
    """Delete the entries that are gone at this hour."""

    now: int


@dataclass(frozen=True, slots=True)
class _Retire:
    """No epoch below this one can be presented any more."""

    oldest: int


_Job: TypeAlias = Transaction | Opening | _Drop | _Retire
_Result: TypeAlias = Verdict | StoredEntry | None


@dataclass(slots=True)
class _Waiting:
    """A caller who wants something written, and what to tell him."""

    job: _Job
    decided: trio.Event = field(default_factory=trio.Event)
    result: _Result | LedgerError = None

    def settle(self, result: _Result | LedgerError) -> None:
        self.result = result
        self.decided.set()


class SqliteLedger:
    """A Ledger (inside `serving`) and a Desk. `reserve`: free bytes of disk insertions leave;
    `max_blobs`: they stop there; 0: never."""

    def __init__(self, path: Path, *, reserve: int = RESERVE, max_blobs: int = 0) -> None:
        """Open a ledger that exists; LedgerError when it does not, or is not one of ours."""
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}; run `hpkvd init` first")
        self._directory = path.parent
        self._reserve = reserve
        self._max_blobs = max_blobs
        self._queue: deque[_Waiting] = deque()
        self._wake = trio.Event()
        self._complaints = Complaints()
        with _translated():
            self._write = _connect(path)
            _check_version(self._write, path)
            _upgrade(self._write)
            self._sweep = Sweep(self._write)
            self._read = _connect(path)
            self._read.execute("PRAGMA query_only = 1")

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty ledger; LedgerError if there is a file already."""
        if path.exists():
            raise LedgerError(f"{path} exists already")
        with _translated():
            connection = sqlite3.connect(path, isolation_level=None)
            connection.executescript(
                "PRAGMA page_size = 4096; PRAGMA auto_vacuum = INCREMENTAL;"
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                f"BEGIN; PRAGMA application_id = {APPLICATION};"
                f"PRAGMA user_version = {SCHEMA_VERSION}; {SCHEMA} {ENTRIES}"
                f"{ended.SCHEMA} COMMIT;"
            )
            connection.close()

    def close(self) -> None:
        """Release the file; idempotent."""
        self._read.close()
        self._write.close()

    # -- Desk ---------------------------------------------------------------------------------

    def add_vouchers(self, vouchers: Sequence[Voucher]) -> None:
        """Make these redeemable; durable on return. Waits for a running server's batch."""
        rows = [(voucher.digest, voucher.amount) for voucher in vouchers]
        with _translated():
            self._write.execute(f"PRAGMA busy_timeout = {int(LOCK_SECONDS * 1000)}")
            self._write.execute("BEGIN IMMEDIATE")
            try:
                self._write.executemany("INSERT INTO voucher (digest, amount) VALUES (?, ?)", rows)
                self._write.execute("COMMIT")
            finally:
                self._roll_back()
                self._write.execute("PRAGMA busy_timeout = 0")

    def totals(self) -> Totals:
        """One consistent view of the books."""
        with _translated():
            return Totals(*self._read.execute(_TOTALS).fetchone())

    # -- Ledger: reading ----------------------------------------------------------------------

    async def recall(self, fingerprint: bytes, serials: Sequence[bytes]) -> Known | None:
        """What is known of a request and its serials, durably, if anything is."""
        with _translated():
            return _recall(self._read, fingerprint, serials)

    async def refusal(self, change: Change) -> Reason | None:
        """Why this change would be refused at this moment; to spare a costly proof."""
        with _translated():
            if isinstance(change, Insert | StoreEntry) and not self._has_room():
                return Reason.FULL
            return _refusal(self._read, change)

    async def read(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        with _translated():
            return _blob(self._read, key)

    async def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """The breakglass entry under a key, unless its timer has fired."""
        with _translated():
            return _entry(self._read, key, now)

    def _has_room(self) -> bool:
        if self._max_blobs:
            (blobs,) = self._read.execute("SELECT blobs FROM books").fetchone()
            if blobs >= self._max_blobs:
                return False
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize >= self._reserve

    # -- Ledger: writing ----------------------------------------------------------------------

    async def apply(self, transaction: Transaction) -> Verdict:
        """Perform it unless it is known or refused; durable on return."""
        verdict = await self._written(transaction)
        assert isinstance(verdict, Done | Refused | Known)
        return verdict

    async def open_entry(self, opening: Opening) -> StoredEntry | None:
        """The entry with its timer running, durably; None if it is not there or another."""
        stored = await self.entry(opening.key, opening.now)
        if stored is None or stored.digest != opening.digest:
            return None
        if stored.gone_at is not None:
            return stored  # opening it again writes nothing
        opened = await self._written(opening)
        assert opened is None or isinstance(opened, StoredEntry)
        return opened

    async def drop_entries(self, now: int) -> None:
        """Delete what is gone by now from the disk too."""
        await self._written(_Drop(now))

    async def retire(self, oldest: int) -> None:
        """No epoch below this one is presented any more, durably; what is kept of them goes."""
        await self._written(_Retire(oldest))

    @property
    def oldest_epoch(self) -> int:
        """Number of the oldest epoch that can be presented."""
        return self._sweep.oldest

    async def _written(self, job: _Job) -> _Result:
        waiting = _Waiting(job)
        self._queue.append(waiting)
        self._wake.set()
        await waiting.decided.wait()
        if isinstance(waiting.result, LedgerError):
            raise waiting.result
        return waiting.result

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[SqliteLedger]:
        """Run the writer; what was queued is performed before this ends, whatever ends it."""
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, stopping)
            try:
                yield self
            finally:
                stopping.set()
                self._wake.set()

    async def _run(self, stopping: trio.Event) -> None:
        with trio.CancelScope(shield=True):
            while self._queue or not stopping.is_set():
                if self._queue:
                    batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
                    await self._perform(batch)
                elif not await self._tidied():
                    self._wake = trio.Event()
                    await self._wake.wait()

    async def _perform(self, batch: Sequence[_Waiting]) -> bool:
        """One transaction of a batch, and of a step of the sweep; whether it could be done."""
        try:
            with _translated():
                await self._begin()
                results = self._write_all(batch)
                await trio.to_thread.run_sync(self._write.execute, "COMMIT")
        except LedgerError as error:
            self._complaints.complain(f"requests are refused, nothing is lost: {error}")
            self._roll_back()
            for waiting in batch:
                waiting.settle(error)
            return False
        for waiting, result in zip(batch, results, strict=True):
            waiting.settle(result)
        return True

    async def _begin(self) -> None:
        """Take the write lock, letting others run while another process holds it."""
        deadline = trio.current_time() + LOCK_SECONDS
        while True:
            try:
                self._write.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if _primary(error) != sqlite3.SQLITE_BUSY or trio.current_time() > deadline:
                    raise
            await trio.sleep(0.005)

    def _write_all(self, batch: Sequence[_Waiting]) -> list[_Result]:
        posting = _Posting()
        self._sweep.refresh(self._write)
        results = [self._write_one(waiting.job, posting) for waiting in batch]
        if self._sweep.due:
            swept = self._sweep.step(self._write, SWEEP_ROWS_WHEN_BUSY if batch else SWEEP_ROWS)
            posting.requests -= swept.requests
            posting.serials -= swept.serials
        if posting != _Posting():
            self._write.execute(_BOOKS, astuple(posting))
        return results

    def _write_one(self, job: _Job, posting: _Posting) -> _Result:
        match job:
            case Transaction():
                return self._apply(job, posting)
            case Opening(key, digest, now):
                self._write.execute(_START_TIMER, (now, key, digest))
                stored = _entry(self._write, key, now)
                return stored if stored is not None and stored.digest == digest else None
            case _Retire(oldest):
                self._sweep.retire(self._write, oldest)
                return None
            case _Drop(now):
                self._write.execute("DELETE FROM entry WHERE gone_at <= ?", (now,))
                return None

    def _apply(self, transaction: Transaction, posting: _Posting) -> Verdict:
        if transaction.epoch < self._sweep.oldest:
            return Refused(Reason.EPOCH_ENDED)
        known = _recall(self._write, transaction.fingerprint, transaction.serials)
        if known is not None:
            return known
        reason = _refusal(self._write, transaction.change)
        if reason is not None:
            return Refused(reason)
        outcome, value = self._change(transaction)
        fact = Fact(transaction.operation, outcome, transaction.delta)
        self._record(transaction, fact)
        posting.add(transaction)
        return Done(fact, transaction.issued, value)

    def _change(self, transaction: Transaction) -> tuple[Outcome, bytes | None]:
        match transaction.change:
            case Read(key):
                value = _blob(self._write, key)
                return (Outcome.ABSENT if value is None else Outcome.FOUND), value
            case Insert(key, digest, blob):
                self._write.execute(
                    "INSERT INTO blob VALUES (random(), ?, ?, ?)", (key, digest, blob)
                )
                return Outcome.INSERTED, None
            case Delete(key):
                self._write.execute("DELETE FROM blob WHERE key = ?", (key,))
                return Outcome.DELETED, None
            case StoreEntry(key, counter, digest, value, hours):
                row = (key, transaction.epoch, counter, digest, value, hours)
                self._write.execute("DELETE FROM entry WHERE key = ?", (key,))
                self._write.execute(_STORE_ENTRY, row)
                return Outcome.STORED, None
            case Redeem(voucher):
                self._write.execute("UPDATE voucher SET spent = 1 WHERE digest = ?", (voucher,))
                return Outcome.ISSUED, None
            case None:
                return Outcome.REISSUED, None

    def _record(self, transaction: Transaction, fact: Fact) -> None:
        fingerprint = transaction.fingerprint
        self._write.execute(
            "INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)",
            (
                fingerprint,
                transaction.epoch,
                fact.operation,
                fact.outcome,
                fact.delta,
                transaction.issued,
            ),
        )
        rows = [(serial, fingerprint) for serial in transaction.serials]
        self._write.executemany("INSERT INTO serial VALUES (?, ?)", rows)

    def _roll_back(self) -> None:
        if self._write.in_transaction:
            self._write.execute("ROLLBACK")
            self._sweep.reload(self._write)

    async def _tidied(self) -> bool:
        """Drop some rows of ended epochs, or give some of the pages that deletions freed back to
        the disk; False if there is little of either."""
        if self._sweep.due:
            return await self._perform(())
        try:
            (free,) = self._write.execute("PRAGMA freelist_count").fetchone()
            if free < 2 * VACUUM_PAGES:
                return False
            command = f"PRAGMA incremental_vacuum({VACUUM_PAGES})"
            await trio.to_thread.run_sync(self._write.executescript, command)
        except sqlite3.Error:
            return False
        return True


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute(f"PRAGMA journal_size_limit = {RESERVE}")
    return connection


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise LedgerError(f"{path} is not a ledger of hpkvd; check --data")
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"{path} was written by a newer hpkvd (schema {version}, this one knows"
            f" {SCHEMA_VERSION}); upgrade hpkvd"
        )


def _upgrade(connection: sqlite3.Connection) -> None:
    """Give a ledger of an older schema the tables that came later."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    added = "".join((ENTRIES, ended.SCHEMA)[version - 1 :])
    if added:
        connection.executescript(
            f"BEGIN IMMEDIATE; {added} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )


def _recall(
    connection: sqlite3.Connection, fingerprint: bytes, serials: Sequence[bytes]
) -> Known | None:
    first, second = serials or (None, None)
    rows = connection.execute(_RECALL, (fingerprint, first, second)).fetchall()
    if not rows:
        return None
    return Known(tuple(_stored(*row) for row in rows))


def _stored(
    fingerprint: bytes, operation: int, outcome: int, delta: int, issued: bytes
) -> StoredFact:
    return StoredFact(fingerprint, Fact(Operation(operation), Outcome(outcome), delta), issued)


def _blob(connection: sqlite3.Connection, key: bytes) -> bytes | None:
    row = connection.execute("SELECT blob FROM blob WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _refusal(connection: sqlite3.Connection, change: Change) -> Reason | None:
    match change:
        case Insert(key):
            return None if _digest(connection, key) is None else Reason.KEY_EXISTS
        case Delete(key, digest):
            return _deletion_refusal(_digest(connection, key), digest)
        case Redeem(voucher, amount):
            return _redemption_refusal(connection, voucher, amount)
        case StoreEntry(key, counter, now=now):
            stored = _entry(connection, key, now)
            newer = stored is None or counter > stored.counter
            return None if newer else Reason.OLD_COUNTER
        case _:
            return None


def _entry(connection: sqlite3.Connection, key: bytes, now: int) -> StoredEntry | None:
    row = connection.execute(_ENTRY, (key, now)).fetchone()
    return None if row is None else StoredEntry(*row)


def _digest(connection: sqlite3.Connection, key: bytes) -> bytes | None:
    row = connection.execute("SELECT digest FROM blob WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _deletion_refusal(stored: bytes | None, digest: bytes) -> Reason | None:
    if stored is None:
        return Reason.KEY_ABSENT
    return None if stored == digest else Reason.DIGEST_MISMATCH


def _redemption_refusal(
    connection: sqlite3.Connection, voucher: bytes, amount: int
) -> Reason | None:
    query = "SELECT amount, spent FROM voucher WHERE digest = ?"
    row = connection.execute(query, (voucher,)).fetchone()
    if row is None:
        return Reason.UNKNOWN_VOUCHER
    if row[1]:
        return Reason.VOUCHER_SPENT
    return None if row[0] == amount else Reason.VOUCHER_AMOUNT


def _primary(error: sqlite3.Error) -> int:
    """The primary result code of an error; extended codes carry it in their low byte."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = _primary(error)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if code == sqlite3.SQLITE_FULL:
            raise LedgerFull("the disk is full; free some space") from error
        if code == sqlite3.SQLITE_BUSY:
            raise LedgerBusy("another process keeps the ledger locked; try again") from error
        raise LedgerError(f"the ledger failed ({name}); check the disk and its file") from error
