"""What the ledger in SQLite has of its own: its file, its lock, its disk."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from hpkvd.ledger import LedgerBusy, LedgerError, LedgerFull, Read, StoredEntry
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.ledger.sqlite_connection import SCHEMA_VERSION
from hpkvfs.protocol.messages import Done, Reason
from tests.server.ledgers import (
    blob,
    delete,
    entry,
    fund,
    insert,
    key,
    opened,
    refusal,
    transaction,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    SqliteLedger.create(tmp_path / "ledger.sqlite")
    return tmp_path / "ledger.sqlite"


@pytest.fixture
async def funded(path: Path) -> AsyncIterator[SqliteLedger]:
    async with opened(f"sqlite://{path}") as ledger:
        assert isinstance(ledger, SqliteLedger)
        await fund(ledger)
        yield ledger


def test_a_ledger_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(LedgerError, match="hpkvd init"):
        SqliteLedger(path)
    SqliteLedger.create(path)
    with pytest.raises(LedgerError, match="exists"):
        SqliteLedger.create(path)


def test_the_file_is_as_it_should_be(path: Path) -> None:
    ledger = SqliteLedger(path)
    try:
        pragmas = {
            "page_size": 4096,
            "auto_vacuum": 2,
            "journal_mode": "wal",
            "synchronous": 2,
            "secure_delete": 1,
        }
        for pragma, value in pragmas.items():
            assert ledger._write.execute(f"PRAGMA {pragma}").fetchone() == (value,)
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        (f"user_version = {SCHEMA_VERSION + 1}", "newer hpkvd.*upgrade"),
        ("application_id = 1", "not a ledger of hpkvd"),
    ],
)
def test_a_file_of_another_kind_or_a_newer_one_is_refused(
    path: Path, pragma: str, message: str
) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA {pragma}")
    connection.close()
    with pytest.raises(LedgerError, match=message):
        SqliteLedger(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(os.urandom(8192))
    with pytest.raises(LedgerError):
        SqliteLedger(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process in the middle of writing."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.close()


async def test_a_lock_is_waited_for_while_reading_goes_on(funded: SqliteLedger, path: Path) -> None:
    async with trio.open_nursery() as nursery:
        with locked(path):
            nursery.start_soon(funded.apply, transaction("a", insert("x"), "s1", "s2"))
            await trio.sleep(0.05)
            assert await funded.read(key("x")) is None
            assert funded.totals().requests == 1
    assert await funded.read(key("x")) == blob("x")


async def test_a_lock_that_stays_is_told_of(
    funded: SqliteLedger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpkvd.ledger.sqlite.LOCK_SECONDS", 0.05)
    one = transaction("a", insert("x"), "s1", "s2")
    with locked(path), pytest.raises(LedgerBusy):
        await funded.apply(one)
    assert isinstance(await funded.apply(one), Done)


async def test_a_full_disk_spends_nothing_and_leaves_reading_alone(funded: SqliteLedger) -> None:
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    before = funded.totals()
    (pages,) = funded._write.execute("PRAGMA page_count").fetchone()
    funded._write.execute(f"PRAGMA max_page_count = {pages}")
    one = transaction("b", insert("y"), "s3", "s4")
    with pytest.raises(LedgerFull):
        await funded.apply(one)
    assert funded.totals() == before
    assert await funded.foresee(one.fingerprint, one.serials) is None
    assert await funded.read(key("x")) == blob("x")
    funded._write.execute(f"PRAGMA max_page_count = {pages * 10}")
    assert isinstance(await funded.apply(one), Done)


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a broken disk: only COMMIT writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_commit_that_fails_spends_nothing(funded: SqliteLedger, path: Path) -> None:
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    before = funded.totals()
    one = transaction("b", insert("y"), "s3", "s4")
    with files_no_longer_than(path.with_name(f"{path.name}-wal").stat().st_size + 5000):
        with pytest.raises(LedgerError, match="IOERR"):
            await funded.apply(one)
        assert funded.totals() == before
        assert await funded.read(key("x")) == blob("x")
        assert await funded.foresee(one.fingerprint, one.serials) is None
    assert isinstance(await funded.apply(one), Done)


async def test_insertions_leave_the_last_of_the_disk_to_the_others(path: Path) -> None:
    ledger = SqliteLedger(path, reserve=2**62)
    assert await refusal(ledger, insert("x")) is Reason.FULL
    assert await refusal(ledger, entry("x", 1)) is Reason.FULL
    assert await refusal(ledger, Read(key("x"))) is None
    ledger.close()


async def test_deleted_blobs_give_their_space_back(
    funded: SqliteLedger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpkvd.ledger.sqlite.VACUUM_PAGES", 20)
    texts = [f"blob {number}" for number in range(100)]
    for text in texts:
        await funded.apply(transaction("i" + text, insert(text), "s" + text, "t" + text))
    (full,) = funded._write.execute("PRAGMA page_count").fetchone()
    for text in texts:
        await funded.apply(transaction("d" + text, delete(text), "u" + text, "v" + text))
    with trio.fail_after(60):
        while funded._write.execute("PRAGMA freelist_count").fetchone()[0] >= 40:
            await trio.sleep(0.01)
    assert funded._write.execute("PRAGMA page_count").fetchone()[0] < full - 300


async def test_the_order_of_rows_is_not_the_order_of_arrival(funded: SqliteLedger) -> None:
    keys = [key(f"{number}") for number in range(40)]
    for number in range(40):
        what = f"{number}"
        await funded.apply(transaction(what, insert(what), "s" + what, "t" + what))
    stored = [row[0] for row in funded._read.execute("SELECT key FROM blob NOT INDEXED")]
    assert sorted(stored) == sorted(keys)
    assert stored != keys


async def test_no_record_joins_a_key_to_a_serial(funded: SqliteLedger) -> None:
    """What a seized disk tells: the tables have no column in common but the fingerprint."""
    tables = ("request", "serial", "blob", "voucher", "entry", "sale", "taking")
    columns = {
        table: {row[1] for row in funded._read.execute(f"PRAGMA table_info({table})")}
        for table in tables
    }
    assert columns["blob"] == {"id", "key", "digest", "blob"}
    assert columns["serial"] == {"serial", "fingerprint"}
    assert columns["voucher"] == {"digest", "amount", "spent"}
    assert columns["sale"] == {"voucher", "method", "tokens", "sats", "due", "data"}
    assert columns["taking"] == {"digest", "sats", "taken", "token"}
    assert columns["entry"] == {
        "id", "key", "epoch", "counter", "digest", "value", "hours", "gone_at",
    }  # fmt: skip
    assert columns["request"] == {
        "fingerprint", "epoch", "operation", "outcome", "delta", "issued",
    }  # fmt: skip


async def test_a_ledger_without_room_for_entries_is_given_it(path: Path) -> None:
    connection = sqlite3.connect(path)
    tables = ("entry", "ended", "sale", "taking", "sold", "newest")
    later = "".join(f"DROP TABLE {n};" for n in tables)
    connection.executescript(f"{later} PRAGMA user_version = 1;")
    connection.close()
    async with opened(f"sqlite://{path}") as ledger:
        assert ledger.totals().entries == ledger.totals().sales == 0


ENTRIES_5 = """
DROP TABLE entry;
CREATE TABLE entry (
    key BLOB PRIMARY KEY, epoch INTEGER NOT NULL, counter INTEGER NOT NULL, digest BLOB NOT NULL,
    value BLOB NOT NULL, hours INTEGER NOT NULL, gone_at INTEGER
) WITHOUT ROWID;
INSERT INTO entry VALUES (x'02', 1, 7, x'dd', x'ee', 72, NULL), (x'03', 1, 8, x'dd', x'ef', 72, 99);
PRAGMA user_version = 5;
"""


async def test_entries_of_an_older_ledger_are_kept(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(ENTRIES_5)
    connection.close()
    for _ in range(2):
        async with opened(f"sqlite://{path}") as ledger:
            assert await ledger.entry(b"\2", 98) == StoredEntry(7, b"\xdd", b"\xee", None)
            assert await ledger.entry(b"\3", 98) == StoredEntry(8, b"\xdd", b"\xef", 99)
            assert await ledger.entry(b"\3", 99) is None
            assert ledger.totals().entries == 2
