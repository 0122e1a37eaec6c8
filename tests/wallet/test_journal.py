"""The journal: what is found again after a crash, and what a thief of the file finds."""

from __future__ import annotations

import secrets
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import pytest
import trio

from hpkvfs.errors import AlreadyInUse, DiskFull, NewerFormat, VaultError
from hpkvfs.protocol import codec
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet import rows
from hpkvfs.wallet.journal import FORMAT, Journal
from hpkvfs.wallet.wallet import Pending, Wallet
from tests.doubles import FailingJournal
from tests.wallet.strategies import EPOCH, attempt, credential

KEY = bytes(range(32))


class Disk:
    """One file, opened again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[FailingJournal] = []

    def open(self, key: bytes = KEY) -> FailingJournal:
        self.opened.append(FailingJournal(self.path, key, secrets.token_bytes))
        return self.opened[-1]

    def kill(self) -> None:
        self.opened.pop().die()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "wallet")
    yield disk
    for journal in disk.opened:
        journal.die()


async def buy(journal: Journal, wallet: Wallet, *amounts: int) -> None:
    one = attempt(Operation.ISSUE, sum(amounts), b"body")
    pending = wallet.begin(EPOCH, (), one, b"voucher")
    await journal.begin(pending)
    outputs = credential(amounts[0]), credential(amounts[1])
    journal.settle(wallet.settle(pending, one, outputs), wallet.book)


async def insert(journal: Journal, wallet: Wallet, memo: bytes = b"memo") -> Pending:
    selection = wallet.select(EPOCH, -10, 10)
    assert selection is not None
    pending = wallet.begin(EPOCH, selection.inputs, attempt(Operation.INSERT, -10), memo)
    await journal.begin(pending)
    return pending


async def test_what_is_flushed_is_found(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    await journal.flush()
    disk.kill()
    again = disk.open().load()
    assert again.held() == wallet.held()
    assert again.conservation == wallet.conservation
    assert again.conservation.holds


async def test_begin_is_durable_and_orders_what_came_before(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    pending = await insert(journal, wallet)
    disk.kill()
    again = disk.open().load()
    assert again.pending == {pending.number: pending}
    assert again.balance.pending == 50 and again.conservation.holds


async def test_a_settlement_that_was_not_committed_is_a_pending_again(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    pending = await insert(journal, wallet)
    outputs = credential(20), credential(20)
    journal.settle(wallet.settle(pending, pending.attempts[0], outputs), wallet.book)
    assert [receipt.memo for receipt in journal.receipts] == [b"memo"]
    disk.kill()
    journal = disk.open()
    assert journal.load().pending == {pending.number: pending}
    assert journal.receipts == []


async def test_both_attempts_are_kept(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    pending = wallet.retry(await insert(journal, wallet), attempt(Operation.REISSUE, 0, b"frame"))
    await journal.begin(pending)
    disk.kill()
    assert disk.open().load().pending == {pending.number: pending}


async def test_a_release_gives_the_inputs_back(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    pending = await insert(journal, wallet)
    wallet.release(pending)
    journal.release(pending)
    other = await insert(journal, wallet)
    disk.kill()
    assert disk.open().load().pending == {other.number: other}


async def test_closing_keeps_everything(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    journal.put_meta("anchor", b"seven")
    disk.opened.pop().close()
    journal = disk.open()
    assert journal.load().held() == wallet.held()
    assert journal.meta("anchor") == b"seven" and journal.meta("other") is None


async def test_a_nudge_commits_without_being_waited_for(disk: Disk) -> None:
    journal = disk.open()
    journal.put_meta("anchor", b"seven")
    journal.nudge()
    journal.put_meta("anchor", b"eight")
    journal.nudge()
    await journal.flush()
    disk.kill()
    assert disk.open().meta("anchor") == b"eight"


async def test_many_begin_at_once(disk: Disk) -> None:
    """They share commits, and each is durable when it returns."""
    journal = disk.open()
    wallet = journal.load()
    for _ in range(40):
        await buy(journal, wallet, 10, 10)
    commits = 0
    commit = journal._commit

    def counting() -> sqlite3.Error | None:
        nonlocal commits
        commits += 1
        return commit()

    journal._commit = counting  # type: ignore[method-assign]  # to count
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(insert, journal, wallet)
    assert commits < 10
    disk.kill()
    assert len(disk.open().load().pending) == 40


@pytest.mark.parametrize("keeps_last", [False, True])
async def test_a_failed_write_is_told_to_everyone_for_good(disk: Disk, keeps_last: bool) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    await buy(journal, wallet, 30, 20)
    await journal.flush()
    journal.commits_left, journal.keeps_last = 0, keeps_last
    failures = []

    async def failing() -> None:
        try:
            await insert(journal, wallet)
        except VaultError as failure:
            failures.append(failure)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(failing)
        nursery.start_soon(failing)
    with pytest.raises(VaultError):
        journal.put_meta("a", b"b")
    with pytest.raises(VaultError):
        await journal.flush()
    assert len(failures) == 2
    disk.kill()
    again = disk.open().load()
    assert again.balance.total == 100 and again.conservation.holds
    assert bool(again.pending) == keeps_last


@pytest.mark.parametrize("has_room_again", [True, False])
async def test_a_full_disk_fails_who_waits_and_nothing_else(
    disk: Disk, has_room_again: bool
) -> None:
    """SQLite's own SQLITE_FULL. What was settled meanwhile is written when there is room."""
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    pending = await insert(journal, wallet)
    _limit(journal, 1)
    journal.put_meta("large", bytes(200_000))
    outputs = credential(25), credential(15)
    journal.settle(wallet.settle(pending, pending.attempts[0], outputs), wallet.book)
    with pytest.raises(DiskFull, match="the disk is full"):
        await journal.flush()
    assert isinstance(journal.trouble, DiskFull)
    unsent = wallet.begin(EPOCH, (), attempt(Operation.ISSUE, 7, b"body"), b"voucher")
    with pytest.raises(DiskFull):
        await journal.begin(unsent)
    wallet.release(unsent)
    journal.release(unsent)
    if has_room_again:
        _limit(journal, 1_000)
        await journal.flush()
        assert journal.trouble is None
    disk.kill()
    journal = disk.open()
    again = journal.load()
    assert again.conservation.holds
    assert again.balance.total == (40 if has_room_again else 50)
    assert list(again.pending) == ([] if has_room_again else [pending.number])
    assert journal.meta("large") == (bytes(200_000) if has_room_again else None)


