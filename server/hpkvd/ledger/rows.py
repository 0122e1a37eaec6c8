"""Every row of a ledger, table by table: to copy it, to back it up, to check it.

Rows are read in the order of their keys from one consistent snapshot, also while a server writes.
Both engines give rows of equal values, so a ledger is copied between them row by row; what was
copied is compared by its counts and books before anybody may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from hpkvd.ledger import LedgerError

CHUNK: Final = 256

Row: TypeAlias = tuple[Any, ...]
Progress: TypeAlias = Callable[[int, int], None]


class Table(NamedTuple):
    """A table; its first column is its key."""

    name: str
    columns: tuple[str, ...]

    @property
    def key(self) -> str:
        """The column rows are ordered by."""
        return self.columns[0]


TABLES: Final = (
    Table("request", ("fingerprint", "epoch", "operation", "outcome", "delta", "issued")),
    Table("serial", ("serial", "fingerprint")),
    Table("blob", ("key", "digest", "blob")),
    Table("voucher", ("digest", "amount", "spent")),
    Table("entry", ("key", "epoch", "counter", "digest", "value", "hours", "gone_at")),
    Table("sale", ("voucher", "method", "tokens", "sats", "due", "data")),
    Table("taking", ("digest", "sats", "taken", "token")),
)
# Tables of one row, taken over last: they say that all the rest is there.
SINGLE: Final = (
    Table("ended", ("id", "oldest", "swept")),
    Table("sold", ("id", "cashu_tokens", "cashu_sats", "lightning_tokens", "lightning_sats")),
    Table("newest", ("id", "number", "mark")),
    Table(
        "books",
        (
            "id", "issued", "charged", "refunded", "outstanding", "requests", "serials", "blobs",
        ),
    ),
)  # fmt: skip


class Rows(Protocol):
    """A ledger's rows; every method may raise LedgerError."""

    def snapshot(self) -> AbstractContextManager[None]:
        """All that is read within is of one moment."""
        ...

    def damage(self) -> str:
        """What the engine finds wrong with its own pages and indexes; empty for nothing."""
        ...

    def one(self, query: str) -> Row:
        """The row a portable query gives."""
        ...

    def after(self, table: Table, key: bytes, limit: int) -> list[Row]:
        """The next rows, in the order of their keys."""
        ...

    def put(self, table: Table, rows: Sequence[Row]) -> None:
        """Add rows, durably."""
        ...

    def replace(self, table: Table, row: Row) -> None:
        """The one row of a table of one row, durably."""
        ...

    def close(self) -> None:
        """Let go of it; idempotent."""
        ...


def select(table: Table, key: str, limit: str) -> str:
    """The query of Rows.after, with an engine's placeholders."""
    return (
        f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE {table.key} > {key}"
        f" ORDER BY {table.key} LIMIT {limit}"
    )


def every(rows: Rows, table: Table, start: bytes = b"") -> Iterator[list[Row]]:
    """All rows of a table behind a key, in chunks."""
    while chunk := rows.after(table, start, CHUNK):
        yield chunk
        start = chunk[-1][0]


def count(rows: Rows, table: Table) -> int:
    """How many rows a table has."""
    (number,) = rows.one(f"SELECT count(*) FROM {table.name}")
    return int(number)


def copy(source: Rows, target: Rows, progress: Progress = lambda done, total: None) -> None:
    """Copy a ledger into an empty one, or into one that an earlier try did not complete.

    The target must not be used before this returns: its books come last. LedgerError when it
    holds what the source does not.
    """
    with source.snapshot():
        total = sum(count(source, table) for table in TABLES)
        done = 0
        for table in TABLES:
            done += count(target, table)
            progress(done, total)
            for chunk in every(source, table, _last(target, table)):
                target.put(table, chunk)
                done += len(chunk)
                progress(done, total)
        for table in SINGLE:
            target.replace(
                table, source.one(f"SELECT {', '.join(table.columns)} FROM {table.name}")
            )
        compare(source, target)


def _last(rows: Rows, table: Table) -> bytes:
    query = f"SELECT {table.key} FROM {table.name} ORDER BY {table.key} DESC LIMIT 1"
    (key,) = rows.one(f"SELECT ({query})")  # NULL for an empty table
    return b"" if key is None else bytes(key)


def compare(source: Rows, target: Rows) -> None:
    """LedgerError unless both have as many rows, and the same sums and books."""
    sums = (
        "SELECT coalesce(sum(delta), 0), coalesce(sum(epoch), 0) FROM request",
        "SELECT coalesce(sum(amount), 0), coalesce(sum(spent), 0) FROM voucher",
        "SELECT coalesce(sum(sats), 0), coalesce(sum(taken), 0) FROM taking",
        "SELECT coalesce(sum(tokens), 0), coalesce(sum(sats), 0), coalesce(sum(due), 0) FROM sale",
    )
    queries = [f"SELECT count(*) FROM {table.name}" for table in TABLES]
    queries += [*sums, *(f"SELECT {', '.join(t.columns)} FROM {t.name}" for t in SINGLE)]
    for query in queries:
        ours, theirs = (tuple(map(int, rows.one(query))) for rows in (source, target))
        if ours != theirs:
            table = query.partition(" FROM ")[2]
            raise LedgerError(
                f"the copy is not the original: they differ in `{table}`; make an empty target"
            )
