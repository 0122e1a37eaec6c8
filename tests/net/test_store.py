"""RemoteStore against a real server in this process, over wires that fail and servers that lie."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import trio
import trio.testing

from hpkvd.epochs import first_epoch
from hpkvd.rotation import POLL_SECONDS
from hpkvfs.errors import (
    EmptyWallet,
    KeyAbsent,
    KeyExists,
    Misbehaviour,
    Refusal,
    Tagging,
    Unreachable,
    UserError,
    VaultError,
)
from hpkvfs.net import epochs
from hpkvfs.net.store import RemoteStore
from hpkvfs.net.transport import NoReply
from hpkvfs.protocol import messages
from hpkvfs.protocol.codec import REPLY_SIZE
from hpkvfs.protocol.credential import IssuerParameters, parse
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.group import SigningKey
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    Done,
    Reason,
    Refused,
    Spent,
    StoredFact,
    decode_reply,
    decode_request,
)
from hpkvfs.protocol.tariff import Operation, Tariff
from hpkvfs.types import BlobStore
from hpkvfs.wallet.journal import Receipt
from tests.doubles import Fault, MemoryStore
from tests.net.harness import World, epoch_one, identity, running
from tests.store_contract import CONTRACT, memo_of, new_blob

LOSSES = [Fault.LOSE_REQUEST, Fault.LOSE_REPLY, Fault.BREAK_REPLY, Fault.LATE]
CUTS = [*LOSSES, Fault.HANG]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


def operations(world: World) -> list[Operation]:
    return [decode_request(frame).operation for frame in world.wire.frames]


async def cut_off(
    world: World, fault: Fault, call: Callable[..., Awaitable[object]], *arguments: object
) -> None:
    """Cancel a call in the middle of an exchange that has this fault."""
    world.wire.faults.append(fault)
    world.wire.struck = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, *arguments)
        await world.wire.struck.wait()
        nursery.cancel_scope.cancel()


# The contract, by both stores.


@pytest.mark.parametrize("check", CONTRACT)
async def test_contract_in_memory(check: Callable[[BlobStore], Awaitable[None]]) -> None:
    await check(MemoryStore())


@pytest.mark.parametrize("check", CONTRACT)
async def test_contract_remote(world: World, check: Callable[[BlobStore], Awaitable[None]]) -> None:
    store = await world.rich_client()
    await check(store)
    world.assert_conserved(store)


# Money.


async def test_operations_cost_what_the_tariff_says(world: World) -> None:
    store = await world.rich_client(100)
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    assert store.balance.total == 90
    await store.look_up(signer.public)
    assert store.balance.total == 89
    await store.delete(signer, hashlib.sha256(blob).digest(), b"")
    assert store.balance.total == 97
    world.assert_conserved(store)


async def test_the_last_token_can_be_spent(world: World) -> None:
    """However the balance is scattered, what it can pay for can be had."""
    store = await world.rich_client(43)
    await store.prime()
    for _ in range(4):
        await store.insert(new_blob()[0].public, new_blob()[1], b"")
    for _ in range(3):
        await store.look_up(new_blob()[0].public)
    with pytest.raises(EmptyWallet):
        await store.look_up(new_blob()[0].public)
    assert store.balance.total == 0
    world.assert_conserved(store)


async def test_small_credentials_are_merged(world: World) -> None:
    store = world.client()
    for _ in range(5):
        await store.redeem(await world.sold(3))
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    assert Operation.REISSUE in operations(world)
    assert store.balance.total == 5
    world.assert_conserved(store)


async def test_many_calls_share_a_balance_that_pays_for_few(world: World) -> None:
    store = await world.rich_client(55)
    failures = []

    async def insert() -> None:
        signer, blob = new_blob()
        try:
            await store.insert(signer.public, blob, b"")
        except EmptyWallet as failure:
            failures.append(failure)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(insert)
    assert len(failures) == 3
    assert store.balance.total == 5
    world.assert_conserved(store)


async def test_without_tokens(world: World) -> None:
    store = world.client()
    with pytest.raises(EmptyWallet):
        await store.look_up(new_blob()[0].public)


async def test_a_voucher_is_redeemed_once(world: World) -> None:
    text = await world.sold(500)
    store = world.client()
    assert await store.redeem(text) == 500
    with pytest.raises(UserError):
        await store.redeem(text)
    assert store.balance.total == 500
    world.assert_conserved(store)


@pytest.mark.parametrize("text", ["", "hpkv1-5", "hpkv1-0-" + "a" * 32, "hpkv1-9-" + "a" * 32])
async def test_vouchers_that_buy_nothing(world: World, text: str) -> None:
    store = world.client()
    with pytest.raises(UserError):
        await store.redeem(text)
    assert store.balance.total == 0 and store.conservation.holds


async def test_calls_in_flight_are_bounded(world: World) -> None:
    store = await world.rich_client(max_in_flight=3)
    most = now = 0
    answer = world.wire.answer

    async def counting(frame: bytes) -> bytes:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await trio.sleep(0.01)
        now -= 1
        return await answer(frame)

    world.wire.answer = counting
    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(store.look_up, new_blob()[0].public)
    assert most == 3


async def test_prime_makes_credentials_for_free(world: World) -> None:
    store = await world.rich_client(max_in_flight=6)
    world.wire.frames.clear()
    await store.prime()
    assert operations(world) == [Operation.REISSUE] * 5
    await store.prime()
    assert len(world.wire.frames) == 5
    world.assert_conserved(store)


# Lost, late and doubled messages.


@pytest.mark.parametrize("fault", [*LOSSES, Fault.NO_ROUTE, Fault.DUPLICATE])
async def test_one_fault_is_not_noticed(world: World, fault: Fault) -> None:
    store = await world.rich_client()
    signer, blob = new_blob()
    digest = hashlib.sha256(blob).digest()
    world.wire.faults.append(fault)
    await store.insert(signer.public, blob, memo_of(blob))
    world.wire.faults.append(fault)
    assert await store.look_up(signer.public) == blob
    world.wire.faults.append(fault)
    await store.delete(signer, digest, memo_of(blob))
    await world.wire.deliver_late()
    assert store.balance.total == 10_000 - 10 - 1 + 8
    world.assert_conserved(store)


async def test_a_retry_sends_the_same_frame(world: World) -> None:
    store = await world.rich_client()
    world.wire.faults.extend([Fault.LOSE_REPLY, Fault.LOSE_REQUEST])
    world.wire.frames.clear()
    await store.look_up(new_blob()[0].public)
    assert len(world.wire.frames) == 3 and len(set(world.wire.frames)) == 1


async def test_a_call_that_never_left_leaves_nothing_pending(world: World) -> None:
    store = await world.impatient_client()
    world.wire.down = True
    with pytest.raises(Unreachable) as caught:
        await store.look_up(new_blob()[0].public)
    assert isinstance(caught.value, NoReply) and not caught.value.sent
    assert store.balance.pending == 0 and store.balance.total == 10_000
    world.wire.down = False
    await store.look_up(new_blob()[0].public)
    world.assert_conserved(store)


async def test_patience_ends(world: World) -> None:
    store = await world.impatient_client()
    world.wire.faults.extend([Fault.LOSE_REQUEST] * 20)
    with pytest.raises(Unreachable):
        await store.look_up(new_blob()[0].public)
    assert store.balance.pending > 0 and store.conservation.holds


@pytest.mark.parametrize("fault", CUTS)
async def test_giving_up_and_trying_again(world: World, fault: Fault) -> None:
    """An insert that failed may have been performed; repeated, it succeeds and is paid once."""
    store = await world.rich_client()
    signer, blob = new_blob()
    await cut_off(world, fault, store.insert, signer.public, blob, memo_of(blob))
    assert store.balance.pending > 0 and store.conservation.holds
    await store.insert(signer.public, blob, memo_of(blob))
    await world.wire.deliver_late()
    assert await store.look_up(signer.public) == blob
    assert store.balance.total == 10_000 - 11
    world.assert_conserved(store)


async def test_a_request_delivered_after_its_resolution_does_nothing(world: World) -> None:
    store = await world.rich_client()
    signer, blob = new_blob()
    await cut_off(world, Fault.LATE, store.insert, signer.public, blob, memo_of(blob))
    assert await store.recover() == []
    await world.wire.deliver_late()
    assert await store.look_up(signer.public) is None
    world.assert_conserved(store)


async def test_a_cancelled_call_is_resolved_in_the_background(world: World) -> None:
    store = await world.rich_client()
    signer, blob = new_blob()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await cut_off(world, Fault.HANG, store.insert, signer.public, blob, memo_of(blob))
        with trio.fail_after(60):
            while store.balance.pending:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert [receipt.memo for receipt in await store.recover()] == [memo_of(blob)]
    world.assert_conserved(store)


async def test_recovery_waits_for_what_the_background_is_settling(world: World) -> None:
    """Receipts read too early would have a vault use the id of a blob that is stored."""
    signer, blob = new_blob()
    store = await world.rich_client()
    await cut_off(world, Fault.HANG, store.insert, signer.public, blob, memo_of(blob))
    world.kill()
    store = world.client()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.testing.wait_all_tasks_blocked()
        receipts = await store.recover()
        nursery.cancel_scope.cancel()
    assert [receipt.memo for receipt in receipts] == [memo_of(blob)]


async def test_tokens_of_a_stranded_request_are_freed_when_needed(world: World) -> None:
    store = await world.rich_client(15)
    await cut_off(world, Fault.LOSE_REQUEST, store.look_up, new_blob()[0].public)
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    world.assert_conserved(store)


async def test_no_serial_is_shown_for_two_operations(world: World) -> None:
    """Reuse would tell the server that one client asked for both."""
    store = await world.rich_client(200)
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    for _ in range(3):
        with pytest.raises(KeyExists):
            await store.insert(signer.public, blob, b"")
        with pytest.raises(KeyAbsent):
            await store.delete(signer, bytes(32), b"")
    shown: dict[bytes, set[Operation]] = {}
    for frame in world.wire.frames:
        request = decode_request(frame)
        if not isinstance(request, CredentialedRequest) or not request.presented:
            continue
        for serial in parse(request.credentials, 2).serials:
            shown.setdefault(serial, set()).add(request.operation)
    assert all(len(what - {Operation.REISSUE}) <= 1 for what in shown.values())
    world.assert_conserved(store)


# Crashes.


async def there_and_back(store: BlobStore, signer: SigningKey, blob: bytes) -> None:
    """An insert and a delete, as a volume repeats them until they are done."""
    await store.insert(signer.public, blob, memo_of(blob))
    await store.delete(signer, hashlib.sha256(blob).digest(), memo_of(blob))


@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("commits", range(4))
async def test_a_crash_at_each_commit(world: World, commits: int, keeps_last: bool) -> None:
    store = await world.rich_client()
    await world.journals[-1].flush()
    signer, blob = new_blob()
    world.journals[-1].commits_left, world.journals[-1].keeps_last = commits, keeps_last
    with contextlib.suppress(VaultError):
        await there_and_back(store, signer, blob)
    world.kill()
    store = world.client()
    receipts = await store.recover()
    stored = await store.look_up(signer.public)
    inserted, deleted = (has(receipts, operation, blob) for operation in (INSERT, DELETE))
    assert (stored == blob) == (inserted and not deleted)
    await there_and_back(store, signer, blob)
    assert store.balance.total == 10_000 - 10 - 1 + 8
    world.assert_conserved(store)


INSERT, DELETE = Operation.INSERT, Operation.DELETE


def has(receipts: list[Receipt], operation: Operation, blob: bytes) -> bool:
    return any((one.operation, one.memo) == (operation, memo_of(blob)) for one in receipts)


@pytest.mark.parametrize("fault", CUTS)
async def test_a_crash_in_flight(world: World, fault: Fault) -> None:
    store = await world.rich_client()
    signer, blob = new_blob()
    await cut_off(world, fault, store.insert, signer.public, blob, memo_of(blob))
    world.kill()
    store = world.client()
    assert store.balance.pending > 0 and store.conservation.holds
    receipts = await store.recover()
    await world.wire.deliver_late()
    assert (await store.look_up(signer.public) == blob) == has(receipts, INSERT, blob)
    assert has(receipts, INSERT, blob) == (fault not in (Fault.LOSE_REQUEST, Fault.LATE))
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", CUTS)
async def test_a_crash_while_resolving(world: World, fault: Fault) -> None:
    store = await world.rich_client()
    await cut_off(world, Fault.HANG, store.look_up, new_blob()[0].public)
    for _ in range(2):
        world.kill()
        store = world.client()
        await cut_off(world, fault, store.recover)
        await world.wire.deliver_late()
    await store.recover()
    assert store.balance.total == 9_999
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", CUTS)
async def test_a_crash_while_redeeming(world: World, fault: Fault) -> None:
    text = await world.sold(700)
    store = world.client()
    await store.parameters()
    await cut_off(world, fault, store.redeem, text)
    world.kill()
    store = world.client()
    assert await store.redeem(text) == 700
    await world.wire.deliver_late()
    assert store.balance.total == 700
    world.assert_conserved(store)


async def test_receipts_last_until_forgotten(world: World) -> None:
    store = await world.rich_client()
    for _ in range(3):
        signer, blob = new_blob()
        await store.insert(signer.public, blob, memo_of(blob))
    await world.journals[-1].flush()
    world.kill()
    store = world.client()
    receipts = await store.recover()
    assert len(receipts) == 3
    store.forget_receipts(receipts[1].seq)
    await world.journals[-1].flush()
    world.kill()
    assert await world.client().recover() == receipts[2:]


async def test_a_copied_wallet_is_told_so(world: World) -> None:
    """Two processes with one journal's content: the second finds its tokens spent."""
    store = await world.rich_client(20)
    await world.journals[-1].flush()
    world.kill()
    copy = (world.directory / "wallet").read_bytes()
    (world.directory / "copy").write_bytes(copy)
    log = world.directory / "wallet-wal"
    if log.exists():
        (world.directory / "copy-wal").write_bytes(log.read_bytes())
    store = world.client()
    await store.look_up(new_blob()[0].public)
    double = world.client(name="copy")
    for _ in range(2):  # the look-up itself, then what it left pending
        with pytest.raises(Misbehaviour, match="not in its journal"):
            await double.look_up(new_blob()[0].public)
    with pytest.raises(EmptyWallet):
        await double.look_up(new_blob()[0].public)
    world.assert_conserved(store)


