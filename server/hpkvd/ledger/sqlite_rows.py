"""rows.Rows in a SQLite file."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpkvd.ledger.rows import Row, Table, select
from hpkvd.ledger.sqlite_connection import translated


class SqliteRows:
    """Rows in a SQLite file that SqliteLedger.create made."""

    def __init__(self, path: Path) -> None:
        with translated():
            self._connection = sqlite3.connect(path, timeout=10, isolation_level=None)
            self._connection.execute("PRAGMA synchronous = FULL")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See rows.Rows."""
        with translated():
            self._connection.execute("BEGIN")
        try:
            self.one("SELECT count(*) FROM books")  # the snapshot begins with the first read
            yield
        finally:
            if self._connection.in_transaction:  # an error may have ended it
                self._connection.execute("ROLLBACK")

    def damage(self) -> str:
        """See rows.Rows."""
        (found,) = self.one("PRAGMA integrity_check(1)")
        return "" if found == "ok" else " ".join(str(found).split())

    def one(self, query: str) -> Row:
        """See rows.Rows."""
        with translated():
            row: Row = self._connection.execute(query).fetchone()
        return row

    def after(self, table: Table, key: bytes, limit: int) -> list[Row]:
        """See rows.Rows."""
        query = select(table, "?", "?")
        with translated():
            return self._connection.execute(query, (key, limit)).fetchall()

    def put(self, table: Table, rows: Sequence[Row]) -> None:
        """See rows.Rows. Blobs and entries get random row numbers, so that they are in no order."""
        columns, values = list(table.columns), [list(row) for row in rows]
        if table.name in ("blob", "entry"):
            columns.append("id")
            for row in values:
                row.append(int.from_bytes(secrets.token_bytes(8), "big", signed=True))
        marks = ", ".join("?" * len(columns))
        with translated():
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({marks})", values
            )
            self._connection.execute("COMMIT")

    def replace(self, table: Table, row: Row) -> None:
        """See rows.Rows."""
        changes = ", ".join(f"{column} = ?" for column in table.columns)
        with translated():
            self._connection.execute(f"UPDATE {table.name} SET {changes}", row)

    def close(self) -> None:
        """See rows.Rows."""
        self._connection.close()
