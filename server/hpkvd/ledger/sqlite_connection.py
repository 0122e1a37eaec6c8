"""The file of a ledger in SQLite: making and opening it, its schema, its errors.

The order of rows tells nothing of the order of arrival: tables are ordered by hashes or random
numbers. (How the file was laid out over time still tells something to who seizes the disk.)
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hpkvd.ledger import LedgerBusy, LedgerError, LedgerFull, later

APPLICATION: Final = int.from_bytes(b"hpkv", "big")
SCHEMA_VERSION: Final = 6
LOCK_SECONDS: Final = 5.0
RESERVE: Final = 64 * 2**20

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


def make(path: Path) -> None:
    """Make a file with an empty ledger; sqlite3.Error."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        "PRAGMA page_size = 4096; PRAGMA auto_vacuum = INCREMENTAL;"
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
        f"BEGIN; PRAGMA application_id = {APPLICATION};"
        f"PRAGMA user_version = {SCHEMA_VERSION}; {SCHEMA} {ENTRIES}"
        f"{' '.join(later.tables('BLOB'))} COMMIT;"
    )
    connection.close()


def connect(path: Path) -> sqlite3.Connection:
    """A connection to a ledger that exists, of which commits are durable; sqlite3.Error."""
    # Who opens a file first recovers its log, and others that start then have to wait for that.
    connection = sqlite3.connect(
        path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON").fetchall()  # as Debian's SQLite does anyway
    connection.execute("PRAGMA cache_size = -16384")
    connection.execute(f"PRAGMA journal_size_limit = {RESERVE}")
    return connection


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """LedgerError unless the file has a ledger that this program knows."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise LedgerError(f"{path} is not a ledger of hpkvd; check --data")
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"{path} was written by a newer hpkvd (schema {version}, this one knows"
            f" {SCHEMA_VERSION}); upgrade hpkvd"
        )


def upgrade(connection: sqlite3.Connection) -> None:
    """Give a ledger of an older schema the tables that came later."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    steps = (ENTRIES, *later.tables("BLOB"), _MOVE_ENTRIES)
    added = "".join(steps[version - 1 :])
    if added:
        connection.executescript(
            f"BEGIN IMMEDIATE; {added} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )


def primary(error: sqlite3.Error) -> int:
    """The primary result code of an error; extended codes carry it in their low byte."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


@contextmanager
def translated() -> Iterator[None]:
    """What SQLite raises, as LedgerError."""
    try:
        yield
    except sqlite3.Error as error:
        code = primary(error)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if code == sqlite3.SQLITE_FULL:
            raise LedgerFull("the disk is full; free some space") from error
        if code == sqlite3.SQLITE_BUSY:
            raise LedgerBusy("another process keeps the ledger locked; try again") from error
        raise LedgerError(f"the ledger failed ({name}); check the disk and its file") from error
    except UnicodeDecodeError as error:  # it quotes what is damaged
        raise LedgerError("the ledger is damaged; check the disk and its file") from error