# Servers that lie. Each lie is one clear error, and what it was told about stays pending.

Lie = Callable[[bytes], bytes]


def of_done(edit: Callable[[Done], messages.Reply]) -> Lie:
    """Edit only answers that something was performed."""

    def lie(frame: bytes) -> bytes:
        reply = messages.decode_reply(frame)
        return edit(reply).encode() if isinstance(reply, Done) else frame

    return lie


def other_credentials(reply: Done) -> Done:
    return replace(reply, issued=bytes([reply.issued[0] ^ 1]) + reply.issued[1:])


def another_charge(reply: Done) -> Done:
    return replace(reply, fact=replace(reply.fact, delta=reply.fact.delta - 1))


def another_operation(reply: Done) -> Done:
    fact = messages.Fact(Operation.DELETE, messages.Outcome.DELETED, reply.fact.delta)
    return replace(reply, fact=fact, value=None)


def spent_by_a_stranger(reply: Done) -> messages.Reply:
    return Spent((StoredFact(secrets.token_bytes(32), reply.fact, reply.issued),))


LIES: dict[str, Lie] = {
    "noise": lambda frame: secrets.token_bytes(REPLY_SIZE),
    "zeros": lambda frame: bytes(REPLY_SIZE),
    "a flipped bit of padding": lambda frame: frame[:-1] + b"\1",
    "other credentials": of_done(other_credentials),
    "credentials too short": of_done(lambda reply: replace(reply, issued=reply.issued[:-1])),
    "another charge": of_done(another_charge),
    "another operation": of_done(another_operation),
    "spent by a stranger": of_done(spent_by_a_stranger),
    "parameters": lambda frame: messages.Parameters.signed(b"?", (bytes(32),), identity()).encode(),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_lies(world: World, lie: Lie) -> None:
    store = await world.rich_client()
    signer, blob = new_blob()
    world.wire.alter = lie
    with pytest.raises(Misbehaviour):
        await store.insert(signer.public, blob, memo_of(blob))
    assert store.balance.total == 10_000 and store.conservation.holds
    world.wire.alter = None
    await store.insert(signer.public, blob, memo_of(blob))
    assert store.balance.total == 9_990
    world.assert_conserved(store)


async def test_a_false_refusal_loses_nothing(world: World) -> None:
    """The server performs an insert and says that it refused."""
    store = await world.rich_client()
    signer, blob = new_blob()
    lies = [Refused(Reason.KEY_EXISTS).encode()]
    world.wire.alter = lambda frame: lies.pop() if lies else frame
    await store.insert(signer.public, blob, memo_of(blob))
    assert await store.look_up(signer.public) == blob
    world.assert_conserved(store)


async def test_a_voucher_at_a_full_server_is_not_lost(world: World) -> None:
    """It refuses, and performs a copy of the request that comes when there is room again."""
    store = world.client()
    text = await world.sold(500)
    await store.parameters()
    answer, refused = world.wire.answer, list[bytes]()

    async def full(frame: bytes) -> bytes:
        refused.append(frame)
        return Refused(Reason.FULL).encode()

    world.wire.answer = full
    with pytest.raises(Refusal, match="no room"):
        await store.redeem(text)
    world.wire.answer = answer
    await answer(refused[0])
    assert await store.redeem(text) == 500
    assert store.balance.total == 500
    world.assert_conserved(store)


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.INTERNAL])
async def test_a_busy_server_is_asked_again(world: World, reason: Reason) -> None:
    store = await world.rich_client()
    busy = [Refused(reason).encode()] * 2
    world.wire.alter = lambda frame: busy.pop() if busy else frame
    await store.look_up(new_blob()[0].public)
    assert not busy
    world.assert_conserved(store)


