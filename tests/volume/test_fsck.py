"""Damage of each kind, planted in a tree: found, named by path, repaired; none where none is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hpkvfs.fs.layer import Effect, Put, Usage
from hpkvfs.mend import DAMAGED, mend
from hpkvfs.session import Session
from hpkvfs.types import PAYLOAD_SIZE, BlobRef, Missing
from hpkvfs.volume import fsck, gc
from hpkvfs.volume.fsck import Report
from hpkvfs.volume.items import ROOT_INO, Dirent, Inode, ItemKind, key
from tests.fs.harness import Client, Machine
from tests.fs.play import START, play, tree

BIG = b"\5" * 50_000


class Keeping:
    """A cache that keeps what it is given."""

    def __init__(self) -> None:
        self.blobs: dict[BlobRef, bytes] = {}

    def __contains__(self, ref: BlobRef) -> bool:
        return ref in self.blobs

    def get(self, ref: BlobRef) -> bytes | None:
        return self.blobs.get(ref)

    def payloads(self, refs: Iterable[BlobRef], kind: bytes) -> list[bytes | None]:
        found = [self.blobs.get(ref, b"") for ref in refs]
        return [blob[-PAYLOAD_SIZE:] if blob[:1] == kind else None for blob in found]

    def put(self, ref: BlobRef, blob: bytes) -> None:
        self.blobs[ref] = blob

    def drop(self, ref: BlobRef) -> None:
        self.blobs.pop(ref, None)


@dataclass
class World:
    """A client with some files published: a/, a/b/, a/c, b (40,000 bytes), dir/big, many/*."""

    machine: Machine
    client: Client

    @classmethod
    async def make(cls, directory: Path) -> World:
        machine = Machine(directory)
        world = cls(machine, machine.boot())
        steps: list[Any] = [*START, ("dir", (b"dir",)), ("file", (b"dir", b"big"))]
        steps += [("write", (b"dir", b"big"), 0, BIG), ("dir", (b"many",))]
        for number in range(150):
            name = (b"many", b"%03d" % number)
            steps += [("file", name), ("write", name, 0, b"%03d" % number * 400)]
        for step in steps:
            assert await play(world.client, step) == 0, step
        await world.client.publish()
        return world

    async def ino(self, *path: bytes) -> int:
        ino = ROOT_INO
        for name in path:
            ino = (await self.client.do(self.client.fs.lookup, ino, name)).ino
        return ino

    async def inode(self, *path: bytes) -> Inode:
        return await self.client.do(self.client.fs.getattr, await self.ino(*path))

    async def entry(self, parent: int, name: bytes) -> tuple[bytes, Dirent]:
        entries = await self.client.do(self.client.fs.readdir, parent, -1, 1_000)
        found = next(entry for entry in entries if entry.name == name)
        return key(parent, ItemKind.DIRENT, found.cookie), found

    async def plant(self, *effects: Effect) -> None:
        """Break rules, and publish that."""
        self.client.fs.mend(list(effects))
        await self.client.publish()

    def lose(self, *refs: BlobRef) -> None:
        """At the server, and here."""
        for ref in refs:
            del self.machine.store.blobs[self.client.volume.keys.signer(ref.id).public]
        self.forget()

    def forget(self) -> None:
        self.client.close()
        self.client = self.machine.boot()

    async def extents(self, *path: bytes) -> dict[int, BlobRef]:
        ino, volume = await self.ino(*path), self.client.volume
        low, high = key(ino, ItemKind.EXTENT), key(ino, ItemKind.INLINE)
        items = await gc.loading(volume, lambda: list(volume.scan(low, high)))
        return {int.from_bytes(raw[9:], "big"): BlobRef.decode(value) for raw, value in items}

    async def check(self) -> Report:
        return await fsck.fsck(self.client.volume, extents=True, progress=lambda d, t: None)

    async def mend(self) -> tuple[Report, list[str]]:
        """As hpkvfs fsck --repair, over this harness."""
        client = self.client

        async def check(extents: bool, **_: Any) -> Report:
            await client.publish()
            return await fsck.fsck(client.volume, extents=extents, progress=lambda d, t: None)

        session = SimpleNamespace(
            fs=client.fs, publisher=client.publisher, publish=client.publish, fsck=check,
            store=self.machine.store, keys=client.volume.keys, load=client.load,
        )  # fmt: skip
        return await mend(cast(Session, session), extents=True)


Plant = Callable[[World], Awaitable[None]]
PLANTS: dict[str, tuple[Plant, str]] = {}


def plant(said: str) -> Callable[[Plant], Plant]:
    def register(function: Plant) -> Plant:
        PLANTS[function.__name__] = function, said
        return function

    return register


@plant("b: has link count 7, expected 1")
async def wrong_link_count(world: World) -> None:
    inode = await world.inode(b"b")
    await world.plant(Put(key(inode.ino, ItemKind.INODE), inode._replace(nlink=7).encode()))


@plant("dir: has link count 5, expected 2")
async def wrong_link_count_of_a_directory(world: World) -> None:
    inode = await world.inode(b"dir")
    await world.plant(Put(key(inode.ino, ItemKind.INODE), inode._replace(nlink=5).encode()))


@plant("dir/ghost: leads to inode 99999, which is not there")
async def dangling_name(world: World) -> None:
    ino = await world.ino(b"dir")
    entry = Dirent(b"ghost", 99_999, 8)
    await world.plant(Put(key(ino, ItemKind.DIRENT, 5), entry.encode()))


@plant("has no name")
async def unnamed_file(world: World) -> None:
    place, _ = await world.entry(ROOT_INO, b"b")
    await world.plant(Put(place, None))


@plant("has no name")
async def unnamed_directory(world: World) -> None:
    place, _ = await world.entry(ROOT_INO, b"many")
    await world.plant(Put(place, None))


@plant("many: its entry tells a wrong type")
async def wrong_type(world: World) -> None:
    place, entry = await world.entry(ROOT_INO, b"many")
    await world.plant(Put(place, entry._replace(type=8).encode()))


@plant("dir: does not know that it is in directory 1")
async def wrong_parent(world: World) -> None:
    inode = await world.inode(b"dir")
    await world.plant(Put(key(inode.ino, ItemKind.INODE), inode._replace(parent=77).encode()))


@plant("is listed as an orphan and has names")
async def orphan_with_a_name(world: World) -> None:
    await world.plant(Put(key(0, ItemKind.ORPHAN, await world.ino(b"b")), b""))


@plant("inode 4444 is listed as an orphan and is not there")
async def orphan_that_is_not_there(world: World) -> None:
    await world.plant(Put(key(0, ItemKind.ORPHAN, 4_444), b""))


@plant("b: has data at 65536, where none can be")
async def data_past_the_end(world: World) -> None:
    ino = await world.ino(b"b")
    await world.plant(Put(key(ino, ItemKind.INLINE, 65_536), b"x"))


@plant("b: has the block at 0 twice")
async def a_block_twice(world: World) -> None:
    ino = await world.ino(b"b")
    await world.plant(Put(key(ino, ItemKind.INLINE, 0), b"x"))


@plant("inode 5555 has data but is not a file")
async def data_of_nothing(world: World) -> None:
    await world.plant(Put(key(5_555, ItemKind.INLINE, 0), b"x"))


@plant("can't be read")
async def an_attribute_that_is_none(world: World) -> None:
    await world.plant(Put(key(await world.ino(b"b"), ItemKind.XATTR, 3), b"\xff\xff"))


@plant("there is no root directory")
async def no_root(world: World) -> None:
    await world.plant(Put(key(ROOT_INO, ItemKind.INODE), None))


@plant("bytes, found")
async def wrong_sums(world: World) -> None:
    inode = await world.inode(b"b")
    touch = Put(key(inode.ino, ItemKind.INODE), inode._replace(ctime=1).encode())
    await world.plant(Usage(1_000, 3), touch)


@pytest.mark.parametrize("name", PLANTS)
async def test_planted_damage_is_found_named_and_repaired(name: str, tmp_path: Path) -> None:
    function, said = PLANTS[name]
    world = await World.make(tmp_path)
    await function(world)
    report = await world.check()
    assert any(said in text for text in report.problems), report.problems
    assert report.repairs
    report, repaired = await world.mend()
    assert report.problems == [] and report.damaged == []
    assert any(said in text for text in repaired)
    assert (await world.check()).problems == []
    seen = await tree(world.client)
    whole = {facts[2] for facts in seen.values()}
    assert {b"\1" * 40_000, BIG, b"070" * 400} <= whole, "what was whole is still there"
    world.client.close()


async def test_nothing_is_found_and_nothing_repaired_where_nothing_is_wrong(
    tmp_path: Path,
) -> None:
    world = await World.make(tmp_path)
    before, blobs = await tree(world.client), dict(world.machine.store.blobs)
    report, repaired = await world.mend()
    assert (report.problems, report.damaged, repaired) == ([], [], [])
    assert not report.repairs
    assert await tree(world.client) == before and world.machine.store.blobs == blobs
    world.client.close()


async def test_a_lost_extent_is_named_by_its_bytes_and_becomes_a_named_hole(
    tmp_path: Path,
) -> None:
    world = await World.make(tmp_path)
    world.lose((await world.extents(b"dir", b"big"))[16_384])
    report = await world.check()
    assert [(d.path, d.ranges) for d in report.damaged] == [("dir/big", ((16_384, 32_768),))]
    report, _ = await world.mend()
    assert report.problems == []
    assert [d.path for d in report.damaged] == ["dir/big"], "what is lost is said all the same"
    seen = (await tree(world.client))[(b"dir", b"big")]
    assert seen[2] == BIG[:16_384] + bytes(16_384) + BIG[32_768:]
    assert seen[4] == {DAMAGED: b"16384-32767"}
    world.client.close()


async def test_a_blob_that_the_cache_has_is_stored_again(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    cache = Keeping()
    world.client.volume._cache = cache
    before = await tree(world.client)
    lost = (await world.extents(b"dir", b"big"))[0]
    del world.machine.store.blobs[world.client.volume.keys.signer(lost.id).public]
    report = await world.check()
    assert report.problems and not report.damaged, "nothing is lost yet"
    report, _ = await world.mend()
    assert report.problems == []
    world.forget()
    assert await tree(world.client) == before
    assert (await world.check()).problems == []
    world.client.close()


async def test_of_a_lost_leaf_the_rest_is_saved_and_what_was_in_it_named(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    whole = await tree(world.client)
    inode = await world.inode(b"many", b"070")
    leaf = await leaf_of(world, key(inode.ino, ItemKind.INODE))
    world.lose(leaf)
    with pytest.raises(Exception, match="missing"):
        await tree(world.client)
    report = await world.check()
    named = {damage.path for damage in report.damaged}
    assert "many/070" in named
    report, _ = await world.mend()
    assert report.problems == []
    seen = await tree(world.client)
    assert set(whole) - set(seen) <= {tuple(path.encode().split(b"/")) for path in named}
    assert seen[(b"b",)][2] == whole[(b"b",)][2]
    left = {path for path in seen if path[:1] == (b"many",)}
    assert len(left) > 100, "the other leaves are there"
    for path in left & set(whole):
        if b"/".join(path).decode() not in named:
            assert seen[path][2] == whole[path][2]
        else:
            assert DAMAGED in seen[path][4]
    report = await world.check()
    assert report.problems == []
    world.client.close()


async def test_a_lost_root_is_told_and_nothing_is_made_of_it(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    assert world.client.volume.root is not None
    world.lose(world.client.volume.root)
    report = await world.check()
    assert report.problems and not report.repairs
    report, _ = await world.mend()
    assert report.problems
    world.client.close()


async def test_damage_in_a_snapshot_is_told_with_its_name_and_stays(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    lost = (await world.extents(b"dir", b"big"))[0]
    world.client.publisher.create.append("then")
    await world.client.publish()
    assert await play(world.client, ("unlink", (b"dir", b"big"))) == 0
    await world.client.publish()
    world.lose(lost)
    report, _ = await world.mend()
    assert [(d.snapshot, d.path) for d in report.damaged] == [("then", "dir/big")]
    assert report.problems, "a snapshot can't be repaired"
    world.client.close()


async def test_a_bound_on_look_ups_is_kept(tmp_path: Path) -> None:
    world = await World.make(tmp_path)
    world.client.volume._cache = cache = Keeping()
    await world.check()
    before = world.machine.store.performed["look_up"]
    report = await fsck.fsck(world.client.volume, extents=True, progress=lambda d, t: None, limit=5)
    assert world.machine.store.performed["look_up"] - before == 5
    assert report.verified == 5 and report.unchecked > 0 and report.problems == []
    assert cache.blobs
    world.client.close()


async def leaf_of(world: World, wanted: bytes) -> BlobRef:
    volume = world.client.volume
    ref = volume.root
    assert ref is not None
    while True:
        try:
            node = volume.node(ref)
        except Missing as missing:
            await volume.load(missing)
            continue
        if not node.level:
            return ref
        index = max(i for i, first in enumerate(node.keys) if first <= wanted)
        ref = BlobRef.decode(node.values[index])
