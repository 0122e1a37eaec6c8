"""Repairs what fsck found, as far as there is one right thing to do about it.

In rounds, as e2fsck: repair all, publish, check again, since one repair may bring about or
settle what another is about. All of it goes through the redo log and an ordinary publication,
so a repair that is cut short has happened in whole rounds, and is gone on with by the next.

    a name that leads nowhere            is removed
    an inode without a name              gets one in /lost+found, `#` and its number
    link counts, types, parents, sums    are set right
    data where none can be, or twice     is removed
    a lost blob that the cache has       is stored again
    a lost extent                        becomes a hole, and its file an attribute that says so
    a lost tree node                     the tree is written anew from the others; files that had
                                         their data in it get the attribute, too

A snapshot can't be changed: what is lost of it comes back from the cache, or not at all.
"""

from __future__ import annotations

import stat
from contextlib import suppress

from hpkvfs.control import Progress, no_progress
from hpkvfs.errors import KeyExists, VaultError
from hpkvfs.fs.backend import run
from hpkvfs.fs.layer import Effect, Put, Usage
from hpkvfs.session import Session
from hpkvfs.types import BlobRef
from hpkvfs.volume.commit import Rewrite
from hpkvfs.volume.fsck import Damage, Range, Repairs, Report
from hpkvfs.volume.items import ROOT_INO, Dirent, ItemKind, file_type, key

DAMAGED = b"user.hpkvfs.damaged"
LOST_AND_FOUND = b"lost+found"
ROUNDS = 8


async def mend(
    session: Session, *, extents: bool, max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> tuple[Report, list[str]]:  # fmt: skip
    """Check and repair until there is nothing left to repair: (last report, what was repaired).

    The report's `damaged` has all that was found damaged, repaired or not. `max_tokens` bounds
    each check; after repairs there is one more.

    For a vault that is not mounted: the kernel would not see what changes. VaultError when
    rounds of repair come to no end.
    """
    found: dict[str, None] = {}
    damaged: dict[Damage, None] = {}
    full = extents
    for _ in range(ROUNDS):
        report = await session.fsck(extents=full, progress=progress, max_tokens=max_tokens)
        found |= dict.fromkeys(report.problems)
        damaged |= dict.fromkeys(report.damaged)
        if report.repairs:
            await _Mender(session).repair(report.repairs)
            full = False
        elif full == extents:
            report.damaged = sorted(damaged)
            return report, [text for text in found if text not in report.problems]
        else:
            full = extents
    raise VaultError("the repairs come to no end", "restore what you miss from a snapshot")


class _Mender:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.fs = session.fs

    async def repair(self, repairs: Repairs) -> None:
        """One round."""
        for ref, blob in repairs.again:
            signer = self.session.keys.signer(ref.id)
            try:
                # not the memo that it was first stored with: that is done, and would be skipped
                memo = BlobRef(ref.id, bytes(32)).encode()
                await self.session.store.insert(signer.public, blob, memo)
            except KeyExists:
                continue  # it came back by itself
        if repairs.rewrite is not None:
            items, nodes = repairs.rewrite
            edits = repairs.edits
            left = tuple((raw, value) for raw, value in items if edits.get(raw, b"") is not None)
            self.session.publisher.rewrite = Rewrite(left, tuple(nodes))
            await self.session.publish()
            await self._mark_all(repairs)
            return
        effects: list[Effect] = [Put(raw, value) for raw, value in repairs.edits.items()]
        for ino, offsets in repairs.holes.items():
            effects += [Put(key(ino, ItemKind.EXTENT, offset), None) for offset in offsets]
        if effects:
            self.fs.mend(effects)
        await self._mark_all(repairs)
        for ino in repairs.unnamed:
            await self._reconnect(ino)
        if not repairs.edits and not repairs.unnamed:
            self._sums(repairs)
        await self.session.publish()

    def _sums(self, repairs: Repairs) -> None:
        """Set the sums right; last, as other repairs change what they should be."""
        if repairs.size or repairs.files:
            self.fs.mend([Usage(repairs.size, repairs.files), *self._touch()])

    def _touch(self) -> list[Effect]:
        """Something to publish: sums alone are no change."""
        root = self.fs.getattr(ROOT_INO)
        return [Put(key(ROOT_INO, ItemKind.INODE), root._replace(ctime=root.ctime + 1).encode())]

    async def _mark_all(self, repairs: Repairs) -> None:
        for ino, ranges in repairs.marks.items():
            with suppress(FileNotFoundError):
                await self._mark(ino, ranges)

    async def _mark(self, ino: int, ranges: tuple[Range, ...]) -> None:
        """Name on the file the bytes that are lost."""
        new = {(start, end - 1) for start, end in ranges}
        try:
            old = await run(self.session, lambda: self.fs.getxattr(ino, DAMAGED))
            new |= {(int(a), int(b)) for a, _, b in (r.partition(b"-") for r in old.split(b","))}
        except (OSError, ValueError):
            pass
        text = ",".join(f"{start}-{end}" for start, end in sorted(new)).encode()[:7_000]
        await run(self.session, lambda: self.fs.setxattr(ino, DAMAGED, text))

    async def _reconnect(self, ino: int) -> None:
        """Give an inode a name in /lost+found."""
        inode = await run(self.session, lambda: self.fs.getattr(ino))
        directory = await self._lost_and_found()
        name = b"#%d" % ino
        place = await run(self.session, lambda: self.fs.place_for(directory, name))
        entry = Dirent(name, ino, file_type(inode.mode))
        effects: list[Effect] = [Put(key(directory, ItemKind.DIRENT, place), entry.encode())]
        if inode.is_dir:
            named = inode._replace(parent=directory)
            effects.append(Put(key(ino, ItemKind.INODE), named.encode()))
        self.fs.mend(effects)

    async def _lost_and_found(self) -> int:
        try:
            found = await run(self.session, lambda: self.fs.lookup(ROOT_INO, LOST_AND_FOUND))
        except OSError:
            mode = stat.S_IFDIR | 0o700
            found = await run(
                self.session, lambda: self.fs.make(ROOT_INO, LOST_AND_FOUND, mode, 0, 0)
            )
        if not found.is_dir:
            raise VaultError("/lost+found is no directory", "rename it, then repair again")
        return found.ino
