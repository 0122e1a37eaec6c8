"""The kernel's view: pyfuse3 requests in, filesystem operations out. An adapter only.

This client is the only writer of its vault, so the kernel may cache names, attributes and
pages for as long as it likes.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import pyfuse3

from hpkvfs.errors import EmptyWallet, HpkvError, Unreachable
from hpkvfs.fs.backend import Backend, run
from hpkvfs.fs.filesystem import Changes
from hpkvfs.fs.shelf import SNAPSHOTS_INO, is_fleeting
from hpkvfs.types import BlobRef
from hpkvfs.volume.items import BLOCK, MAX_NAME, Inode

log = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_SECONDS = 3_600.0
READDIR_BATCH = 128
READ_AHEAD_BLOCKS = 32
_IO_SIZE = 128 * 1024

# What a failure of the store looks like to a program.
ERRNO: tuple[tuple[type[HpkvError], int], ...] = (
    (EmptyWallet, errno.ENOSPC),
    (Unreachable, errno.EHOSTDOWN),
    (HpkvError, errno.EIO),
)


def errno_of(error: HpkvError) -> int:
    """The errno that a program is given for a failure of ours."""
    return next(code for family, code in ERRNO if isinstance(error, family))


class Adapter(pyfuse3.Operations):
    """Answers the kernel from a Backend."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self._fs = backend.fs
        self._read_ends: dict[int, int] = {}

    async def _do(self, operation: Callable[..., T], *args: Any) -> T:
        """Run one operation; every failure becomes an errno, unknown ones EIO and a traceback."""
        try:
            return await run(self._backend, lambda: operation(*args))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except HpkvError as error:
            log.warning("%s: %s", operation.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error)) from None
        except Exception:
            log.exception("%s failed", operation.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    async def _wait(self, waiting: Callable[..., Any], *args: Any) -> None:
        try:
            await waiting(*args)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except HpkvError as error:
            log.warning("%s: %s", waiting.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error)) from None

    def _held(self, inode: Inode) -> pyfuse3.EntryAttributes:
        self._fs.remember(inode.ino)
        return attributes(inode)

    # -- names -----------------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        """See pyfuse3."""
        try:
            return self._held(await self._do(self._fs.lookup, parent_inode, name))
        except pyfuse3.FUSEError as error:
            if error.errno != errno.ENOENT or parent_inode == SNAPSHOTS_INO:
                raise
            return _absent()

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """See pyfuse3."""
        for ino, count in inode_list:
            self._read_ends.pop(ino, None)
            try:
                await self._do(self._fs.forget, ino, count)
            except pyfuse3.FUSEError as error:
                log.warning("inode %d stays an orphan: errno %d", ino, error.errno)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        """See pyfuse3."""
        made = await self._do(self._fs.make, parent_inode, name, mode, ctx.uid, ctx.gid, rdev)
        return self._held(made)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        """See pyfuse3."""
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        return self._held(await self._do(self._fs.make, parent_inode, name, mode, ctx.uid, ctx.gid))

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """See pyfuse3."""
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        made = await self._do(self._fs.make, parent_inode, name, mode, ctx.uid, ctx.gid)
        return _opened(made.ino), self._held(made)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        """See pyfuse3."""
        return self._held(
            await self._do(self._fs.symlink, parent_inode, name, target, ctx.uid, ctx.gid)
        )

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        """See pyfuse3."""
        return self._held(await self._do(self._fs.link, inode, new_parent_inode, new_name))

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        await self._do(self._fs.unlink, parent_inode, name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        await self._do(self._fs.rmdir, parent_inode, name)

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: Any,
    ) -> None:  # fmt: skip
        """See pyfuse3."""
        await self._do(
            self._fs.rename, parent_inode_old, name_old, parent_inode_new, name_new, flags
        )

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """See pyfuse3."""
        return await self._do(self._fs.readlink, inode)

    async def opendir(self, inode: int, ctx: Any) -> int:
        """See pyfuse3."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """See pyfuse3. A place in the listing is an entry's cookie plus one."""
        while True:
            entries = await self._do(self._fs.readdir, fh, start_id - 1, READDIR_BATCH)
            for entry in entries:
                inode = await self._do(self._fs.getattr, entry.ino)
                start_id = entry.cookie + 1
                if not pyfuse3.readdir_reply(token, entry.name, attributes(inode), start_id):
                    return
                self._fs.remember(inode.ino)
            if len(entries) < READDIR_BATCH:
                return

    async def releasedir(self, fh: int) -> None:
        """See pyfuse3."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """See pyfuse3."""
        await self._wait(self._backend.sync)

    # -- inodes ----------------------------------------------------------------------

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        """See pyfuse3."""
        return attributes(await self._do(self._fs.getattr, inode))

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        """See pyfuse3."""
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
            ctime=attr.st_ctime_ns if fields.update_ctime else None,
        )
        return attributes(await self._do(self._fs.setattr, inode, changes))

    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        """See pyfuse3; the kernel checks permissions itself (default_permissions)."""
        return True

    async def statfs(self, ctx: Any) -> Any:
        """See pyfuse3: the space left is what the tokens can still store."""
        used, free = self._backend.space()
        files = self._fs.totals().files
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK
        data.f_blocks, data.f_bfree, data.f_bavail = used + free, free, free
        data.f_files, data.f_ffree, data.f_favail = files + free, free, free
        data.f_namemax = MAX_NAME
        return data

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        _check_namespace(name)
        await self._do(self._fs.setxattr, inode, name, value)

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """See pyfuse3."""
        _check_namespace(name)
        return await self._do(self._fs.getxattr, inode, name)

    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        """See pyfuse3."""
        return await self._do(self._fs.listxattr, inode)

    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        _check_namespace(name)
        await self._do(self._fs.removexattr, inode, name)

    # -- data ------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """See pyfuse3."""
        return _opened(inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """See pyfuse3."""
        if self._read_ends.get(fh, 0) == off:
            self._read_ahead(fh, off + size)
        self._read_ends[fh] = off + size
        return await self._do(self._fs.read, fh, off, size)

    def _read_ahead(self, ino: int, offset: int) -> None:
        first = offset // BLOCK
        try:
            last = min(first + READ_AHEAD_BLOCKS, -(-self._fs.getattr(ino).size // BLOCK))
            refs: list[BlobRef] = self._fs.view.extent_refs(ino, range(first, last))
        except Exception:
            return  # only a hint: the read itself will say what is wrong
        if refs:
            self._backend.prefetch(refs)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """See pyfuse3."""
        await self._wait(self._backend.admit, len(buf))
        return await self._do(self._fs.write, fh, off, buf)

    async def flush(self, fh: int) -> None:
        """See pyfuse3; nothing is held back, so there is nothing to do."""

    async def release(self, fh: int) -> None:
        """See pyfuse3."""
        self._read_ends.pop(fh, None)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """See pyfuse3."""
        await self._wait(self._backend.sync)


def attributes(inode: Inode) -> pyfuse3.EntryAttributes:
    """An inode as the kernel wants it."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode.ino
    entry.generation = 0
    seconds = 0.0 if is_fleeting(inode.ino) else CACHE_SECONDS
    entry.entry_timeout = entry.attr_timeout = seconds
    entry.st_mode = inode.mode
    entry.st_nlink = inode.nlink
    entry.st_uid = inode.uid
    entry.st_gid = inode.gid
    entry.st_rdev = inode.rdev
    entry.st_size = inode.size
    entry.st_blksize = _IO_SIZE
    entry.st_blocks = -(-inode.size // 512)
    entry.st_atime_ns = inode.atime
    entry.st_mtime_ns = inode.mtime
    entry.st_ctime_ns = inode.ctime
    return entry


def _check_namespace(name: bytes) -> None:
    """EOPNOTSUPP for POSIX ACLs, which must not be kept as if they were only bytes.

    A program that is told so (cp -a, rsync -A) sets the mode with chmod instead.
    """
    if name.startswith(b"system."):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)


