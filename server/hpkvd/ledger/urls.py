"""Which ledger a URL names: `sqlite:///var/lib/hpkvd/ledger.sqlite`, `postgresql://USER@HOST/DB`.

A URL may have a password, so it is never told: `shown` is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, unquote, urlsplit

from hpkvd.ledger import Engine, LedgerError
from hpkvd.ledger.sqlite import SqliteLedger

if TYPE_CHECKING:
    from hpkvd.ledger.postgresql import PostgresqlLedger

_POSTGRESQL: Final = ("postgresql", "postgres")


class UnknownLedger(LedgerError):
    """The text names no ledger of ours."""


def create(url: str) -> None:
    """Make an empty ledger; LedgerError, also if there is one."""
    if (path := sqlite_path(url)) is not None:
        SqliteLedger.create(path)
    else:
        _postgresql().create(url)


def open_ledger(url: str, *, reserve: int = 0, max_blobs: int = 0) -> Engine:
    """The ledger a URL names; LedgerError.

    `reserve`: bytes of disk that insertions leave (SQLite); `max_blobs`: blobs at which they
    stop, 0 for never.
    """
    if (path := sqlite_path(url)) is not None:
        if moved(path).exists() and not path.exists():
            raise LedgerError(
                "this ledger was moved elsewhere by `hpkvd migrate`; change `ledger` in hpkvd.toml"
            )
        return SqliteLedger(path, reserve=reserve, max_blobs=max_blobs)
    return _postgresql()(url, max_blobs=max_blobs)


def sqlite_path(url: str) -> Path | None:
    """The file of a sqlite URL, None for another engine's; UnknownLedger for other text."""
    parts = _parts(url)
    if parts.scheme == "sqlite" and parts.path and not parts.netloc:
        return Path(unquote(parts.path))
    if parts.scheme in _POSTGRESQL and url.partition("://")[2]:
        return None
    raise UnknownLedger(
        "a ledger is written as sqlite:///DIR/FILE or postgresql://USER@HOST/DATABASE"
    )


def moved(path: Path) -> Path:
    """What a SQLite file is called after its ledger was moved elsewhere."""
    return path.with_name(f"{path.name}.moved")


def has_password(url: str) -> bool:
    """Whether it holds a secret that does not belong on a command line."""
    parts = _parts(url)
    return bool(parts.password) or "password=" in parts.query


def _parts(url: str) -> SplitResult:
    """Nothing of what is no URL at all."""
    try:
        return urlsplit(url)
    except ValueError:  # a bracket that is not closed
        return urlsplit("")


def shown(url: str) -> str:
    """The engine, and the file; of a database no more than that it is one."""
    path = sqlite_path(url)
    return "PostgreSQL" if path is None else f"SQLite, {path}"


def _postgresql() -> type[PostgresqlLedger]:
    """The class, imported when it is wanted: servers on SQLite need no psycopg."""
    try:
        from hpkvd.ledger.postgresql import PostgresqlLedger
    except ImportError as error:
        raise LedgerError("PostgreSQL needs psycopg: pip install 'hpkvfs[postgresql]'") from error
    return PostgresqlLedger
