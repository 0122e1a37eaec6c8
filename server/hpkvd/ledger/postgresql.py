"""The ledger in PostgreSQL: several servers on one database, a standby that takes over.

A batch takes two round trips whatever its size, each one pipeline: fetch every row that deciding
needs, decide (rules.py), write and COMMIT. (One more fetches what is known of a request, if
anything is.) All that blocks runs in threads.

    submit() x n -> fetch | decide | write, COMMIT -> wake n callers

postgresql_batch.py says why no two servers can spend one serial, postgresql_connection.py why
what is read and what is answered outlives a crash.

The statements are of the dialect that CockroachDB and YugabyteDB share; those were not tried.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import psycopg
import trio

from hpkvd.ledger import (
    Change,
    Known,
    LedgerError,
    NewestEpoch,
    Opening,
    Paid,
    Sale,
    StoredEntry,
    Taking,
    Totals,
    Transaction,
    Verdict,
    later,
    newest,
    till,
)
from hpkvd.ledger import postgresql_batch as batch
from hpkvd.ledger.group import Group
from hpkvd.ledger.postgresql_connection import (
    SCHEMA_VERSION,
    Connection,
    Session,
    check_version,
    connect,
    schema_version,
    translated,
)
from hpkvd.ledger.rules import Account, Drop, Job, Result, Retire
from hpkvd.ledger.sweep import Sweep
from hpkvd.log import Complaints
from hpkvfs import threads
from hpkvfs.protocol.messages import Done, Reason, Refused
from hpkvfs.protocol.voucher import Voucher

SWEEP_ROWS: Final = 500

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
_SWEPT: Final = "UPDATE books SET requests = requests - %b, serials = serials - %b"
# Ciphertext does not compress: PostgreSQL need not try. Others may not know the word.
TUNING: Final = "ALTER TABLE blob ALTER COLUMN blob SET STORAGE EXTERNAL"
_TOTALS: Final = f"""
SELECT issued, charged, refunded, outstanding, requests, serials, blobs,
    (SELECT count(*) FROM entry),
    (SELECT count(*) FROM voucher WHERE spent = 0),
    (SELECT coalesce(sum(amount), 0)::bigint FROM voucher WHERE spent = 0), {till.TOTALS}
FROM books
"""


class PostgresqlLedger:
    """A Ledger (inside `serving`) and a Desk. `max_blobs`: insertions stop there; 0: never."""

    def __init__(self, url: str, *, max_blobs: int = 0) -> None:
        """Open a ledger that exists; LedgerError when it cannot be reached or is not one."""
        self._url = url
        self._max_blobs = max_blobs
        self._room = True, 0.0
        self._complaints = Complaints()
        self._writer = Session(url, autocommit=False)
        self._reader = Session(url, autocommit=True)
        self._writing: Group[Job, Result] = Group(self._perform, self._sweep_some)
        self._reading: Group[batch.Question, batch.Answer] = Group(self._ask)
        with translated(), connect(url, autocommit=True) as connection:
            check_version(connection)
            self._sweep = Sweep(connection, "%b")

    @classmethod
    def create(cls, url: str) -> None:
        """Make an empty ledger in an empty database; LedgerError if there is one already."""
        with translated(), connect(url, autocommit=False) as connection:
            if schema_version(connection) is not None:
                raise LedgerError("the database has a ledger already")
            connection.execute("".join((SCHEMA, *later.tables("BYTEA"))).encode())
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
        session = Session(self._url, autocommit=True)
        try:
            return session.run(lambda connection: newest.claim(connection, epoch, "%b"))
        finally:
            session.close()

    # -- Ledger -------------------------------------------------------------------------------

    async def foresee(
        self, fingerprint: bytes, serials: Sequence[bytes], change: Change = None
    ) -> Known | Reason | None:
        """What is known of a request, durably; else why its change would be refused."""
        answer = await self._reading.submit(batch.Request(fingerprint, serials, change))
        assert answer is None or isinstance(answer, Known | Reason)
        return answer

    async def read(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        answer = await self._reading.submit(batch.Blob(key))
        assert answer is None or isinstance(answer, bytes)
        return answer

    async def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """The breakglass entry under a key, unless its timer has fired."""
        answer = await self._reading.submit(batch.EntryAt(key, now))
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
        answer = await self._reading.submit(batch.PaidFor(voucher))
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
                lambda: self._writer.run(lambda connection: batch.write(connection, jobs))
            )
        except LedgerError as error:
            self._complaints.complain(f"requests are refused, nothing is lost: {error}")
            raise
        self._sweep.learn(oldest)  # here, where no step of it is under way
        await self._sweep_some()
        return results

    async def _ask(self, questions: Sequence[batch.Question]) -> Sequence[batch.Answer]:
        return await threads.in_thread(
            lambda: self._reader.run(
                lambda connection: batch.answer(connection, questions, self._has_room)
            )
        )

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
