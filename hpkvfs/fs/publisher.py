"""Carries out publication: takes frozen layers to the server, generation by generation.

An attempt that fails (server down, wallet empty) is kept as it is and resumed with the same
blobs; writing goes on meanwhile in the active layer and the redo log. It is thrown away only
when the server has something else under one of its ids, or when making the next blobs failed,
which cannot be gone on with; what it stored is then dead.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from hpkvfs.errors import KeyExists, SecondWriter, StoreError, VaultError
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.view import View
from hpkvfs.parallel import IN_ORDER, Scatter, each
from hpkvfs.types import ANCHOR_BIT, BlobId, BlobRef, Generation
from hpkvfs.volume import gc
from hpkvfs.volume.anchor import heralds
from hpkvfs.volume.commit import Base, Insert, Load, Rewrite, Sealed, Step, Steps, publish
from hpkvfs.volume.deadlist import DeadList
from hpkvfs.volume.items import Clock
from hpkvfs.volume.snapshots import Plan, plan
from hpkvfs.volume.volume import Known, Volume

log = logging.getLogger(__name__)

INSERTS_AT_ONCE = 16
ID_GAP = 4_096
MAX_COLLISIONS = 3
SURE = 3_600 * 10**9
"""Nanoseconds after a publication of ours in which no more than HANDOVERS others take over."""

Progress = Callable[[int, int], None]


class Records(Protocol):
    """Durable local facts of this client."""

    async def sync_log(self) -> None:
        """Everything that was changed so far is in the local log; durable on return."""
        ...

    async def save_known(self, known: Known) -> None:
        """The newest generation this client has seen; durable on return."""
        ...

    def mark(self) -> int:
        """A place in the record of what was stored and deleted: now."""
        ...

    def settle(self, mark: int) -> None:
        """What was stored or deleted before the mark is in the known generation's books."""
        ...


@dataclass(slots=True)
class _Attempt:
    steps: Steps
    mark: int
    orphans: frozenset[BlobRef]
    removed: frozenset[BlobRef]
    snapshots: Plan | None
    step: Step | None = None
    tried: set[BlobRef] = field(default_factory=set)
    stored: set[BlobRef] = field(default_factory=set)
    collided: bool = False
    done: Known | None = None

    def advance(self) -> None:
        try:
            self.step = next(self.steps)
        except StopIteration as stop:
            self.step, self.done = None, stop.value


