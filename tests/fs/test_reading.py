"""Reading a file while it changes under what was fetched ahead; the oracle is a bytearray.

The local cache has room for a few blobs, so that what is read was in memory, in the cache, evicted
from it, or at the store alone.
"""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from hpkvfs.cache import SLOT_SIZE, BlobCache
from hpkvfs.fs.inodes import Changes
from hpkvfs.volume.items import BLOCK
from hpkvfs.volume.volume import Volume
from tests.examples import examples
from tests.fs.harness import Machine

BLOCKS = 24
SIZE = BLOCKS * BLOCK
SLOTS = 10

OFFSETS = st.one_of(st.integers(0, SIZE), st.integers(0, BLOCKS).map(lambda number: number * BLOCK))
STEPS = st.one_of(
    st.tuples(st.just("write"), OFFSETS, st.sampled_from([1, 5_000, BLOCK, 3 * BLOCK, 70_000])),
    st.tuples(st.just("cut"), OFFSETS),
    st.tuples(st.just("publish")),
    st.tuples(st.just("collect")),
    st.tuples(st.just("ahead"), st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)),
    st.tuples(st.just("read"), OFFSETS, st.sampled_from([1, BLOCK, 8 * BLOCK, SIZE])),
)
Step = tuple[Any, ...]


class Reader:
    """A file, what it should hold, and the client that reads it."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        machine = Machine(directory / "log")
        machine.cache = BlobCache(directory / "cache", bytes(32), SLOTS * SLOT_SIZE + 4_096)
        self.client = machine.boot()
        self.ino = self.client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
        self.expected = bytearray()
        self.nursery = nursery
        self.count = 0

    async def write(self, offset: int, size: int) -> None:
        """Bytes that were never written before."""
        self.count += 1
        data = (b"%07d\n" % self.count * (size // 8 + 1))[:size]
        await self.client.do(self.client.fs.write, self.ino, offset, data)
        self.expected.extend(bytes(max(0, offset + size - len(self.expected))))
        self.expected[offset : offset + size] = data

    async def cut(self, size: int) -> None:
        await self.client.do(self.client.fs.setattr, self.ino, Changes(size=size))
        self.expected = self.expected[:size].ljust(size, b"\0")

    async def publish(self) -> None:
        await self.client.publish()

    async def collect(self) -> None:
        await self.client.publish()
        await self.client.collect()

    async def ahead(self, first: int, count: int) -> None:
        """Begin to fetch, and go on before it has come."""
        numbers = range(first, first + count)
        refs = await self.client.do(self.client.fs.view.extent_refs, self.ino, numbers)
        self.client.volume.prefetch(refs, self.nursery)

    async def read(self, offset: int, size: int) -> None:
        found = await self.client.do(self.client.fs.read, self.ino, offset, size)
        assert found == self.expected[offset : offset + size]


async def play(directory: Path, steps: list[Step]) -> None:
    (directory / "log").mkdir()
    async with trio.open_nursery() as nursery:
        reader = Reader(directory, nursery)
        await reader.write(0, SIZE - 100)
        await reader.publish()
        for name, *args in steps:
            await getattr(reader, name)(*args)
        await reader.read(0, SIZE + BLOCK)
        await reader.publish()
        await reader.read(0, SIZE + BLOCK)


OVERWRITTEN = [
    ("ahead", 0, BLOCKS), ("write", 3 * BLOCK, 2 * BLOCK), ("publish",), ("read", 0, SIZE)
]  # fmt: skip
CUT = [("ahead", 0, BLOCKS), ("cut", 5 * BLOCK + 9), ("cut", SIZE), ("publish",), ("read", 0, SIZE)]
COLLECTED = [
    ("read", 0, SIZE), ("ahead", 0, BLOCKS), ("write", BLOCK, 70_000), ("collect",),
    ("read", 0, 8 * BLOCK), ("read", 0, SIZE),
]  # fmt: skip


@examples(60)
@given(st.lists(STEPS, max_size=20))
@example(OVERWRITTEN)
@example(CUT)
@example(COLLECTED)
def test_what_is_read_is_what_was_written(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(play, Path(directory), steps)


async def follow(directory: Path) -> bool:
    """Whether one client reads what another wrote in place of what both have read."""
    machine = Machine(directory / "log")
    (directory / "log").mkdir()
    writer = machine.boot()
    ino = writer.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    for content in (b"before", b"after."):
        writer.fs.write(ino, 0, content * BLOCK)
        await writer.publish()
        if content == b"before":
            (directory / "other").mkdir()
            other = Machine(directory / "other", machine.store)
            other.known = machine.known
            reader = other.boot()
            assert await reader.do(reader.fs.read, ino, 0, SIZE) == content * BLOCK
    reader.volume.known = machine.known
    return await reader.do(reader.fs.read, ino, 0, SIZE) == b"after." * BLOCK


async def test_a_client_that_follows_reads_what_is_published_now(tmp_path: Path) -> None:
    assert await follow(tmp_path)


async def test_control_extents_of_an_earlier_generation_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Volume, "state", property(lambda _: 0))
    assert not await follow(tmp_path)
