"""Inodes: their attributes, extended attributes and data, as POSIX has it.

Invariants
  - a file holds no data past its size (so blocks past it are known to be empty);
  - an inode without names exists only while the kernel still holds it, and is then listed
    as an orphan, so that after a crash it is found and removed.
"""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hpkvfs.fs import acl
from hpkvfs.fs.acl import Acl
from hpkvfs.fs.layer import Cut, Effect, Gone, Put, Usage, Write
from hpkvfs.fs.memo import Xattrs
from hpkvfs.fs.stack import HELD, Base, Change, Log, Stack, fail
from hpkvfs.volume.items import (
    BLOCK,
    MAX_NAME,
    MAX_OFFSET,
    MAX_TIME,
    MAX_XATTR,
    MIN_TIME,
    ROOT_INO,
    Clock,
    Inode,
    ItemKind,
    NameHash,
    decode_xattr,
    encode_xattr,
    key,
    kind_range,
    split_key,
)

XATTR_CREATE = 1
XATTR_REPLACE = 2
MAX_SIZE = 1 << 50
MAX_SUM = MAX_OFFSET
RELATIME = 24 * 3_600 * 10**9
MOST_ACCESSES = 20_000
_LENT = stat.S_ISUID | stat.S_ISGID
_CAPABILITY = b"security.capability"


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


class Inodes(Stack):
    """Files, directories and the like, by number."""

    def __init__(
        self,
        below: Base,
        log: Log,
        names: NameHash,
        clock: Clock,
        room: Callable[[int], None] = lambda _: None,
        held: int = HELD,
    ) -> None:
        """See Stack; `names` hashes the names of extended attributes, and those in directories."""
        super().__init__(below, log, clock, room, held)
        self._names = names
        self._lookups: Counter[int] = Counter()
        self._orphaned: set[int] = set()
        self._accesses: dict[int, int] = {}

    # -- coming and going --------------------------------------------------------------

    def make_root(self, uid: int, gid: int) -> None:
        """Give an empty filesystem its root directory."""
        now = self._clock()
        root = Inode(ROOT_INO, stat.S_IFDIR | 0o755, 2, uid, gid, 0, now, now, now, 0, ROOT_INO)
        self._commit([root, Usage(0, 1)])

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
        self._commit([*removal(inode), Put(key(0, ItemKind.ORPHAN, ino), None)])
        self._orphaned.discard(ino)

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

    # -- attributes --------------------------------------------------------------------

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

    def _free_place(self, name: bytes, taken: set[int]) -> int:
        """The first offset for this name that no other with the same hash has; ENOSPC."""
        for place in range(*self._names.slots(name)):
            if place not in taken:
                return place
        raise fail(errno.ENOSPC)


def unprivileged(mode: int) -> int:
    """The mode of a file whose content or owner changed: it does not lend its owner's rights."""
    if not mode & _LENT:
        return mode
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def removal(inode: Inode) -> list[Effect]:
    """What takes an inode away that has no names any more."""
    return [Gone(inode.ino), Usage(-inode.size, -1)]


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
