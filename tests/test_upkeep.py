"""Collections, automatic snapshots and restores of a whole vault, cut short and gone on with."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from statistics import correlation
from typing import Any

import msgpack
import pytest
import trio
from trio.testing import MockClock

from hpkvfs import keep, upkeep
from hpkvfs.commands import Commands
from hpkvfs.control import no_progress
from hpkvfs.errors import Unreachable
from hpkvfs.fs.backend import run
from hpkvfs.restore import clear, restore
from hpkvfs.session import Session, housekeeping
from hpkvfs.timeline import Timeline
from hpkvfs.types import BlobId, BlobRef, Generation
from hpkvfs.volume import gc
from hpkvfs.volume.deadlist import Dead
from hpkvfs.volume.gc import Collected
from tests.adversary.vault import Vault, vault
from tests.fs.play import play, tree

BIG = bytes(range(256)) * 64 * 30
FILE = (b"a", b"big")
HOURS = 6 * 3_600.0


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Vault]:
    async with vault(tmp_path) as made:
        yield made


async def write(session: Session, *path: bytes, data: bytes = BIG) -> None:
    assert await play(session, ("file", path)) == 0
    assert await play(session, ("write", path, 0, data)) == 0


async def with_dead_blobs(session: Session) -> None:
    await session.connect()
    await write(session, *FILE)
    await session.publish()
    assert await play(session, ("unlink", FILE)) == 0
    await session.publish()


async def test_a_dry_run_tells_what_a_collection_then_does(made: Vault) -> None:
    async with made.session() as session:
        await with_dead_blobs(session)
        commands = Commands(session, str)
        before, blobs = session.store.balance.total, made.world.ledger.totals().blobs
        told = await commands.run("gc", {"dry_run": True}, no_progress)
        assert told["would_delete"] > 30 and told["blobs_held"] == 0
        assert session.store.balance.total == before
        assert made.world.ledger.totals().blobs == blobs, "it deletes nothing"
        seen: list[tuple[int, int]] = []
        done = await commands.run("gc", {}, lambda *progress: seen.append(progress))
        assert done["deleted"] == told["would_delete"]
        assert done["regained"] == told["would_regain"]
        assert seen[-1] == (done["deleted"], done["deleted"])
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        expected = await tree(session)
    await made.assert_well(expected)


@pytest.mark.parametrize("how", ["cancelled", "no server"])
async def test_a_collection_cut_short_is_gone_on_with(made: Vault, how: str) -> None:
    """And each blob is paid back once."""
    async with made.session() as session:
        await with_dead_blobs(session)
    async with made.session(patience=2) as session:
        await session.connect()
        wanted = session.collectable()[0]
        with trio.CancelScope() as scope:

            def cut(done: int, total: int) -> None:
                if done == 7 and how == "cancelled":
                    scope.cancel()
                elif done == 7:
                    made.world.wire.down = True

            if how == "cancelled":
                await session.gc(cut)
            else:
                with pytest.raises(Unreachable):
                    await session.gc(cut)
    made.world.wire.down = False
    async with made.session() as session:
        await session.connect()
        assert 0 < session.collectable()[0] < wanted
        done = await session.gc()
        assert done.absent == [], "none is asked for again"
        assert 7 <= wanted - len(done.deleted) < wanted
        expected = await tree(session)
        assert session.status()["blobs_dead"] <= 8, "what the last publications replaced"
    await made.assert_well(expected)


def unevenness(moments: list[float]) -> float:
    """How far moments in [0, 1) are from being spread evenly: Kolmogorov's D, times sqrt(n)."""
    count, moments = len(moments), sorted(moments)
    gaps = (max((i + 1) / count - m, m - i / count) for i, m in enumerate(moments))
    return float(max(gaps) * count**0.5)


