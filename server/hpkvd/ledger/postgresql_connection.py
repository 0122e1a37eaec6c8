"""Connections to PostgreSQL, and what is tried again when one of them breaks.

When the answer to COMMIT is lost (the server died, a standby took over) the batch is decided anew
on a new connection. What had been committed is then found as known, with its stored reply, and
the callers cannot tell the difference.

A read does not show what a crash can undo: PostgreSQL lets nobody see a transaction before its
COMMIT is durable, with `synchronous_standby_names` also on the standby. That holds as long as
nobody cancels that wait, so we set no statement timeout, and as long as the old primary is shut
out after a fail-over (docs/operator.md).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
from psycopg import errors

from hpkvd.ledger import LedgerBusy, LedgerError, LedgerFull, later

SCHEMA_VERSION: Final = 6  # of postgresql.SCHEMA, and what check_version adds to older ones
FAILOVER_SECONDS: Final = 20.0
CONNECT_SECONDS: Final = 3
SERVING: Final = "hpkvd serve"  # the application_name of servers
LONGEST_PAUSE: Final = 0.5
# A server finds rows by their keys. Those of a young ledger, of which there are no statistics yet,
# PostgreSQL would find by walking through whole tables. (And where it has to, it would think that
# worth compiling.)
BY_KEY: Final = "SET enable_seqscan = off; SET jit = off"

# What can be tried again at once: somebody else was quicker (class 40: serialisation, deadlock).
_CONFLICTS: Final = (errors.UniqueViolation, errors.SerializationFailure, errors.DeadlockDetected)
_AGAIN: Final = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    errors.ReadOnlySqlTransaction,
)
_ROOM: Final = (errors.DiskFull, errors.OutOfMemory)

T = TypeVar("T")
Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]


class Session:
    """One connection, made anew when it breaks; used by one thread at a time."""

    def __init__(self, url: str, *, autocommit: bool) -> None:
        self._url = url
        self._autocommit = autocommit
        self._connection: Connection | None = None
        self._closing = threading.Event()

    def run(self, work: Callable[[Connection], T]) -> T:
        """Do this on the connection, again and again until nothing transient is in its way.

        LedgerBusy after FAILOVER_SECONDS; LedgerFull; LedgerError.
        """
        end, pause = time.monotonic() + FAILOVER_SECONDS, 0.001
        while True:
            try:
                return work(self._connected())
            except _CONFLICTS as error:
                self._roll_back()
                failure: psycopg.Error = error
            except _ROOM as error:
                self._roll_back()
                raise LedgerFull("the database's disk is full; free some space") from error
            except _AGAIN as error:
                self._drop()
                failure = error
                pause = max(pause, 0.05)
            except psycopg.Error as error:
                self._drop()
                raise LedgerError(f"the database failed ({_name(error)}); see its log") from error
            if time.monotonic() + pause > end or self._closing.is_set():
                raise LedgerBusy(
                    f"the database does not answer ({_name(failure)}); is it up, and the primary?"
                ) from failure
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """End it; nothing is retried any more."""
        self._closing.set()
        self._drop()

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._url, autocommit=True, name=SERVING)
            self._check()
            self._connection.autocommit = self._autocommit
        return self._connection

    def _check(self) -> None:
        """Nobody moved the ledger away while we had no connection; LedgerError."""
        assert self._connection is not None
        try:
            check_version(self._connection)
        except LedgerError:
            self._drop()
            raise

    def _roll_back(self) -> None:
        if self._connection is not None:
            try:
                self._connection.rollback()
            except psycopg.Error:
                self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None


def connect(url: str, *, autocommit: bool, name: str = "hpkvd") -> Connection:
    """A connection to whichever of the URL's hosts takes writes; psycopg.Error.

    Its commits are durable before they return, whatever the database's default is.
    """
    connection = psycopg.connect(
        url,
        autocommit=True,
        connect_timeout=CONNECT_SECONDS,
        target_session_attrs="read-write",
        application_name=name,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=10_000,
    )
    row = connection.execute("SHOW synchronous_commit").fetchone()
    if row in [("off",), ("local",)]:
        connection.execute("SET synchronous_commit = 'on'")
    if name == SERVING:
        with suppress(psycopg.Error):
            connection.execute(BY_KEY)
    connection.autocommit = autocommit
    return connection


def check_version(connection: Connection) -> None:
    """LedgerError unless the database has a ledger that this program knows and may use."""
    version = schema_version(connection)
    if version is None:
        raise LedgerError("the database has no ledger; run `hpkvd init` or `hpkvd migrate` first")
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"the database was written by a newer hpkvd (schema {version}, this one knows"
            f" {SCHEMA_VERSION}); upgrade hpkvd"
        )
    row = connection.execute("SELECT state FROM hpkvd").fetchone()
    if version < SCHEMA_VERSION:
        added = "".join(later.tables("BYTEA")[max(0, version - 3) :])
        noted = f"UPDATE hpkvd SET version = {SCHEMA_VERSION};"
        connection.execute(f"BEGIN; {added} {noted} COMMIT;".encode())
    if row == ("filling",):
        raise LedgerError("this ledger is not complete; run `hpkvd migrate` again, to its end")
    if row == ("moved",):
        raise LedgerError(
            "this ledger was moved elsewhere by `hpkvd migrate`; change `ledger` in hpkvd.toml"
        )


def schema_version(connection: Connection) -> int | None:
    """Of the ledger in the database; None if it has none."""
    found = connection.execute(
        "SELECT 1 FROM information_schema.tables"
        " WHERE table_name = 'hpkvd' AND table_schema = current_schema()"
    ).fetchone()
    if found is None:
        return None
    row = connection.execute("SELECT version FROM hpkvd").fetchone()
    return None if row is None else row[0]


def _name(error: psycopg.Error) -> str:
    """What can be told of an error: its text may have addresses, users, or a row's contents."""
    return error.sqlstate or type(error).__name__


@contextmanager
def translated() -> Iterator[None]:
    """psycopg.Error as LedgerError, of which the message tells no more than a code."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise LedgerBusy(
            f"the database cannot be reached ({_name(error)}); is it up, and are its URL, user and"
            " password right?"
        ) from error
    except psycopg.Error as error:
        raise LedgerError(f"the database failed ({_name(error)}); see its log") from error