@pytest.mark.parametrize("reason", [Reason.FULL, Reason.BAD_PROOF, Reason.UNKNOWN_EPOCH])
async def test_refusals_spend_nothing(world: World, reason: Reason) -> None:
    store = await world.rich_client()
    answer = world.wire.answer

    async def refusing(frame: bytes) -> bytes:
        if decode_request(frame).operation is Operation.INSERT:
            return Refused(reason).encode()
        return await answer(frame)

    world.wire.answer = refusing
    signer, blob = new_blob()
    with pytest.raises(Refusal):
        await store.insert(signer.public, blob, b"")
    assert store.balance.total == 10_000
    world.assert_conserved(store)


# Epochs.


def shown(*epochs: EpochParameters, by: Identity | None = None) -> bytes:
    """What a server says that has these epochs."""
    digests = tuple(epoch.digest for epoch in epochs)
    return messages.Parameters.signed(epochs[-1].encode(), digests, by or identity()).encode()


def another_epoch(number: int = 1, after: EpochParameters | None = None) -> EpochParameters:
    """Parameters of the same issuer, so cheap to make, that nobody else is shown."""
    previous = after.digest if after else bytes(32)
    return replace(
        epoch_one().parameters, number=number, previous=previous, tariff=Tariff(2, 20, entry=20)
    )


