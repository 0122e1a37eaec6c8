"""The snapshots as part of the tree, so that every operation that reads works on them as it is.

Below the layers of changes lies the published tree. `Shelf` is that tree with more in it: for
each snapshot a copy of all its items under inode numbers of its own, and a directory that has
the snapshots by name. Nothing is copied: a key is translated on its way down, and the inode
numbers in a value on its way up.

    inode number = slot << 48 | number in the tree         slot 0: the newest generation
                                                           slot 1: the directory `.snapshots`
                                                           from 2 on: snapshots, as they are met

`.snapshots` is in the root directory and not listed there, as `.zfs` is: programs that walk the
whole tree (du, rsync, backups) do not walk it once more for each snapshot. Who asks for the
name gets it, unless the user has something of this name: then the name is the user's.

Invariants: what a number means does not change while the process lives; no layer ever holds an
item of a slot other than 0 (the filesystem refuses such a change with EROFS).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from hpkvfs.fs.layer import Effect, Record
from hpkvfs.types import BlobRef
from hpkvfs.volume.items import (
    ROOT_INO,
    Dirent,
    Inode,
    ItemKind,
    NameHash,
    key,
    split_key,
)
from hpkvfs.volume.snapshots import Snapshot

SNAPSHOTS_NAME = b".snapshots"
SLOT_SHIFT = 48
SNAPSHOTS_INO = 1 << SLOT_SHIFT
_NUMBER = SNAPSHOTS_INO - 1
_LAST_SLOT = (1 << 16) - 1

Pair = tuple[bytes, bytes]


class Tree(Protocol):
    """What the shelf needs of the volume; every method may raise types.Missing."""

    @property
    def state(self) -> object:
        """Another object when it is another generation that is known."""
        ...

    def get(self, key: bytes) -> bytes | None:
        """An item of the newest tree."""
        ...

    def scan(self, low: bytes, high: bytes) -> Iterator[Pair]:
        """Items of the newest tree in [low, high)."""
        ...

    def get_in(self, root: BlobRef | None, key: bytes) -> bytes | None:
        """An item of another tree."""
        ...

    def scan_in(self, root: BlobRef | None, low: bytes, high: bytes) -> Iterator[Pair]:
        """Items of another tree in [low, high)."""
        ...

    def extent(self, ref: BlobRef) -> bytes:
        """An extent's payload."""
        ...

    def extents(self, refs: Sequence[BlobRef]) -> list[bytes]:
        """Several extents' payloads."""
        ...

    def snapshots(self) -> list[Snapshot]:
        """The snapshots there are."""
        ...


