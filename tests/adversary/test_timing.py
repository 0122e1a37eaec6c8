"""A server that writes down when everything comes, and looks at order, sizes, numbers and times.

What docs/threat-model.md, "What many requests show, over time", says it does not see there; each
with a negative control: the same eyes on a client that does not hide it do see it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hpkvfs import parallel, session
from hpkvfs.net.store import MAX_IN_FLIGHT
from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE
from hpkvfs.protocol.messages import DeleteRequest, InsertRequest, Request, decode_request
from hpkvfs.session import Session
from hpkvfs.types import BlobId
from tests.adversary.vault import Vault, vault
from tests.fs.play import play

BLOCKS = 64
SPREAD = 600.0
FOR_EVER = 1e9
"""Patience, where the clock jumps: the disks' threads take no time of that clock."""


@dataclass
class Diary:
    """What one server writes down."""

    arrivals: list[tuple[float, Request]] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    contents: set[int] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0

    def watch(self, vault: Vault) -> None:
        honest = vault.world.wire.answer

        async def answer(frame: bytes) -> bytes:
            self.arrivals.append((trio.current_time(), decode_request(frame)))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
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


def in_order(rng: Callable[[int], bytes], seconds: float) -> parallel.Scatter:
    return parallel.IN_ORDER


@pytest.mark.parametrize("shuffled", [True, False])
async def test_the_order_of_a_publication_tells_nothing_of_the_file(
    watched: tuple[Vault, Diary], monkeypatch: pytest.MonkeyPatch, shuffled: bool
) -> None:
    if not shuffled:
        monkeypatch.setattr(session, "_scatter", in_order)
    made, diary = watched
    async with made.session() as opened:
        await opened.connect()
        ids = await write(opened)
        await opened.publish()
    seen = agreement(made, diary.keys(InsertRequest), ids)
    assert abs(seen) < 0.63 if shuffled else seen > 0.9


@pytest.mark.parametrize("shuffled", [True, False])
async def test_the_order_of_a_collection_tells_nothing_of_the_file(
    watched: tuple[Vault, Diary], monkeypatch: pytest.MonkeyPatch, shuffled: bool
) -> None:
    if not shuffled:
        monkeypatch.setattr(Session, "_shuffle", lambda self, entries: None)
    made, diary = watched
    async with made.session() as opened:
        await opened.connect()
        ids = await write(opened)
        await opened.publish()
        await play(opened, ("unlink", (b"big",)))
        await opened.gc()
    seen = agreement(made, diary.keys(DeleteRequest), ids)
    assert abs(seen) < 0.63 if shuffled else abs(seen) > 0.9


async def test_all_requests_and_all_replies_have_one_size(
    watched: tuple[Vault, Diary],
) -> None:
    """Whatever they are, refusals too. The negative control: what is in them has many sizes."""
    made, diary = watched
    async with made.session() as opened:
        await opened.connect()
        await opened.redeem(made.world.voucher(100))
        await write(opened)
        await opened.publish()
        await play(opened, ("unlink", (b"big",)))
        await opened.gc()
        await opened.fsck(extents=True)
    assert diary.sizes == {(REQUEST_SIZE, REPLY_SIZE)}
    assert len({type(request) for _, request in diary.arrivals}) >= 5
    assert len(diary.contents) >= 5


async def test_a_publication_has_a_bounded_number_of_connections(
    watched: tuple[Vault, Diary],
) -> None:
    """However much there is to store. The negative control: two clients have more."""
    made, diary = watched
    async with made.session() as opened:
        await opened.connect()
        await write(opened)
        await opened.publish()
        assert diary.most_at_once == MAX_IN_FLIGHT == 16
        async with trio.open_nursery() as nursery:
            other = made.world.client(name="other", max_in_flight=MAX_IN_FLIGHT)
            await other.redeem(made.world.voucher(500))
            await write(opened)
            nursery.start_soon(opened.publish)
            for number in range(BLOCKS):
                nursery.start_soon(other.look_up, made.key(BlobId(number)))
        assert diary.most_at_once > MAX_IN_FLIGHT


@pytest.mark.parametrize("spread", [SPREAD, 0.0])
async def test_spread_takes_a_publication_apart(
    autojump_clock: MockClock, tmp_path: Path, spread: float
) -> None:
    """Inserts come all through the time, the lone anchor too, which is not where the others end.
    The negative control: without, one moment has them all."""
    async with vault(tmp_path) as made:
        diary = Diary()
        diary.watch(made)
        async with made.session(patience=FOR_EVER, spread=spread) as opened:
            await opened.connect()
            await write(opened)
            start = trio.current_time()
            await opened.publish()
    times = [time - start for time in diary.times(InsertRequest)]
    data, anchor = times[:BLOCKS], times[-1]
    if not spread:
        assert max(times) == 0
        return
    assert 0 <= min(data) and max(data) <= spread < anchor < 4 * spread
    tenths = [sum(1 for time in data if 10 * time // spread == tenth) for tenth in range(10)]
    assert sum(1 for count in tenths if count) >= 7
    assert max(tenths) <= BLOCKS / 3


@pytest.mark.parametrize("spread", [SPREAD, 0.0])
async def test_spread_takes_a_collection_apart(
    autojump_clock: MockClock, tmp_path: Path, spread: float
) -> None:
    async with vault(tmp_path) as made:
        diary = Diary()
        diary.watch(made)
        async with made.session(patience=FOR_EVER) as opened:
            await opened.connect()
            await write(opened)
            await opened.publish()
            await play(opened, ("unlink", (b"big",)))
            await opened.publish()
            start = trio.current_time()
            await opened.gc(spread=spread)
    times = [time - start for time in diary.times(DeleteRequest)]
    assert len(times) >= BLOCKS
    if not spread:
        assert max(times) == 0
        return
    tenths = [sum(1 for time in times if 10 * time // spread == tenth) for tenth in range(10)]
    assert sum(1 for count in tenths if count) >= 7
    assert max(tenths) <= len(times) / 3