async def asks(store: RemoteStore) -> None:
    await store.parameters()


async def redeems(store: RemoteStore) -> None:
    await store.redeem("hpkv1-9-" + "a" * 32)


async def test_parameters_are_asked_for_by_three(world: World) -> None:
    """Negative control of what follows: an honest server is asked thrice, then trusted."""
    store = world.client(identity=identity().public)
    assert await store.parameters() == epoch_one().parameters
    assert operations(world) == [Operation.PARAMETERS] * 3
    assert len(set(world.wire.frames)) == 1


TAGS: dict[str, Callable[[], bytes]] = {
    "other prices": lambda: shown(another_epoch()),
    "a longer list": lambda: shown(another_epoch(0), epoch_one().parameters),
    "another list": lambda: messages.Parameters.signed(
        epoch_one().parameters.encode(), (bytes(32), epoch_one().parameters.digest), identity()
    ).encode(),
    "another identity": lambda: shown(epoch_one().parameters, by=Identity(bytes(32))),
}


@pytest.mark.parametrize("call", [asks, redeems])
@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("tagged", [0, 1, 2])
async def test_a_server_that_tags_one_connection_is_noticed(
    world: World,
    tag: Callable[[], bytes],
    tagged: int,
    call: Callable[[RemoteStore], Awaitable[None]],
) -> None:
    store, count = world.client(), 0

    def alter(frame: bytes) -> bytes:
        nonlocal count
        count += 1
        return tag() if count == tagged + 1 else frame

    world.wire.alter = alter
    with pytest.raises(Tagging, match="different"):
        await call(store)
    assert set(operations(world)) == {Operation.PARAMETERS}  # nothing was made with them
    assert store.balance.total == 0 and store.conservation.holds


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
async def test_a_server_that_tags_one_user_from_the_start(
    world: World, tag: Callable[[], bytes]
) -> None:
    """It recognised all three connections; whoever knows its address, or comes back, notices."""
    world.wire.alter = lambda frame: tag()
    store = world.client(identity=identity().public)
    if tag is TAGS["another identity"]:
        with pytest.raises(Tagging, match="signed by another identity"):
            await store.parameters()
        return
    before = await store.parameters()
    world.wire.alter = None
    await world.journals[-1].flush()
    world.kill()
    store = world.client(identity=identity().public)
    if before == epoch_one().parameters:
        await store.parameters()  # the list alone was false: that is over
        return
    with pytest.raises(Tagging, match="other parameters for epoch 1"):
        await store.parameters()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How often, and how long, a client waited for a server to make up its mind."""
    sleep, found = trio.sleep, list[float]()

    async def counted(seconds: float) -> None:
        if seconds == epochs.SUCCESSION_SECONDS:
            found.append(seconds)
        await sleep(0 if seconds == epochs.SUCCESSION_SECONDS else seconds)

    monkeypatch.setattr(trio, "sleep", counted)
    return found


async def test_an_epoch_that_processes_take_up_one_after_the_other_is_no_tag(
    world: World, pauses: list[float]
) -> None:
    """Of two, the second does so within a second: until then connections are told different lists,
    however often one asks."""
    first, second = epoch_one().parameters, another_epoch(2, epoch_one().parameters)
    lagging = count()

    def alter(frame: bytes) -> bytes:
        has_it = sum(pauses) > POLL_SECONDS or next(lagging) % 2
        return shown(first, second) if has_it else shown(first)

    world.wire.alter = alter
    assert await world.client().parameters() == second
    assert len(pauses) == 1


async def test_an_epoch_that_begins_while_it_is_asked_for_is_no_tag(
    world: World, pauses: list[float]
) -> None:
    first, second = epoch_one().parameters, another_epoch(2, epoch_one().parameters)
    replies = [shown(first), *[shown(first, second)] * 5]
    world.wire.alter = lambda frame: replies.pop(0)
    assert await world.client().parameters() == second
    assert not replies


async def test_a_server_that_keeps_changing_its_mind_is_not_believed(
    world: World, pauses: list[float]
) -> None:
    first, second = epoch_one().parameters, another_epoch(2, epoch_one().parameters)
    replies = [shown(first), shown(first, second), shown(first)] * 3
    world.wire.alter = lambda frame: replies.pop(0)
    with pytest.raises(Tagging, match="different"):
        await world.client().parameters()


async def test_the_identity_is_pinned(world: World) -> None:
    """A server without an onion address must stay who it was."""
    await world.rich_client()
    await world.journals[-1].flush()
    world.kill()
    world.wire.alter = lambda frame: shown(epoch_one().parameters, by=Identity(bytes(32)))
    with pytest.raises(Tagging, match="another identity"):
        await world.client().parameters()


async def test_a_forged_signature_is_refused(world: World) -> None:
    forged = decode_reply(shown(epoch_one().parameters, by=Identity(bytes(32))))
    assert isinstance(forged, messages.Parameters)
    forged = replace(forged, identity=identity().public)
    world.wire.alter = lambda frame: forged.encode()
    with pytest.raises(Misbehaviour, match="not signed"):
        await world.client().parameters()


async def test_parameters_are_pinned(world: World) -> None:
    """Another issuer under the same number is noticed, also after a restart."""
    await world.rich_client()
    await world.journals[-1].flush()
    world.kill()
    other = first_epoch(Tariff(), secrets.token_bytes).parameters
    world.wire.alter = lambda frame: shown(other)
    store = world.client()
    with pytest.raises(Tagging, match="other parameters for epoch 1"):
        await store.look_up(new_blob()[0].public)
    assert store.balance.total == 10_000


async def test_a_table_that_betrays_amounts_is_refused(world: World) -> None:
    issuer = epoch_one().parameters.issuer.encoded
    at = 2 * 33
    swapped = issuer[:at] + issuer[at + 33 : at + 66] + issuer[at : at + 33] + issuer[at + 66 :]
    false = replace(epoch_one().parameters, issuer=IssuerParameters.decode(swapped))
    world.wire.alter = lambda frame: shown(false)
    store = world.client()
    with pytest.raises(Misbehaviour, match="betray"):
        await store.parameters()
