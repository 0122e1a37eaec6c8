"""Which epoch is the newest of all servers on one ledger.

Each server has its epochs in files, and several servers must have the same ones: two epochs of one
number would look like tagging to every client. So whoever begins an epoch claims its number here
first, in one statement; of two that do so at a time one is told the other's. The row says nothing
that is secret, and that an epoch is claimed does not yet mean that anybody uses it.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from hpkvd.ledger import NewestEpoch

# Since schema 5 of SQLite, 6 of PostgreSQL.
SCHEMA: Final = """
CREATE TABLE newest (
    id          BIGINT PRIMARY KEY CHECK (id = 0),
    number      BIGINT NOT NULL,    -- of the newest epoch that was claimed; 0: none yet
    mark        BIGINT NOT NULL     -- 63 bits of its digest
);
INSERT INTO newest VALUES (0, 0, 0);
"""


class Connection(Protocol):
    """What sqlite3 and psycopg have in common."""

    @property
    def execute(self) -> Any:
        """Run a statement; a cursor with fetchone()."""
        ...


def claim(connection: Connection, newest: NewestEpoch, mark: str = "?") -> NewestEpoch:
    """See Desk; the connection commits each statement by itself."""
    now = _now(connection)
    if now.number < newest.number:
        command = "UPDATE newest SET number = ?, mark = ? WHERE number < ?"
        arguments = (newest.number, newest.mark, newest.number)
        connection.execute(command.replace("?", mark), arguments)
        now = _now(connection)
    return now


def _now(connection: Connection) -> NewestEpoch:
    row: tuple[int, int] = connection.execute("SELECT number, mark FROM newest").fetchone()
    return NewestEpoch(*row)
