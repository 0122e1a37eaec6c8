"""The ledger in one SQLite file; for a machine of its own.

Statements take microseconds and run on the trio thread; only COMMIT, which waits for the disk,
runs in a thread, where SQLite holds no interpreter lock. (A thread for the statements as well
would fight the proofs for that lock.) While one COMMIT waits, the transactions that arrive
queue up and share the next: group commit.

    submit() x n -> BEGIN IMMEDIATE, decide (rules.py) and write each, COMMIT -> wake n callers

Invariants. Nothing is read by `_durable` before it is durable, since that is another connection.
A batch that fails is rolled back as a whole, and every caller in it told so. No await separates
BEGIN from the last statement of a batch.

The order of rows tells nothing of the order of arrival: tables are ordered by hashes or random
numbers. (How the file was laid out over time still tells something to who seizes the disk.)
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Final

import trio

from hpkvd.ledger import (
    Change,
    Insert,
    Known,
    LedgerBusy,
    LedgerError,
    LedgerFull,
    NewestEpoch,
    Opening,
    Paid,
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
    till,
)
from hpkvd.ledger import sweep as ended
from hpkvd.ledger.group import Group
from hpkvd.ledger.rules import Account, Drop, Job, Posting, Result, Retire
from hpkvd.ledger.sweep import Sweep
from hpkvd.log import Complaints
from hpkvfs import threads
from hpkvfs.protocol.messages import Done, Fact, Outcome, Reason, Refused, StoredFact
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher

APPLICATION: Final = int.from_bytes(b"hpkv", "big")
SCHEMA_VERSION: Final = 6
LOCK_SECONDS: Final = 5.0
RESERVE: Final = 64 * 2**20
VACUUM_PAGES: Final = 1024
SWEEP_ROWS: Final = 500
SWEEP_ROWS_WHEN_BUSY: Final = 64

SCHEMA: Final = """
CREATE TABLE request (
    fingerprint BLOB PRIMARY KEY,   -- SHA-256 of the request's body
    epoch       INTEGER NOT NULL,   -- number of the last epoch it names: it goes when that ends
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
    id          INTEGER PRIMARY KEY, -- random: rows in no order
    key         BLOB NOT NULL UNIQUE, -- of a breakglass entry
    epoch       INTEGER NOT NULL,   -- number of the epoch it was paid in
    counter     INTEGER NOT NULL,   -- greater than that of whatever it replaced
    digest      BLOB NOT NULL,      -- SHA-256 of the value
    value       BLOB NOT NULL,
    hours       INTEGER NOT NULL,   -- how long it can be opened once it was opened
    gone_at     INTEGER             -- the hour from which on it is gone; NULL: never opened
);
"""
# Since schema 6; before it entries had no row numbers, and SQLite keeps no more than 1,002 bytes of
# such a row in its page: each entry had a page of 4,096 bytes besides.
_MOVE_ENTRIES: Final = f"""
ALTER TABLE entry RENAME TO entry_5;
{ENTRIES}
INSERT INTO entry (id, key, epoch, counter, digest, value, hours, gone_at)
    SELECT random(), key, epoch, counter, digest, value, hours, gone_at FROM entry_5;
DROP TABLE entry_5;
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
INSERT INTO entry (id, key, epoch, counter, digest, value, hours)
VALUES (random(), ?, ?, ?, ?, ?, ?)
"""
_ENTRY: Final = """
SELECT counter, digest, value, gone_at FROM entry
WHERE key = ? AND (gone_at IS NULL OR gone_at > ?)
"""
# It stays open for `hours` whole hours and what is left of the one in which it was opened.
_START_TIMER: Final = """
UPDATE entry SET gone_at = ? + hours + 1 WHERE key = ? AND digest = ? AND gone_at IS NULL
"""
_TOTALS: Final = f"""
SELECT issued, charged, refunded, outstanding, requests, serials, blobs,
    (SELECT count(*) FROM entry),
    (SELECT count(*) FROM voucher WHERE spent = 0),
    (SELECT coalesce(sum(amount), 0) FROM voucher WHERE spent = 0), {till.TOTALS}
