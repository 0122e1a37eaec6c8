"""One vault in use by this process: builds the rooms, starts them, keeps them going.

Starting has two halves. `open` needs the local state alone: the newest generation this client
knows, and the redo log over it. `connect` needs the server: it settles what a crash left open,
looks for newer generations, and learns which blob ids are taken. Until it has succeeded nothing
is published; reading and writing go on with what is here. So a vault can be used while its
server is down, and what was written then is published later.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from hpkvfs import kept
from hpkvfs.breakglass import Breakglass
from hpkvfs.cache import BlobCache
from hpkvfs.errors import (
    CorruptBlob,
    DiskFull,
    HpkvError,
    NothingThere,
    SecondWriter,
    VaultError,
)
from hpkvfs.fs import overlap
from hpkvfs.fs.backend import run
from hpkvfs.fs.filesystem import Filesystem, fail
from hpkvfs.fs.flush import GroupFlush
from hpkvfs.fs.publisher import Publisher
from hpkvfs.fs.redolog import RedoLog
from hpkvfs.fs.shelf import Shelf
from hpkvfs.net.proving import Helpers, Here, Prover
from hpkvfs.net.store import RemoteStore
from hpkvfs.net.transport import PATIENCE_SECONDS, Dialer
from hpkvfs.parallel import Scatter, each
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from hpkvfs.state import StateDirectory
from hpkvfs.types import (
    ANCHOR_BIT,
    BLOB_SIZE,
    PAYLOAD_SIZE,
    BlobId,
    BlobRef,
    Generation,
    Missing,
    anchor_id,
)
from hpkvfs.volume import fsck
from hpkvfs.volume.anchor import Anchor, find_newest, heralds
from hpkvfs.volume.blob import Sealer
from hpkvfs.volume.gc import CHUNKS, LEAST_CHUNK, Collected, collect, read_list
from hpkvfs.volume.items import Clock, NameHash
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.volume import Known, MissingExtent, Volume
from hpkvfs.wallet.journal import Journal, Receipt

log = logging.getLogger(__name__)

MIB = 1 << 20
PROBE_GAP = 32
POLLS = 8
RETRY_SECONDS = 5.0
RESERVED_BLOBS = 16
ROOMY_BLOBS = 1_024
_WRITER = "writer"

Progress = Callable[[int, int], None]
Rng = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Options:
    """How a vault is used.

    memory: bytes that the process is to get by with, what waits to be published apart; the
    caches of nodes and extents take three eighths of it, the interpreter and what is under way
    the rest;
    publish_interval: seconds between generations while something changes; remote_durability:
    fsync waits for the server; dirty_limit: bytes of changes, those of names and attributes too,
    that may wait to be published, in memory or in the log;
    publish_at: so many are published without waiting for the interval; patience:
    seconds to try each request; spread: seconds over which each step of a publication is drawn
    out; snapshots_shown: they are readable under `.snapshots` in the root directory.

    read_only: publish nothing, look every follow_interval seconds for what another client did;
    takeover: go on from what another client wrote; kept: the number of a copy of changes that
    did not fit it, to be read only.

    helpers: processes for proofs; without any they are made on the thread that does all else.
    """

    publish_interval: float = 10.0
    remote_durability: bool = False
    cache_bytes: int = 1024 * MIB
    memory: int = 256 * MIB
    dirty_limit: int = 256 * MIB
    publish_at: int = 128 * MIB
    patience: float | None = None
    spread: float = 0.0
    snapshots_shown: bool = True
    read_only: bool = False
    follow_interval: float = 60.0
    takeover: bool = False
    kept: int | None = None
    helpers: int = 0


@dataclass(frozen=True, slots=True)
class TakeOver:
    """What became of changes not published when another client's generation was taken over.

    `dirty`: their bytes; `kept`: the number of their copy, None if they were put on top.
    """

    generation: Generation
    dirty: int
    kept: int | None


class Session:
    """A vault in use. Implements fs.backend.Backend."""

    def __init__(
        self,
        keys: VaultKeys,
        journal: Journal,
        store: RemoteStore,
        volume: Volume,
        fs: Filesystem,
        shelf: Shelf,
        names: NameHash,
        writer: bytes,
        options: Options,
        clock: Clock,
        breakglass: Breakglass,
        rng: Rng,
        state: StateDirectory,
        redo: RedoLog,
    ) -> None:
        self.keys = keys
        self._state = state
        self._redo = redo
        self.breakglass = breakglass
        self.store = store
        self.volume = volume
        self.options = options
        self.shelf = shelf
        self.names = names
        self.clock = clock
        self.writer = writer
        self.changed_behind: Callable[[int, bytes], None] = lambda parent, name: None
        self._journal = journal
        self._rng = rng
        self._fs = fs
        self._flush = GroupFlush(fs)
        self._roomy_until, self._roomy_since = 0, 0.0
        self._full = False
        self._connected = False
        self._connecting = trio.Lock()
        self._wake = trio.Event()
        self._settled = trio.Event()
        self._prefetches: trio.Nursery | None = None
        self.offline_because: HpkvError | None = None
        self.broken: VaultError | None = None
        self.followed: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.pull: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.took_over: TakeOver | None = None
        self._covered = 0
        next_id = volume.known.anchor.next_id if volume.known else BlobId(0)
        self.publisher = Publisher(
            volume, fs, self, writer, next_id, clock, _scatter(rng, options.spread)
        )
        self._listing = trio.Lock()
        self._collecting: trio.CancelScope | None = None

    # -- fs.backend.Backend ------------------------------------------------------------

    @property
    def fs(self) -> Filesystem:
        """The filesystem."""
        return self._fs

    async def load(self, missing: Missing) -> None:
        """Bring blobs into memory."""
        try:
            await self.volume.load(missing)
        except CorruptBlob:
            # perhaps the other client collected it: what is asked for may be elsewhere by now
            if not (self._follows and await self.follow(thorough=True)):
                raise

    def is_crowded(self, size: int) -> bool:
        """Whether `admit` has anything to do."""
        return self._fs.backlog + size > self.options.publish_at

    async def admit(self, size: int) -> None:
        """Wait while too much is not published; ENOSPC when it can't be."""
        waiting = self._fs.backlog
        if waiting + size > self.options.publish_at:
            self._wake.set()
        while waiting and waiting + size > self.options.dirty_limit:
            if self.trouble is not None or not self._connected:
                self._say_it_is_full()
                raise fail(errno.ENOSPC)
            self._wake.set()
            await self._settled.wait()
            waiting = self._fs.backlog

    def _say_it_is_full(self) -> None:
        """Once, until something is published again."""
        if not self._full:
            log.error("the local log is full and nothing can be published: %s", self.trouble)
        self._full = True

    def room(self, size: int) -> None:
        """ENOSPC when the tokens do not pay for what is dirty and `size` bytes more.

        Adding up the wallet for each operation would cost more than most operations: what was
        free then is taken to be free until a quarter of it may have been used.
        """
        dirty = self._fs.dirty
        if dirty + size <= self._roomy_until and time.monotonic() < self._roomy_since + 1.0:
            return
        free = self._affordable() - self._needed(dirty + size)
        if free < 0:
            self._roomy_until = 0
            raise fail(errno.ENOSPC)
        self._roomy_since = time.monotonic()
        self._roomy_until = dirty + free // 4 * PAYLOAD_SIZE if free > ROOMY_BLOBS else 0

    async def sync(self) -> None:
        """Return when all changes so far are durable, here or (by option) at the server."""
        await self._flush.sync()
        if self.options.remote_durability:
            await self.publish()

    def prefetch(self, refs: list[BlobRef]) -> None:
        """Fetch extents in the background; failures show when they are really read."""
        wanted = [ref for ref in refs if not self.volume.has_extent(ref)]
        if wanted and self._prefetches is not None:
            self._prefetches.start_soon(self._prefetch, MissingExtent(tuple(wanted)))

    async def _prefetch(self, missing: Missing) -> None:
        try:
            await self.volume.load(missing)
        except HpkvError as error:
            log.debug("read-ahead: %s", error)
        except Exception:  # only a hint: the mount outlives it
            log.exception("read-ahead failed")

    def space(self) -> tuple[int, int]:
        """(blocks in use, blocks that the tokens can still store)."""
        totals = self._fs.totals()
        used = -(-totals.bytes // PAYLOAD_SIZE)
        return used, max(0, self._affordable() - self._needed(totals.dirty))

    def _needed(self, dirty: int) -> int:
        """Blobs that publishing so many dirty bytes may still take, from above."""
        return dirty * 17 // 16 // PAYLOAD_SIZE + 4 - self.publisher.stored_now

    def _affordable(self) -> int:
        return self.store.balance.total // self.store.tariff.insert - RESERVED_BLOBS

    # -- fs.publisher.Records ------------------------------------------------------------

    async def sync_log(self) -> None:
        """Return when all changes so far are in the redo log, durably; VaultError."""
        with _disk_trouble():
            await trio.to_thread.run_sync(self._fs.syncer())

    async def save_known(self, known: Known) -> None:
        """Remember the newest generation, durably."""
        kept.save_known(self._journal, known)
        await self._journal.flush()

    def mark(self) -> int:
        """The newest receipt."""
        return max((receipt.seq for receipt in self._journal.receipts), default=0)

    def settle(self, mark: int) -> None:
        """Forget receipts that the known generation accounts for."""
        self.store.forget_receipts(mark)
        kept.come_back(self._journal)

    # -- notes ---------------------------------------------------------------------------

    def note(self, name: str) -> bytes:
        """What `keep_note` kept under this name; empty when it is nothing."""
        return self._journal.meta(f"note/{name}") or b""

    async def keep_note(self, name: str, value: bytes) -> None:
        """Remember something on this machine, durably and sealed; VaultError."""
        self._journal.put_meta(f"note/{name}", value)
        await self._journal.flush()

    # -- starting ------------------------------------------------------------------------

    def load_local(self, uid: int, gid: int) -> int:
        """Take over the newest known generation and the redo log; operations replayed."""
        known = self.volume.known
        if known is None:
            replayed = self._fs.start(0, 0, 0, 0)
            if not replayed:
                self._fs.make_root(uid, gid)
            return replayed
        anchor, self._covered = known.anchor, kept.covered(self._journal, known)
        return self._fs.start(anchor.next_ino, anchor.size, anchor.files, self._covered)

    async def recover(self, floor: Generation | None = None) -> tuple[Generation, int]:
        """Come back from the words alone: (newest generation, orphans found).

        For a state directory that knows no generation. `floor`: see `find`. VaultError when the
        server has none.
        """
        await self.connect()
        generation = await self.find(floor)
        self.load_local(0, 0)
        return generation, await self.probe_orphans()

    async def find(self, floor: Generation | None = None) -> Generation:
        """Find the newest generation from the words alone, and take it for what is known.

        `floor`: a generation that existed once; CorruptBlob when the server has none that new.
        NothingThere when there is none at all.
        """
        newest = await self._search(floor)
        self.volume.known = newest
        await self.save_known(newest)
        return newest.anchor.generation

    async def _go_on_from_newest(self, known: Known) -> bool:
        """Take over the newest generation, nothing being changed here; whether it is another."""
        newest = await self._search(known.anchor.generation)
        if newest.ref == known.ref:
            return False
        kept.leave(self._journal, known)
        self.volume.known = newest
        self._start_from_known()
        await self.save_known(newest)
        return True

    async def _search(self, floor: Generation | None) -> Known:
        search, found = find_newest(floor), dict[Generation, Known]()
        try:
            wanted = next(search)
            while True:
                found |= await self._find_anchors(*wanted)
                wanted = search.send(wanted & found.keys())
        except StopIteration as stop:
            newest: Generation | None = stop.value
        if newest is None:
            raise NothingThere(
                "this server holds nothing for these words",
                "check the server's address, and the passphrase if you used one",
            )
        if newest not in found:
            found |= await self._find_anchors(newest)
        if newest not in found:
            raise CorruptBlob(
                f"the server no longer has generation {newest}, which existed before",
                "it was rolled back, or it lies; what is cached here can still be read",
            )
        return found[newest]

    async def probe_orphans(self) -> int:
        """Find blobs that no generation names, left by a client that was lost; how many."""
        assert self.volume.known is not None
        start, found = self.volume.known.anchor.next_id, list[BlobRef]()

        async def probe(number: int) -> None:
            ref = await self.volume.find_own(BlobId(number))
            if ref is not None:
                found.append(ref)

        before = -1
        while len(found) > before:
            before = len(found)
            await each(range(start, start + PROBE_GAP), probe, PROBE_GAP)
            start = BlobId(start + PROBE_GAP)
        self.publisher.orphans |= set(found)
        self.publisher.next_id = max(self.publisher.next_id, start)
        return len(found)

    async def connect(self) -> None:
        """Settle the past with the server; StoreError or SecondWriter when it can't be."""
        async with self._connecting:
            if self._connected:
                return
            try:
                await self.store.parameters()
                receipts = await self.store.recover()
                await self.store.prime()
                if self.options.kept is not None:
                    pass  # it lies upon a generation that is past
                elif self.volume.known is not None:
                    await self._look_for_newer(self.volume.known)
                else:
                    await self._look_for_first(receipts)
                self._absorb(receipts)
            except HpkvError as error:
                self.offline_because = error
                raise
            self._connected, self.offline_because = True, None

    async def _look_for_first(self, receipts: list[Receipt]) -> None:
        """Take over generation 0 if a crash kept us from noting that it was published."""
        refs = [BlobRef.decode(receipt.memo) for receipt in receipts]
        if any(ref.id == anchor_id(Generation(0)) for ref in refs):
            first = await self.volume.find_anchor(Generation(0))
            if first is None:
                raise CorruptBlob("the server lost the vault's first generation")
            await self._take_over(first, 0, 0)

    async def _look_for_newer(self, known: Known) -> None:
        generation = known.anchor.generation
        found = await self._find_anchors(generation, *heralds(generation))
        here, next_one = found.pop(generation, None), found.get(Generation(generation + 1))
        if not found and here is not None and here.ref != known.ref:
            raise CorruptBlob(
                f"the server has another generation {generation} than the one it confirmed before",
                "it was rolled back, or it lies; what is cached here can still be read",
            )
        if next_one is not None and next_one.anchor.writer == self.writer:
            await self._take_over(next_one, known.anchor.size, known.anchor.files)
            if len(found) > 1:  # and another client went on from it
                await self._look_for_newer(next_one)
        elif found or here is None:  # here is None: collected, or the server was rolled back
            await self._follow(known)

    async def _find_anchors(self, *generations: Generation) -> dict[Generation, Known]:
        """Look up several anchors at a time; the first failure of them, bare."""
        found: dict[Generation, Known] = {}

        async def look(generation: Generation) -> None:
            anchor = await self.volume.find_anchor(generation)
            if anchor is not None:
                found[generation] = anchor

        await each(generations, look, len(generations))
        return found

    async def _follow(self, known: Known) -> None:
        """Take over the newest generation of another client; SecondWriter if that loses changes."""
        if self._fs.active and self.options.takeover:
            await self._take_over_from_other(known)
            return
        if self._fs.active:
            raise SecondWriter(
                "another client has written to this vault since it was used here",
                "what was written here and not published is kept;"
                " to go on from the other's state: hpkvfs mount --takeover DIR",
            )
        await self._go_on_from_newest(known)

    async def _take_over_from_other(self, known: Known) -> None:
        """Put our changes on top of another client's generation, or aside if they do not fit.

        Programs go on writing meanwhile: from the decision on whether they fit to what it is
        about nothing is waited for.
        """
        newest = await self._search(known.anchor.generation)
        await self.sync_log()
        await self._journal.flush()
        layer = self._fs.active
        try:
            fits = await run(
                self,
                lambda: overlap.applies(
                    self.volume, known.anchor, newest.anchor, layer, self._fs.next_ino
                ),
            )
        except CorruptBlob:
            fits = False  # what it was made upon is collected
        anchor, number = newest.anchor, None
        dirty, before = self._fs.totals().dirty, self._covered
        if not fits:
            with _disk_trouble():
                number = kept.put_aside(self._state, self._journal, known, self._covered)
        kept.leave(self._journal, known)
        self.volume.known = newest
        if fits:
            kept.rest_on(self._journal, newest, self._covered)
            self._fs.rest_on(anchor.next_ino, anchor.size, anchor.files)
        else:
            self._fs.discard()
            self._start_from_known()
        self.publisher.next_id = max(self.publisher.next_id, anchor.next_id)
        self.took_over = TakeOver(anchor.generation, dirty, number)
        await self.save_known(newest)
        if self._covered > before:
            self._fs.drop_log(self._covered)

    def _start_from_known(self) -> None:
        assert self.volume.known is not None
        anchor, self._covered = self.volume.known.anchor, self._fs.end_log()
        kept.rest_on(self._journal, self.volume.known, self._covered)
        self._fs.start(anchor.next_ino, anchor.size, anchor.files, self._covered)

    async def _take_over(self, newer: Known, size: int, files: int) -> None:
        """Note a generation of ours, which a crash kept us from.

        What it holds is no longer only in the layers.
        """
        self._fs.rebase(newer.anchor.size - size, newer.anchor.files - files)
        self.volume.known = newer
        await self.save_known(newer)

    def _absorb(self, receipts: list[Receipt]) -> None:
        """Learn from what was stored and deleted since the known generation was published."""
        first = self._first_unaccounted(receipts)
        used = first
        for receipt in receipts:
            ref = BlobRef.decode(receipt.memo)
            if receipt.operation is Operation.DELETE:
                self.publisher.removed.add(ref)
            elif not ref.id & ANCHOR_BIT and ref.id >= first:
                self.publisher.orphans.add(ref)
                used = max(used, BlobId(ref.id + 1))
        self.publisher.next_id = max(self.publisher.next_id, used)

    def _first_unaccounted(self, receipts: list[Receipt]) -> BlobId:
        """Above which ids what we stored is in no generation.

        That is above those of the one that was left for another client's, unless an anchor of ours
        was stored after it: then it may be in what the other client went on from.
        """
        left = kept.left(self._journal)
        if left is not None:
            next_anchor = anchor_id(Generation(left.anchor.generation + 1))
            refs = [BlobRef.decode(receipt.memo) for receipt in receipts]
            if not any(ref.id >= next_anchor for ref in refs):
                return left.anchor.next_id
        return self.volume.known.anchor.next_id if self.volume.known else BlobId(0)

    # -- running -------------------------------------------------------------------------

    async def keep_going(self) -> None:
        """Publish in the background, resolve what is pending; runs until cancelled.

        What this machine's disk does ends nothing: what cannot be done is told in `trouble`, and
        tried again. Whatever is in memory can be read, and be published later.
        """
        async with trio.open_nursery() as nursery:
            self._prefetches = nursery
            nursery.start_soon(self._run_store)
            if self.options.read_only:
                nursery.start_soon(self._follow_regularly)
            else:
                nursery.start_soon(self._publish_regularly)
                nursery.start_soon(self._reclaim)
                nursery.start_soon(self.breakglass.run, lambda: self.generation)

    async def _run_store(self) -> None:
        """`store.run`, begun again when it failed."""
        while True:
            try:
                await self.store.run()
            except* VaultError as failed:
                self.broken = _first(failed)
            await self._wait_for_journal()

    async def _wait_for_journal(self) -> None:
        while self.broken is not None:
            await trio.sleep(RETRY_SECONDS)
            try:
                await self._journal.flush()
                self.broken = None
            except VaultError as error:
                self.broken = error

    def reserve_room(self) -> None:
        """For what lasts: have the room on this disk that reading and publishing need."""
        self._journal.reserve_room()

    @property
    def _follows(self) -> bool:
        return self.options.read_only and self.options.kept is None

    async def _follow_regularly(self) -> None:
        polls = 0
        while self._follows:
            await trio.sleep(self.options.follow_interval)
            polls += 1
            try:
                await self.connect()
                await self.follow(thorough=polls % POLLS == 0)
            except HpkvError as error:
                log.warning("nothing new was found: %s", error)

    async def follow(self, *, thorough: bool) -> bool:
        """Go on to the newest generation, if there is a newer one; whether there was.

        The next one tells, for one token, unless another client went so far meanwhile that it is
        collected: only a `thorough` look finds that out. What was changed here and not published
        is in the way.
        """
        known = self.volume.known
        if known is None or self._fs.active:
            return False
        following = Generation(known.anchor.generation + 1)
        if not thorough and await self.volume.find_anchor(following) is None:
            return False
        if not await self._go_on_from_newest(known):
            return False
        await self.followed()
        return True

    async def _reclaim(self) -> None:
        """Remove what was open and without a name when an earlier process ended."""
        try:
            for ino in await run(self, self._fs.left_behind):
                await run(self, partial(self._fs.reclaim, ino))
        except (HpkvError, OSError) as error:
            log.info("orphans are reclaimed another time: %s", error)

    async def _publish_regularly(self) -> None:
        pause = self.options.publish_interval
        while True:
            with trio.move_on_after(pause):
                await self._wake.wait()
            self._wake = trio.Event()
            pause = self.options.publish_interval
            if not self.publisher.pending and self._connected:
                continue
            try:
                await self.publish()
            except HpkvError as error:
                log.warning("nothing was published: %s", error)
                pause = max(5.0, pause)
                await trio.sleep(min(1.0, pause))

    async def publish(self, progress: Progress = lambda done, total: None) -> None:
        """Publish all changes so far; StoreError, SecondWriter."""
        if self.options.read_only:
            await self.connect()
            return
        try:
            await self.connect()
            await self.publisher.publish(progress)
            self._flush.published()
            self._full = False
        finally:
            self._settled.set()
            self._settled = trio.Event()

    async def finish(self, progress: Progress = lambda done, total: None) -> None:
        """Before closing: drop orphans, publish what is left. StoreError leaves it in the log."""
        if self.options.read_only:
            return
        for ino in await run(self, self._fs.orphans):
            await run(self, lambda ino=ino: self._fs.reclaim(ino))  # type: ignore[misc]
        if self.publisher.pending:
            await self.publish(progress)
        await self.store.move_late()

    # -- commands ------------------------------------------------------------------------

    async def gc(
        self, progress: Progress = lambda done, total: None, spread: float = 0.0
    ) -> Collected:
        """Publish, delete every dead blob for its refund, publish that.

        spread: seconds over which the deletions are strewn at random. Of two collections at a
        time the later takes over what the earlier has left.
        """
        if self._collecting is not None:
            self._collecting.cancel()
        result = Collected()
        with trio.CancelScope() as self._collecting:
            scope = self._collecting
            try:
                await self._collect(result, progress, spread)
            finally:
                self.publisher.removed |= result.gone
                if self._collecting is scope:
                    self._collecting = None
        if scope.cancelled_caught:
            log.info("a later collection took over")
        elif self.publisher.removed:
            await self.publish()
        return result

    async def _collect(self, result: Collected, progress: Progress, spread: float) -> None:
        """Every dead blob of the newest generation, the list written anew now and then."""
        async with self._listing:
            await self.publish()
            entries, _ = await read_list(self.volume, self.volume.dead)
        entries = [entry for entry in entries if entry.ref not in self.publisher.removed]
        self._shuffle(entries)
        times = sorted(int.from_bytes(self._rng(7), "big") / 2**56 * spread for _ in entries)
        size = max(LEAST_CHUNK, -(-len(entries) // CHUNKS)) if spread else len(entries)
        start = trio.current_time()
        for at in range(0, len(entries), size or 1):
            chunk = list(zip(entries, times, strict=True))[at : at + size]
            await collect(self.volume, chunk, start, result, progress, len(entries))
            self.publisher.removed |= result.gone

    def _shuffle(self, entries: list[Any]) -> None:
        entries.sort(key=lambda _: self._rng(16))

    def collectable(self) -> tuple[int, int]:
        """(blobs that a collection would delete, tokens it would regain), as far as published."""
        gone = sum(1 for ref in self.publisher.removed)
        count = max(0, self.volume.dead.count - gone)
        return count, count * self.store.tariff.refund

    def refund(self, count: int) -> int:
        """Tokens for deleting so many blobs."""
        return count * self.store.tariff.refund

    async def fsck(
        self,
        *,
        extents: bool,
        progress: Progress = lambda done, total: None,
        max_tokens: int | None = None,
    ) -> fsck.Report:
        """Publish, then check the published generation and the books.

        Nothing that is dead only in a later generation is collected meanwhile.
        """
        async with self._listing:
            await self.publish()
            price = self.store.tariff.look_up
            limit = None if max_tokens is None or not price else max_tokens // price
            report = await fsck.fsck(
                self.volume, extents=extents, progress=progress, limit=limit, shuffle=self._shuffle
            )
        if not self.store.conservation.holds:
            report.problems.append(f"the tokens do not add up: {self.store.conservation}")
        return report

    async def keepalive(self, *, now: bool) -> dict[str, Any]:
        """Store the breakglass entry if it is due, or now; what `report` says, and "stored"."""
        await self.connect()
        if now:
            stored = await self.breakglass.renew(self.generation)
        else:
            stored = await self.breakglass.renew_if_due(self.generation)
        return {"stored": stored, **self.breakglass.report()}

    @property
    def generation(self) -> Generation | None:
        """The newest generation that this client knows."""
        return self.volume.known.anchor.generation if self.volume.known else None

    async def redeem(self, voucher: str) -> int:
        """Turn a voucher into tokens; their number."""
        amount = await self.store.redeem(voucher)
        self._wake.set()
        return amount

    async def take(self, voucher: Voucher) -> int:
        """Turn a voucher that was paid for into tokens; their number."""
        amount = await self.store.take(voucher)
        self._wake.set()
        return amount

    def status(self) -> dict[str, Any]:
        """Facts for `hpkvfs status`."""
        known, totals, balance = self.volume.known, self._fs.totals(), self.store.balance
        anchor = known.anchor if known else None
        live, is_exact = self._live(anchor)
        stored = live * BLOB_SIZE
        return {
            "generation": self.generation,
            "files": totals.files,
            "bytes": totals.bytes,
            "blobs_live": live,
            "blobs_exact": is_exact,
            "blobs_dead": anchor.dead.count if anchor else 0,
            "blobs_held": anchor.held.count + anchor.held_before if anchor else 0,
            "bytes_stored": stored,
            "amplification": round(stored / anchor.size, 3) if anchor and anchor.size else None,
            "unpublished_bytes": totals.dirty,
            "tokens_held": balance.held,
            "tokens_pending": balance.pending,
            "tokens_expired": self.store.expired,
            "free_blobs": self.space()[1],
            "connected": self._connected,
            "recovery": self.breakglass.report(),
            "kept": kept.numbers(self._state),
            "trouble": self.trouble or self._log_trouble,
        }

    @property
    def trouble(self) -> str | None:
        """Why nothing is published at the moment; None when all is well."""
        local, remote = self._journal.trouble or self.broken, self.publisher.last_error
        error = local or remote or self.offline_because
        return _told(error) if error else None

    @property
    def _log_trouble(self) -> str | None:
        """Why programs cannot write, as far as this machine's disk is to blame."""
        failure = self._redo.failure
        if failure is None:
            return None
        error = _disk_failure(failure)
        return None if isinstance(error, DiskFull) and self._state.has_room else _told(error)

    def _live(self, anchor: Anchor | None) -> tuple[int, bool]:
        """Blobs at the server that are neither dead nor held, and whether these are all.

        What is not on this machine is not fetched for it: the lists of older snapshots, whose
        pages then are not counted.
        """
        if anchor is None:
            return 0, True
        live = anchor.live + len(anchor.kept) + 1 + len(anchor.tables)
        live += anchor.dead.pages + anchor.held.pages
        try:
            older = self.volume.snapshots()[:-1]
        except Missing:
            return live, False
        return live + sum(snapshot.held.pages for snapshot in older), True


def _scatter(rng: Rng, seconds: float) -> Scatter:
    return Scatter(lambda: int.from_bytes(rng(8), "big") / 2**64, seconds)


@asynccontextmanager
async def open_session(
    state: StateDirectory,
    keys: VaultKeys,
    dialer: Dialer,
    options: Options,
    *,
    clock: Clock,
    rng: Rng,
    identity: bytes | None = None,
    uid: int = 0,
    gid: int = 0,
) -> AsyncIterator[Session]:
    """The vault of a state directory, from local state alone; AlreadyInUse, VaultError.

    `identity`: the key (32 bytes) in the server's onion address, if it has one.
    The caller then runs `connect` (before or while using it) and, for anything that lasts,
    `keep_going`.
    """
    log_directory = kept.log_directory(state, options.kept)
    with (
        state.locked(),
        closing(Journal(state.wallet, keys.secret("wallet"), rng)) as journal,
        closing(_cache(state, keys, options, rng)) as cache,
        closing(RedoLog(log_directory, keys.secret("redo"), rng)) as redo,
        closing(Helpers(Here(rng), options.helpers)) as helpers,
    ):
        prover = helpers if options.helpers else None
        session = _build(
            state, keys, dialer, options, journal, cache, redo, clock, rng, identity, prover
        )
        if session.volume.known is not None or state.is_new:
            with _disk_trouble():
                session.load_local(uid, gid)
        yield session


def _cache(state: StateDirectory, keys: VaultKeys, options: Options, rng: Rng) -> BlobCache:
    with _disk_trouble():
        return BlobCache(state.cache, keys.secret("cache"), options.cache_bytes, rng)


@contextmanager
def _disk_trouble() -> Iterator[None]:
    """Say as an error of ours that this machine's disk refused something."""
    try:
        yield
    except OSError as error:
        raise _disk_failure(error) from error


def _disk_failure(error: OSError) -> VaultError:
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else VaultError
    return kind(
        f"the state directory cannot be written: {error.strerror}",
        "nothing is lost: make room on the disk, or see what is wrong with it",
    )


def _told(error: HpkvError) -> str:
    """An error as a line of `hpkvfs status`; what to do about this machine is said, too."""
    return f"{error.message}; {error.hint}" if isinstance(error, VaultError) else error.message


def _first(group: BaseExceptionGroup[VaultError]) -> VaultError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, VaultError)
    return error


def _build(
    state: StateDirectory,
    keys: VaultKeys,
    dialer: Dialer,
    options: Options,
    journal: Journal,
    cache: BlobCache,
    redo: RedoLog,
    clock: Clock,
    rng: Rng,
    identity: bytes | None,
    prover: Prover | None,
) -> Session:
    patience = options.patience or PATIENCE_SECONDS
    store = RemoteStore(journal, dialer, rng, identity=identity, patience=patience, prover=prover)
    sealer, caches = Sealer(keys, rng), options.memory * 3 // 8
    known = kept.known(journal, options.kept)
    volume = Volume(keys, sealer, store, cache, known, memory=caches)
    writer = journal.meta(_WRITER)
    if writer is None:
        writer = rng(8)
        journal.put_meta(_WRITER, writer)
    names = NameHash(keys.secret("names"))
    breakglass = Breakglass(keys, store, journal, clock, rng)
    rooms: list[Session] = []
    shelf = Shelf(volume, names, shown=options.snapshots_shown)
    fs = Filesystem(shelf, redo, names, clock, lambda size: rooms[0].room(size))
    parts = (keys, journal, store, volume, fs, shelf, names, writer)
    rooms.append(Session(*parts, options, clock, breakglass, rng, state, redo))
    return rooms[0]
