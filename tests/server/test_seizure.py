"""What a seized ledger joins: a purchase has nothing in common with what was paid by it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

from hpkvfs.protocol.voucher import Voucher
from tests.server.support import LocalServer, Purchase, Purse, epoch, new_blob, new_key

Row: TypeAlias = tuple[Any, ...]

TABLES = ("request", "serial", "blob", "voucher")
WINDOW = 8  # bytes: that two random rows have so many in common does not happen


def rows(server: LocalServer) -> set[Row]:
    """All that the ledger has about somebody, each with its table's name."""
    read = server.ledger._read
    return {(t, *row) for t in TABLES for row in read.execute(f"SELECT * FROM {t}").fetchall()}


def windows(some: set[Row]) -> set[bytes]:
    texts = [value for row in some for value in row if isinstance(value, bytes)]
    return {text[i : i + WINDOW] for text in texts for i in range(len(text) - WINDOW + 1)}


async def test_a_purchase_and_what_it_paid_for_have_nothing_in_common(server: LocalServer) -> None:
    voucher = Voucher.generate(7_001, secrets.token_bytes)
    server.ledger.add_vouchers([voucher])
    purse, key, blob = Purse(epoch().parameters), new_key(), new_blob()
    seen = [rows(server)]

    purchase = purse.redeem(voucher)
    purse.settle(purchase, await server.ask(purchase.request))
    seen.append(rows(server))
    uses: tuple[Callable[[], Purchase], ...] = (
        lambda: purse.insert(key.public, blob),
        lambda: purse.look_up(key.public),
        purse.reissue,
    )
    for begin in uses:
        purchase = begin()
        purse.settle(purchase, await server.ask(purchase.request))
        seen.append(rows(server))

    redeemed, *later = (after - before for before, after in pairwise(seen))
    bought = redeemed | seen[0]
    assert {row[0] for row in bought} == {"voucher", "request"}
    assert all({row[0] for row in one} >= {"request", "serial"} for one in later)
    used = set().union(*later)
    assert not windows(bought) & windows(used)
    (sold,) = (row for row in redeemed if row[0] == "request")
    assert 7_001 in sold
    assert not any(7_001 in row for row in used)

    spent = {row for row in later[0] if row[0] == "serial"}
    assert windows(spent) & windows(later[0] - spent)  # the negative control: one request's rows


async def test_two_requests_paid_for_by_one_purchase_have_nothing_in_common(
    server: LocalServer,
) -> None:
    purse = await server.purse(1_000, credentials=6)
    seen = [rows(server)]
    for _ in range(2):
        purchase = purse.insert(new_key().public, new_blob())
        purse.settle(purchase, await server.ask(purchase.request))
        seen.append(rows(server))
    first, second = (after - before for before, after in pairwise(seen))
    assert not windows(first) & windows(second)
    spent = {row for row in first if row[0] == "serial"}
    assert windows(spent) & windows(first - spent)  # the negative control
