"""A server that writes down when everything comes, and looks at order, sizes, numbers and times.

What docs/threat-model.md, "What many requests show, over time", says it does not see there; each
with a negative control: the same eyes on a client that does not hide it do see it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hpkvfs import parallel
from hpkvfs.fs import publisher
from hpkvfs.net.store import MAX_IN_FLIGHT, RemoteStore
from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE
from hpkvfs.protocol.messages import (
    DeleteRequest,
    InsertRequest,
    LookUpRequest,
    Request,
    decode_request,
)
from hpkvfs.session import Session, session
from hpkvfs.session.housekeeping import Housekeeping
from hpkvfs.types import BlobId
from tests.adversary.vault import Vault, vault
from tests.fs.play import play

BLOCKS = 64
SPREAD, STEP = 600.0, 10.0
LULL = 0.02
FOR_EVER = 1e9
"""Patience, where a clock of ours jumps while threads wait for a disk."""


@dataclass
class Diary:
    """What one server writes down."""

    arrivals: list[tuple[float, Request]] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    contents: set[int] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0
    holds: bool = False
    """Whether it answers when no more requests come."""

    def watch(self, vault: Vault) -> None:
        honest = vault.world.wire.answer

        async def answer(frame: bytes) -> bytes:
            self.arrivals.append((trio.current_time(), decode_request(frame)))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                if self.holds:
                    await wait_all_tasks_blocked(LULL)
                reply = await honest(frame)
            finally:
                self.at_once -= 1
            self.sizes.add((len(frame), len(reply)))
            self.contents.add(len(frame.rstrip(b"\0")))
            return reply

        vault.world.wire.answer = answer

    def keys(self, kind: type[InsertRequest | DeleteRequest]) -> list[bytes]:
        return [request.key for _, request in self.arrivals if isinstance(request, kind)]

    def times(self, kind: type[InsertRequest | DeleteRequest]) -> list[float]:
        return [at for at, request in self.arrivals if isinstance(request, kind)]


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[tuple[Vault, Diary]]:
    async with vault(tmp_path) as made:
        diary = Diary()
        diary.watch(made)
        yield made, diary


async def write(session: Session) -> range:
    """A file of BLOCKS blocks, each of which is an extent; their ids."""
    first = session.publisher.next_id
    await play(session, ("file", (b"big",)))
    for block in range(BLOCKS):
        await play(session, ("write", (b"big",), 16_384 * block, bytes([1 + block]) * 16_384))
    return range(first, first + BLOCKS)


def agreement(vault: Vault, keys: list[bytes], ids: range) -> float:
    """Spearman's rank correlation of the order of arrival with the order in the file: 1 if they
    are the same; by chance within 5 / sqrt(BLOCKS - 1) = 0.63, but for one time in a million."""
    number = {vault.key(BlobId(one)): one - ids[0] for one in ids}
    ranks = [number[key] for key in keys if key in number]
    assert sorted(ranks) == list(range(BLOCKS))
    squares = sum((at - rank) ** 2 for at, rank in enumerate(ranks))
    return 1 - 6 * squares / (BLOCKS * (BLOCKS**2 - 1))


async def live(vault: Vault) -> range:
    """A client buys, writes, publishes, deletes, collects; the ids of its file's extents."""
    async with vault.session() as opened:
        await opened.connect()
        await opened.redeem(vault.world.voucher(100))
        ids = await write(opened)
        await opened.publish()
        await play(opened, ("unlink", (b"big",)))
        await opened.gc()
    return ids


async def publish_held(vault: Vault, diary: Diary) -> None:
    """A client publishes at a server that lets it wait for as long as it has more to ask."""
    async with vault.session() as opened:
        await opened.connect()
        await write(opened)
        diary.holds = True
        await opened.publish()
        diary.holds = False


async def test_order_sizes_and_number_of_requests_tell_nothing(
    watched: tuple[Vault, Diary],
) -> None:
    """Neither a publication nor a collection shows which blobs are neighbours; requests have one
    size and replies one, whatever is in them; however much there is to do, 16 come at a time."""
    made, diary = watched
    ids = await live(made)
    assert abs(agreement(made, diary.keys(InsertRequest), ids)) < 0.63
    assert abs(agreement(made, diary.keys(DeleteRequest), ids)) < 0.63
    assert diary.sizes == {(REQUEST_SIZE, REPLY_SIZE)}
    assert len({type(request) for _, request in diary.arrivals}) >= 5
    assert len(diary.contents) >= 5  # the negative control: what is in them is not of one size
    await publish_held(made, diary)
    assert diary.most_at_once == MAX_IN_FLIGHT == 16


