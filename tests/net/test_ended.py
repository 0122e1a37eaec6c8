"""Requests that were cut short, and whose epoch ended before it was known what became of them.

Oracle: the wallet's books and the ledger's are the same numbers (harness.assert_conserved), and a
blob is at the server if and only if a receipt says so.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cache, partial
from pathlib import Path

import pytest
import trio
import trio.testing

from hpkvfs.errors import EmptyWallet, KeyExists, UserError, VaultError
from hpkvfs.net.refusals import EpochEnded
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.group import SigningKey
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    LookUpRequest,
    Reason,
    Refused,
    ReissueRequest,
    decode_request,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.types import Generation
from tests.doubles import Fault
from tests.net.harness import World, running
from tests.net.test_breakglass import Client
from tests.net.test_moving import CUTS, move_all, restarted, worth
from tests.net.test_store import cut_off
from tests.store_contract import memo_of, new_blob

ARRIVED = (Fault.LOSE_REPLY, Fault.BREAK_REPLY, Fault.HANG)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


_decode = cache(EpochParameters.decode)


@pytest.fixture(autouse=True)
def _verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and checking parameters would take most of the time; test_store.py does it."""
    monkeypatch.setattr(EpochParameters, "decode", staticmethod(_decode))
    monkeypatch.setattr(EpochParameters, "verify", lambda self: None)


async def rotate(world: World, times: int = 4) -> None:
    for _ in range(times):
        await world.rotate()


async def begun(world: World) -> tuple[RemoteStore, SigningKey, bytes]:
    """A client that knows its server, with 300 tokens in an otherwise empty pool."""
    store = await world.rich_client(300)
    await store.parameters()
    return store, *new_blob()


def operations(world: World) -> list[Operation]:
    requests = [decode_request(frame) for frame in world.wire.frames]
    return [one.operation for one in requests if isinstance(one, CredentialedRequest)]


# An insertion, a deletion: the storage key tells.


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("retried", [False, True])
async def test_an_insertion(world: World, fault: Fault, retried: bool) -> None:
    """`retried`: the caller calls again, instead of a new process that recovers."""
    store, signer, blob = await begun(world)
    await cut_off(world, fault, store.insert, signer.public, blob, memo_of(blob))
    await rotate(world)
    await store.redeem(await world.sold(50))
    insert = partial(store.insert, signer.public, blob, memo_of(blob))
    if not retried:
        store = await restarted(world)
        receipts = [(one.operation, one.memo) for one in await store.recover()]
        assert receipts == [(Operation.INSERT, memo_of(blob))] * (fault in ARRIVED)
        insert = partial(store.insert, signer.public, blob, memo_of(blob))
        world.assert_conserved(store)
    await insert()
    assert store.conservation.book.lost == (0 if fault in ARRIVED else 10)
    assert await world.ledger.read(signer.public) == blob
    assert operations(world).count(Operation.INSERT) == (1 if fault in ARRIVED else 2)
    await world.wire.deliver_late()
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("retried", [False, True])
async def test_a_deletion(world: World, fault: Fault, retried: bool) -> None:
    store, signer, blob = await begun(world)
    digest = hashlib.sha256(blob).digest()
    await store.insert(signer.public, blob, memo_of(blob))
    await cut_off(world, fault, store.delete, signer, digest, memo_of(blob))
    await rotate(world)
    await store.redeem(await world.sold(50))
    if not retried:
        store = await restarted(world)
        deleted = [one.operation for one in await store.recover()][1:]
        assert deleted == [Operation.DELETE] * (fault in ARRIVED)
    await store.delete(signer, digest, memo_of(blob))
    assert await world.ledger.read(signer.public) is None
    assert operations(world).count(Operation.DELETE) == (1 if fault in ARRIVED else 2)
    book = store.conservation.book
    assert (book.refunded, book.forgone) == ((0, 8) if fault in ARRIVED else (8, 0))
    world.assert_conserved(store)


async def test_a_deletion_of_what_was_never_there(world: World) -> None:
    """That it is gone does not tell that it was refunded: nothing is made up in the book."""
    store, signer, blob = await begun(world)
    await rotate(world)
    with pytest.raises(EmptyWallet):
        await store.delete(signer, hashlib.sha256(blob).digest(), memo_of(blob))
    await store.redeem(await world.sold(50))
    assert [one.operation for one in await store.recover()] == [Operation.DELETE]
    book = store.conservation.book
    assert (book.refunded, book.forgone, book.expired) == (0, 8, 300)
    world.assert_conserved(store)