class Publisher:
    """Publishes a filesystem's changes; one attempt at a time."""

    def __init__(
        self,
        volume: Volume,
        fs: Filesystem,
        records: Records,
        writer: bytes,
        next_id: BlobId,
        clock: Clock,
        scatter: Scatter = IN_ORDER,
    ) -> None:
        """`scatter` decides when and in which order the blobs of each step are stored."""
        self._volume = volume
        self._fs = fs
        self._records = records
        self._writer = writer
        self._clock = clock
        self._scatter = scatter
        self._lock = trio.Lock()
        self._attempt: _Attempt | None = None
        self.next_id = next_id
        self._covered = 0
        self._next_ino = 0
        self.orphans: set[BlobRef] = set()
        self.removed: set[BlobRef] = set()
        self.create: list[str] = []
        self.delete: set[str] = set()
        self.rewrite: Rewrite | None = None
        self.last_error: StoreError | VaultError | None = None
        self._sure = -SURE

    @property
    def pending(self) -> bool:
        """Whether there is anything that the newest generation does not hold."""
        unpublished = self._fs.active or self._fs.frozen is not None
        snapshots = self.create or self.delete
        return bool(unpublished or self.orphans or self.removed or snapshots or self.rewrite)

    def withdraw(self, create: Iterable[str], delete: Iterable[str]) -> bool:
        """Forget that these snapshots were to be made or deleted; False if it is too late."""
        under_way = self._attempt.snapshots if self._attempt else None
        if under_way and {*under_way.create, *under_way.delete} & {*create, *delete}:
            return False
        self.create = [name for name in self.create if name not in set(create)]
        self.delete -= set(delete)
        return True

    @property
    def stored_now(self) -> int:
        """Blobs of the attempt under way that are stored already."""
        return len(self._attempt.stored) if self._attempt else 0

    async def publish(self, progress: Progress = lambda done, total: None) -> None:
        """Publish all that changed before the call; returns when its anchor is stored.

        Raises StoreError and DiskFull (call again later), SecondWriter, VaultError.
        """
        async with self._lock:
            try:
                if self._fs.frozen is not None or self._attempt is not None:
                    await self._finish(progress)
                if self.pending:
                    await self._finish(progress)
                self.last_error = None
            except (StoreError, VaultError) as error:
                self.last_error = error
                raise

    async def _finish(self, progress: Progress) -> None:
        for _ in range(MAX_COLLISIONS):
            attempt = self._attempt or await self._begin()
            try:
                await self._run(attempt, progress)
            except KeyExists:
                self._abandon(attempt, ID_GAP)
                continue
            if attempt.done is None:
                raise _unfinished()
            await self._complete(attempt, attempt.done)
            return
        raise SecondWriter(
            "the server has other blobs under this vault's keys",
            "what was written here is kept; is the vault mounted elsewhere? Unmount it there, then"
            " here, and mount again with --takeover",
        )

    async def _begin(self) -> _Attempt:
        removed = frozenset(self.removed)
        remaining = await gc.remaining(self._volume, removed) if removed else None
        snapshots = await self._plan_snapshots()
        mark = self._records.mark()
        if self._fs.frozen is None:
            self._covered = self._fs.freeze()
            self._next_ino = self._fs.next_ino
        frozen = self._fs.frozen
        assert frozen is not None
        base = Base(
            known=self._volume.known,
            writer=self._writer,
            redo=self._covered,
            next_id=self.next_id,
            next_ino=self._next_ino,
            now=self._clock(),
            orphans=sorted(self.orphans),
            remaining=remaining,
            snapshots=snapshots,
            rewrite=self.rewrite,
        )
        view = View([frozen], self._volume)
        steps = publish(base, frozen, view.blocks, self._volume, self._volume.sealer)
        attempt = _Attempt(steps, mark, frozenset(base.orphans), removed, snapshots)
        self._attempt = attempt
        self._advance(attempt)
        return attempt

    async def _plan_snapshots(self) -> Plan | None:
        volume, known = self._volume, self._volume.known
        if not (self.create or self.delete):
            return None
        tables, held = (known.anchor.tables, known.anchor.held) if known else ((), DeadList())
        create, delete = tuple(self.create), frozenset(self.delete)

        def attempt() -> Plan:
            return plan(volume.snapshots(known), held, tables, volume.entries, create, delete)

        return await gc.loading(volume, attempt)

    def _advance(self, attempt: _Attempt) -> None:
        """Make the next step. Whatever fails in that ends the generator, and so the attempt.

        But not once an anchor is stored: what it names must not be taken for dead.
        """
        try:
            attempt.advance()
        except Exception as error:
            log.error("making a generation failed (%r); the next attempt begins anew", error)
            if not any(ref.id & ANCHOR_BIT for ref in attempt.stored):
                self._abandon(attempt, 0)
            raise

    def _abandon(self, attempt: _Attempt, gap: int) -> None:
        stored = {ref for ref in attempt.stored if not ref.id & ANCHOR_BIT}
        self.orphans |= stored
        self.next_id = BlobId(max([self.next_id, *(ref.id + 1 for ref in stored)]) + gap)
        self._attempt = None

    async def _run(self, attempt: _Attempt, progress: Progress) -> None:
        while attempt.step is not None:
            if isinstance(attempt.step, Load):
                await self._volume.load(attempt.step.missing)
            elif isinstance(attempt.step, Insert):
                await self._store(attempt, attempt.step, progress)
            self._advance(attempt)
            await trio.lowlevel.checkpoint()

    async def _store(self, attempt: _Attempt, step: Insert, progress: Progress) -> None:
        """Store all of a step, in parallel; after a failure nothing more is started.

        KeyExists when another's blob is in the way; of all that was tried it is known by then
        whether it was stored, since nobody asks any more once the attempt is given up.
        """
        todo = [sealed for sealed in step.blobs if sealed.ref not in attempt.stored]
        total, unstored = len(step.blobs), len(attempt.stored) + len(todo)
        if any(sealed.ref.id & ANCHOR_BIT for sealed in todo):
            # Or a power failure could leave a local log that is behind what is published, whose
            # replay would undo some of it.
            await self._records.sync_log()
            await self._refuse_if_behind()

        async def store(sealed: Sealed) -> None:
            if attempt.collided and sealed.ref not in attempt.tried:
                return
            attempt.tried.add(sealed.ref)
            try:
                await self._store_one(sealed)
            except KeyExists:
                attempt.collided = True
                return
            attempt.stored.add(sealed.ref)
            progress(total - unstored + len(attempt.stored), total)

        await self._scatter.each(todo, store, INSERTS_AT_ONCE)
        if attempt.collided:
            raise KeyExists("another client's blob is in the way")

    async def _refuse_if_behind(self) -> None:
        """SecondWriter when another client went on so far that the next anchor's key is free again.

        The server refuses a second anchor only for as long as it has the first one. That of a
        handover is kept (volume/anchor.py), so after a generation of ours there is no need to look.
        Nor is it harmless: the keys are the same each time, and would show which publications are
        one vault's.
        """
        known, now = self._volume.known, self._clock()
        if known and known.anchor.writer == self._writer and 0 <= now - self._sure < SURE:
            return

        async def look(generation: Generation) -> None:
            if await self._volume.find_anchor(generation) is not None:
                raise _overtaken()

        later = heralds(known.anchor.generation if known else None)[1:]
        await each(later, look, len(later))
        self._sure = now

    async def _store_one(self, sealed: Sealed) -> None:
        ref, store = sealed.ref, self._volume.store
        public = self._volume.keys.signer(ref.id).public
        try:
            await store.insert(public, sealed.blob, ref.encode())
        except KeyExists:
            # perhaps ours: an earlier try whose reply was lost. Nobody else can make its digest.
            found = await store.look_up(public)
            if found is None or hashlib.sha256(found).digest() != ref.digest:
                if ref.id & ANCHOR_BIT:
                    raise _overtaken() from None
                raise
        self._volume.remember(ref, sealed.opened, sealed.node)

    async def _complete(self, attempt: _Attempt, known: Known) -> None:
        await self._records.save_known(known)
        other = attempt.snapshots is not None or self.rewrite is not None
        before = None if other else self._fs.state
        self._volume.known = known
        self._sure = self._clock()
        self.next_id = known.anchor.next_id
        self.orphans -= attempt.orphans
        self.removed -= attempt.removed
        self.rewrite = None
        if attempt.snapshots is not None:
            self.create = [name for name in self.create if name not in attempt.snapshots.create]
            self.delete -= attempt.snapshots.delete
        self._fs.published(self._covered, before)
        self._attempt = None
        self._records.settle(attempt.mark)
        log.info("generation %d published", known.anchor.generation)


def _overtaken() -> SecondWriter:
    return SecondWriter(
        "another client has written to this vault",
        "what was written here and not published is kept; to go on from the other's state:"
        " unmount, then hpkvfs mount --takeover DIR",
    )


def _unfinished() -> VaultError:
    return VaultError(
        "publishing failed after its last step, and stops here",
        "what was written is kept; unmount, then mount again",
    )
