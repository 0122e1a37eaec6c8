"""Whatever is cut short, and when: it is done once and paid once, and is known to be.

One row for each operation, one column for each moment. Real processes are killed at real moments in
tests/world, simulated ones at each side's every commit in tests/simulation.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpkvd.epochs import Epochs
from hpkvd.handler import Handler
from hpkvfs.breakglass import Breakglass
from hpkvfs.errors import StoreError, UserError, VaultError
from hpkvfs.net.store import RemoteStore
from hpkvfs.volume.keys import VaultKeys
from tests.doubles import Fault
from tests.net.harness import World, epoch_one, identity, running
from tests.store_contract import memo_of, new_blob

KEYS = VaultKeys(bytes(range(32)))
TOKENS = 1_000


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


@dataclass
class Row:
    """One operation: how it is called, again after another start, and what it charges in all."""

    call: Callable[[RemoteStore], Awaitable[object]]
    charged: int = 0
    refunded: int = 0
    issued: int = 0
    may_charge_again: bool = False
    """What a look-up found is not told twice: after a crash it is asked and paid for anew."""


def glass(world: World, store: RemoteStore) -> Breakglass:
    now = int(world.clock() * 1e9)
    return Breakglass(KEYS, store, world.journals[-1], lambda: now, secrets.token_bytes)


async def looking_up(world: World, store: RemoteStore) -> Row:
    signer, blob = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))

    async def call(store: RemoteStore) -> None:
        assert await store.look_up(signer.public) == blob

    return Row(call, charged=1, may_charge_again=True)


async def inserting(world: World, store: RemoteStore) -> Row:
    signer, blob = new_blob()
    return Row(lambda store: store.insert(signer.public, blob, memo_of(blob)), charged=10)


async def deleting(world: World, store: RemoteStore) -> Row:
    signer, blob = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    digest = hashlib.sha256(blob).digest()
    return Row(lambda store: store.delete(signer, digest, memo_of(blob)), refunded=8)


async def reissuing(world: World, store: RemoteStore) -> Row:
    async def call(store: RemoteStore) -> None:
        await store.fill_reserve(await store.parameters(), (123, 45))

    return Row(call)


async def redeeming(world: World, store: RemoteStore) -> Row:
    voucher = world.voucher(77)

    async def call(store: RemoteStore) -> None:
        try:
            await store.redeem(voucher)
        except UserError as error:
            assert "already" in error.message

    return Row(call, issued=77)


async def putting_an_entry(world: World, store: RemoteStore) -> Row:
    async def call(store: RemoteStore) -> None:
        breakglass = glass(world, store)
        if breakglass.report()["state"] != "safe":
            await breakglass.renew(None)

    return Row(call, charged=10)


async def opening_an_entry(world: World, store: RemoteStore) -> Row:
    """Its tokens are claimed by another machine, which has the words alone."""
    await glass(world, store).renew(None)
    return Row(lambda store: glass(world, store).recover())


OPERATIONS = (
    looking_up,
    inserting,
    deleting,
    reissuing,
    redeeming,
    putting_an_entry,
    opening_an_entry,
)


def server_dies(world: World, *, after_commit: bool) -> None:
    """With the next request: before it is performed, or before its answer leaves."""
    answer = world.wire.answer

    async def last_answer(frame: bytes) -> bytes:
        if after_commit:
            await answer(frame)
        world.handler = Handler(Epochs([epoch_one()], identity()), world.ledger, world.clock)
        world.wire.answer = world.handler.answer
        return b""

    world.wire.answer = last_answer


Cut = Callable[[World, RemoteStore, Row], Awaitable[RemoteStore]]


def lost(fault: Fault) -> Cut:
    async def cut(world: World, store: RemoteStore, row: Row) -> RemoteStore:
        world.wire.faults.append(fault)
        await row.call(store)
        return store

    return cut


def server_killed(after_commit: bool) -> Cut:
    async def cut(world: World, store: RemoteStore, row: Row) -> RemoteStore:
        server_dies(world, after_commit=after_commit)
        await row.call(store)
        return store

    return cut


def client_killed(keeps_last: bool) -> Cut:
    """At the first commit that it waits for."""

    async def cut(world: World, store: RemoteStore, row: Row) -> RemoteStore:
        await world.journals[-1].flush()
        world.journals[-1].commits_left, world.journals[-1].keeps_last = 0, keeps_last
        with contextlib.suppress(VaultError):
            await row.call(store)
        return await started_again(world, row)

    return cut


async def killed_after_the_reply(world: World, store: RemoteStore, row: Row) -> RemoteStore:
    await row.call(store)
    return await started_again(world, row)


async def started_again(world: World, row: Row) -> RemoteStore:
    """Another process with the same journal settles what is open, and asks again."""
    path = world.journals[-1]._path
    world.kill()
    store = world.client(name=path.name)
    await store.recover()
    await row.call(store)
    return store


MOMENTS: dict[str, Cut] = {
    "request lost": lost(Fault.LOSE_REQUEST),
    "reply lost": lost(Fault.LOSE_REPLY),
    "server killed before commit": server_killed(after_commit=False),
    "server killed after commit": server_killed(after_commit=True),
    "client killed before journal": client_killed(keeps_last=False),
    "client killed after journal": client_killed(keeps_last=True),
    "client killed after reply": killed_after_the_reply,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("prepare", OPERATIONS, ids=lambda one: one.__name__)
async def test_it_is_done_once_and_paid_once(
    world: World, prepare: Callable[[World, RemoteStore], Awaitable[Row]], moment: str
) -> None:
    first = store = await world.rich_client(TOKENS)
    await store.prime()
    row = await prepare(world, store)
    before = world.ledger.totals()
    if prepare is opening_an_entry:
        store = world.client(name="heir")
        await store.parameters()
    store = await MOMENTS[moment](world, store, row)
    await store.resolve_pending()
    after = world.ledger.totals()
    charged = after.charged - before.charged
    assert charged == row.charged or (row.may_charge_again and charged == 2 * row.charged)
    assert after.refunded - before.refunded == row.refunded
    assert after.issued - before.issued == row.issued
    assert store.conservation.holds and store.balance.pending == 0
    if prepare is opening_an_entry:
        carved = sum(one.amount for one in first.reserve)
        assert store.balance.total == carved and carved > TOKENS / 2
    else:
        world.assert_conserved(store)


async def test_the_table_can_fail(world: World) -> None:
    """Negative control: a client that forgets what it had journalled pays for the same twice."""
    store = await world.rich_client(TOKENS)
    row = await inserting(world, store)
    world.wire.faults.append(Fault.LOSE_REPLY)
    await row.call(store)
    store.forget_receipts(1 << 60)
    with pytest.raises(StoreError, match="taken"):
        await row.call(store)