async def test_an_insertion_of_what_was_deleted_since(world: World) -> None:
    """Nor that it is not there, that it was never stored and paid."""
    store, signer, blob = await begun(world)
    await cut_off(world, Fault.LOSE_REPLY, store.insert, signer.public, blob, memo_of(blob))
    await store.redeem(await world.sold(100))
    await store.delete(signer, hashlib.sha256(blob).digest(), memo_of(blob))
    await rotate(world)
    await store.redeem(await world.sold(50))
    assert [one.operation for one in await store.recover()] == [Operation.DELETE]
    assert (store.conservation.book.lost, world.ledger.totals().charged) == (10, 11)
    world.assert_conserved(store)


async def test_a_key_with_somebody_elses_blob_was_not_ours(world: World) -> None:
    store, signer, blob = await begun(world)
    _, other = new_blob()
    await cut_off(world, Fault.LOSE_REQUEST, store.insert, signer.public, blob, memo_of(blob))
    rival = world.client(name="rival")
    await rival.redeem(await world.sold(100))
    await rival.insert(signer.public, other, memo_of(other))
    await rotate(world)
    await store.redeem(await world.sold(50))
    await store.resolve_pending()
    assert store._journal.receipts == []
    with pytest.raises(KeyExists):
        await store.insert(signer.public, blob, memo_of(blob))
    assert store.conservation.holds and store.balance.pending == 0


async def test_without_a_token_it_waits_for_one(world: World) -> None:
    """Nothing is decided before the key was looked up."""
    store, signer, blob = await begun(world)
    await cut_off(world, Fault.HANG, store.insert, signer.public, blob, memo_of(blob))
    await rotate(world)
    store = await restarted(world)
    with pytest.raises(EmptyWallet, match="0, and 300 in requests that are not settled"):
        await store.recover()
    assert store.balance.pending == 300 and store.expired == 0
    await store.redeem(await world.sold(50))
    assert [one.memo for one in await store.recover()] == [memo_of(blob)]
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.HANG])
@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("commits", range(4))
@pytest.mark.parametrize("operation", [Operation.INSERT, Operation.DELETE])
async def test_a_crash_at_each_commit(
    world: World, operation: Operation, commits: int, keeps_last: bool, fault: Fault
) -> None:
    """Of finding out, and of what is done next."""
    store, signer, blob = await begun(world)
    digest, memo = hashlib.sha256(blob).digest(), memo_of(blob)
    if operation is Operation.DELETE:
        await store.insert(signer.public, blob, b"")

    async def perform() -> None:
        if operation is Operation.INSERT:
            await store.insert(signer.public, blob, memo)
        else:
            await store.delete(signer, digest, memo)

    await cut_off(world, fault, perform)
    await rotate(world)
    await store.redeem(await world.sold(50))
    store = await restarted(world)
    await store.parameters()
    await world.journals[-1].flush()
    world.journals[-1].commits_left, world.journals[-1].keeps_last = commits, keeps_last
    with contextlib.suppress(VaultError):
        await perform()
    world.kill()
    store = world.client()
    await store.recover()
    await perform()
    assert await world.ledger.read(signer.public) == (
        blob if operation is operation.INSERT else None
    )
    assert [one.operation for one in store._journal.receipts] == [operation]
    world.assert_conserved(store)


# Tokens on their way into a later epoch.


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("resolving", [None, Fault.LOSE_REQUEST, Fault.HANG])
async def test_what_was_moved_is_told_as_long_as_it_lives_where_it_went(
    world: World, fault: Fault, resolving: Fault | None
) -> None:
    """Also if a reissue in the old epoch, to find out, was cut short as well."""
    store = await world.rich_client(1_000)
    await rotate(world, 2)
    store = await restarted(world)
    await store.parameters()
    tender = store._tender
    await cut_off(world, fault, tender.move, tender.behind()[0])
    if resolving is not None:
        store = await restarted(world)
        await cut_off(world, resolving, store.resolve_pending)
    await rotate(world, 3)
    store = await restarted(world)
    await store.recover()
    moved = fault in ARRIVED
    assert (store.balance.total, store.expired) == ((1_000, 0) if moved else (0, 1_000))
    world.assert_conserved(store)
    await move_all(store)
    assert worth(store, 6) == (1_000 if moved else 0)


