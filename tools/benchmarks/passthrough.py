"""The least that a filesystem in Python can do: pyfuse3 with a directory behind it, no more.

`python passthrough.py SOURCE MOUNTPOINT` answers every request with the system call it stands
for. The kernel may cache names and attributes for as long as it likes, as it may with hpkvfs;
pyfuse3's own example forbids that, which makes its metadata slower than a limit should be.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio

CACHE_SECONDS = 3_600.0


class PassThrough(pyfuse3.Operations):
    """Inodes have one path each, the last one seen, and numbers that are never used twice."""

    enable_writeback_cache = True

    def __init__(self, source: str) -> None:
        super().__init__()
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: os.fsencode(source)}
        self._numbers: dict[int, int] = {}
        self._last = pyfuse3.ROOT_INODE

    def _path(self, parent: int, name: bytes) -> bytes:
        return self._paths[parent] + b"/" + name

    def _entry(self, path: bytes, *, root: bool = False, new: bool = False) -> Any:
        facts = os.lstat(path)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE if root else self._number(facts.st_ino, path, new)
        for field in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize",
                      "st_blocks", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):  # fmt: skip
            setattr(entry, field, getattr(facts, field))
        entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
        return entry

    def _number(self, behind: int, path: bytes, new: bool) -> int:
        number = None if new else self._numbers.get(behind)
        if number is None:
            self._last += 1
            number = self._numbers[behind] = self._last
        self._paths[number] = path
        return number

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        try:
            return self._entry(self._path(parent_inode, name))
        except FileNotFoundError:
            absent = pyfuse3.EntryAttributes()
            absent.st_ino = 0
            absent.entry_timeout = CACHE_SECONDS
            return absent

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        try:
            return self._entry(self._paths[inode], root=inode == pyfuse3.ROOT_INODE)
        except FileNotFoundError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        try:
            return self._setattr(inode, attr, fields)
        except FileNotFoundError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    def _setattr(self, inode: int, attr: Any, fields: Any) -> Any:
        path = self._paths[inode]
        if fields.update_size:
            os.truncate(path, attr.st_size)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            os.lchown(
                path,
                attr.st_uid if fields.update_uid else -1,
                attr.st_gid if fields.update_gid else -1,
            )
        if fields.update_atime or fields.update_mtime:
            facts = os.lstat(path)
            atime = attr.st_atime_ns if fields.update_atime else facts.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else facts.st_mtime_ns
            os.utime(path, ns=(atime, mtime), follow_symlinks=False)
        return self._entry(path, root=inode == pyfuse3.ROOT_INODE)

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self._path(parent_inode, name)
        fd = os.open(path, flags & ~(os.O_APPEND | 3) | os.O_CREAT | os.O_RDWR, mode)
        entry = self._entry(path, new=True)
        return self._opened(fd), entry

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        path = self._paths[inode]
        try:
            return self._opened(os.open(path, flags & ~(os.O_APPEND | 3) | os.O_RDWR))
        except PermissionError:
            return self._opened(os.open(path, flags & ~os.O_APPEND))

    def _opened(self, fd: int) -> Any:
        return pyfuse3.FileInfo(fh=fd, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)

    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        path = self._path(parent_inode, name)
        os.mkdir(path, mode)
        return self._entry(path, new=True)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        path = self._path(parent_inode, name)
        os.symlink(target, path)
        return self._entry(path, new=True)

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return os.readlink(self._paths[inode])

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        path = self._path(new_parent_inode, new_name)
        os.link(self._paths[inode], path)
        return self._entry(path)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        os.unlink(self._path(parent_inode, name))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        os.rmdir(self._path(parent_inode, name))

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: Any,
    ) -> None:  # fmt: skip
        new = self._path(parent_inode_new, name_new)
        os.rename(self._path(parent_inode_old, name_old), new)
        self._paths[self._numbers[os.lstat(new).st_ino]] = new

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        names = sorted(os.listdir(self._paths[fh]))
        for number, name in enumerate(names[start_id:], start_id + 1):
            entry = self._entry(self._path(fh, name))
            if not pyfuse3.readdir_reply(token, name, entry, number):
                return

    async def forget(self, inode_list: Any) -> None:
        pass

    async def statfs(self, ctx: Any) -> Any:
        facts = os.statvfs(self._paths[pyfuse3.ROOT_INODE])
        data = pyfuse3.StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files",
                      "f_ffree", "f_favail", "f_namemax"):  # fmt: skip
            setattr(data, field, getattr(facts, field))
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True


def main(source: str, mountpoint: str) -> None:
    """Serve until unmounted."""
    pyfuse3.init(PassThrough(source), mountpoint, {*pyfuse3.default_options, "fsname=passthrough"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
