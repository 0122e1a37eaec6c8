"""The ledger in one SQLite file; for a machine of its own.

Statements take microseconds and run on the trio thread; only COMMIT, which waits for the disk,
runs in a thread, where SQLite holds no interpreter lock. (A thread for the statements as well
would fight the proofs for that lock.) While one COMMIT waits, the transactions that arrive
queue up and share the next: group commit.

    submit() x n -> BEGIN IMMEDIATE, decide (rules.py) and write each, COMMIT -> wake n callers

Invariants. Nothing is read by `_durable` before it is durable, since that is another connection.
A batch that fails is rolled back as a whole, and every caller in it told so. No await separates
BEGIN from the last statement of a batch.

sqlite_connection.py says why the order of rows tells nothing of the order of arrival.
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
    LedgerError,
    NewestEpoch,
    Opening,
    Paid,
    Sale,
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
from hpkvd.ledger.group import Group
from hpkvd.ledger.rules import Account, Drop, Job, Posting, Result, Retire
from hpkvd.ledger.sqlite_connection import (
    LOCK_SECONDS,
    RESERVE,
    check_version,
    connect,
    make,
    primary,
    translated,
    upgrade,
)
from hpkvd.ledger.sqlite_tables import SqliteTables
from hpkvd.ledger.sweep import Sweep
from hpkvd.log import Complaints
from hpkvfs import threads
from hpkvfs.protocol.messages import Done, Reason, Refused
from hpkvfs.protocol.voucher import Voucher

VACUUM_PAGES: Final = 1024
SWEEP_ROWS: Final = 500
SWEEP_ROWS_WHEN_BUSY: Final = 64

_BOOKS: Final = """
UPDATE books SET issued = issued + ?, charged = charged + ?, refunded = refunded + ?,
    outstanding = outstanding + ?, requests = requests + ?, serials = serials + ?, blobs = blobs + ?
"""
_TOTALS: Final = f"""
SELECT issued, charged, refunded, outstanding, requests, serials, blobs,
    (SELECT count(*) FROM entry),
    (SELECT count(*) FROM voucher WHERE spent = 0),
    (SELECT coalesce(sum(amount), 0) FROM voucher WHERE spent = 0), {till.TOTALS}
FROM books
"""


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
            self._write = connect(path)
            check_version(self._write, path)
            upgrade(self._write)
            self._sweep = Sweep(self._write)
            self._read = connect(path)
            self._read.execute("PRAGMA query_only = 1")
            self._write.execute("PRAGMA busy_timeout = 0")  # _begin waits, and lets others run
        self._rows = SqliteTables(self._write, self._sweep)
        self._durable = SqliteTables(self._read, self._sweep)

    @classmethod
    def create(cls, path: Path) -> None:
        """Make an empty ledger; LedgerError if there is a file already."""
        if path.exists():
            raise LedgerError(f"{path} exists already")
        with translated():
            make(path)

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
        with translated(), closing(connect(self._path)) as connection:
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
        with translated(), closing(connect(self._path)) as connection:
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
                if primary(error) != sqlite3.SQLITE_BUSY or trio.current_time() > deadline:
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