async def test_who_does_not_shuffle_nor_bound_is_seen(
    watched: tuple[Vault, Diary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(session, "_scatter", lambda rng, seconds: parallel.IN_ORDER)
    monkeypatch.setattr(Housekeeping, "_shuffle", lambda self, entries: None)
    made, diary = watched
    ids = await live(made)
    assert agreement(made, diary.keys(InsertRequest), ids) > 0.9
    assert abs(agreement(made, diary.keys(DeleteRequest), ids)) > 0.9
    monkeypatch.setattr(publisher, "INSERTS_AT_ONCE", BLOCKS)
    defaults = (RemoteStore.__init__.__kwdefaults__ or {}) | {"max_in_flight": BLOCKS}
    monkeypatch.setattr(RemoteStore.__init__, "__kwdefaults__", defaults)
    await publish_held(made, diary)
    assert diary.most_at_once > MAX_IN_FLIGHT


async def test_spread_takes_publications_and_collections_apart(
    mock_clock: MockClock, watched: tuple[Vault, Diary]
) -> None:
    """Requests come all through the time, and the anchor's own moment is one of them."""
    made, diary = watched
    async with made.session(patience=FOR_EVER, spread=SPREAD) as opened:
        await opened.connect()
        await write(opened)
        start = trio.current_time()
        async with time_passes(mock_clock, opened, diary):
            await opened.publish()
        inserts = [time - start for time in diary.times(InsertRequest)]
        opened.publisher._scatter = parallel.IN_ORDER
        await play(opened, ("unlink", (b"big",)))
        await opened.publish()
        start = trio.current_time()
        async with time_passes(mock_clock, opened, diary):
            await opened.gc(spread=SPREAD)
        deletes = [time - start for time in diary.times(DeleteRequest)]
    assert max(inserts[:BLOCKS]) <= SPREAD + STEP < inserts[-1] < 4 * SPREAD
    for times in (inserts[:BLOCKS], deletes):
        assert len(times) >= BLOCKS
        tenths = [sum(1 for at in times if 10 * at // SPREAD == tenth) for tenth in range(10)]
        assert sum(1 for count in tenths if count) >= 7
        assert max(tenths) <= len(times) / 3


async def test_without_it_one_moment_has_them_all(
    mock_clock: MockClock, watched: tuple[Vault, Diary]
) -> None:
    """The negative control: nothing waits for the clock, which stands still."""
    made, diary = watched
    await live(made)
    assert len(set(diary.times(InsertRequest))) == 1
    assert len(set(diary.times(DeleteRequest))) == 1


async def test_a_generation_begins_an_interval_after_its_first_change(
    mock_clock: MockClock, watched: tuple[Vault, Diary]
) -> None:
    """Not whenever an interval is over, counted from the start or from a publication by command."""
    made, diary = watched
    async with made.session(patience=FOR_EVER) as opened, trio.open_nursery() as nursery:
        interval = opened.options.publish_interval
        await opened.connect()
        await play(opened, ("file", (b"f",)))
        await opened.publish()
        nursery.start_soon(opened.keep_going)
        for pause in (0.7 * interval, 1.3 * interval, 0.4 * interval):
            async with time_passes(mock_clock, opened, diary, step=0.05 * interval):
                await trio.sleep(pause)
                diary.arrivals.clear()
                first = trio.current_time()
                await play(opened, ("write", (b"f",), 0, b"first"))
                await trio.sleep(0.5 * interval)
                await play(opened, ("write", (b"f",), 0, b"second"))
                await trio.sleep(1.2 * interval)
            assert not opened.publisher.pending
            came = [at - first for at in diary.times(InsertRequest)]
            assert interval <= min(came) <= max(came) < 1.2 * interval
            await play(opened, ("write", (b"f",), 0, b"by command"))
            await opened.publish()
        nursery.cancel_scope.cancel()


async def key_in_common(watched: tuple[Vault, Diary]) -> int:
    """How many keys came in more than one of a session's publications, but the first."""
    made, diary = watched
    seen: list[set[bytes]] = []
    async with made.session() as opened:
        await opened.connect()
        for number in range(7):
            diary.arrivals.clear()
            await play(opened, ("write", (b"b",), 0, bytes([number]) * 9_000))
            await opened.publish()
            asked = (request for _, request in diary.arrivals)
            seen.append(
                {one.key for one in asked if isinstance(one, InsertRequest | LookUpRequest)}
            )
    every = Counter(key for keys in seen[1:] for key in keys)
    return sum(1 for times in every.values() if times > 1)


async def test_publications_have_no_key_in_common(watched: tuple[Vault, Diary]) -> None:
    assert await key_in_common(watched) == 0


async def test_who_looks_for_others_before_each_anchor_chains_them(
    watched: tuple[Vault, Diary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the anchors that are not there yet are the same ones each time."""
    monkeypatch.setattr(publisher, "SURE", 0)
    assert await key_in_common(watched) > 0


@asynccontextmanager
async def time_passes(
    clock: MockClock, session: Session, diary: Diary, step: float = STEP
) -> AsyncIterator[None]:
    """By steps, whenever nobody has anything to do. (autojump would go on to the end of FOR_EVER
    while a thread writes to a disk.)"""

    async def jump() -> None:
        while True:
            await trio.testing.wait_all_tasks_blocked(0.002)
            if not diary.at_once and session._journal._committing is None:
                clock.jump(step)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(jump)
        yield
        nursery.cancel_scope.cancel()