async def test_when_a_collection_deletes_is_drawn_evenly_and_tells_nothing_of_birth(
    made: Vault, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By chance of our own, on a clock of our own; 600 blobs that nothing else can be told of."""
    dead = [Dead(BlobRef(BlobId(10_000 + n), bytes(32)), Generation(0)) for n in range(600)]
    times: dict[int, float] = {}

    async def read_list(volume: object, of: object) -> tuple[list[Dead], list[BlobRef]]:
        return dead, []

    async def delete(volume: object, ref: BlobRef, result: Collected) -> None:
        times[ref.id - 10_000] = trio.current_time()
        result.absent.append(ref)

    async def collect_at_once(*arguments: Any) -> None:
        mock_clock.autojump_threshold = 0  # only now: nothing here waits for a thread
        try:
            await gc.collect(*arguments)
        finally:
            mock_clock.autojump_threshold = math.inf

    async with made.session() as session:
        await session.connect()
        monkeypatch.setattr(housekeeping, "read_list", read_list)
        monkeypatch.setattr(housekeeping, "collect", collect_at_once)
        monkeypatch.setattr(gc, "_delete", delete)
        monkeypatch.setattr(session._housekeeping, "_rng", random.Random("spread").randbytes)
        at_once = await drawn(session, times, 0.0)
        over_hours = await drawn(session, times, HOURS)
    births = list(range(600))
    assert unevenness([at / HOURS for at in over_hours.values()]) < 1.63, "1 in 100 is above"
    gaps = sorted(after - before for before, after in pairwise(over_hours.values()))
    assert gaps[-1] > 3 * HOURS / 600 > 50 * gaps[5], "at random, not in step"
    assert set(at_once.values()) == {0.0}, "the control: all at once"
    assert unevenness(list(at_once.values())) > 20
    for order in map(list, (at_once, over_hours)):
        assert sorted(order) == births, "each once"
        assert abs(correlation(births, order)) < 0.1, "2.5 deviations"
    assert correlation(births, sorted(order)) > 0.9, "as it were in order of birth"


async def drawn(session: Session, times: dict[int, float], spread: float) -> dict[int, float]:
    """Collect; when each was deleted, in order, in seconds from the beginning."""
    times.clear()
    start = trio.current_time()
    await session.gc(spread=spread)
    session.publisher.removed.clear()
    return {number: at - start for number, at in times.items()}


async def test_a_policy_over_half_a_day(made: Vault) -> None:
    policy = keep.parse("hourly=3,daily=2")
    async with made.session() as session:
        await session.connect()
        timeline = Timeline(session)
        for hour in range(12):
            made.world.clock.pass_hours(1)
            await write(session, b"a", b"%d" % hour, data=b"small")
            assert (await timeline.apply(policy))[0] is not None
            assert (await timeline.apply(policy)) == (None, []), "one an hour"
        assert 3 <= len(await timeline.snapshots()) <= 4
        held = session.status()["blobs_held"]
        await timeline.delete([s.name for s in await timeline.snapshots()])
        assert session.status()["blobs_held"] == 0 < held
        await session.gc()
        expected = await tree(session)
    await made.assert_well(expected)


class Killed(BaseException):
    """Nothing is tidied up after it."""


async def test_what_a_killed_restore_left_is_taken_away(made: Vault) -> None:
    options: Any = {"replace": False, "token": bytes(8)}

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    async with made.session() as session:
        await session.connect()
        for name in (b"1", b"2", b"3"):
            await write(session, b"a", name, data=BIG[:40_000])
        then = await Timeline(session).create("then")
        expected = await tree(session)
        with pytest.raises(Killed):
            await restore(session, then, "a", "copy", **options, progress=kill)
        assert len(await tree(session)) > len(expected)
        assert await play(session, ("file", (b".hpkvfs-restore-mine",))) == 0
    async with made.session() as session:
        await clear(session)
        left = await tree(session)
        assert left.pop((b".hpkvfs-restore-mine",)), "a file of the user's is not touched"
        assert left == expected
        await clear(session)
        await restore(session, then, "a", "copy", **options, progress=no_progress)
        inode = await run(session, lambda: session.fs.lookup(1, b"copy"))
        assert len(await tree(session, inode.ino)) == len(await tree(session, 2))
        await session.publish()
        expected = await tree(session)
    await made.assert_well(expected)


async def test_a_mounted_vault_collects_and_tidies_up_by_itself(
    made: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LEAST_DEAD", 8)
    async with made.session() as session:
        await with_dead_blobs(session)
        await session.keep_note("restoring", msgpack.packb([1, b".hpkvfs-restore-left"]))
        assert await play(session, ("dir", (b".hpkvfs-restore-left",))) == 0
        assert await play(session, ("file", (b".hpkvfs-restore-left", b"x"))) == 0
        dead = session.collectable()[0]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upkeep.look_after, session, (), 0.1, trio.Lock())
                while session.collectable()[0] > dead // 4:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        await session.publish()
        expected = await tree(session)
        assert not any(path[0].startswith(b".hpkvfs") for path in expected if path)
    await made.assert_well(expected)
