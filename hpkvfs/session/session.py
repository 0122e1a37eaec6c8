"""Starting a vault, keeping it going, and answering for it.

Starting has two halves. `load_local` needs the local state alone: the newest generation this client
knows, and the redo log over it. `connect` needs the server: it settles what a crash left open,
looks for newer generations, and learns which blob ids are taken. Until it has succeeded nothing
is published; reading and writing go on with what is here. So a vault can be used while its
server is down, and what was written then is published later.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio

from hpkvfs import kept
from hpkvfs.breakglass import Breakglass
from hpkvfs.errors import CorruptBlob, DiskFull, HpkvError, VaultError
from hpkvfs.fs.backend import run
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.flush import GroupFlush
from hpkvfs.fs.publisher import Publisher
from hpkvfs.fs.redolog import RedoLog
from hpkvfs.fs.shelf import Shelf
from hpkvfs.net.store import RemoteStore
from hpkvfs.parallel import Scatter
from hpkvfs.protocol.voucher import Voucher
from hpkvfs.session.admission import Admission
from hpkvfs.session.footing import Footing, TakeOver
from hpkvfs.session.housekeeping import Housekeeping
from hpkvfs.session.options import Options
from hpkvfs.session.records import LocalRecords
from hpkvfs.state import StateDirectory, disk_failure
from hpkvfs.types import BLOB_SIZE, BlobId, BlobRef, Generation, Missing
from hpkvfs.volume import fsck
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.gc import Collected
from hpkvfs.volume.items import Clock, NameHash
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.volume import Volume
from hpkvfs.wallet.journal import Journal

log = logging.getLogger(__name__)

POLLS: Final = 8
RETRY_SECONDS: Final = 5.0

Progress = Callable[[int, int], None]
Rng = Callable[[int], bytes]


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
        self.breakglass = breakglass
        self.store = store
        self.volume = volume
        self.options = options
        self.shelf = shelf
        self.names = names
        self.clock = clock
        self.writer = writer
        self.changed_behind: Callable[[int, bytes], None] = lambda parent, name: None
        self.followed: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.pull: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.offline_because: HpkvError | None = None
        self.broken: VaultError | None = None
        self._state = state
        self._redo = redo
        self._journal = journal
        self._fs = fs
        self._flush = GroupFlush(fs)
        self._connected = False
        self._connecting = trio.Lock()
        self._stir = trio.Event()
        self._hurried = False
        fs.begun = lambda: self._stir.set()
        self._prefetches: trio.Nursery | None = None
        next_id = volume.known.anchor.next_id if volume.known else BlobId(0)
        scatter = _scatter(rng, options.spread)
        self.records = LocalRecords(fs, journal, store)
        self.publisher = Publisher(volume, fs, self.records, writer, next_id, clock, scatter)
        self._footing = Footing(
            volume,
            fs,
            self.publisher,
            self.records,
            journal,
            state,
            writer=writer,
            takeover=options.takeover,
        )
        self.admission = Admission(fs, store, self.publisher, options, self._hurry, self._why_stuck)
        self._housekeeping = Housekeeping(volume, store, self.publisher, self.publish, rng)

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
            if not (self.options.follows and await self.follow(thorough=True)):
                raise

    def is_crowded(self, size: int) -> bool:
        """Whether `admit` has anything to do."""
        return self.admission.is_crowded(size)

    async def admit(self, size: int) -> None:
        """Wait while too much is not published; ENOSPC when it can't be."""
        await self.admission.admit(size)

    async def sync(self) -> None:
        """Return when all changes so far are durable, here or (by option) at the server."""
        await self._flush.sync()
        if self.options.remote_durability:
            await self.publish()

    def prefetch(self, refs: list[BlobRef]) -> None:
        """Fetch extents in the background; failures show when they are really read."""
        if self._prefetches is not None:
            self.volume.prefetch(refs, self._prefetches)

    def space(self) -> tuple[int, int]:
        """(blocks in use, blocks that the tokens can still store)."""
        return self.admission.space()

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
        """Take over the newest known generation and the redo log; operations replayed.

        `uid`, `gid`: whose a new vault's root directory is.
        """
        return self._footing.start(uid, gid)

    async def connect(self) -> None:
        """Settle the past with the server; StoreError or SecondWriter when it can't be."""
        async with self._connecting:
            if self._connected:
                return
            try:
                await self.store.parameters()
                receipts = await self.store.recover()
                await self.store.prime()
                if self.options.kept is None:  # else it lies upon a generation that is past
                    await self._footing.compare(receipts)
                self._footing.absorb(receipts)
            except HpkvError as error:
                self.offline_because = error
                raise
            self._connected, self.offline_because = True, None

    async def recover(self, floor: Generation | None = None) -> tuple[Generation, int]:
        """Come back from the words alone: (newest generation, orphans found).

        For a state directory that knows no generation. `floor`: see `find`. VaultError when the
        server has none.
        """
        await self.connect()
        generation = await self.find(floor)
        self.load_local(0, 0)
        return generation, await self._footing.find_orphans()

    async def find(self, floor: Generation | None = None) -> Generation:
        """Find the newest generation from the words alone, and take it for what is known.

        `floor`: a generation that existed once; CorruptBlob when the server has none that new.
        NothingThere when there is none at all.
        """
        return await self._footing.find(floor)

    @property
    def took_over(self) -> TakeOver | None:
        """What `connect` took over from another client, in spite of changes here."""
        return self._footing.took_over

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

    async def _follow_regularly(self) -> None:
        polls = 0
        while self.options.follows:
            await trio.sleep(self.options.follow_interval)
            polls += 1
            try:
                await self.connect()
                await self.follow(thorough=polls % POLLS == 0)
            except HpkvError as error:
                log.warning("nothing new was found: %s", error)

    async def follow(self, *, thorough: bool) -> bool:
        """Go on to the newest generation, if there is a newer one; whether there was.

        `thorough`: also if the next one is collected already.
        """
        if not await self._footing.follow(thorough=thorough):
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
            await self._due(pause)
            pause = self.options.publish_interval
            if not self.publisher.pending and self._connected:
                continue
            try:
                await self.publish()
            except HpkvError as error:
                log.warning("nothing was published: %s", error)
                pause = max(5.0, pause)
                await trio.sleep(min(1.0, pause))

    async def _due(self, interval: float) -> None:
        """Return when what was changed first has waited for so long, or somebody is in a hurry.

        Counted from the first change: what is written in one go is one generation, as a rule.
        """
        while not self._hurried:
            self._stir = trio.Event()
            waits = self.publisher.pending or not self._connected
            with trio.move_on_after(interval) as timer:
                await self._stir.wait()
            if timer.cancelled_caught and waits:
                break
        self._hurried = False

    def _hurry(self) -> None:
        self._hurried = True
        self._stir.set()

    async def publish(self, progress: Progress = lambda done, total: None) -> None:
        """Publish all changes so far; StoreError, SecondWriter."""
        if self.options.read_only:
            await self.connect()
            return
        try:
            await self.connect()
            await self.publisher.publish(progress)
            self._flush.published()
            self.admission.published()
        finally:
            self.admission.tried()

    async def finish(self, progress: Progress = lambda done, total: None) -> None:
        """Before closing: drop orphans, publish what is left. StoreError leaves it in the log."""
        if self.options.read_only:
            return
        for ino in await run(self, self._fs.orphans):
            await run(self, partial(self._fs.reclaim, ino))
        if self.publisher.pending:
            await self.publish(progress)
        await self.store.move_late()

    # -- commands ------------------------------------------------------------------------

    async def gc(
        self, progress: Progress = lambda done, total: None, spread: float = 0.0
    ) -> Collected:
        """Publish, delete every dead blob for its refund, publish that; see Housekeeping.gc."""
        return await self._housekeeping.gc(progress, spread)

    def collectable(self) -> tuple[int, int]:
        """(blobs that a collection would delete, tokens it would regain), as far as published."""
        count = self._housekeeping.collectable()
        return count, self.refund(count)

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
        """Publish, then check the published generation and the books."""
        return await self._housekeeping.fsck(
            extents=extents, progress=progress, max_tokens=max_tokens
        )

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
        self._hurry()
        return amount

    async def take(self, voucher: Voucher) -> int:
        """Turn a voucher that was paid for into tokens; their number."""
        amount = await self.store.take(voucher)
        self._hurry()
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

    def _why_stuck(self) -> str | None:
        """Why it is in vain to wait for a publication; None if it is not."""
        return self.trouble or (None if self._connected else "not connected yet")

    @property
    def _log_trouble(self) -> str | None:
        """Why programs cannot write, as far as this machine's disk is to blame."""
        failure = self._redo.failure
        if failure is None:
            return None
        error = disk_failure(failure)
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


def _told(error: HpkvError) -> str:
    """An error as a line of `hpkvfs status`; what to do about this machine is said, too."""
    return f"{error.message}; {error.hint}" if isinstance(error, VaultError) else error.message


def _first(group: BaseExceptionGroup[VaultError]) -> VaultError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, VaultError)
    return error
