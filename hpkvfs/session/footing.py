"""The generation that what is changed here lies upon: read from the journal, compared with the
server's, gone on from.

Invariants:
  - which generation is known, and from which file of the redo log on changes lie upon it, changes
    in one commit of the journal: before it the old state is there, with the whole log, after it the
    new one;
  - changes that are not published are never given up: another client's generation takes the place
    of the known one only when there are none, when they fit on top, or when they are put aside;
  - an id under which we stored something is used for nothing else: until a generation accounts for
    it, what is there is an orphan, to be collected.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hpkvfs import kept
from hpkvfs.errors import CorruptBlob, SecondWriter
from hpkvfs.fs import overlap
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.publisher import Publisher
from hpkvfs.protocol.tariff import Operation
from hpkvfs.session.records import LocalRecords
from hpkvfs.state import StateDirectory, disk_trouble
from hpkvfs.types import ANCHOR_BIT, BlobId, BlobRef, Generation, anchor_id
from hpkvfs.volume.anchor import heralds
from hpkvfs.volume.gc import loading
from hpkvfs.volume.search import find_anchors, probe, search
from hpkvfs.volume.volume import Known, Volume
from hpkvfs.wallet.journal import Journal, Receipt


@dataclass(frozen=True, slots=True)
class TakeOver:
    """What became of changes not published when another client's generation was taken over.

    `dirty`: their bytes; `kept`: the number of their copy, None if they were put on top.
    """

    generation: Generation
    dirty: int
    kept: int | None


class Footing:
    """Where one client stands among a vault's generations."""

    def __init__(
        self,
        volume: Volume,
        fs: Filesystem,
        publisher: Publisher,
        records: LocalRecords,
        journal: Journal,
        state: StateDirectory,
        *,
        writer: bytes,
        takeover: bool,
    ) -> None:
        """`writer`: who we are, in anchors; `takeover`: go on from another client's generation
        even if there are changes here."""
        self._volume = volume
        self._fs = fs
        self._publisher = publisher
        self._records = records
        self._journal = journal
        self._state = state
        self._writer = writer
        self._takeover = takeover
        self._covered = 0
        self.took_over: TakeOver | None = None

    def start(self, uid: int, gid: int) -> int:
        """Take the known generation and the redo log over it; operations replayed."""
        known = self._volume.known
        if known is None:
            replayed = self._fs.start(0, 0, 0, 0)
            if not replayed:
                self._fs.make_root(uid, gid)
            return replayed
        anchor, self._covered = known.anchor, kept.covered(self._journal, known)
        return self._fs.start(anchor.next_ino, anchor.size, anchor.files, self._covered)

    # From the words alone.

    async def find(self, floor: Generation | None) -> Generation:
        """Find the newest generation, and take it for what is known; see volume.search."""
        newest = await search(self._volume, floor)
        self._volume.known = newest
        await self._records.save_known(newest)
        return newest.anchor.generation

    async def find_orphans(self) -> int:
        """Find blobs that no generation names, left by a client that was lost; how many."""
        assert self._volume.known is not None
        found, beyond = await probe(self._volume, self._volume.known.anchor.next_id)
        self._publisher.orphans |= found
        self._publisher.next_id = max(self._publisher.next_id, beyond)
        return len(found)

    # Compared with the server.

    async def compare(self, receipts: list[Receipt]) -> None:
        """See that the known generation is still there, and take over newer ones.

        CorruptBlob when the server has something else; SecondWriter when another client's is
        newer and changes here are in the way.
        """
        if self._volume.known is not None:
            await self._look_for_newer(self._volume.known)
        else:
            await self._look_for_first(receipts)

    async def follow(self, *, thorough: bool) -> bool:
        """Go on to the newest generation, if there is a newer one; whether there was.

        The next one tells, for one token, unless another client went so far meanwhile that it is
        collected: only a `thorough` look finds that out. What was changed here and not published
        is in the way.
        """
        known = self._volume.known
        if known is None or self._fs.active:
            return False
        following = Generation(known.anchor.generation + 1)
        if not thorough and await self._volume.find_anchor(following) is None:
            return False
        return await self._go_on_from_newest(known)

    async def _look_for_first(self, receipts: list[Receipt]) -> None:
        """Take over generation 0 if a crash kept us from noting that it was published."""
        refs = [BlobRef.decode(receipt.memo) for receipt in receipts]
        if any(ref.id == anchor_id(Generation(0)) for ref in refs):
            first = await self._volume.find_anchor(Generation(0))
            if first is None:
                raise CorruptBlob("the server lost the vault's first generation")
            await self._adopt(first, 0, 0)

    async def _look_for_newer(self, known: Known) -> None:
        generation = known.anchor.generation
        found = await find_anchors(self._volume, generation, *heralds(generation))
        here, next_one = found.pop(generation, None), found.get(Generation(generation + 1))
        if not found and here is not None and here.ref != known.ref:
            raise CorruptBlob(
                f"the server has another generation {generation} than the one it confirmed before",
                "it was rolled back, or it lies; what is cached here can still be read",
            )
        if next_one is not None and next_one.anchor.writer == self._writer:
            await self._adopt(next_one, known.anchor.size, known.anchor.files)
            if len(found) > 1:  # and another client went on from it
                await self._look_for_newer(next_one)
        elif found or here is None:  # here is None: collected, or the server was rolled back
            await self._go_on_from_other(known)

    async def _adopt(self, newer: Known, size: int, files: int) -> None:
        """Note a generation of ours, which a crash kept us from.

        What it holds is no longer only in the layers.
        """
        self._fs.rebase(newer.anchor.size - size, newer.anchor.files - files)
        self._volume.known = newer
        await self._records.save_known(newer)

    # Another client's.

    async def _go_on_from_other(self, known: Known) -> None:
        """Take over the newest generation of another client; SecondWriter if that loses changes."""
        if self._fs.active and self._takeover:
            await self._take_over(known)
            return
        if self._fs.active:
            raise SecondWriter(
                "another client has written to this vault since it was used here",
                "what was written here and not published is kept;"
                " to go on from the other's state: hpkvfs mount --takeover DIR",
            )
        await self._go_on_from_newest(known)

    async def _go_on_from_newest(self, known: Known) -> bool:
        """Take over the newest generation, nothing being changed here; whether it is another."""
        newest = await search(self._volume, known.anchor.generation)
        if newest.ref == known.ref:
            return False
        kept.leave(self._journal, known)
        self._start_from(newest)
        await self._records.save_known(newest)
        return True

    async def _take_over(self, known: Known) -> None:
        """Put our changes on top of another client's generation, or aside if they do not fit.

        Programs go on writing meanwhile: from the decision on whether they fit to what it is
        about nothing is waited for.
        """
        newest = await search(self._volume, known.anchor.generation)
        await self._records.sync_log()
        await self._journal.flush()
        fits = await self._fits(known, newest)
        number, dirty, before = None, self._fs.totals().dirty, self._covered
        if not fits:
            with disk_trouble():
                number = kept.put_aside(self._state, self._journal, known, self._covered)
        kept.leave(self._journal, known)
        if fits:
            self._rest_on(newest)
        else:
            self._fs.discard()
            self._start_from(newest)
        anchor = newest.anchor
        self._publisher.next_id = max(self._publisher.next_id, anchor.next_id)
        self.took_over = TakeOver(anchor.generation, dirty, number)
        await self._records.save_known(newest)
        if self._covered > before:
            self._fs.drop_log(self._covered)

    async def _fits(self, known: Known, newest: Known) -> bool:
        """Whether what was changed upon one generation can be put on top of another."""
        applies = partial(
            overlap.applies, self._volume, known.anchor, newest.anchor, self._fs.active
        )
        try:
            return await loading(self._volume, lambda: applies(self._fs.next_ino))
        except CorruptBlob:
            return False  # what it was made upon is collected

    def _rest_on(self, newest: Known) -> None:
        """Have the layers, and the log that they are in, lie upon another generation."""
        anchor = newest.anchor
        self._volume.known = newest
        kept.rest_on(self._journal, newest, self._covered)
        self._fs.rest_on(anchor.next_ino, anchor.size, anchor.files)

    def _start_from(self, newest: Known) -> None:
        """Begin anew upon another generation, with an empty log."""
        anchor = newest.anchor
        self._volume.known = newest
        self._covered = self._fs.end_log()
        kept.rest_on(self._journal, newest, self._covered)
        self._fs.start(anchor.next_ino, anchor.size, anchor.files, self._covered)

    # What was stored and deleted since.

    def absorb(self, receipts: list[Receipt]) -> None:
        """Learn from what was stored and deleted since the known generation was published."""
        first = self._first_unaccounted(receipts)
        used = first
        for receipt in receipts:
            ref = BlobRef.decode(receipt.memo)
            if receipt.operation is Operation.DELETE:
                self._publisher.removed.add(ref)
            elif not ref.id & ANCHOR_BIT and ref.id >= first:
                self._publisher.orphans.add(ref)
                used = max(used, BlobId(ref.id + 1))
        self._publisher.next_id = max(self._publisher.next_id, used)

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
        return self._volume.known.anchor.next_id if self._volume.known else BlobId(0)
