"""Generations and snapshots of a vault in use: listing, making, deleting, comparing."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from hpkvfs import keep
from hpkvfs.control import Progress, no_progress
from hpkvfs.errors import HpkvError, UserError, VaultError
from hpkvfs.fs.backend import run
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.shelf import SNAPSHOTS_INO, SNAPSHOTS_NAME, NoLog, Shelf
from hpkvfs.fs.stack import fail
from hpkvfs.parallel import each
from hpkvfs.session import Session
from hpkvfs.tree import diff
from hpkvfs.types import BlobRef, Missing
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.blob import Kind
from hpkvfs.volume.commit import Pinned
from hpkvfs.volume.facts import Facts
from hpkvfs.volume.gc import loading
from hpkvfs.volume.items import (
    ROOT_INO,
    Clock,
    Inode,
    ItemKind,
    NameHash,
    inode_range,
    key,
    kind_range,
    split_key,
)
from hpkvfs.volume.snapshots import MAX_TABLES, Plan, Snapshot, check_name, encode_tables, plan
from hpkvfs.volume.volume import FETCHES_AT_ONCE, Volume

LIVE = "live"


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """How a path differs. kind: `+` new, `-` gone, `M` changed, `R` renamed (from `old`)."""

    path: str
    kind: str
    old: str = ""


class Timeline:
    """The generations of one vault in use."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def volume(self) -> Volume:
        """What the generations are in."""
        return self.session.volume

    async def snapshots(self) -> list[Snapshot]:
        """Those there are, oldest first."""
        return await loading(self.volume, lambda: self.volume.snapshots())

    async def find(self, name: str) -> Snapshot:
        """The snapshot of this name; UserError."""
        found = [snapshot for snapshot in await self.snapshots() if snapshot.name == name]
        if not found:
            raise UserError(f"there is no snapshot {name!r}", "hpkvfs snapshot list names them")
        return found[0]

    # -- making and deleting -------------------------------------------------------------

    async def create(self, name: str | None, progress: Progress = no_progress) -> Snapshot:
        """Keep the vault as it is now, published with all that is not yet.

        UserError for a name that is taken or can't be one; VaultError when there are too many.
        """
        await self.session.connect()
        there = await self.snapshots()
        name = check_name(keep.timestamp(self.session.clock()) if name is None else name)
        if name in (*(snapshot.name for snapshot in there), *self.session.publisher.create):
            raise UserError(f"there is a snapshot {name!r} already", "choose another name")
        if name == LIVE:
            raise UserError(f"{LIVE!r} means the files as they are now", "choose another name")
        if len(encode_tables([*there, *there[-1:]])) > MAX_TABLES - 1:
            raise VaultError("there are too many snapshots", "delete some: hpkvfs snapshot delete")
        await self.session.pull()
        self.session.publisher.create.append(name)
        await self._publish([name], [], progress)
        return await self.find(name)

    async def delete(self, names: Iterable[str], progress: Progress = no_progress) -> int:
        """Let go of some; how many blobs nobody needs any more then. UserError."""
        names = list(dict.fromkeys(names))
        await self.session.connect()
        for name in names:
            await self.find(name)
        freed = len((await self.plan_without(names)).freed)
        self.session.publisher.delete |= set(names)
        await self._publish([], names, progress)
        return freed

    async def _publish(self, create: list[str], delete: list[str], progress: Progress) -> None:
        try:
            await self.session.publish(progress)
        except HpkvError as error:
            if not self.session.publisher.withdraw(create, delete) and not error.hint:
                error.hint = "this is under way, and is done when the server can be reached"
            raise

    async def plan_without(self, names: Iterable[str]) -> Plan:
        """What deleting these would free."""
        anchor = self._anchor()
        return await loading(
            self.volume,
            lambda: plan(
                self.volume.snapshots(), anchor.held, [], self.volume.entries, [], set(names)
            ),
        )

    def _anchor(self) -> Anchor:
        if self.volume.known is None:
            raise VaultError("the vault has no generation yet", "hpkvfs sync publishes one")
        return self.volume.known.anchor

    async def apply(
        self, policy: keep.Policy, progress: Progress = no_progress
    ) -> tuple[str | None, list[str]]:
        """Make an automatic snapshot if one is due, delete what is not to be kept.

        The names of both. None is made when nothing changed since the newest snapshot.
        """
        made: str | None = None
        snapshots = await self.snapshots()
        now = self.session.clock()
        if keep.is_due(policy, snapshots, now) and self._changed_since(snapshots):
            made = (await self.create(keep.name_at(now), progress)).name
        gone = keep.superfluous(policy, await self.snapshots())
        if gone:
            await self.delete(gone, progress)
        return made, gone

    def _changed_since(self, snapshots: list[Snapshot]) -> bool:
        if not snapshots or self.session.publisher.pending:
            return True
        return snapshots[-1].root != self.volume.root

    # -- generations ---------------------------------------------------------------------

    async def log(self) -> list[dict[str, Any]]:
        """The generations whose anchor or snapshot there is, newest first."""
        known = self.volume.known
        if known is None:
            return []
        rows = {known.anchor.generation: _row(known.anchor)}

        async def read(ref: BlobRef) -> None:
            anchor = Anchor.decode(await self.volume.fetch(ref, Kind.ANCHOR))
            rows[anchor.generation] = _row(anchor)

        await each(known.anchor.kept, read, FETCHES_AT_ONCE)
        for snapshot in await self.snapshots():
            row = rows.setdefault(snapshot.generation, _row(snapshot))
            row["snapshots"].append(snapshot.name)
        ours = self.session.writer.hex()
        for row in rows.values():
            row["here"] = row["writer"] == ours
        return [rows[generation] for generation in sorted(rows, reverse=True)]

    # -- comparing -----------------------------------------------------------------------

    async def diff(self, old: str, new: str = LIVE) -> list[Change]:
        """How one snapshot differs from another, or from what is there now; by path."""
        if LIVE in (old, new):
            await self.session.pull()
            await self.session.publish()
        before, after = await self._root(old), await self._root(new)
        pinned = Pinned(self.volume)
        found = await loading(self.volume, lambda: list(diff.diff(pinned, before, after)))
        return await _Comparison(self.volume, before, after, found).changes()

    async def _root(self, name: str) -> BlobRef | None:
        return self.volume.root if name == LIVE else (await self.find(name)).root