async def test_a_move_is_forgotten_with_the_epoch_it_went_to(world: World) -> None:
    store = await world.rich_client(1_000)
    await rotate(world, 1)
    store = await restarted(world)
    await store.parameters()
    await cut_off(world, Fault.HANG, store._tender.move, store._tender.behind()[0])
    await rotate(world, 5)
    store = await restarted(world)
    await store.recover()
    assert (store.balance.total, store.expired) == (0, 1_000)
    world.assert_conserved(store)
    while world.ledger._sweep.due:
        await world.ledger._tidied()
    assert world.ledger.totals().requests == 0


@pytest.mark.parametrize("fault", CUTS)
async def test_a_reissue(world: World, fault: Fault) -> None:
    """Its tokens are gone with their epoch, whether it was performed or not."""
    store = await world.rich_client(300)
    epoch = await store.parameters()
    await cut_off(world, fault, store.fill_reserve, epoch, (100, 50))
    await rotate(world)
    store = await restarted(world)
    await store.recover()
    assert (store.balance.total, store.conservation.book.expired) == (0, 300)
    world.assert_conserved(store)


# What nobody can tell any more.


@pytest.mark.parametrize("fault", CUTS)
async def test_a_look_up(world: World, fault: Fault) -> None:
    store, signer, _ = await begun(world)
    await cut_off(world, fault, store.look_up, signer.public)
    await rotate(world)
    store = await restarted(world)
    await store.recover()
    book = store.conservation.book
    assert (book.expired, book.lost, store.expired) == (299, 1, 300)
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", CUTS)
async def test_a_breakglass_entry(world: World, fault: Fault) -> None:
    client = Client(world, "wallet")
    await client.store.redeem(await world.sold(300))
    await client.store.prime()
    for _ in range(8):
        await cut_off(world, fault, client.glass.renew, Generation(1))
        if operations(world)[-1] is Operation.STORE_ENTRY:
            break
        await client.store.resolve_pending()
    await rotate(world)
    await client.journal.flush()
    client = client.restarted()
    await client.store.redeem(await world.sold(100))
    await client.store.recover()
    assert client.store.conservation.book.lost <= 10
    world.assert_conserved(client.store)
    assert await client.glass.renew(Generation(1))
    assert client.glass.report()["state"] == "safe"
    world.assert_conserved(client.store)


@pytest.mark.parametrize("fault", CUTS)
async def test_a_claim_out_of_an_entry(world: World, fault: Fault) -> None:
    owner = Client(world, "owner")
    await owner.store.redeem(await world.sold(400))
    await owner.store.prime()
    await owner.glass.renew(Generation(1))
    heir = Client(world, "heir")
    await heir.store.prime()

    world.wire.faults.extend([Fault.NONE] * 5)  # the epochs, three times; which entry; the entry
    await cut_off(world, fault, heir.glass.recover)
    assert heir.store.balance.pending > 100
    await rotate(world)
    await heir.journal.flush()
    heir = heir.restarted()
    await heir.store.recover()
    assert await heir.glass.recover() is None
    assert heir.store.balance.total == 0 and heir.store.conservation.holds


# A voucher.


async def half_redeemed(world: World, fault: Fault) -> tuple[str, RemoteStore]:
    """A voucher of 60 tokens, and whose redemption was cut short in an epoch that has ended."""
    text = await world.sold(60)
    store = world.client()
    await store.parameters()
    await cut_off(world, fault, store.redeem, text)
    await rotate(world)
    return text, store


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("retried", [False, True])
async def test_a_voucher(world: World, fault: Fault, retried: bool) -> None:
    """Redeemed in the newest epoch if it was not before; else its tokens expired, which is told."""
    text, store = await half_redeemed(world, fault)
    if not retried:
        store = await restarted(world)
    if fault not in ARRIVED:
        assert await store.redeem(text) == 60
        assert worth(store, 5) == 60
    else:
        with pytest.raises(UserError, match=r"redeemed before.* 60 tokens expired"):
            await store.redeem(text)
        assert store.expired == 60
        with pytest.raises(UserError, match="redeemed already"):
            await store.redeem(text)
    await world.wire.deliver_late()
    world.assert_conserved(store)


@pytest.mark.parametrize("is_first", [False, True])
async def test_a_voucher_that_the_background_settles_as_lost(world: World, is_first: bool) -> None:
    """Whoever redeems it, meanwhile or then, is told once of the loss, and how it came to it."""
    text, store = await half_redeemed(world, Fault.LOSE_REPLY)
    store = await restarted(world)
    if is_first:
        await store.recover()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.recover)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(UserError, match=r"redeemed before.* 60 tokens expired"):
            await store.redeem(text)
    with pytest.raises(UserError, match="redeemed already"):
        await store.redeem(text)
    assert store.expired == 60
    world.assert_conserved(store)


