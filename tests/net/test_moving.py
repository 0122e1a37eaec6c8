"""A wallet through its server's epochs: moved in time, lost late and clearly, never twice."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from typing import Unpack

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.errors import EmptyWallet, StoreError, Tagging
from hpkvfs.net.epochs import WITNESSES
from hpkvfs.net.moving import Mover, Pace
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol.messages import (
    ParametersRequest,
    Reason,
    Refused,
    ReissueRequest,
    decode_request,
)
from tests.doubles import Fault
from tests.examples import examples
from tests.net.harness import Options, World, chain, running
from tests.net.test_store import another_epoch, cut_off, shown
from tests.net.test_world import Life, steps
from tests.store_contract import memo_of, new_blob

QUICK = Pace(notice=0.01, apart=0.001, move=0.02, move_late=0.01, look=0.01, pause=0.001)
CUTS = [Fault.LOSE_REQUEST, Fault.LOSE_REPLY, Fault.BREAK_REPLY, Fault.LATE, Fault.HANG]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


def worth(store: RemoteStore, epoch: int) -> int:
    """Tokens of the epoch with this number."""
    return store._wallet.worth(chain(epoch)[-1].parameters.digest)


async def move_all(store: RemoteStore) -> None:
    await store._tender.refresh()
    for epoch in store._tender.behind():
        while await store._tender.move(epoch):
            pass


async def restarted(world: World, **options: Unpack[Options]) -> RemoteStore:
    await world.journals[-1].flush()
    world.kill()
    return world.client(**options)


# Moving.


async def test_everything_is_moved_and_nothing_lost(world: World) -> None:
    store = await world.rich_client(1_000)
    await store.prime()
    await world.rotate()
    await move_all(store)
    assert worth(store, 2) == 1_000 and worth(store, 1) == 0
    assert len(set(world.wire.frames)) > 4
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    world.assert_conserved(store)


async def test_the_background_moves_at_times_of_its_own(world: World) -> None:
    """Not when a new epoch is noticed, and not all pairs at once."""
    store = await world.rich_client(1_000, pace=Pace(notice=0.1, apart=0.01, move=0.5, look=0.01))
    await store.prime()
    pairs = store._wallet.size // 2
    await world.rotate()
    times: list[float] = []
    answer = world.wire.answer

    async def timed(frame: bytes) -> bytes:
        request = decode_request(frame)
        if isinstance(request, ReissueRequest) and request.into:
            times.append(trio.current_time())
        if isinstance(request, ParametersRequest) and not noticed:
            noticed.append(trio.current_time())
        return await answer(frame)

    noticed: list[float] = []
    world.wire.answer = timed
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        with trio.fail_after(60):
            while worth(store, 2) < 1_000:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert noticed and noticed[0] > start
    assert len(times) <= pairs and times[0] > noticed[0]
    assert len(times) > 1 and times[-1] > times[0]
    world.assert_conserved(store)


async def test_the_old_epoch_is_spent_first_and_refunds_go_to_the_new(world: World) -> None:
    store = await world.rich_client(100)
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    await world.rotate()
    store = await restarted(world)
    await store.look_up(signer.public)
    assert (worth(store, 1), worth(store, 2)) == (89, 0)
    await store.delete(signer, hashlib.sha256(blob).digest(), b"")
    assert (worth(store, 1), worth(store, 2)) == (89, 8)
    world.assert_conserved(store)


async def test_what_no_epoch_can_pay_alone_all_can(world: World) -> None:
    """A request presents one epoch only, so the tokens come together first."""
    store = await world.rich_client(6)
    await world.rotate()
    store = await restarted(world)
    await store.parameters()
    await store.redeem(await world.sold(6))
    assert (worth(store, 1), worth(store, 2)) == (6, 6)
    signer, blob = new_blob()
    await store.insert(signer.public, blob, b"")
    assert store.balance.total == 2
    for frame in world.wire.frames:
        request = decode_request(frame)
        assert not isinstance(request, ReissueRequest) or request.epoch != request.into
    world.assert_conserved(store)


async def test_a_refund_in_flight_is_not_left_behind(world: World) -> None:
    store = await world.rich_client(100)
    signer, blob = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    digest = hashlib.sha256(blob).digest()
    await cut_off(world, Fault.HANG, store.delete, signer, digest, memo_of(blob))
    await world.rotate()
    store = await restarted(world)
    await store.recover()
    await move_all(store)
    assert worth(store, 2) == 98 and store.balance.total == 98
    world.assert_conserved(store)


async def test_commands_move_what_is_late(world: World) -> None:
    """Who never runs in the background moves what may end soon, and only that."""
    store = await world.rich_client(500)
    await world.rotate()
    store = await restarted(world, pace=QUICK)
    await store.parameters()
    await store.move_late()
    assert worth(store, 1) == 500
    await world.rotate()
    store = await restarted(world, pace=QUICK)
    await store.parameters()
    await store.move_late()
    assert worth(store, 3) == 500
    world.assert_conserved(store)


async def test_what_a_breakglass_entry_has_stays_when_the_rest_of_its_epoch_has_left(
    world: World,
) -> None:
    """Also when all that is left beside it is worth nothing, and let go."""
    store = await world.rich_client(500)
    tender = store._tender
    first = await tender.newest()
    await store.fill_reserve(first, (200, 100))
    await world.rotate()
    await store.refresh()
    while await tender.move(first):
        pass
    await store._till.grow(first)
    assert tender.left_behind(first)
    assert not await tender.move(first)
    assert not tender.left_behind(first)
    assert sum(one.amount for one in store.reserve) == 300
    assert (store.balance.total, store.expired) == (500, 0)
    store = await restarted(world)
    assert sum(one.amount for one in store.reserve) == 300
    world.assert_conserved(store)


@pytest.mark.parametrize("fault", CUTS)
@pytest.mark.parametrize("rotations", [1, 3])
async def test_a_crash_in_the_middle_of_a_move(world: World, fault: Fault, rotations: int) -> None:
    store = await world.rich_client(1_000)
    await world.rotate()
    store = await restarted(world)
    await store.parameters()
    tender = store._tender
    await cut_off(world, fault, tender.move, tender.behind()[0])
    assert store.conservation.holds and store.balance.pending
    for _ in range(rotations - 1):
        await world.rotate()
    store = await restarted(world)
    await store.recover()
    await world.wire.deliver_late()
    await move_all(store)
    assert worth(store, 1 + rotations) == store.balance.total == 1_000
    world.assert_conserved(store)


@pytest.mark.parametrize("keeps_last", [False, True])
@pytest.mark.parametrize("commits", range(4))
async def test_a_crash_at_each_commit_of_moving(
    world: World, commits: int, keeps_last: bool
) -> None:
    store = await world.rich_client(1_000)
    await store.prime()
    await world.rotate()
    store = await restarted(world)
    await store.parameters()
    await world.journals[-1].flush()
    world.journals[-1].commits_left, world.journals[-1].keeps_last = commits, keeps_last
    with contextlib.suppress(Exception):
        await move_all(store)
    world.kill()
    store = world.client()
    await store.recover()
    await move_all(store)
    assert worth(store, 2) == 1_000
    world.assert_conserved(store)


# Too late.


async def test_tokens_of_an_ended_epoch_are_lost_clearly(world: World) -> None:
    store = await world.rich_client(700)
    for _ in range(4):
        await world.rotate()
    store = await restarted(world)
    with pytest.raises(EmptyWallet, match="700 expired"):
        await store.look_up(new_blob()[0].public)
    assert store.expired == 700 and store.balance.total == 0
    assert store.conservation.holds
    await store.redeem(await world.sold(50))
    await store.look_up(new_blob()[0].public)
    world.assert_conserved(store)
    store = await restarted(world)
    assert store.expired == 700


async def test_an_epoch_that_ends_under_a_running_client(world: World) -> None:
    """It notices by a refusal, asks, and goes on with what it has in other epochs."""
    store = await world.rich_client(100)
    await world.rotate()
    store = await restarted(world)
    await store.parameters()
    await store.redeem(await world.sold(40))
    await world.rotate(keep=2)
    await store.look_up(new_blob()[0].public)
    assert store.expired == 100 and store.balance.total == 39
    world.assert_conserved(store)


async def test_a_lie_about_an_end_takes_nothing(world: World) -> None:
    """A refusal alone does not make tokens worthless: what is signed and told to all does."""
    store = await world.rich_client(100)
    await world.rotate()
    lies = [Refused(Reason.EPOCH_ENDED).encode()] * 2
    answer = world.wire.answer

    async def lying(frame: bytes) -> bytes:
        if lies and not isinstance(decode_request(frame), ParametersRequest):
            return lies.pop()
        return await answer(frame)

    world.wire.answer = lying
    with contextlib.suppress(StoreError):
        await store.look_up(new_blob()[0].public)
    await store.recover()
    assert store.expired == 0 and store.balance.total in (99, 100)
    world.assert_conserved(store)


async def test_a_chain_is_followed_back_to_what_is_pinned(world: World) -> None:
    store = await world.rich_client(10)
    for _ in range(3):
        await world.rotate()
    store = await restarted(world)
    world.wire.frames.clear()
    assert (await store.parameters()).number == 4
    asked = [decode_request(frame) for frame in world.wire.frames]
    digests = {one.epoch for one in asked if isinstance(one, ParametersRequest)}
    assert digests == {None, *(one.parameters.digest for one in chain(3)[1:])}


async def test_a_chain_that_forked_is_noticed(world: World) -> None:
    store = await world.rich_client(10)
    store = await restarted(world)
    one = chain(1)[0].parameters
    fork = another_epoch(2, another_epoch(1))
    later = another_epoch(3, fork)
    by_digest = {None: later, fork.digest: fork}

    async def forked(frame: bytes) -> bytes:
        request = decode_request(frame)
        assert isinstance(request, ParametersRequest)
        return shown(one, later) if request.epoch is None else shown(by_digest[request.epoch])

    world.wire.answer = forked
    with pytest.raises(Tagging, match="does not follow epoch 1"):
        await store.parameters()
    with pytest.raises(Tagging):
        await store.look_up(new_blob()[0].public)
    assert store.balance.total == 10


async def test_tagging_in_the_background_stops_the_client(world: World) -> None:
    store = await world.rich_client(100, pace=QUICK)
    world.wire.alter = lambda frame: shown(another_epoch())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        with trio.fail_after(60):
            while store._epochs._tagging is None:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    world.wire.alter = None
    with pytest.raises(Tagging):
        await store.look_up(new_blob()[0].public)
    assert store.balance.total == 100


async def test_in_the_background_each_connection_asks_in_a_moment_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody waits for the answer, all do at once."""
    waits, sleep, moment = list[float](), trio.sleep, count()

    async def told(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    store = await world.rich_client(100, pace=Pace(notice=1e6, apart=1e3, look=1e9))
    monkeypatch.setattr(trio, "sleep", told)
    monkeypatch.setattr(Mover, "_random_time", lambda _, mean: mean + next(moment))
    await store.refresh()
    assert not [one for one in waits if 1e3 <= one < 1e6]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store._mover.notice_in_time)
        while len(noticed := [at for at, one in enumerate(waits) if one >= 1e6]) < 2:
            await sleep(0.001)
        nursery.cancel_scope.cancel()
    apart = [one for one in waits[noticed[0] : noticed[1]] if 1e3 <= one < 1e6]
    assert len(set(apart)) == len(apart) == WITNESSES


