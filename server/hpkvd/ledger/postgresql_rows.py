"""rows.Rows in PostgreSQL, and whether a ledger there is whole or was moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hpkvd.ledger import LedgerBusy
from hpkvd.ledger.postgresql_connection import SERVING, connect, translated
from hpkvd.ledger.rows import Row, Table, select


class PostgresqlRows:
    """Rows in a database that PostgresqlLedger.create made."""

    def __init__(self, url: str) -> None:
        with translated():
            self._connection = connect(url, autocommit=True)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """See rows.Rows."""
        with translated():
            self._connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                yield
            finally:
                self._connection.execute("ROLLBACK")

    def damage(self) -> str:
        """See rows.Rows. PostgreSQL tells it by tools of its own (pg_amcheck)."""
        return ""

    def one(self, query: str) -> Row:
        """See rows.Rows."""
        with translated():
            row = self._connection.execute(query.encode()).fetchone()
        assert row is not None
        return row

    def after(self, table: Table, key: bytes, limit: int) -> list[Row]:
        """See rows.Rows."""
        query = select(table, "%b", "%b").encode()
        with translated():
            return self._connection.execute(query, (key, limit), binary=True).fetchall()

    def put(self, table: Table, rows: Sequence[Row]) -> None:
        """See rows.Rows."""
        marks = ", ".join(["%b"] * len(table.columns))
        command = f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({marks})"
        with translated(), self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(command.encode(), rows)

    def replace(self, table: Table, row: Row) -> None:
        """See rows.Rows."""
        changes = ", ".join(f"{column} = %s" for column in table.columns)
        with translated():
            self._connection.execute(f"UPDATE {table.name} SET {changes}".encode(), row)

    def close(self) -> None:
        """See rows.Rows."""
        self._connection.close()

    # Moving

    def state(self) -> str:
        """`ready`, `filling` or `moved`."""
        (state,) = self.one("SELECT state FROM hpkvd")
        return str(state)

    def set_state(self, state: str) -> None:
        """Durable on return."""
        with translated():
            self._connection.execute("UPDATE hpkvd SET state = %s", (state,))

    def refuse_servers(self) -> None:
        """LedgerBusy while a server has it open."""
        (serving,) = self.one(
            f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{SERVING}'"
            " AND datname = current_database() AND pid <> pg_backend_pid()"
        )
        if serving:
            raise LedgerBusy("a server uses this ledger; stop it first")
