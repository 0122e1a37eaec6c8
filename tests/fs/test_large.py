"""Trees larger than memory, directories larger than a listing's page, snapshots of both.

Through the operations that the FUSE adapter calls, over a store in memory.
"""

from __future__ import annotations

import errno
import random
import stat
from pathlib import Path

import pytest
import trio

from hpkvfs.fs import inodes
from hpkvfs.fs.inodes import Changes
from hpkvfs.fs.layer import Effect, Put
from hpkvfs.types import Missing
from hpkvfs.volume import volume
from hpkvfs.volume.items import Dirent, Inode, ItemKind, key
from hpkvfs.volume.volume import LEAST_NODES
from tests.fs.harness import Client, Machine

FILES = 3_000
INLINE = 4_000  # bytes of a file that lie in the tree: three files fill a node
ENTRIES = 100_000


async def spread_out(machine: Machine) -> None:
    """Published: a tree of more nodes than a client keeps, and a directory of names whose
    inodes are each in another leaf."""
    client = machine.boot()
    fs = client.fs
    names = fs.make(1, b"names", stat.S_IFDIR | 0o755, 0, 0).ino
    for number in range(FILES):
        ino = fs.make(1, b"%d" % number, stat.S_IFREG | 0o644, 0, 0).ino
        fs.write(ino, 0, content(number))
        if number % 8 == 0:
            fs.link(ino, names, b"%d" % number)
    await client.publish()
    client.close()


def content(number: int) -> bytes:
    return number.to_bytes(4, "big") * (INLINE // 4)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = Machine(tmp_path_factory.mktemp("large"))
    trio.run(spread_out, machine)
    assert machine.known is not None and machine.known.anchor.live > 1.5 * LEAST_NODES
    return machine


class Frugal(Client):
    """A client with as little memory as can be had; counts what it loads."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.volume._nodes = volume.Lru(max(volume.LEAST_NODES, 1))
        self.rounds = 0

    async def load(self, missing: Missing) -> None:
        self.rounds += 1
        assert self.rounds < 20_000, "it pushes out what it needs, for ever"
        await super().load(missing)


async def test_a_tree_larger_than_memory_is_walked_and_read(large: Machine) -> None:
    client = Frugal(large)
    seen, after = 0, -1
    while entries := await client.do(client.fs.listing, 1, after, 200):
        seen, after = seen + len(entries), entries[-1][0].cookie
    assert seen == FILES + 1
    for number in random.Random(1).choices(range(FILES), k=300):
        inode = await client.do(client.fs.lookup, 1, b"%d" % number)
        assert await client.do(client.fs.read, inode.ino, 0, INLINE) == content(number)
    assert len(client.volume._nodes._values) <= LEAST_NODES
    client.close()


async def test_the_least_memory_is_enough_for_the_largest_operation(large: Machine) -> None:
    """200 names listed, each with its inode in a leaf of its own.

    No negative control: with less memory it only takes longer, since the inodes that were decoded
    are remembered (fs/memo.py) and each round gets further.
    """
    client = Frugal(large)
    names = (await client.do(client.fs.lookup, 1, b"names")).ino
    assert len(await client.do(client.fs.listing, names, -1, 200)) == 200
    assert client.rounds < 20
    client.close()


async def test_a_directory_of_100000_entries(tmp_path: Path) -> None:
    """Listed a page at a time while names come and go: each that stays once, all in one order."""
    machine = Machine(tmp_path)
    client = machine.boot()
    fs = client.fs
    directory = fs.make(1, b"d", stat.S_IFDIR | 0o755, 0, 0)
    fill(client, directory.ino)
    await client.publish()
    seen: list[int] = []
    names: list[bytes] = []
    after, come = -1, 0
    while entries := await client.do(fs.readdir, directory.ino, after, 1_000):
        seen += [entry.cookie for entry in entries]
        names += [entry.name for entry in entries]
        after = entries[-1].cookie
        if come < 40:  # one that was listed goes, one that may be anywhere comes
            await client.do(fs.unlink, directory.ino, entries[0].name)
            await client.do(fs.make, directory.ino, b"new %d" % come, 0o100644, 0, 0)
            come += 1
        if come == 20:
            await client.publish()
    assert seen == sorted(seen) and len(set(names)) == len(names)
    assert {name for name in names if not name.startswith(b"new")} == {
        b"%d" % number for number in range(ENTRIES)
    }
    assert (await client.do(fs.lookup, directory.ino, b"77777")).is_file
    assert (await client.check()).problems == []
    client.close()


def fill(client: Client, directory: int) -> None:
    """Put so many names of one file into a directory, without a record of the log for each."""
    fs = client.fs
    inode: Inode = fs.make(directory, b"0", stat.S_IFREG | 0o644, 0, 0)
    effects: list[Effect] = [
        Put(key(inode.ino, ItemKind.INODE), inode._replace(nlink=ENTRIES).encode())
    ]
    for number in range(1, ENTRIES):
        name = b"%d" % number
        place = fs._names.slots(name)[0]
        entry = Dirent(name, inode.ino, stat.S_IFREG >> 12)
        effects.append(Put(key(directory, ItemKind.DIRENT, place), entry.encode()))
    fs.mend(effects)


@pytest.mark.parametrize("files", [10, 1_000])
async def test_a_snapshot_costs_two_blobs_whatever_it_keeps(tmp_path: Path, files: int) -> None:
    """Its table and an anchor; then what changes costs what it does without one."""
    machine = Machine(tmp_path)
    client = machine.boot()
    for number in range(files):
        client.fs.make(1, b"%d" % number, stat.S_IFREG | 0o644, 0, 0)
    await client.publish()

    async def cost() -> int:
        before = machine.store.performed["insert"]
        await client.publish()
        return machine.store.performed["insert"] - before

    client.fs.make(1, b"one more", stat.S_IFREG | 0o644, 0, 0)
    without = await cost()
    for name in ("first", "second", "third"):
        client.publisher.create.append(name)
        assert await cost() == 2
    client.fs.make(1, b"and one more", stat.S_IFREG | 0o644, 0, 0)
    assert await cost() <= without + 1
    client.close()


async def test_sizes_that_no_generation_could_tell_are_refused_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All holes, so the tokens would not mind."""
    monkeypatch.setattr(inodes, "MAX_SUM", 3 * inodes.MAX_SIZE)
    client = Machine(tmp_path).boot()
    fs = client.fs
    inos = [fs.make(1, b"%d" % n, stat.S_IFREG | 0o644, 0, 0).ino for n in range(4)]
    for ino in inos[:3]:
        fs.setattr(ino, Changes(size=inodes.MAX_SIZE))
    for refused, code in (
        (lambda: fs.setattr(inos[0], Changes(size=inodes.MAX_SIZE + 1)), errno.EFBIG),
        (lambda: fs.write(inos[0], inodes.MAX_SIZE, b"x"), errno.EFBIG),
        (lambda: fs.setattr(inos[3], Changes(size=1)), errno.ENOSPC),
        (lambda: fs.write(inos[3], 0, b"x"), errno.ENOSPC),
    ):
        with pytest.raises(OSError) as caught:
            refused()
        assert caught.value.errno == code
    await client.publish()
    fs.setattr(inos[0], Changes(size=0))
    assert fs.write(inos[3], 0, b"x") == 1
    await client.publish()
    assert (await client.check()).problems == []
    client.close()