def _row(of: Anchor | Snapshot) -> dict[str, Any]:
    return {
        "generation": of.generation,
        "time": of.time,
        "bytes": of.size,
        "files": of.files,
        "blobs": of.live,
        "writer": of.writer.hex(),
        "snapshots": [],
    }


class _Comparison:
    """Items that differ, turned into paths that do."""

    def __init__(
        self, volume: Volume, old: BlobRef | None, new: BlobRef | None,
        items: list[diff.Difference],
    ) -> None:  # fmt: skip
        self._volume = volume
        self._before = _Names(volume, old)
        self._after = _Names(volume, new)
        self._touched: set[int] = set()
        self._gone: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        self._come: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        for raw, was, is_now in items:
            self._take(raw, was, is_now)

    def _take(self, raw: bytes, was: bytes | None, is_now: bytes | None) -> None:
        ino, kind, _ = split_key(raw)
        if kind == ItemKind.DIRENT:
            for value, names in ((was, self._gone), (is_now, self._come)):
                if value is not None:
                    facts = Facts()
                    facts.read([(raw, value)])
                    for parent, entry in facts.entries:
                        names[entry.ino].append((parent, entry.name))
        elif kind == ItemKind.INODE:
            if was and is_now and _matters(ino, was, is_now):
                self._touched.add(ino)
        elif ino:
            self._touched.add(ino)

    async def changes(self) -> list[Change]:
        found: list[Change] = []
        renamed: set[int] = set()
        for ino in self._come.keys() | self._gone.keys():
            gone = [n for n in self._gone[ino] if n not in self._come[ino]]
            come = [n for n in self._come[ino] if n not in self._gone[ino]]
            for old, new in zip(gone, come, strict=False):
                was, path = await self._before.path(*old), await self._after.path(*new)
                found.append(Change(path, "R", was))
            for old in gone[len(come) :]:
                found.append(Change(await self._before.path(*old), "-"))
            for new in come[len(gone) :]:
                found.append(Change(await self._after.path(*new), "+"))
            renamed |= {ino} if (gone or come) else set()
        stayed = self._touched & await self._in_both()
        for ino, path in (await self._after.paths_of(stayed)).items():
            if ino not in renamed or any(c.kind == "R" and c.path == path for c in found):
                found.append(Change(path, "M"))
        return sorted(found)

    async def _in_both(self) -> set[int]:
        there = set()
        for ino in self._touched:
            if await self._before.has(ino) and await self._after.has(ino):
                there.add(ino)
        return there


def _matters(ino: int, was: bytes, is_now: bytes) -> bool:
    """Whether an inode changed in more than its times of access and of change.

    What is in a directory is told by the names that come and go.
    """
    one, two = Inode.decode(ino, was), Inode.decode(ino, is_now)
    common = (one.mode, one.uid, one.gid, one.rdev) == (two.mode, two.uid, two.gid, two.rdev)
    if one.is_dir:
        return not common
    return not common or (one.size, one.mtime) != (two.size, two.mtime)


