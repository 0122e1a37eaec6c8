"""What payments left in a ledger goes wherever the ledger goes, and `hpkvd check` looks at it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from hpkvd import custody
from hpkvd.ledger import Begin, Sale, Settle, Taking
from hpkvd.ledger import check as checking
from hpkvd.ledger.urls import create, sqlite_path
from hpkvfs.protocol.messages import Method
from tests.server.ledgers import fund, opened
from tests.server.postgres import Cluster

ENGINES = ("sqlite", "postgresql")
ECASH = Sale(b"e" * 32, Method.CASHU, 990, 99, 7, b"coins")
INVOICE = Sale(b"i" * 32, Method.LIGHTNING, 2_505, 251, 8, b"seed")
BY_MINT = Sale(b"m" * 32, Method.LIGHTNING, 100, 10, 8, b"quote")
OPEN = (
    Sale(b"o" * 32, Method.CASHU, 10, 1, 9, bytes(range(256))),
    Sale(b"p" * 32, Method.LIGHTNING, 20, 2, 10, b""),
)
TAKEN, LEFT = Taking(99, "cashuBtaken"), Taking(10, "cashuBleft")


def new_url(engine: str, directory: Path, cluster: Cluster) -> str:
    """Of a ledger that is not there yet."""
    return cluster.new_url() if engine == "postgresql" else f"sqlite://{directory}/ledger.sqlite"


async def sell(url: str) -> None:
    """One of everything that payments leave."""
    create(url)
    async with opened(url) as ledger:
        await fund(ledger)
        for one in (ECASH, INVOICE, BY_MINT, *OPEN):
            await ledger.account(Begin(one))
        await ledger.account(Settle(ECASH, (TAKEN,)))
        ledger.mark_taken([TAKEN])
        await ledger.account(Settle(INVOICE))
        await ledger.account(Settle(BY_MINT, (LEFT,)))


async def kept(url: str) -> Any:
    async with opened(url) as ledger:
        sales = sorted(await ledger.sales(99), key=lambda one: one.voucher)
        again = {one.digest: one for one in ledger.takings(again=True)}
        return ledger.totals(), sales, ledger.takings(), again


def problems(url: str) -> list[str]:
    with closing(custody.rows_of(url)) as rows:
        return list(checking.problems(rows, blobs=True, progress=lambda done, total: None))


@pytest.mark.parametrize("engine", ENGINES)
async def test_sales_and_takings_move_to_the_other_engine(
    engine: str, tmp_path: Path, cluster: Cluster
) -> None:
    other = ENGINES[1 - ENGINES.index(engine)]
    here, there = (new_url(one, tmp_path, cluster) for one in (engine, other))
    await sell(here)
    before = await kept(here)
    assert before[1:3] == (list(OPEN), [LEFT]) and before[0].sales == 2
    custody.migrate(here, there, lambda done, total: None)
    assert await kept(there) == before
    assert problems(there) == []
    async with opened(there) as ledger:  # what was unsettled is gone on with
        await ledger.account(Settle(OPEN[0], (Taking(1, "cashuBnew"),)))
    assert problems(there) == []


@pytest.mark.parametrize("engine", ENGINES)
async def test_sales_and_takings_are_in_a_backup_and_restored(
    engine: str, tmp_path: Path, cluster: Cluster
) -> None:
    data, again = tmp_path / "data", tmp_path / "again"
    data.mkdir()
    again.mkdir()
    here, there = (new_url(engine, one, cluster) for one in (data, again))
    await sell(here)
    custody.backup(data, here, tmp_path / "copy", lambda done, total: None)
    custody.restore(tmp_path / "copy", again, there, lambda done, total: None)
    assert await kept(there) == await kept(here)
    assert problems(there) == []


DAMAGES = {
    "UPDATE sale SET voucher = (SELECT digest FROM voucher WHERE amount = 990) WHERE due = 9":
        "1 sales are unsettled whose vouchers are there already",
    "UPDATE voucher SET amount = 1 WHERE spent = 1": "and vouchers of 1 are spent",
    "UPDATE sold SET cashu_tokens = 9000000": "9,002,605 tokens were paid for and all vouchers",
    "DELETE FROM taking WHERE taken = 1": "10 sat of ecash came in, and payments of 99 to",
    "UPDATE taking SET token = digest WHERE taken = 0": "1 tokens of ecash are damaged",
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
async def test_check_looks_into_sales_takings_and_vouchers(
    engine: str, tmp_path: Path, cluster: Cluster
) -> None:
    url = new_url(engine, tmp_path, cluster)
    await sell(url)
    assert problems(url) == []
    for damage in DAMAGES:
        _execute(url, damage)
    found = problems(url)
    assert len(found) == len(DAMAGES)
    for told in DAMAGES.values():
        assert any(told in one for one in found), (told, found)


def _execute(url: str, statement: str) -> None:
    path = sqlite_path(url)
    if path is None:
        with psycopg.connect(url) as database:
            database.execute(statement.encode())
        return
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(statement)
