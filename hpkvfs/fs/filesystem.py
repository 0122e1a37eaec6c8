"""The filesystem proper: POSIX operations on inodes, in memory, with no kernel and no network.

Every operation is one synchronous step: it first reads all it needs (which may raise
types.Missing: load, then call again), then decides, then applies its effects in one record
of the redo log. So an operation happens whole or not at all, and no lock is needed.

Errors are OSError with the errno a Linux filesystem would give. Permissions are the
kernel's business (default_permissions).

Invariants
  - inode numbers are never used twice;
  - a file holds no data past its size (so blocks past it are known to be empty);
  - an inode without names exists only while the kernel still holds it, and is then listed
    as an orphan, so that after a crash it is found and removed;
  - `usage` always equals the sum over inodes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpkvfs.fs import acl
from hpkvfs.fs.acl import Acl
from hpkvfs.fs.layer import Cut, Effect, Gone, Layer, Put, Record, Usage, Write
from hpkvfs.fs.memo import Memo, Xattrs
from hpkvfs.fs.shelf import in_snapshot
from hpkvfs.fs.view import Below, View
from hpkvfs.types import Missing
from hpkvfs.volume.items import (
    BLOCK,
    MAX_NAME,
    MAX_OFFSET,
    MAX_SYMLINK,
    MAX_TIME,
    MAX_XATTR,
    MIN_TIME,
    ROOT_INO,
    Clock,
    Dirent,
    Inode,
    ItemKind,
    NameHash,
    decode_xattr,
    encode_xattr,
    file_type,
    key,
    kind_range,
    split_key,
)
from hpkvfs.volume.volume import together

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
XATTR_CREATE = 1
XATTR_REPLACE = 2
LINK_MAX = 65_000
MAX_SIZE = 1 << 50
MAX_SUM = MAX_OFFSET
RELATIME = 24 * 3_600 * 10**9
MOST_ACCESSES = 20_000
HELD = 16 << 20
_LENT = stat.S_ISUID | stat.S_ISGID
_CAPABILITY = b"security.capability"


def fail(code: int) -> OSError:
    """The OSError of an errno."""
    return OSError(code, os.strerror(code))


@dataclass(frozen=True, slots=True)
class Changes:
    """What setattr is asked to change; None leaves a field as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None
    ctime: int | None = None


Change = Effect | Inode
"""An effect; an Inode stands for putting it."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What statfs is computed from: bytes and files held, and dirty bytes not published."""

    bytes: int
    files: int
    dirty: int


class Base(Below, Protocol):
    """The published tree, and names in it that are not listed."""

    def hidden(self, parent: int, name: bytes) -> Dirent | None:
        """The entry of a name that is there and not listed."""
        ...


class Log(Protocol):
    """What a filesystem needs of its redo log; see redolog.py."""

    @property
    def size(self) -> int:
        """Bytes of it that no published generation covers."""
        ...

    def replay(self, covered: int) -> Iterator[tuple[Record, list[Effect]]]:
        """Records after those that a generation covers."""
        ...

    def append(self, effects: Iterable[Effect]) -> Record:
        """Add one operation; OSError when it can't be."""
        ...

    def syncer(self) -> Callable[[], None]:
        """A function that returns when all appended so far is on the disk."""
        ...

    def rotate(self) -> int:
        """Go on in another file; the number of the last."""
        ...

    def drop(self, covered: int) -> None:
        """Delete the files that a published generation covers."""
        ...