class _Names:
    """Paths in one tree."""

    def __init__(self, volume: Volume, root: BlobRef | None) -> None:
        self._volume = volume
        self._root = root
        self._known: dict[int, str] = {ROOT_INO: ""}

    async def has(self, ino: int) -> bool:
        return await self._inode(ino) is not None

    async def path(self, parent: int, name: bytes) -> str:
        """The path of a name in a directory."""
        above = await self._directory(parent)
        return above + "/" * bool(above) + name.decode(errors="surrogateescape")

    async def paths_of(self, inos: set[int]) -> dict[int, str]:
        """One path of each; reads all names of the tree, as inodes do not tell where they are."""
        found: dict[int, str] = {}
        if ROOT_INO in inos:
            found[ROOT_INO] = "."
        if not inos - found.keys():
            return found
        async for parent, entry in self._entries():
            if entry.ino in inos and entry.ino not in found:
                found[entry.ino] = await self.path(parent, entry.name)
        return found

    async def _entries(self) -> AsyncIterator[tuple[int, Any]]:
        low, high = inode_range(ROOT_INO)[0], b"\xff" * 17
        while True:
            try:
                for raw, value in self._volume.scan_in(self._root, low, high):
                    low = raw + b"\0"
                    if split_key(raw)[1] == ItemKind.DIRENT:
                        facts = Facts()
                        facts.read([(raw, value)])
                        for parent, entry in facts.entries:
                            yield parent, entry
                return
            except Missing as missing:
                await self._volume.load(missing)

    async def _directory(self, ino: int) -> str:
        """The path of a directory, which knows what it is in."""
        path = self._known.get(ino)
        if path is None:
            inode = await self._inode(ino)
            parent = inode.parent if inode else ROOT_INO
            facts = Facts()
            await loading(
                self._volume,
                lambda: facts.read(
                    list(self._volume.scan_in(self._root, *kind_range(parent, ItemKind.DIRENT)))
                ),
            )
            name = next((e.name for _, e in facts.entries if e.ino == ino), b"#%d" % ino)
            path = self._known[ino] = await self.path(parent, name)
        return path

    async def _inode(self, ino: int) -> Inode | None:
        place = key(ino, ItemKind.INODE)
        raw = await loading(self._volume, lambda: self._volume.get_in(self._root, place))
        return Inode.decode(ino, raw) if raw is not None else None


class Source(Protocol):
    """What a snapshot is read from: a session, or what is borrowed from one (beside.py)."""

    volume: Volume
    names: NameHash
    clock: Clock

    async def load(self, missing: Missing) -> None:
        """Bring blobs into memory; HpkvError."""
        ...

    def prefetch(self, refs: list[BlobRef]) -> None:
        """Fetch extents in the background."""
        ...


class SnapshotBackend:
    """One snapshot to be mounted by itself. Implements fs.backend.Backend."""

    def __init__(self, source: Source, snapshot: Snapshot) -> None:
        self._source = source
        self._snapshot = snapshot
        shelf = Shelf(source.volume, source.names, only=snapshot)
        self._fs = Filesystem(shelf, NoLog(), source.names, source.clock)
        self._fs.start(0, snapshot.size, snapshot.files, 0)

    @property
    def fs(self) -> Filesystem:
        """The filesystem, which refuses every change."""
        return self._fs

    async def load(self, missing: Missing) -> None:
        """Bring blobs into memory."""
        await self._source.load(missing)

    def is_crowded(self, size: int) -> bool:
        """Always: `admit` says why."""
        return True

    async def admit(self, size: int) -> None:
        """EROFS."""
        raise fail(errno.EROFS)

    async def sync(self) -> None:
        """There is nothing to sync."""

    def prefetch(self, refs: list[BlobRef]) -> None:
        """Fetch extents in the background."""
        self._source.prefetch(refs)

    def space(self) -> tuple[int, int]:
        """(blocks in use, none left)."""
        return self._snapshot.live, 0


async def is_name_taken(session: Session) -> bool:
    """Whether the user has something called `.snapshots`, which then hides the snapshots.

    False as well when that can't be known, or the snapshots are not shown anyway.
    """
    shelf, fs = session.shelf, session.fs
    if not shelf.shown:
        return False
    try:
        found = await run(session, lambda: fs.lookup(ROOT_INO, SNAPSHOTS_NAME))
    except (OSError, HpkvError):
        return False
    return found.ino != SNAPSHOTS_INO
