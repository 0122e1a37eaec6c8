"""rules.Tables in SQLite: the rows that a batch reads and writes, one statement at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from hpkvd.ledger import Insert, Opening, Sale, Settle, StoredEntry, StoreEntry, Transaction, till
from hpkvd.ledger.sweep import Sweep
from hpkvfs.protocol.messages import Fact, Outcome, StoredFact
from hpkvfs.protocol.tariff import Operation

_RECALL: Final = """
SELECT fingerprint, operation, outcome, delta, issued FROM request
WHERE fingerprint = ?1 OR fingerprint IN (SELECT fingerprint FROM serial WHERE serial IN (?2, ?3))
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


class SqliteTables:
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


def _stored(
    fingerprint: bytes, operation: int, outcome: int, delta: int, issued: bytes
) -> StoredFact:
    return StoredFact(fingerprint, Fact(Operation(operation), Outcome(outcome), delta), issued)