def _limit(journal: Journal, pages: int) -> None:
    """The database may not grow beyond so many pages, nor shrink."""
    journal._database.execute(f"PRAGMA max_page_count = {pages}").fetchone()


async def test_the_file_tells_nothing(disk: Disk) -> None:
    journal = disk.open()
    wallet = journal.load()
    await buy(journal, wallet, 30, 20)
    await insert(journal, wallet, b"a memo to be found")
    journal.put_meta("anchor", b"a value to be found")
    await journal.flush()
    raw = b"".join(path.read_bytes() for path in disk.path.parent.iterdir())
    secret = [held.credential.encode()[4:36] for held in wallet.held()]
    assert not any(text in raw for text in (b"to be found", b"secrets", EPOCH, *secret))
    assert stat.S_IMODE(disk.path.stat().st_mode) == 0o600


async def test_another_key_does_not_open_it(disk: Disk) -> None:
    journal = disk.open()
    await buy(journal, journal.load(), 30, 20)
    disk.opened.pop().close()
    with pytest.raises(VaultError, match="damaged"):
        disk.open(bytes(32))


async def test_rows_cannot_be_moved(disk: Disk) -> None:
    """A credential under another's number, as somebody with the disk could put it."""
    journal = disk.open()
    await buy(journal, journal.load(), 30, 20)
    disk.opened.pop().close()
    with closing(sqlite3.connect(disk.path)) as database, database:
        database.execute(
            "UPDATE credentials SET sealed = (SELECT sealed FROM credentials WHERE number ="
            " (SELECT min(number) FROM credentials))"
        )
    with pytest.raises(VaultError, match="damaged"):
        disk.open().load()


async def test_a_newer_format_is_left_alone(disk: Disk) -> None:
    disk.open()
    disk.opened.pop().close()
    with closing(sqlite3.connect(disk.path)) as database:
        database.execute(f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(NewerFormat):
        disk.open()


async def test_the_format_before_is_read_and_raised(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = disk.open()
    wallet = journal.load()
    with monkeypatch.context() as before:
        before.setattr(rows, "pack_book", lambda book: codec.pack(astuple(book)[:5]))
        await buy(journal, wallet, 30, 20)
        await journal.flush()
    disk.opened.pop().close()
    with closing(sqlite3.connect(disk.path)) as database:
        database.execute("PRAGMA user_version = 3")
    assert disk.open().load().conservation == wallet.conservation
    disk.opened.pop().close()
    with closing(sqlite3.connect(disk.path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (FORMAT,)


async def test_one_process_at_a_time(disk: Disk) -> None:
    disk.open()
    with pytest.raises(AlreadyInUse):
        disk.open()


def test_what_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "wallet").write_bytes(b"a text, and none of ours" * 100)
    with pytest.raises(VaultError, match="damaged"):
        Journal(tmp_path / "wallet", KEY, secrets.token_bytes)
