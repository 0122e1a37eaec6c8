"""A filesystem over a MemoryStore, with crashes: what the tests of fs/ and volume/ drive."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import trio

from hpkvfs.fs.backend import run
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.publisher import Publisher
from hpkvfs.fs.redolog import RedoLog
from hpkvfs.fs.shelf import Shelf
from hpkvfs.types import ANCHOR_BIT, BlobId, BlobRef, Missing
from hpkvfs.volume import fsck, gc
from hpkvfs.volume.blob import Sealer
from hpkvfs.volume.items import BLOCK, NameHash
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.volume import Cache, Known, Volume
from tests.doubles import MemoryStore

T = TypeVar("T")


class NoCache:
    """A cache that forgets at once, so that every read reaches the store."""

    def payloads(self, refs: Iterable[BlobRef], kind: bytes) -> list[bytes | None]:
        return [None for _ in refs]

    def __contains__(self, ref: BlobRef) -> bool:
        return False

    def get(self, ref: BlobRef) -> bytes | None:
        return None

    def put(self, ref: BlobRef, blob: bytes) -> None:
        pass

    def drop(self, ref: BlobRef) -> None:
        pass


class Machine:
    """What survives a crash of one client: its store, its redo log, what it noted."""

    def __init__(self, directory: Path, store: MemoryStore | None = None, seed: int = 0) -> None:
        self.directory = directory
        self.store = store or MemoryStore()
        self.keys = VaultKeys(hashlib.sha256(b"a vault").digest())
        self.cache: Cache = NoCache()
        self.known: Known | None = None
        self._random = random.Random(seed)
        self.time = 10**18

    def rng(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def clock(self) -> int:
        self.time += 1_000
        return self.time

    def boot(self) -> Client:
        return Client(self)


class Client:
    """One run of a client. Implements fs.backend.Backend and fs.publisher.Records."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.log = RedoLog(machine.directory, machine.keys.secret("redo"), machine.rng)
        sealer = Sealer(machine.keys, machine.rng)
        self.volume = Volume(machine.keys, sealer, machine.store, machine.cache, machine.known)
        names = NameHash(machine.keys.secret("names"))
        self.shelf = Shelf(self.volume, names)
        # memory for three blocks only, so that those of most files are left to the log
        self.fs = Filesystem(self.shelf, self.log, names, machine.clock, held=3 * BLOCK)
        anchor = machine.known.anchor if machine.known else None
        next_id = anchor.next_id if anchor else BlobId(0)
        self.publisher = Publisher(self.volume, self.fs, self, b"writer00", next_id, machine.clock)
        if anchor:
            self.fs.start(anchor.next_ino, anchor.size, anchor.files, anchor.redo)
        elif not self.fs.start(0, 0, 0, 0):
            self.fs.make_root(0, 0)
        self._absorb(next_id)

    def _absorb(self, first: BlobId) -> None:
        for call, memo in self.machine.store.outcomes:
            ref = BlobRef.decode(memo)
            if call == "delete":
                self.publisher.removed.add(ref)
            elif not ref.id & ANCHOR_BIT and ref.id >= first:
                self.publisher.orphans.add(ref)
                self.publisher.next_id = max(self.publisher.next_id, BlobId(ref.id + 1))

    async def do(self, operation: Callable[..., T], *args: object) -> T:
        return await run(self, lambda: operation(*args))

    async def load(self, missing: Missing) -> None:
        await self.volume.load(missing)

    def is_crowded(self, size: int) -> bool:
        return False

    async def admit(self, size: int) -> None:
        pass

    async def sync(self) -> None:
        self.fs.syncer()()

    def prefetch(self, refs: list[BlobRef]) -> None:
        pass

    def space(self) -> tuple[int, int]:
        return 0, 0

    async def sync_log(self) -> None:
        self.fs.syncer()()

    async def save_known(self, known: Known) -> None:
        await trio.lowlevel.checkpoint()
        self.machine.known = known

    def mark(self) -> int:
        return len(self.machine.store.outcomes)

    def settle(self, mark: int) -> None:
        del self.machine.store.outcomes[:mark]

    async def publish(self) -> None:
        await self.publisher.publish()

    async def collect(self) -> gc.Collected:
        result = gc.Collected()
        try:
            entries, _ = await gc.read_list(self.volume, self.volume.dead)
            timed = [(entry, 0.0) for entry in entries]
            start = trio.current_time()
            await gc.collect(self.volume, timed, start, result, lambda done, total: None, 0)
        finally:
            self.publisher.removed |= result.gone
        return result

    async def check(self) -> fsck.Report:
        return await fsck.fsck(self.volume, extents=True, progress=lambda done, total: None)

    def close(self) -> None:
        self.log.close()