FROM books
"""


class _Rows:
    """rules.Tables: the rows of the file, read and written at once."""

    def __init__(self, connection: sqlite3.Connection, sweep: Sweep) -> None:
        self._connection = connection
        self._sweep = sweep

    def known(self, fingerprint: bytes, serials: Sequence[bytes]) -> tuple[StoredFact, ...]:
        """See rules.Reading."""
        first, second = serials or (None, None)
        rows = self._connection.execute(_RECALL, (fingerprint, first, second)).fetchall()
        return tuple(_stored(*row) for row in rows)

    def digest(self, key: bytes) -> bytes | None:
        """See rules.Reading."""
        return self._value("SELECT digest FROM blob WHERE key = ?", key)

    def blob(self, key: bytes) -> bytes | None:
        """See rules.Tables."""
        return self._value("SELECT blob FROM blob WHERE key = ?", key)

    def _value(self, query: str, key: bytes) -> bytes | None:
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else row[0]

    def voucher(self, digest: bytes) -> tuple[int, bool] | None:
        """See rules.Reading."""
        query = "SELECT amount, spent FROM voucher WHERE digest = ?"
        row = self._connection.execute(query, (digest,)).fetchone()
        return None if row is None else (row[0], bool(row[1]))

    def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """See rules.Reading."""
        row = self._connection.execute(_ENTRY, (key, now)).fetchone()
        return None if row is None else StoredEntry(*row)

    def put_blob(self, insert: Insert) -> None:
        """See rules.Tables."""
        row = (insert.key, insert.digest, insert.blob)
        self._connection.execute("INSERT INTO blob VALUES (random(), ?, ?, ?)", row)

    def delete_blob(self, key: bytes) -> None:
        """See rules.Tables."""
        self._connection.execute("DELETE FROM blob WHERE key = ?", (key,))

    def spend_voucher(self, digest: bytes) -> None:
        """See rules.Tables."""
        self._connection.execute("UPDATE voucher SET spent = 1 WHERE digest = ?", (digest,))

    def sale(self, voucher: bytes) -> Sale | None:
        """See rules.Reading."""
        row = self._connection.execute(f"{till.SALE} WHERE voucher = ?", (voucher,)).fetchone()
        return None if row is None else till.stored(*row)

    def put_sale(self, sale: Sale) -> None:
        """See rules.Tables."""
        self._connection.execute(*till.putting(sale))

    def drop_sale(self, voucher: bytes) -> None:
        """See rules.Tables."""
        self._connection.execute(*till.dropping(voucher))

    def settle(self, settlement: Settle) -> None:
        """See rules.Tables."""
        for statement in till.settling(settlement):
            self._connection.execute(*statement)

    def put_entry(self, entry: StoreEntry, epoch: int) -> None:
        """See rules.Tables."""
        row = (entry.key, epoch, entry.counter, entry.digest, entry.value, entry.hours)
        self._connection.execute("DELETE FROM entry WHERE key = ?", (entry.key,))
        self._connection.execute(_STORE_ENTRY, row)

    def start_timer(self, opening: Opening) -> None:
        """See rules.Tables."""
        self._connection.execute(_START_TIMER, (opening.now, opening.key, opening.digest))

    def drop_entries(self, now: int) -> None:
        """See rules.Tables."""
        self._connection.execute("DELETE FROM entry WHERE gone_at <= ?", (now,))

    @property
    def oldest_epoch(self) -> int:
        """See rules.Tables."""
        return self._sweep.oldest

    def retire(self, oldest: int) -> None:
        """See rules.Tables."""
        self._sweep.retire(self._connection, oldest)

    def record(self, transaction: Transaction, fact: Fact) -> None:
        """See rules.Tables."""
        fingerprint, issued = transaction.fingerprint, transaction.issued
        epoch = transaction.kept_with
        row = (fingerprint, epoch, fact.operation, fact.outcome, fact.delta, issued)
        self._connection.execute("INSERT INTO request VALUES (?, ?, ?, ?, ?, ?)", row)
        rows = [(serial, fingerprint) for serial in transaction.serials]
        self._connection.executemany("INSERT INTO serial VALUES (?, ?)", rows)


class SqliteLedger:
    """A Ledger (inside `serving`) and a Desk. `reserve`: free bytes of disk insertions leave;
    `max_blobs`: they stop there; 0: never."""

    def __init__(self, path: Path, *, reserve: int = RESERVE, max_blobs: int = 0) -> None:
        """Open a ledger that exists; LedgerError when it does not, or is not one of ours."""
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}; run `hpkvd init` first")
        self._path = path
        self._directory = path.parent
        self._reserve = reserve
        self._max_blobs = max_blobs
        self._writing: Group[Job, Result] = Group(self._perform, self._tidied)
        self._complaints = Complaints()
        with translated():
            self._write = _connect(path)
            _check_version(self._write, path)
            _upgrade(self._write)
            self._sweep = Sweep(self._write)
            self._read = _connect(path)
            self._read.execute("PRAGMA query_only = 1")
            self._write.execute("PRAGMA busy_timeout = 0")  # _begin waits, and lets others run
        self._rows = _Rows(self._write, self._sweep)
        self._durable = _Rows(self._read, self._sweep)

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty ledger; LedgerError if there is a file already."""
        if path.exists():
            raise LedgerError(f"{path} exists already")
        with translated():
            connection = sqlite3.connect(path, isolation_level=None)
            connection.executescript(
                "PRAGMA page_size = 4096; PRAGMA auto_vacuum = INCREMENTAL;"
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                f"BEGIN; PRAGMA application_id = {APPLICATION};"
                f"PRAGMA user_version = {SCHEMA_VERSION}; {SCHEMA} {ENTRIES}"
                f"{ended.SCHEMA} {till.schema('BLOB')} {newest.SCHEMA} COMMIT;"
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
        with self._one_transaction() as connection:
            connection.executemany("INSERT INTO voucher (digest, amount) VALUES (?, ?)", rows)

    @contextmanager
    def _one_transaction(self) -> Iterator[sqlite3.Connection]:
        """Waits for a server's batch, which is another process's. On a connection of its own, so
        that one of this process is in nobody's way: then this fails, and that does not."""
        with translated(), closing(_connect(self._path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def totals(self) -> Totals:
        """One consistent view of the books."""
        with translated():
            return Totals(*self._read.execute(_TOTALS).fetchone())

    def takings(self, *, again: bool = False) -> list[Taking]:
        """Ecash that was not taken out yet, or (`again`) all that ever came in."""
        with translated():
            return till.takings(self._read, again=again)

    def mark_taken(self, takings: Sequence[Taking]) -> None:
        """These were taken out; durable on return."""
        with self._one_transaction() as connection:
            till.mark_taken(connection, takings)

    def claim_epoch(self, epoch: NewestEpoch) -> NewestEpoch:
        """See Desk. On a connection of its own: the other may be in the middle of a COMMIT."""
        with translated(), closing(_connect(self._path)) as connection:
            return newest.claim(connection, epoch)

    # -- Ledger: reading ----------------------------------------------------------------------

    async def foresee(
        self, fingerprint: bytes, serials: Sequence[bytes], change: Change = None
    ) -> Known | Reason | None:
        """What is known of a request, durably; else why its change would be refused."""
        with translated():
            known = self._durable.known(fingerprint, serials)
            if known:
                return Known(known)
            if isinstance(change, Insert | StoreEntry) and not self._has_room():
                return Reason.FULL
            return rules.refusal(self._durable, change)

    async def read(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        with translated():
            return self._durable.blob(key)

    async def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """The breakglass entry under a key, unless its timer has fired."""
        with translated():
            return self._durable.entry(key, now)

    async def sale(self, voucher: bytes) -> Sale | Paid | None:
        """How far paying for the voucher with this digest is."""
        with translated():
            return rules.paid_for(self._durable, voucher)

    async def sales(self, now: int) -> list[Sale]:
        """The sales that are due at this hour."""
        with translated():
            rows = self._read.execute(f"{till.SALE} WHERE due <= ?", (now,)).fetchall()
        return [till.stored(*row) for row in rows]

    async def open_sales(self) -> int:
        """How many sales are not settled."""
        with translated():
            (count,) = self._read.execute("SELECT count(*) FROM sale").fetchone()
        return int(count)

    def _has_room(self) -> bool:
        if self._max_blobs:
            (blobs,) = self._read.execute("SELECT blobs FROM books").fetchone()
            if blobs >= self._max_blobs:
                return False
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize >= self._reserve

    # -- Ledger: writing ----------------------------------------------------------------------

    async def apply(self, transaction: Transaction, behind: int = 0) -> Verdict:
        """Perform it unless it is known or refused; durable on return."""
        verdict = await self._writing.submit(transaction, behind)
        assert isinstance(verdict, Done | Refused | Known)
        return verdict

    async def account(self, job: Account) -> Sale | Paid | None:
        """Keep, settle or forget a sale; what is there then, durably."""
        found = await self._writing.submit(job)
        assert found is None or isinstance(found, Sale | Paid)
        return found

    async def open_entry(self, opening: Opening) -> StoredEntry | None:
        """The entry with its timer running, durably; None if it is not there or another."""
        stored = await self.entry(opening.key, opening.now)
        if stored is None or stored.digest != opening.digest:
            return None
        if stored.gone_at is not None:
            return stored  # opening it again writes nothing
        opened = await self._writing.submit(opening)
        assert opened is None or isinstance(opened, StoredEntry)
        return opened

    async def drop_entries(self, now: int) -> None:
        """Delete what is gone by now from the disk too."""
        await self._writing.submit(Drop(now))

    async def retire(self, oldest: int) -> None:
        """No epoch below this one is presented any more, durably; what is kept of them goes."""
        await self._writing.submit(Retire(oldest))

    @property
    def oldest_epoch(self) -> int:
        """Number of the oldest epoch that can be presented."""
        return self._sweep.oldest

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[SqliteLedger]:
        """Run the writer; what was queued is performed before this ends, whatever ends it."""
        async with self._writing.serving():
            yield self

    async def _perform(self, jobs: Sequence[Job]) -> Sequence[Result]:
        """One transaction of a batch, and of a step of the sweep."""
        try:
            with translated():
                await self._begin()
                results = self._write_all(jobs)
                await threads.in_thread(lambda: self._write.execute("COMMIT"))
        except LedgerError as error:
            self._complaints.complain(f"requests are refused, nothing is lost: {error}")
            self._roll_back()
            raise
        return results

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

    def _write_all(self, jobs: Sequence[Job]) -> list[Result]:
        posting = Posting()
        self._sweep.refresh(self._write)
        results = [rules.perform(self._rows, job, posting) for job in jobs]
        if self._sweep.due:
            swept = self._sweep.step(self._write, SWEEP_ROWS_WHEN_BUSY if jobs else SWEEP_ROWS)
            posting.requests -= swept.requests
            posting.serials -= swept.serials
        if posting != Posting():
            self._write.execute(_BOOKS, astuple(posting))
        return results

    def _roll_back(self) -> None:
        if self._write.in_transaction:
            self._write.execute("ROLLBACK")
            self._sweep.reload(self._write)

    async def _tidied(self) -> bool:
        """Drop some rows of ended epochs, or give some of the pages that deletions freed back to
        the disk; False if there is little of either."""
        try:
            if self._sweep.due:
                await self._perform(())
                return True
            (free,) = self._write.execute("PRAGMA freelist_count").fetchone()
            if free < 2 * VACUUM_PAGES:
                return False
            command = f"PRAGMA incremental_vacuum({VACUUM_PAGES})"
            await trio.to_thread.run_sync(self._write.executescript, command)
        except (sqlite3.Error, LedgerError):
            return False
        return True


def _connect(path: Path) -> sqlite3.Connection:
    # Who opens a file first recovers its log, and others that start then have to wait for that.
    connection = sqlite3.connect(
        path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON").fetchall()  # as Debian's SQLite does anyway
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
    later = (ENTRIES, ended.SCHEMA, till.schema("BLOB"), newest.SCHEMA, _MOVE_ENTRIES)
    added = "".join(later[version - 1 :])
    if added:
        connection.executescript(
            f"BEGIN IMMEDIATE; {added} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )


def _stored(
    fingerprint: bytes, operation: int, outcome: int, delta: int, issued: bytes
) -> StoredFact:
    return StoredFact(fingerprint, Fact(Operation(operation), Outcome(outcome), delta), issued)


def _primary(error: sqlite3.Error) -> int:
    """The primary result code of an error; extended codes carry it in their low byte."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


@contextmanager
def translated() -> Iterator[None]:
    """What SQLite raises, as LedgerError."""
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
    except UnicodeDecodeError as error:  # it quotes what is damaged
        raise LedgerError("the ledger is damaged; check the disk and its file") from error
