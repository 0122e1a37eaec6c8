"""What reading and writing cost: calls of the store, rounds of them. Counted, not timed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import trio

from hpkvfs.fs.backend import Backend
from hpkvfs.types import Missing
from tests.fs.harness import Client, Machine

FILES, DIRECTORIES = 10_000, 100


async def furnish(machine: Machine, files: int) -> Client:
    """Published: so many small inodes in directories, with nothing inside."""
    client = machine.boot()
    fs = client.fs
    for number in range(DIRECTORIES):
        directory = fs.make(1, b"d%d" % number, stat.S_IFDIR | 0o755, 0, 0).ino
        for file in range(files // DIRECTORIES):
            fs.make(directory, b"file %d" % file, stat.S_IFREG | 0o644, 0, 0)
    await client.publish()
    return client


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine whose vault has FILES files; nobody changes it."""
    machine = Machine(tmp_path_factory.mktemp("furnished"))
    trio.run(furnish, machine, FILES).close()
    return machine


class Counting(Client):
    """Counts how often somebody has to wait for the store."""

    rounds = 0

    async def load(self, missing: Missing) -> None:
        self.rounds += 1
        await super().load(missing)


async def list_all(client: Backend, walk: Counting) -> int:
    """As ls -lR does: every directory, in the order of its names, with every inode."""
    seen, todo = 0, [1]
    while todo:
        directory, after = todo.pop(), -1
        while entries := await walk.do(walk.fs.listing, directory, after, 200):
            seen += len(entries)
            after = entries[-1][0].cookie
            todo += [inode.ino for _, inode in entries if inode.is_dir]
    return seen


async def test_the_first_listing_of_10000_files(furnished: Machine) -> None:
    """At most 1.3 times the tree's blobs, in few rounds, from a client that has nothing."""
    machine = furnished
    assert machine.known is not None
    live = machine.known.anchor.live
    machine.store.calls.clear()
    cold = Counting(machine)
    assert await list_all(cold, cold) == FILES + DIRECTORIES
    assert machine.store.calls["look_up"] <= 1.3 * live
    assert cold.rounds <= 20
    cold.close()


async def test_reading_here_and_there_pays_for_twice_what_it_uses(furnished: Machine) -> None:
    machine = furnished
    machine.store.calls.clear()
    cold = Counting(machine)
    used = 12
    for number in range(used):
        await cold.do(cold.fs.getattr, 2 + number * FILES // used)
    assert machine.store.calls["look_up"] <= 2 * used + 2
    cold.close()


async def test_appending_and_syncing_costs_few_blobs_an_interval(tmp_path: Path) -> None:
    """200 bytes each second, published every ten: five minutes of it, on a clock of our own."""
    machine = Machine(tmp_path)
    client = await furnish(machine, 1_000)
    ino = client.fs.make(1, b"log", stat.S_IFREG | 0o644, 0, 0).ino
    await client.publish()
    most = size = 0
    for _ in range(30):
        before = machine.store.calls["insert"]
        for _ in range(10):
            size += client.fs.write(ino, size, b"x" * 200)
            await client.sync()
        await client.publish()
        most = max(most, machine.store.calls["insert"] - before)
    assert most <= 5
    assert (await client.check()).problems == []
    client.close()