@pytest.mark.parametrize("first", [Fault.LOSE_REQUEST, Fault.HANG])
@pytest.mark.parametrize("second", [Fault.LOSE_REQUEST, Fault.HANG])
@pytest.mark.parametrize("rotations", [0, 1, 4])
async def test_a_voucher_cut_short_in_two_epochs(
    world: World, first: Fault, second: Fault, rotations: int
) -> None:
    """And settled without being told the voucher again: the journal has it."""
    text, store = await half_redeemed(world, first)
    store = await restarted(world)
    await store.parameters()
    await cut_off(world, second, store.redeem, text)
    await rotate(world, rotations)
    store = await restarted(world)
    await store.recover()
    is_lost = first is Fault.HANG or (second is Fault.HANG and rotations == 4)
    assert (store.balance.total, store.expired) == ((0, 60) if is_lost else (60, 0))
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", [Fault.LOSE_REQUEST, Fault.HANG])
@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("commits", range(3))
async def test_a_voucher_and_a_crash_at_each_commit(
    world: World, commits: int, keeps_last: bool, fault: Fault
) -> None:
    text, store = await half_redeemed(world, fault)
    store = await restarted(world)
    await store.parameters()
    await world.journals[-1].flush()
    world.journals[-1].commits_left, world.journals[-1].keeps_last = commits, keeps_last
    with contextlib.suppress(VaultError, UserError):
        await store.redeem(text)
    world.kill()
    store = world.client()
    await store.recover()
    with contextlib.suppress(UserError):
        await store.redeem(text)
    assert store.balance.total + store.expired == 60
    assert (store.expired == 60) == (fault is Fault.HANG)
    world.assert_conserved(store)


# Whoever can pay again hears nothing of an end.


async def _insert(client: Client) -> None:
    signer, blob = new_blob()
    await client.store.insert(signer.public, blob, memo_of(blob))
    assert await client.world.ledger.read(signer.public) == blob


async def _look_up(client: Client) -> None:
    assert await client.store.look_up(new_blob()[0].public) is None


async def _redeem(client: Client) -> None:
    await client.store.redeem(await client.world.sold(5))


async def _renew(client: Client) -> None:
    await client.glass.renew(Generation(0))
    assert client.glass.report()["state"] in ("safe", "ageing")


CALLS: dict[str, Callable[[Client], Awaitable[None]]] = {
    "insert": _insert,
    "look up": _look_up,
    "redeem": _redeem,
    "entry": _renew,
    "prime": lambda client: client.store.prime(),
    "gather": lambda client: client.store.gather(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("request_number", [0, 1, 3])
@pytest.mark.parametrize("answered", [False, True])
async def test_an_end_in_the_middle(
    world: World, call: Callable[[Client], Awaitable[None]], request_number: int, answered: bool
) -> None:
    """Two epochs end at some request of a call: before the server has it, or its answer is lost
    with them. Tokens in a third pay."""
    client = Client(world, "wallet")
    for _ in range(3):
        await client.store.redeem(await world.sold(100))
        await world.rotate()
        await client.journal.flush()
        client = client.restarted()
    await client.store.redeem(await world.sold(100))
    left = request_number
    answer = world.wire.answer

    async def ending(frame: bytes) -> bytes:
        nonlocal left
        left -= 1
        if left == -1:
            if answered:
                await answer(frame)
            await world.rotate(keep=3)
            return await answer(frame)
        return await answer(frame)

    world.wire.answer = ending
    await call(client)
    world.wire.answer = answer
    await client.store.redeem(await world.sold(100))
    await client.store.recover()
    world.assert_conserved(client.store)


async def test_a_refusal_that_is_a_lie_is_raised(world: World) -> None:
    """The server lists the epoch still: nothing is written off, and nothing tried for ever."""
    store = await world.rich_client(100)
    honest = world.wire.answer

    async def lying(frame: bytes) -> bytes:
        request = decode_request(frame)
        if isinstance(request, LookUpRequest | ReissueRequest) and request.presented:
            return Refused(Reason.EPOCH_ENDED).encode()
        return await honest(frame)

    world.wire.answer = lying
    with pytest.raises(EpochEnded):
        await store.look_up(new_blob()[0].public)
    world.wire.answer = honest
    await store.recover()
    assert store.expired == 0
    world.assert_conserved(store)
