"""Forgetting ended epochs: their serials, stored replies and entries, some rows at a time.

`oldest` is the number of the oldest epoch whose credentials can be presented. It only grows, and
is durable before the first row of an epoch below it is dropped: a serial that is forgotten while
its epoch could still be presented would be money spent twice.

A sweep walks each table once in the order of its key, so a step costs the same whatever the
table holds. Serials go before the requests that tell their epochs. A sweep that is cut short, by
a crash or a transaction rolled back, begins again; several processes may sweep at a time.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

# Since schema 3 of SQLite, 4 of PostgreSQL.
SCHEMA: Final = """
CREATE TABLE ended (
    id          BIGINT PRIMARY KEY CHECK (id = 0),
    oldest      BIGINT NOT NULL,    -- number of the oldest epoch that can be presented
    swept       BIGINT NOT NULL     -- nothing is kept of epochs before this one
);
INSERT INTO ended VALUES (0, 0, 0);
"""


_STATE: Final = "SELECT oldest, swept FROM ended"


class _Table(NamedTuple):
    name: str
    key: str
    epoch: str


_TABLES: Final = (
    _Table(
        "serial",
        "serial",
        "(SELECT epoch FROM request WHERE request.fingerprint = serial.fingerprint)",
    ),
    _Table("request", "fingerprint", "epoch"),
    _Table("entry", "key", "epoch"),
)


class Swept(NamedTuple):
    """Rows that a step dropped."""

    requests: int = 0
    serials: int = 0


class Connection(Protocol):
    """What sqlite3 and psycopg have in common."""

    @property
    def execute(self) -> Any:
        """Run a statement; a cursor with fetchone() and rowcount."""
        ...


class Sweep:
    """Its methods are to be called inside a transaction; `reload` after one was rolled back."""

    def __init__(self, connection: Connection, mark: str = "?") -> None:
        """`mark`: how the database's driver writes a parameter."""
        self._mark = mark
        self.reload(connection)

    def reload(self, connection: Connection) -> None:
        """Take what the database says, and begin the sweep anew."""
        row: tuple[int, int] = connection.execute(_STATE).fetchone()
        self.oldest, self._swept = row
        self._table, self._after = 0, b""

    def refresh(self, connection: Connection) -> None:
        """Learn of what another process retired or swept."""
        if connection.execute(_STATE).fetchone() != (self.oldest, self._swept):
            self.reload(connection)

    def restart(self) -> None:
        """Begin the sweep anew: a step of it was rolled back."""
        self._table, self._after = 0, b""

    @property
    def due(self) -> bool:
        """Whether there may be something to drop."""
        return self._swept < self.oldest

    def retire(self, connection: Connection, oldest: int) -> None:
        """From now on no epoch below this one can be presented."""
        if oldest > self.oldest:
            self._execute(connection, "UPDATE ended SET oldest = ?", oldest)
            self.oldest, self._table, self._after = oldest, 0, b""

    def learn(self, oldest: int) -> None:
        """A committed batch saw this; needs no transaction, but none of ours may be under way."""
        if oldest > self.oldest:
            self.oldest, self._table, self._after = oldest, 0, b""

    def step(self, connection: Connection, rows: int) -> Swept:
        """Look at so many rows and drop those of ended epochs."""
        table = _TABLES[self._table]
        last = self._last(connection, table, rows)
        dropped = self._drop(connection, table, last)
        if last is not None:
            self._after = last
        elif self._table + 1 < len(_TABLES):
            self._table, self._after = self._table + 1, b""
        else:
            self._execute(connection, "UPDATE ended SET swept = ?", self.oldest)
            self._swept = self.oldest
        return Swept(
            requests=dropped if table.name == "request" else 0,
            serials=dropped if table.name == "serial" else 0,
        )

    def _last(self, connection: Connection, table: _Table, rows: int) -> bytes | None:
        """The key of the last row of this step; None if fewer rows are left."""
        query = (
            f"SELECT {table.key} FROM {table.name} WHERE {table.key} > ?"
            f" ORDER BY {table.key} LIMIT 1 OFFSET ?"
        )
        row = self._execute(connection, query, self._after, rows - 1).fetchone()
        return None if row is None else row[0]

    def _drop(self, connection: Connection, table: _Table, last: bytes | None) -> int:
        command = f"DELETE FROM {table.name} WHERE {table.key} > ? AND {table.epoch} < ?"
        arguments: list[object] = [self._after, self.oldest]
        if last is not None:
            command += f" AND {table.key} <= ?"
            arguments.append(last)
        dropped: int = self._execute(connection, command, *arguments).rowcount
        return dropped

    def _execute(self, connection: Connection, command: str, *arguments: object) -> Any:
        return connection.execute(command.replace("?", self._mark), arguments)
