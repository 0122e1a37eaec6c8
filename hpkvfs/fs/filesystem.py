"""The filesystem proper: POSIX operations, in memory, with no kernel and no network.

Here are those on names; `inodes.py` has those on files, `stack.py` what both rest on, and why
no lock is needed.

Errors are OSError with the errno a Linux filesystem would give. Permissions are the
kernel's business (default_permissions).

Invariant: inode numbers are never used twice.
"""

from __future__ import annotations

import errno
import stat
from collections import Counter

from hpkvfs.fs import acl
from hpkvfs.fs.acl import Acl
from hpkvfs.fs.inodes import Inodes, removal
from hpkvfs.fs.layer import Put, Usage
from hpkvfs.fs.stack import Change, fail
from hpkvfs.types import Missing
from hpkvfs.volume.items import (
    BLOCK,
    MAX_NAME,
    MAX_SYMLINK,
    ROOT_INO,
    Dirent,
    Inode,
    ItemKind,
    file_type,
    key,
    kind_range,
    split_key,
)
from hpkvfs.volume.volume import together

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
LINK_MAX = 65_000


class Filesystem(Inodes):
    """Inodes, directories and file data over a published tree."""

    def place_for(self, parent: int, name: bytes) -> int:
        """Where a directory's entry of a new name belongs; EEXIST, Missing."""
        return self._free_cookie(parent, name)

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
        return [*removal(inode)]

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


def _entry_put(parent: int, cookie: int, name: bytes, inode: Inode) -> Put:
    entry = Dirent(name, inode.ino, file_type(inode.mode))
    return Put(key(parent, ItemKind.DIRENT, cookie), entry.encode())


def _touched(directory: Inode, now: int, nlink: int | None = None) -> Inode:
    links = directory.nlink if nlink is None else nlink
    return directory._replace(mtime=now, ctime=now, nlink=links)