class Shelf:
    """The newest tree and, if `shown`, the snapshots; or the tree of one snapshot only."""

    def __init__(
        self, tree: Tree, names: NameHash, *, shown: bool = True, only: Snapshot | None = None
    ) -> None:
        self._tree = tree
        self._names = names
        self._only = only
        self.shown = shown and only is None
        self._slots: dict[int, Snapshot] = {}
        self._slot_of: dict[tuple[str, int], int] = {}

    @property
    def state(self) -> object:
        """Another object when something in the tree is another than before."""
        return self._tree.state

    def get(self, key: bytes) -> bytes | None:
        """An item's value; Missing."""
        if key[0] or key[1]:
            return self._get_shelved(key)
        if self._only is not None:
            return self._tree.get_in(self._only.root, key)
        return self._tree.get(key)

    def scan(self, low: bytes, high: bytes) -> Iterator[Pair]:
        """Items with low <= key < high, of one inode; Missing."""
        if low[0] or low[1]:
            return self._scan_shelved(low, high)
        if self._only is not None:
            return self._tree.scan_in(self._only.root, low, high)
        return self._tree.scan(low, high)

    def extent(self, ref: BlobRef) -> bytes:
        """An extent's payload; Missing."""
        return self._tree.extent(ref)

    def extents(self, refs: Sequence[BlobRef]) -> list[bytes]:
        """Several extents' payloads; Missing, of all."""
        return self._tree.extents(refs)

    def hidden(self, parent: int, name: bytes) -> Dirent | None:
        """The entry of a name that is there and not listed."""
        if self.shown and parent == ROOT_INO and name == SNAPSHOTS_NAME:
            return Dirent(name, SNAPSHOTS_INO, stat.S_IFDIR >> 12)
        return None

    def root_of(self, snapshot: Snapshot) -> int:
        """The inode number of a snapshot's root directory; OSError when there are too many."""
        identity = snapshot.name, snapshot.generation
        slot = self._slot_of.get(identity)
        if slot is None:
            slot = len(self._slots) + 2
            if slot > _LAST_SLOT:
                raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
            self._slots[slot] = snapshot
            self._slot_of[identity] = slot
        return slot << SLOT_SHIFT | ROOT_INO

    def _get_shelved(self, raw: bytes) -> bytes | None:
        ino, kind, offset = split_key(raw)
        if ino >> SLOT_SHIFT == 1:
            return self._directory().encode() if raw == key(SNAPSHOTS_INO, ItemKind.INODE) else None
        root, slot = self._tree_of(ino)
        value = self._tree.get_in(root, key(ino & _NUMBER, ItemKind(kind), offset))
        return None if value is None else _lift(kind, value, slot)

    def _scan_shelved(self, low: bytes, high: bytes) -> Iterator[Pair]:
        ino = split_key(low)[0]
        if ino >> SLOT_SHIFT == 1:
            yield from ((raw, value) for raw, value in self._names_of_all() if low <= raw < high)
            return
        root, slot = self._tree_of(ino)
        for raw, value in self._tree.scan_in(root, _lower(low), _lower(high)):
            number, kind, offset = split_key(raw)
            lifted = key(number | slot << SLOT_SHIFT, ItemKind(kind), offset)
            yield lifted, _lift(kind, value, slot)

    def _tree_of(self, ino: int) -> tuple[BlobRef | None, int]:
        slot = ino >> SLOT_SHIFT
        snapshot = self._slots.get(slot)
        return (snapshot.root if snapshot else None), slot

    def _directory(self) -> Inode:
        snapshots = self._tree.snapshots()
        newest = max((snapshot.time for snapshot in snapshots), default=0)
        mode = stat.S_IFDIR | 0o555
        raw = self._tree.get(key(ROOT_INO, ItemKind.INODE))
        root = Inode.decode(ROOT_INO, raw) if raw else None
        uid, gid = (root.uid, root.gid) if root else (0, 0)
        return Inode(
            SNAPSHOTS_INO,
            mode,
            2 + len(snapshots),
            uid,
            gid,
            0,
            newest,
            newest,
            newest,
            0,
            ROOT_INO,
        )

    def _names_of_all(self) -> list[Pair]:
        """The directory's entries: each in a place that its name can have."""
        taken: dict[int, Pair] = {}
        for snapshot in self._tree.snapshots():
            name = snapshot.name.encode()
            place = next(at for at in range(*self._names.slots(name)) if at not in taken)
            entry = Dirent(name, self.root_of(snapshot), stat.S_IFDIR >> 12)
            taken[place] = key(SNAPSHOTS_INO, ItemKind.DIRENT, place), entry.encode()
        return sorted(taken.values())


def in_snapshot(ino: int) -> bool:
    """Whether this is `.snapshots` or something below it."""
    return ino >= SNAPSHOTS_INO


def is_fleeting(ino: int) -> bool:
    """Whether what a name in `.snapshots`, or the directory itself, is like may change."""
    return ino == SNAPSHOTS_INO or (in_snapshot(ino) and ino & _NUMBER == ROOT_INO)


def _lower(raw: bytes) -> bytes:
    return b"\0\0" + raw[2:]


def _lift(kind: int, value: bytes, slot: int) -> bytes:
    """A value of a snapshot's tree with the inode numbers that it has outside."""
    if kind == ItemKind.DIRENT:
        entry = Dirent.decode(0, value)
        return entry._replace(ino=entry.ino | slot << SLOT_SHIFT).encode()
    if kind == ItemKind.INODE:
        inode = Inode.decode(0, value)
        if inode.parent:
            return inode._replace(parent=inode.parent | slot << SLOT_SHIFT).encode()
    return value


class NoLog:
    """The redo log of a filesystem that can't be changed. See fs/redolog.py."""

    size = 0

    def append(self, effects: Iterable[Effect]) -> Record:
        """EROFS."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def replay(self, covered: int) -> Iterator[tuple[Record, list[Effect]]]:
        """Nothing."""
        return iter(())

    def rotate(self) -> int:
        """There is no file."""
        return 0

    def drop(self, covered: int) -> None:
        """There is no file."""

    def syncer(self) -> Callable[[], None]:
        """There is nothing to sync."""
        return lambda: None
