"""Ended epochs are forgotten: refused first, then dropped in small steps, the disk given back."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from hpkvd.ledger import LedgerError, Transaction
from hpkvd.ledger import sqlite as ledger_module
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvfs.protocol.messages import Done, Reason, Refused
from tests.server.ledgers import VOUCHER, entry, insert, sale, transaction


@pytest.fixture
def path(tmp_path: Path) -> Path:
    SqliteLedger.create(tmp_path / "ledger.sqlite")
    return tmp_path / "ledger.sqlite"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteLedger]:
    ledger = SqliteLedger(path, reserve=0)
    try:
        async with ledger.serving():
            yield ledger
    finally:
        ledger.close()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that few rows take many steps, and few pages are worth giving back."""
    monkeypatch.setattr(ledger_module, "SWEEP_ROWS", 7)
    monkeypatch.setattr(ledger_module, "SWEEP_ROWS_WHEN_BUSY", 2)
    monkeypatch.setattr(ledger_module, "VACUUM_PAGES", 8)
    yield


def reissue(what: str, epoch: int, size: int = 1) -> Transaction:
    made = transaction(what, None, f"{what}-1", f"{what}-2")
    return replace(made, epoch=epoch, issued=bytes(size))


async def fill(ledger: SqliteLedger, epoch: int, count: int, size: int = 1) -> None:
    async with trio.open_nursery() as nursery:
        for i in range(count):
            nursery.start_soon(ledger.apply, reissue(f"{epoch}/{i}", epoch, size))


async def swept(ledger: SqliteLedger) -> None:
    """Wait until the sweep is over, by what a reader of the file sees: the writer's own state,
    and even its `in_transaction`, say so while the last COMMIT is still being written."""
    with trio.fail_after(60):
        while ledger._read.execute("SELECT swept < oldest FROM ended").fetchone() == (1,):
            await trio.sleep(0.01)


def kept(path: Path) -> tuple[set[int], int]:
    """Epochs of the requests in the file, and how many serials there are."""
    with closing(sqlite3.connect(path)) as connection:
        epochs = {epoch for (epoch,) in connection.execute("SELECT epoch FROM request")}
        (serials,) = connection.execute("SELECT count(*) FROM serial").fetchone()
    return epochs, serials


async def test_an_epoch_that_ended_is_refused_at_once_and_forgotten(
    path: Path, small_steps: None
) -> None:
    async with opened(path) as ledger:
        for epoch in (1, 2, 3):
            await fill(ledger, epoch, 30)
        await ledger.retire(3)
        for old in (reissue("1/0", 1), reissue("2/7", 2), reissue("new", 2)):
            assert await ledger.apply(old) == Refused(Reason.EPOCH_ENDED)
        assert isinstance(await ledger.apply(reissue("new", 3)), Done)
        await swept(ledger)
        assert ledger.totals().requests == 31
        assert ledger.totals().serials == 62
    assert kept(path) == ({3}, 62)


async def test_serials_of_live_epochs_stay_spent(path: Path, small_steps: None) -> None:
    async with opened(path) as ledger:
        await fill(ledger, 1, 20)
        await fill(ledger, 2, 20)
        await ledger.retire(2)
        await swept(ledger)
        for i in range(20):
            again = replace(reissue(f"again {i}", 2), serials=reissue(f"2/{i}", 2).serials)
            known = await ledger.apply(again)
            assert not isinstance(known, Done | Refused)


async def test_requests_are_answered_while_it_sweeps(path: Path, small_steps: None) -> None:
    async with opened(path) as ledger:
        await fill(ledger, 1, 100)
        await ledger.retire(2)
        count = 0
        while ledger._sweep.due:
            assert isinstance(await ledger.apply(reissue(f"live {count}", 2)), Done)
            count += 1
        assert count > 20
        assert ledger.totals().requests == count


async def test_a_sweep_cut_short_is_finished_after_the_next_start(
    path: Path, small_steps: None
) -> None:
    async with opened(path) as ledger:
        await fill(ledger, 1, 100)
        await ledger.retire(2)
        assert ledger._sweep.due
    assert kept(path)[1] > 0
    async with opened(path) as ledger:
        assert ledger.oldest_epoch == 2
        assert await ledger.apply(reissue("1/0", 1)) == Refused(Reason.EPOCH_ENDED)
        await swept(ledger)
    assert kept(path) == (set(), 0)


async def test_what_ended_never_comes_back(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.retire(5)
        await ledger.retire(2)
        assert ledger.oldest_epoch == 5


async def test_a_disk_that_fails_leaves_the_epoch_to_be_ended_again(path: Path) -> None:
    async with opened(path) as ledger:
        await fill(ledger, 1, 3)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ledger_module, "LOCK_SECONDS", 0.05)
                with pytest.raises(LedgerError):
                    await ledger.retire(2)
            other.execute("ROLLBACK")
        assert ledger.oldest_epoch == 0
        assert isinstance(await ledger.apply(reissue("still", 1)), Done)
        await ledger.retire(2)
        await swept(ledger)
    assert kept(path) == (set(), 0)


async def test_blobs_vouchers_and_books_stay(path: Path, small_steps: None) -> None:
    async with opened(path) as ledger:
        ledger.add_vouchers([VOUCHER])
        await ledger.apply(sale())
        await ledger.apply(transaction("insert", insert("x"), "s1", "s2"))
        await ledger.apply(transaction("entry", entry("y", 1), "s3", "s4"))
        before = ledger.totals()
        await ledger.retire(2)
        await swept(ledger)
        after = ledger.totals()
        assert await ledger.read(insert("x").key) == insert("x").blob
        assert after == replace(before, requests=0, serials=0, entries=0)
        assert after.issued == after.outstanding + after.charged - after.refunded
        again = replace(sale(), fingerprint=b"another" + bytes(25), epoch=2)
        assert await ledger.apply(again) == Refused(Reason.VOUCHER_SPENT)


async def test_the_disk_space_is_given_back(path: Path, small_steps: None) -> None:
    async with opened(path) as ledger:
        await fill(ledger, 1, 1_500, size=500)
        await fill(ledger, 2, 10, size=500)
    full = path.stat().st_size
    async with opened(path) as ledger:
        await ledger.retire(2)
        await swept(ledger)
        with trio.fail_after(60):
            while await ledger._tidied():
                pass
    assert path.stat().st_size < full / 4