def _absent() -> pyfuse3.EntryAttributes:
    """Tells the kernel that a name does not exist, and that it may remember this."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
    return entry


def _opened(ino: int) -> pyfuse3.FileInfo:
    return pyfuse3.FileInfo(fh=ino, keep_cache=True)


def mount_options(*, read_only: bool, allow_other: bool) -> set[str]:
    """Options for pyfuse3.init."""
    options = set(pyfuse3.default_options)
    options |= {"fsname=hpkvfs", "subtype=hpkvfs"}
    if read_only:
        options.add("ro")
    if allow_other:
        options.add("allow_other")
    return options


async def serve(
    backend: Backend, mountpoint: str, options: set[str], ready: Callable[[], None]
) -> None:
    """Mount, answer the kernel until unmounted, and clean up the mount."""
    pyfuse3.init(Adapter(backend), mountpoint, options)
    try:
        ready()
        await pyfuse3.main()
    finally:
        # harmless when unmounted already; asking first whether it is would ask ourselves
        pyfuse3.close(unmount=True)


def forget_name(parent: int, name: bytes) -> None:
    """Have the kernel look again at a name and its directory: they changed behind its back."""
    pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
    with suppress(OSError):  # it does not know the directory
        pyfuse3.invalidate_inode(parent, attr_only=True)


def stop() -> None:
    """Make `serve` return: it answers what was asked already, then detaches the mount."""
    pyfuse3.terminate()