# Lives.


class Rotate:
    """The server begins an epoch and keeps so many."""

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def __repr__(self) -> str:
        return f"Rotate({self.keep})"


class Move:
    """The client moves what it has."""

    def __repr__(self) -> str:
        return "Move()"


class Refresh(Move):
    """The client asks for the epochs."""

    def __repr__(self) -> str:
        return "Refresh()"


lives = st.lists(
    st.one_of(
        steps,
        st.builds(Rotate, st.sampled_from([2, 3, 4])),
        st.builds(Move),
        st.builds(Refresh),
    ),
    max_size=12,
)


class LongLife(Life):
    """One that sees epochs come and go."""

    async def step(self, step: object) -> None:
        match step:
            case Rotate():
                if self.world.rotations < 6:
                    await self.world.rotate(step.keep)
            case Refresh():
                await self.tolerate(self.store._tender.refresh)
            case Move():
                await self.tolerate(move_all, self.store)
            case _:
                while self.world.ledger._write.in_transaction:
                    await trio.sleep(0.001)  # vouchers are made by another process, in life
                await super().step(step)
        assert self.store.conservation.holds

    async def end(self) -> None:
        self.world.wire.faults.clear()
        self.restart()
        await self.store.parameters()
        await self.store.redeem(await self.world.sold(200))  # what must be looked up can be paid
        receipts = await self.store.recover()
        await self.world.wire.deliver_late()
        await move_all(self.store)
        assert worth(self.store, self.world.rotations + 1) == self.store.balance.total
        self.world.assert_conserved(self.store)
        await self.check_blobs(receipts)


async def live(directory: Path, script: list[object]) -> None:
    async with running(directory) as world:
        life = LongLife(world, await world.rich_client(150, patience=0.4))
        for step in script:
            await life.step(step)
        await life.end()


@examples(25)
@given(lives)
def test_no_token_is_lost_or_made_through_the_epochs(script: list[object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(live, Path(directory), script)
