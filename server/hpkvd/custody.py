"""A ledger's whereabouts: moved between engines, backed up, restored.

There is one ledger, ever. Two that both serve, or an old one that serves again, would take
credentials that were spent already. So a copy that is not complete cannot be opened, and the
original of one that is complete cannot either:

- SQLite: a copy is made as FILE.part and renamed when it is whole; an original that was moved is
  renamed to FILE.moved.
- PostgreSQL: the table `hpkvd` says `filling`, `ready` or `moved`.

A server holds FILE.lock (shared) while it serves; moving takes it alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hpkvd import config as settings
from hpkvd import files
from hpkvd.ledger import LedgerBusy, LedgerError, urls
from hpkvd.ledger.rows import Progress, Rows, compare, copy
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.ledger.sqlite_rows import SqliteRows
from hpkvfs.tor import TORRC

if TYPE_CHECKING:
    from hpkvd.ledger.postgresql_rows import PostgresqlRows

TELL_STEPS: Final = 100_000
"""Of SQLite's machine, some tens to a row: so often is told how far a copy is."""


@contextmanager
def in_use(url: str, *, alone: bool = False) -> Iterator[None]:
    """While within: others may serve this ledger too, or (`alone`) nobody may. LedgerBusy."""
    path = urls.sqlite_path(url)
    if path is None:
        if alone:
            with closing(_postgresql(url)) as rows:
                rows.refuse_servers()
        yield
        return
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, alone)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, alone: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = "a server uses this ledger; stop it" if alone else "`hpkvd migrate` is at work; wait"
        raise LedgerBusy(f"{who} first") from error


def rows_of(url: str) -> Rows:
    """The rows of a ledger that can be opened; LedgerError."""
    urls.open_ledger(url).close()
    path = urls.sqlite_path(url)
    return _postgresql(url) if path is None else SqliteRows(path)


def migrate(source: str, target: str, progress: Progress) -> None:
    """Move a ledger; LedgerError. Interrupted, it is to be called again, and goes on."""
    if source == target:
        raise LedgerError("source and target are the same ledger")
    path = urls.sqlite_path(source)
    if path is not None and not (path.exists() or urls.moved(path).exists()):
        raise LedgerError(f"there is no ledger at {path}; name the file that is to be moved")
    with in_use(source, alone=True):
        if _is_there(target):
            with closing(rows_of(source)) as rows, closing(rows_of(target)) as copied:
                compare(rows, copied)  # an earlier try ended before it retired the source
        else:
            with closing(rows_of(source)) as rows, _filled(target) as copied:
                copy(rows, copied, progress)
                compare(rows, copied)  # once more, with what is there now
        _retire(source)


def _is_there(url: str) -> bool:
    """Whether a ledger that can be served is there."""
    try:
        urls.open_ledger(url).close()
    except LedgerError:
        return False
    return True


@contextmanager
def _filled(url: str) -> Iterator[Rows]:
    """An empty or half-filled target; complete and in place after this."""
    path = urls.sqlite_path(url)
    if path is not None:
        with _filled_file(path) as rows:
            yield rows
        return
    if not _is_filling(url):
        urls.create(url)
    with closing(_postgresql(url)) as rows:
        rows.set_state("filling")
        yield rows
        rows.set_state("ready")


@contextmanager
def _filled_file(path: Path) -> Iterator[Rows]:
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        raise LedgerError(f"{path} exists already")
    if not part.exists():
        SqliteLedger.create(part)
    with closing(SqliteRows(part)) as rows:
        yield rows
        rows.one("PRAGMA wal_checkpoint(TRUNCATE)")
    part.rename(path)
    files.sync(path.parent)


def _is_filling(url: str) -> bool:
    if _is_there(url):
        raise LedgerError("the target has a ledger already")
    try:
        with closing(_postgresql(url)) as rows:
            return rows.state() == "filling"
    except LedgerError:
        return False


def _retire(url: str) -> None:
    path = urls.sqlite_path(url)
    if path is None:
        with closing(_postgresql(url)) as rows:
            rows.set_state("moved")
        return
    with closing(SqliteRows(path)) as rows:
        rows.one("PRAGMA wal_checkpoint(TRUNCATE)")
    path.rename(urls.moved(path))
    files.sync(path.parent)


def backup(data: Path, url: str, target: Path, progress: Progress) -> None:
    """Copy a data directory and its ledger, also while it serves, into a new directory.

    The ledger first: an epoch that begins meanwhile is then in the copy without any requests,
    and not the other way round.
    """
    target.mkdir(mode=0o700, parents=True)
    try:
        _copy_ledger(url, target / settings.LEDGER, progress)
        _copy_keys(data, target)
    except BaseException:
        shutil.rmtree(target)  # half a backup is none, and in the way of the next
        raise


def _copy_ledger(url: str, path: Path, progress: Progress) -> None:
    source = urls.sqlite_path(url)
    if source is None:
        with closing(rows_of(url)) as rows, _filled_file(path) as copied:
            copy(rows, copied, progress)
    else:
        urls.open_ledger(url).close()
        _copy_file(source, path, progress)


def restore(saved: Path, data: Path, url: str, progress: Progress) -> None:
    """Make a data directory and a ledger of a backup; neither may exist. LedgerError, OSError."""
    path = saved / settings.LEDGER
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = urls.sqlite_path(url)
    if target is None:
        with closing(SqliteRows(path)) as rows, _filled(url) as copied:
            copy(rows, copied, progress)
    elif target.exists():
        raise LedgerError(f"{target} exists already")
    else:
        _copy_file(path, target, progress)
    _copy_keys(saved, data)  # last: until then it can be run again


def _copy_file(source: Path, target: Path, progress: Progress) -> None:
    """One consistent state, while others write, in the order of its tables and nothing besides.

    Not by SQLite's online backup. That begins anew whenever somebody else has written, so never
    ends while a server is busy; and it copies page by page, with blobs in the order in which they
    were stored.
    """
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

    try:
        with closing(sqlite3.connect(source, isolation_level=None)) as ours:
            (pages,) = ours.execute("PRAGMA page_count").fetchone()
            (size,) = ours.execute("PRAGMA page_size").fetchone()

            def told() -> None:
                progress(min(part.stat().st_size // size, pages), pages)

            ours.set_progress_handler(told, TELL_STEPS)
            ours.execute("VACUUM INTO ?", (str(part),))
        with closing(sqlite3.connect(part)) as theirs:
            theirs.execute("PRAGMA journal_mode = WAL").fetchall()
    except sqlite3.Error as error:
        part.unlink(missing_ok=True)
        raise LedgerError(f"the ledger could not be copied: {error}") from error
    files.sync(part)
    part.rename(target)
    files.sync(target.parent)


def _copy_keys(source: Path, target: Path) -> None:
    """Everything of a data directory but ledgers, locks and what is being made."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(settings.LEDGER) or path.suffix in (".lock", ".part"):
            continue
        if path.is_dir():
            ignore = _all_but_torrc if path.name == settings.TOR else None
            shutil.copytree(path, target / path.name, ignore=ignore)
        else:
            shutil.copy2(path, target / path.name)
    for path in target.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def _all_but_torrc(_: str, names: list[str]) -> list[str]:
    """tor makes the rest anew, and changes it while it is copied."""
    return [name for name in names if name != TORRC]


def _postgresql(url: str) -> PostgresqlRows:
    from hpkvd.ledger.postgresql_rows import PostgresqlRows

    return PostgresqlRows(url)