class Filesystem:
    """Inodes, directories and file data over a published tree.

    `room(n)` tells whether n more dirty bytes can be accepted; it raises OSError if not.
    `held`: so many bytes of the blocks of a layer stay in memory, if the log has the others.
    """

    def __init__(
        self,
        below: Base,
        log: Log,
        names: NameHash,
        clock: Clock,
        room: Callable[[int], None] = lambda _: None,
        held: int = HELD,
    ) -> None:
        self._below = below
        self._held = held
        self._log = log
        self._names = names
        self._clock = clock
        self._room = room
        self._lookups: Counter[int] = Counter()
        self._orphaned: set[int] = set()
        self._accesses: dict[int, int] = {}
        self._memo = Memo()
        self.position = 0
        """Grows with every change."""
        self._base = (0, 0)
        self.active = Layer()
        self.frozen: Layer | None = None
        self.next_ino = ROOT_INO
        self._restack()

    # -- life cycle ------------------------------------------------------------------

    def start(self, next_ino: int, size: int, files: int, covered: int) -> int:
        """Take over from a published generation and the redo log; records replayed."""
        self._memo.clear()
        self.next_ino = max(next_ino, ROOT_INO)
        self._base = (size, files)
        replayed = 0
        for record, effects in self._log.replay(covered):
            self._take(effects, record)
            replayed += 1
        return replayed

    def make_root(self, uid: int, gid: int) -> None:
        """Give an empty filesystem its root directory."""
        now = self._clock()
        root = Inode(ROOT_INO, stat.S_IFDIR | 0o755, 2, uid, gid, 0, now, now, now, 0, ROOT_INO)
        self._commit([root, Usage(0, 1)])

    def freeze(self) -> int:
        """Set the active layer aside to be published; the last redo log it includes."""
        assert self.frozen is None
        covered = self._log.rotate()
        self.frozen, self.active = self.active, Layer()
        self._restack()
        return covered

    def published(self, covered: int) -> None:
        """The frozen layer is now in the tree below: forget it, and its log."""
        if self.frozen is not None:
            size, files = self._base
            self._base = (size + self.frozen.usage_bytes, files + self.frozen.usage_files)
        self.frozen = None
        self._restack()
        self._log.drop(covered)

    def orphans(self) -> list[int]:
        """Inodes that lost their last name while open; Missing."""
        scan = self._view.scan(*kind_range(0, ItemKind.ORPHAN))
        return [split_key(raw)[2] for raw, _ in scan]

    def left_behind(self) -> list[int]:
        """Orphans that nobody holds: those of an earlier life that was cut short. Missing."""
        return [ino for ino in self.orphans() if ino not in self._orphaned]

    def reclaim(self, ino: int) -> None:
        """Remove an orphan for good; Missing."""
        inode = self.getattr(ino)
        self._commit([*_remove(inode), Put(key(0, ItemKind.ORPHAN, ino), None)])
        self._orphaned.discard(ino)

    def mend(self, effects: list[Effect]) -> None:
        """Repair: apply changes as they are, which may break rules to restore others."""
        self._commit(effects)

    def place_for(self, parent: int, name: bytes) -> int:
        """Where a directory's entry of a new name belongs; EEXIST, Missing."""
        return self._free_cookie(parent, name)

    def rebase(self, size: int, files: int) -> None:
        """The generation below turned out to hold some of the active layer already."""
        base_size, base_files = self._base
        self._base = (base_size + size, base_files + files)
        self.active.usage_bytes -= size
        self.active.usage_files -= files

    def rest_on(self, next_ino: int, size: int, files: int) -> None:
        """The active layer lies upon another generation from now on."""
        self.next_ino = max(self.next_ino, next_ino)
        self._base = (size, files)

    def discard(self) -> None:
        """Give the active layer up; its log is there until it is dropped."""
        assert self.frozen is None
        self.active = Layer()
        self._restack()

    def drop_log(self, number: int) -> None:
        """Delete the files of the redo log up to this one."""
        self._log.drop(number)

    def end_log(self) -> int:
        """End the redo log's newest file: later changes go to the next. Its number."""
        return self._log.rotate()

    def syncer(self) -> Callable[[], None]:
        """A function that returns when all changes so far are on the local disk."""
        return self._log.syncer()

    def totals(self) -> Totals:
        """Sums over the whole filesystem, unpublished changes included."""
        layers = self._layers
        size, files = self._base
        return Totals(
            size + sum(layer.usage_bytes for layer in layers),
            files + sum(layer.usage_files for layer in layers),
            self.dirty,
        )

    @property
    def dirty(self) -> int:
        """Bytes that publishing what is not published will cost, about."""
        return self.active.weight + (self.frozen.weight if self.frozen is not None else 0)

    @property
    def _layers(self) -> list[Layer]:
        return [self.active] if self.frozen is None else [self.active, self.frozen]

    @property
    def logged(self) -> int:
        """Bytes that wait to be published, in the log."""
        return self._log.size

    @property
    def in_memory(self) -> int:
        """Bytes that wait to be published, in memory: names and attributes, and those blocks that
        the log has in pieces, or that were written just now."""
        return sum(layer.held + layer.item_weight for layer in self._layers)

    @property
    def view(self) -> View:
        """Reading access to what is below and above."""
        return self._view

    # -- what the kernel holds -------------------------------------------------------

    def held(self) -> list[int]:
        """The inodes that the kernel holds."""
        return list(self._lookups)

    def remember(self, ino: int) -> None:
        """The kernel holds one more reference to this inode."""
        self._lookups[ino] += 1

    def forget(self, ino: int, count: int) -> None:
        """The kernel dropped references; the last one removes an orphan. Missing."""
        left = self._lookups[ino] - count
        if left > 0:
            self._lookups[ino] = left
            return
        if ino in self._orphaned and self.getattr(ino).nlink == 0:
            self.reclaim(ino)
        self._lookups.pop(ino, None)
        self._accesses.pop(ino, None)

    # -- inodes ----------------------------------------------------------------------

    def getattr(self, ino: int) -> Inode:
        """The inode; ENOENT."""
        inode, atime = self._inode(ino), self._accesses.get(ino)
        return inode if atime is None else inode._replace(atime=atime)

    def _inode(self, ino: int) -> Inode:
        """As getattr, but for accesses that only memory knows of."""
        memo = self._memo.at(self._below.state)
        inode = memo.inodes.get(ino)
        if inode is None:
            raw = self._view.get(key(ino, ItemKind.INODE))
            if raw is None:
                raise fail(errno.ENOENT)
            inode = memo.inodes[ino] = Inode.decode(ino, raw)
            memo.trim()
        return inode

    def accessed(self, ino: int) -> None:
        """Somebody read it: note the time, as relatime does, but only in memory; Missing.

        It joins the inode when that changes for another reason (lazytime): reading must not
        cost tokens.
        """
        inode, now = self._inode(ino), self._clock()
        atime = self._accesses.get(ino, inode.atime)
        if atime <= inode.mtime or atime <= inode.ctime or now - atime >= RELATIME:
            if len(self._accesses) >= MOST_ACCESSES:
                self._accesses.pop(next(iter(self._accesses)))
            self._accesses[ino] = now

    def setattr(self, ino: int, changes: Changes) -> Inode:
        """Change an inode's attributes, size included; EISDIR, EINVAL, EFBIG, ENOSPC."""
        inode = self.getattr(ino)
        now = self._clock()
        effects: list[Change] = []
        new = inode._replace(ctime=now)
        if changes.size is not None:
            effects += self._resize(inode, changes.size)
            new = new._replace(size=changes.size, mtime=now)
        if changes.mode is not None:
            new = new._replace(mode=stat.S_IFMT(inode.mode) | stat.S_IMODE(changes.mode))
            effects += self._chmod_acl(new)
        elif not inode.is_dir and not (changes.size is changes.uid is changes.gid is None):
            new = new._replace(mode=unprivileged(inode.mode))
            effects += self._capability_gone(ino)
        for field in ("uid", "gid"):
            value = getattr(changes, field)
            if value is not None:
                new = new._replace(**{field: value})
        for field in ("atime", "mtime", "ctime"):
            value = getattr(changes, field)
            if value is not None:  # the nearest that there is, as every filesystem of Linux
                new = new._replace(**{field: min(max(value, MIN_TIME), MAX_TIME)})
        self._commit([*effects, new])
        if changes.atime is not None:
            self._accesses.pop(ino, None)
        return new

    def _capability_gone(self, ino: int) -> list[Change]:
        """What takes from a file the capabilities that it lends; Missing.

        The kernel was promised that they go whenever content or owner change (handshake.py).
        """
        found = self.xattrs(ino).get(_CAPABILITY)
        return [] if found is None else [Put(key(ino, ItemKind.XATTR, found[0]), None)]

    def _chmod_acl(self, inode: Inode) -> list[Change]:
        found = self.xattrs(inode.ino).get(acl.ACCESS)
        if found is None:
            return []
        changed = Acl.decode(found[1]).with_mode(inode.mode)
        return [self._xattr_put(inode.ino, found[0], acl.ACCESS, changed.encode())]

    def _resize(self, inode: Inode, size: int) -> list[Change]:
        if inode.is_dir:
            raise fail(errno.EISDIR)
        if not inode.is_file:
            raise fail(errno.EINVAL)
        if not 0 <= size <= MAX_SIZE:
            raise fail(errno.EFBIG)
        self._check_sum(size - inode.size)
        effects: list[Change] = [Usage(size - inode.size, 0)]
        if size < inode.size:
            effects.append(Cut(inode.ino, _blocks(size)))
            rest = min(-size % BLOCK, inode.size - size)
            if rest and self._view.block(inode.ino, size // BLOCK)[size % BLOCK :]:
                effects.append(Write(inode.ino, size, bytes(rest), _blocks(inode.size)))
        return effects

    def _check_sum(self, growth: int) -> None:
        """ENOSPC when all files together, holes included, are more than an anchor can tell."""
        if growth > 0 and growth + self.totals().bytes > MAX_SUM:
            raise fail(errno.ENOSPC)

    # -- names -----------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Inode:
        """The inode a name leads to; ENOENT, ENOTDIR, ENAMETOOLONG."""
        if name in (b".", b".."):
            directory = self._directory(parent)
            return directory if name == b"." else self.getattr(directory.parent)
        return self.getattr(self._entry(parent, name).ino)

    def readdir(self, ino: int, after: int, limit: int) -> list[Dirent]:
        """At most `limit` entries with cookies above `after`, in their stable order."""
        low, high = kind_range(ino, ItemKind.DIRENT, after + 1)
        entries = []
        for raw, value in self._view.scan(low, high):
            entries.append(Dirent.decode(split_key(raw)[2], value))
            if len(entries) == limit:
                break
        return entries

    def listing(self, ino: int, after: int, limit: int) -> list[tuple[Dirent, Inode]]:
        """As readdir, with the inodes; what is missing for any is reported together."""
        found, misses = [], []
        for entry in self.readdir(ino, after, limit):
            try:
                found.append((entry, self.getattr(entry.ino)))
            except Missing as miss:
                misses.append(miss)
        if misses:
            raise together(misses)
        return found

    def make(self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0) -> Inode:
        """Create a file, directory, fifo, socket or device node; EEXIST, ENOSPC, ..."""
        return self._make(parent, name, mode, uid, gid, rdev, [])

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """Create a symbolic link; ENAMETOOLONG when the target exceeds 4,095 bytes."""
        if len(target) > MAX_SYMLINK:
            raise fail(errno.ENAMETOOLONG)
        extra: list[Change] = [Put(key(self.next_ino, ItemKind.SYMLINK), target)]
        mode = stat.S_IFLNK | 0o777
        return self._make(parent, name, mode, uid, gid, 0, extra, len(target))

    def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int,
        extra: list[Change],
        size: int = 0,
    ) -> Inode:
        directory = self._directory(parent)
        cookie = self._free_cookie(parent, name)
        if directory.nlink == 0:
            raise fail(errno.ENOENT)
        is_dir = stat.S_ISDIR(mode)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            mode |= stat.S_ISGID if is_dir else 0
        self._room(2 * BLOCK)
        now = self._clock()
        ino, links = self.next_ino, 2 if is_dir else 1
        if not stat.S_ISLNK(mode):
            mode, inherited = self._inherit(parent, mode, ino)
            extra = [*extra, *inherited]
        above = parent if is_dir else 0
        inode = Inode(ino, mode, links, uid, gid, size, now, now, now, rdev, above)
        changed = _touched(directory, now, nlink=directory.nlink + is_dir)
        entry = _entry_put(parent, cookie, name, inode)
        self._commit([inode, *extra, entry, changed, Usage(size, 1)])
        if not extra:
            self._memo.xattrs[ino] = {}
        return inode

    def _inherit(self, parent: int, mode: int, ino: int) -> tuple[int, list[Change]]:
        """The mode and access control lists of something made in a directory with a default."""
        found = self.xattrs(parent).get(acl.DEFAULT)
        if found is None:
            return mode, []
        default = Acl.decode(found[1])
        access = default.inherited(mode)
        lists = {} if access.is_minimal else {acl.ACCESS: access.encode()}
        if stat.S_ISDIR(mode):
            lists[acl.DEFAULT] = found[1]
        return mode & ~0o777 | access.mode, [
            self._xattr_put(ino, self._names.slots(name)[0], name, value)
            for name, value in lists.items()
        ]

    def readlink(self, ino: int) -> bytes:
        """The target of a symbolic link; EINVAL if it is none."""
        target = self._view.get(key(ino, ItemKind.SYMLINK))
        if target is None:
            raise fail(errno.EINVAL)
        return target

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """Give an inode one more name; EPERM for directories, EMLINK."""
        inode, directory = self.getattr(ino), self._directory(parent)
        if inode.is_dir:
            raise fail(errno.EPERM)
        cookie = self._free_cookie(parent, name)
        if inode.nlink == 0 or directory.nlink == 0:
            raise fail(errno.ENOENT)
        if inode.nlink >= LINK_MAX:
            raise fail(errno.EMLINK)
        self._room(2 * BLOCK)
        now = self._clock()
        new = inode._replace(nlink=inode.nlink + 1, ctime=now)
        entry = _entry_put(parent, cookie, name, new)
        self._commit([new, entry, _touched(directory, now)])
        return new

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name of something that is not a directory; ENOENT, EISDIR."""
        directory, entry = self._directory(parent), self._entry(parent, name)
        inode = self.getattr(entry.ino)
        if inode.is_dir:
            raise fail(errno.EISDIR)
        now = self._clock()
        effects = self._unname(inode, now)
        gone = Put(key(parent, ItemKind.DIRENT, entry.cookie), None)
        self._commit([*effects, gone, _touched(directory, now)])

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory; ENOENT, ENOTDIR, ENOTEMPTY."""
        if name == b".":
            raise fail(errno.EINVAL)
        if name == b"..":
            raise fail(errno.ENOTEMPTY)
        directory, entry = self._directory(parent), self._entry(parent, name)
        inode = self._directory(entry.ino)
        self._check_empty(entry.ino)
        now = self._clock()
        effects = self._unname(inode, now)
        gone = Put(key(parent, ItemKind.DIRENT, entry.cookie), None)
        changed = _touched(directory, now, nlink=directory.nlink - 1)
        self._commit([*effects, gone, changed])

    def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """rename(2) with RENAME_NOREPLACE and RENAME_EXCHANGE; EINVAL for other flags."""
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise fail(errno.EINVAL)
        if {old_name, new_name} & {b".", b".."}:
            raise fail(errno.EBUSY)
        self._directory(old_parent)
        self._directory(new_parent)
        old = self._entry(old_parent, old_name)
        moved = self.getattr(old.ino)
        target = self._find(new_parent, new_name)
        if flags == RENAME_EXCHANGE:
            self._exchange(old_parent, old, moved, new_parent, target)
            return
        if target is not None and flags == RENAME_NOREPLACE:
            raise fail(errno.EEXIST)
        if target is not None and target.ino == old.ino:
            return
        self._no_loop(moved, new_parent)
        self._replace(old_parent, old, moved, new_parent, new_name, target)

    def _replace(
        self,
        old_parent: int,
        old: Dirent,
        moved: Inode,
        new_parent: int,
        new_name: bytes,
        target: Dirent | None,
    ) -> None:
        now = self._clock()
        links = Counter({old_parent: 0, new_parent: 0})
        effects: list[Change] = [Put(key(old_parent, ItemKind.DIRENT, old.cookie), None)]
        if target is not None:
            victim = self.getattr(target.ino)
            self._replaceable(moved, victim)
            effects += self._unname(victim, now)
            links[new_parent] -= victim.is_dir
            cookie = target.cookie
        else:
            self._room(2 * BLOCK)
            cookie = self._free_cookie(new_parent, new_name)
        if moved.is_dir:
            links[old_parent] -= 1
            links[new_parent] += 1
        above = new_parent if moved.is_dir else 0
        effects.append(moved._replace(ctime=now, parent=above))
        effects.append(_entry_put(new_parent, cookie, new_name, moved))
        self._commit([*effects, *self._relinked(links, now)])

    def _exchange(
        self, old_parent: int, old: Dirent, moved: Inode, new_parent: int, target: Dirent | None
    ) -> None:
        if target is None:
            raise fail(errno.ENOENT)
        other = self.getattr(target.ino)
        if moved.ino == other.ino:
            return
        self._no_loop(moved, new_parent)
        self._no_loop(other, old_parent)
        now = self._clock()
        shift = moved.is_dir - other.is_dir
        links = Counter({old_parent: 0, new_parent: 0})
        links[old_parent] -= shift
        links[new_parent] += shift
        self._commit(
            [
                moved._replace(ctime=now, parent=new_parent if moved.is_dir else 0),
                other._replace(ctime=now, parent=old_parent if other.is_dir else 0),
                _entry_put(new_parent, target.cookie, target.name, moved),
                _entry_put(old_parent, old.cookie, old.name, other),
                *self._relinked(links, now),
            ]
        )

    def _relinked(self, links: Counter[int], now: int) -> list[Change]:
        directories = [(self._directory(ino), more) for ino, more in links.items()]
        return [_touched(d, now, nlink=d.nlink + more) for d, more in directories]

    def _replaceable(self, moved: Inode, victim: Inode) -> None:
        if victim.is_dir and not moved.is_dir:
            raise fail(errno.EISDIR)
        if moved.is_dir and not victim.is_dir:
            raise fail(errno.ENOTDIR)
        if victim.is_dir:
            self._check_empty(victim.ino)

    def _no_loop(self, moved: Inode, parent: int) -> None:
        """EINVAL when a directory would be moved into itself."""
        while moved.is_dir and parent != ROOT_INO:
            if parent == moved.ino:
                raise fail(errno.EINVAL)
            parent = self.getattr(parent).parent

    def _check_empty(self, ino: int) -> None:
        if self.readdir(ino, -1, 1):
            raise fail(errno.ENOTEMPTY)

    def _unname(self, inode: Inode, now: int) -> list[Change]:
        """The effects on an inode of losing one name."""
        left = 0 if inode.is_dir else inode.nlink - 1
        if left:
            return [inode._replace(nlink=left, ctime=now)]
        if self._lookups[inode.ino]:
            self._orphaned.add(inode.ino)
            orphan = Put(key(0, ItemKind.ORPHAN, inode.ino), b"")
            return [inode._replace(nlink=0, ctime=now), orphan]
        return [*_remove(inode)]

    def _directory(self, ino: int) -> Inode:
        inode = self.getattr(ino)
        if not inode.is_dir:
            raise fail(errno.ENOTDIR)
        return inode

    def _entry(self, parent: int, name: bytes) -> Dirent:
        entry = self._find(parent, name)
        if entry is None:
            raise fail(errno.ENOENT)
        return entry

    def _find(self, parent: int, name: bytes) -> Dirent | None:
        if len(name) > MAX_NAME:
            raise fail(errno.ENAMETOOLONG)
        for entry in self._bucket(parent, name):
            if entry.name == name:
                return entry
        self._directory(parent)
        return self._below.hidden(parent, name)

    def _bucket(self, parent: int, name: bytes) -> tuple[Dirent, ...]:
        """The entries whose names have this name's hash."""
        first, last = self._names.slots(name)
        memo = self._memo.at(self._below.state)
        found = memo.names.get((parent, first))
        if found is None:
            low, high = key(parent, ItemKind.DIRENT, first), key(parent, ItemKind.DIRENT, last)
            found = tuple(
                Dirent.decode(split_key(raw)[2], value) for raw, value in self._view.scan(low, high)
            )
            memo.names[parent, first] = found
            memo.trim()
        return found

    def _free_cookie(self, parent: int, name: bytes) -> int:
        """A cookie for a new name; EEXIST if it is there already."""
        if not name or b"/" in name or b"\0" in name:
            raise fail(errno.EINVAL)
        if name in (b".", b"..") or self._find(parent, name) is not None:
            raise fail(errno.EEXIST)
        return self._free_place(name, {entry.cookie for entry in self._bucket(parent, name)})

    def _free_place(self, name: bytes, taken: set[int]) -> int:
        """The first offset for this name that no other with the same hash has; ENOSPC."""
        for place in range(*self._names.slots(name)):
            if place not in taken:
                return place
        raise fail(errno.ENOSPC)

    # -- data ------------------------------------------------------------------------

    def read(self, ino: int, offset: int, size: int) -> bytes:
        """At most `size` bytes from an offset, fewer at the end of the file; Missing."""
        size = min(size, self._inode(ino).size - offset)
        if size <= 0:
            return b""
        first, start = divmod(offset, BLOCK)
        numbers = range(first, _blocks(offset + size))
        blocks = self._view.read(ino, numbers)
        if len(blocks) == 1:
            return blocks[0][start : start + size].ljust(size, b"\0")
        whole = b"".join(blocks)
        if len(whole) < BLOCK * len(blocks):
            whole = b"".join(block.ljust(BLOCK, b"\0") for block in blocks)
        return whole[start : start + size]

    def write(self, ino: int, offset: int, data: bytes, *, stamp: bool = True) -> int:
        """Write all of `data` at an offset; its length. EFBIG, ENOSPC.

        Without `stamp` the times stay: whoever caches writes tells them with setattr.
        """
        inode = self.getattr(ino)
        end = offset + len(data)
        if end > MAX_SIZE:
            raise fail(errno.EFBIG)
        self._room(len(data))
        self._check_sum(end - inode.size)
        new = inode
        if end > inode.size or inode.mode & _LENT:
            size, mode = max(inode.size, end), unprivileged(inode.mode)
            new = inode._replace(size=size, mode=mode)
        if stamp:
            now = self._clock()
            new = new._replace(mtime=now, ctime=now)
        effects: list[Change] = [Write(ino, offset, data, _blocks(inode.size))]
        effects += self._capability_gone(ino)
        if new is not inode:
            effects.append(new)
        if new.size != inode.size:
            effects.append(Usage(new.size - inode.size, 0))
        self._commit(effects)
        return len(data)

    # -- extended attributes -----------------------------------------------------------

    def xattrs(self, ino: int) -> Xattrs:
        """All of an inode's extended attributes; Missing."""
        memo = self._memo.at(self._below.state)
        found = memo.xattrs.get(ino)
        if found is None:
            found = {}
            for raw, item in self._view.scan(*kind_range(ino, ItemKind.XATTR)):
                name, value = decode_xattr(item)
                found[name] = split_key(raw)[2], value
            memo.xattrs[ino] = found
            memo.trim()
        return found

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value; ENODATA."""
        found = self.xattrs(ino).get(name)
        if found is None:
            raise fail(errno.ENODATA)
        return found[1]

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set one; EEXIST and ENODATA by flags, ENOSPC when it is over 7,500 bytes."""
        inode, found = self.getattr(ino), self.xattrs(ino).get(name)
        if flags & XATTR_CREATE and found:
            raise fail(errno.EEXIST)
        if flags & XATTR_REPLACE and not found:
            raise fail(errno.ENODATA)
        if len(name) > MAX_NAME:
            raise fail(errno.ERANGE)
        if len(name) + len(value) > MAX_XATTR:
            raise fail(errno.ENOSPC)
        self._commit([*self._xattr_set(ino, name, value), inode._replace(ctime=self._clock())])

    def set_acl(self, ino: int, name: bytes, value: bytes, *, keep_setgid: bool) -> None:
        """Set an access control list, and the mode by it; EINVAL, EACCES, ENOSPC.

        keep_setgid: whoever sets it is in the file's group, or may do as if.
        """
        inode = self.getattr(ino)
        try:
            given = Acl.decode(value)
        except ValueError:
            raise fail(errno.EINVAL) from None
        if len(name) + len(value) > MAX_XATTR:
            raise fail(errno.ENOSPC)
        if name == acl.DEFAULT and not inode.is_dir:
            raise fail(errno.EACCES)
        new = inode._replace(ctime=self._clock())
        if name == acl.ACCESS:
            mode = inode.mode & ~0o777 | given.mode
            new = new._replace(mode=mode if keep_setgid else mode & ~stat.S_ISGID)
        if name == acl.ACCESS and given.is_minimal:
            found = self.xattrs(ino).get(name)
            effects: list[Change] = []
            if found is not None:
                effects.append(Put(key(ino, ItemKind.XATTR, found[0]), None))
        else:
            effects = self._xattr_set(ino, name, value)
        self._commit([*effects, new])

    def listxattr(self, ino: int) -> list[bytes]:
        """The names."""
        self.getattr(ino)
        return list(self.xattrs(ino))

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove one; ENODATA."""
        inode, found = self.getattr(ino), self.xattrs(ino).get(name)
        if found is None:
            raise fail(errno.ENODATA)
        item = Put(key(ino, ItemKind.XATTR, found[0]), None)
        self._commit([item, inode._replace(ctime=self._clock())])

    def _xattr_set(self, ino: int, name: bytes, value: bytes) -> list[Change]:
        self._room(2 * BLOCK)
        found = self.xattrs(ino)
        if name in found:
            place = found[name][0]
        else:
            place = self._free_place(name, {taken for taken, _ in found.values()})
        return [self._xattr_put(ino, place, name, value)]

    def _xattr_put(self, ino: int, place: int, name: bytes, value: bytes) -> Put:
        return Put(key(ino, ItemKind.XATTR, place), encode_xattr(name, value))

    # -- effects ---------------------------------------------------------------------

    def _commit(self, changes: Sequence[Change]) -> None:
        """The one way to change anything: first the log, then memory. EROFS for snapshots."""
        inodes = [change for change in changes if type(change) is Inode]
        effects = [_effect(change) for change in changes]
        if any(in_snapshot(_inode_of(effect)) for effect in effects):
            raise fail(errno.EROFS)
        record = self._log.append(effects)
        self.position += 1
        self._take(effects, record)
        for inode in inodes:
            self._memo.inodes[inode.ino] = inode

    def _take(self, effects: list[Effect], record: Record) -> None:
        for at, effect in enumerate(effects):
            self.active.apply(effect, record, at)
            ino = self._memo.note(effect)
            if ino >= self.next_ino:
                self.next_ino = ino + 1
        if self.active.held > self._held:
            self.active.ease(self._held)

    def _restack(self) -> None:
        self._view = View(self._layers, self._below)


def _inode_of(effect: Effect) -> int:
    match effect:
        case Put(raw, _):
            return split_key(raw)[0]
        case Gone(ino):
            return ino
    return 0  # nothing else comes without one of these


def unprivileged(mode: int) -> int:
    """The mode of a file whose content or owner changed: it does not lend its owner's rights."""
    if not mode & _LENT:
        return mode
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def _effect(change: Change) -> Effect:
    if type(change) is Inode:
        return Put(key(change.ino, ItemKind.INODE), change.encode())
    return change  # type: ignore[return-value]


def _entry_put(parent: int, cookie: int, name: bytes, inode: Inode) -> Put:
    entry = Dirent(name, inode.ino, file_type(inode.mode))
    return Put(key(parent, ItemKind.DIRENT, cookie), entry.encode())


def _remove(inode: Inode) -> list[Effect]:
    return [Gone(inode.ino), Usage(-inode.size, -1)]


def _touched(directory: Inode, now: int, nlink: int | None = None) -> Inode:
    links = directory.nlink if nlink is None else nlink
    return directory._replace(mtime=now, ctime=now, nlink=links)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
