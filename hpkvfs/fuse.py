"""The kernel's view: pyfuse3 requests in, filesystem operations out. An adapter only.

This client is the only writer of its vault, so the kernel may cache names, attributes and
pages for as long as it likes, and keep what was written (writeback cache) until a file is
closed or synced, or it wants the memory: then it comes in few large pieces. The kernel then
knows a file's size and times better than we do, and tells us.

What the kernel need not ask each time: `security.capability` before each write (handshake.py; a
kernel that is asked for no promise is answered from the memo of xattrs); FLUSH is answered ENOSYS
once, and never comes again, since there is nothing it could do.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import pyfuse3
import trio

from hpkvfs import handshake
from hpkvfs.eager import Pending, Trio
from hpkvfs.errors import DiskFull, EmptyWallet, HpkvError, Unreachable
from hpkvfs.fs import acl
from hpkvfs.fs.backend import Backend, run
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.inodes import Changes
from hpkvfs.fs.shelf import SNAPSHOTS_INO, is_fleeting
from hpkvfs.types import BlobRef, Missing
from hpkvfs.volume.items import BLOCK, MAX_NAME, ROOT_INO, Inode
from hpkvfs.writeback import Writeback

log = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_SECONDS = 3_600.0
FOLLOW_SECONDS = 1.0
READDIR_BATCH = 200
LEAST_AHEAD, MOST_AHEAD = 8, 64  # blocks
MOST_READERS = 1_000
_IO_SIZE = 128 * 1024
_DOT, _DOTDOT, _FIRST = 1, 2, 3
_PRIVILEGES = stat.S_ISUID | stat.S_ISGID

# What a failure of the store looks like to a program.
ERRNO: tuple[tuple[type[HpkvError], int], ...] = (
    (EmptyWallet, errno.ENOSPC),
    (DiskFull, errno.ENOSPC),
    (Unreachable, errno.EHOSTDOWN),
    (HpkvError, errno.EIO),
)


def errno_of(error: HpkvError) -> int:
    """The errno that a program is given for a failure of ours."""
    return next(code for family, code in ERRNO if isinstance(error, family))


class Adapter(pyfuse3.Operations):
    """Answers the kernel from a Backend."""

    supports_dot_lookup = True
    enable_acl = True

    def __init__(
        self,
        backend: Backend,
        follows: bool,
        writeback: Writeback,
        pending: Pending,
        *,
        caches_writes: bool,
    ) -> None:
        super().__init__()
        self._pending = pending
        self._backend = backend
        self._writeback = writeback
        self._follows = follows
        self.enable_writeback_cache = caches_writes
        self._fs = backend.fs
        self._reads: dict[int, _Reading] = {}

    async def _do(self, operation: Callable[..., T], *args: Any) -> T:
        """Run one operation; every failure becomes an errno, unknown ones EIO and a traceback."""
        try:
            return operation(*args)
        except Missing:
            return await self._do_with_loading(operation, *args)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except Exception as error:
            raise _unforeseen(operation, error) from None

    async def _change(self, operation: Callable[..., T], *args: Any) -> T:
        """As _do, once what waits to be published leaves room for more."""
        if self._backend.is_crowded(0):
            await self._wait(self._backend.admit, 0)
        return await self._do(operation, *args)

    async def _do_with_loading(self, operation: Callable[..., T], *args: Any) -> T:
        try:
            with self._pending:
                return await run(self._backend, lambda: operation(*args))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except Exception as error:
            raise _unforeseen(operation, error) from None

    async def _wait(self, waiting: Callable[..., Any], *args: Any) -> None:
        try:
            with self._pending:
                await waiting(*args)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except HpkvError as error:
            log.warning("%s: %s", waiting.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error)) from None

    def _held(self, inode: Inode) -> pyfuse3.EntryAttributes:
        self._fs.remember(inode.ino)
        return self._attributes(inode)

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        return self._brief(attributes(inode))

    def _brief(self, entry: pyfuse3.EntryAttributes) -> pyfuse3.EntryAttributes:
        """What another client may change is not to be relied on for long."""
        if self._follows:
            entry.entry_timeout = entry.attr_timeout = FOLLOW_SECONDS
        return entry

    def _opened(self, ino: int, flags: int) -> pyfuse3.FileInfo:
        self._writeback.opened(ino, flags)
        return pyfuse3.FileInfo(fh=ino, keep_cache=not self._follows)

    # -- names -----------------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        """See pyfuse3."""
        try:
            return self._held(await self._do(self._fs.lookup, parent_inode, name))
        except pyfuse3.FUSEError as error:
            if error.errno != errno.ENOENT or parent_inode == SNAPSHOTS_INO:
                raise
            if parent_inode == ROOT_INO and (ino := self._writeback.named(name)) is not None:
                return self._held(await self._do(self._fs.getattr, ino))
            return self._brief(_absent())

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """See pyfuse3."""
        for ino, count in inode_list:
            self._reads.pop(ino, None)
            try:
                await self._do(self._fs.forget, ino, count)
            except pyfuse3.FUSEError as error:
                log.warning("inode %d stays an orphan: errno %d", ino, error.errno)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        """See pyfuse3."""
        made = await self._change(self._fs.make, parent_inode, name, mode, ctx.uid, ctx.gid, rdev)
        return self._held(made)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        """See pyfuse3."""
        mode = stat.S_IFDIR | stat.S_IMODE(mode)
        return self._held(
            await self._change(self._fs.make, parent_inode, name, mode, ctx.uid, ctx.gid)
        )

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """See pyfuse3."""
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        made = await self._change(self._fs.make, parent_inode, name, mode, ctx.uid, ctx.gid)
        return self._opened(made.ino, flags), self._held(made)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        """See pyfuse3."""
        return self._held(
            await self._change(self._fs.symlink, parent_inode, name, target, ctx.uid, ctx.gid)
        )

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        """See pyfuse3."""
        return self._held(await self._change(self._fs.link, inode, new_parent_inode, new_name))

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        await self._change(self._fs.unlink, parent_inode, name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        await self._change(self._fs.rmdir, parent_inode, name)

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: Any,
    ) -> None:  # fmt: skip
        """See pyfuse3."""
        await self._change(
            self._fs.rename, parent_inode_old, name_old, parent_inode_new, name_new, flags
        )

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """See pyfuse3."""
        return await self._do(self._fs.readlink, inode)

    async def opendir(self, inode: int, ctx: Any) -> int:
        """See pyfuse3."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """See pyfuse3. A place in the listing is an entry's cookie, behind those of . and .."""
        if start_id < _DOTDOT and not await self._list_dots(fh, start_id, token):
            return
        after = start_id - _FIRST if start_id >= _FIRST else -1
        while True:
            entries = await self._do(self._fs.listing, fh, after, READDIR_BATCH)
            for entry, inode in entries:
                after, found = entry.cookie, self._attributes(inode)
                if not pyfuse3.readdir_reply(token, entry.name, found, after + _FIRST):
                    return
                self._fs.remember(inode.ino)
            if len(entries) < READDIR_BATCH:
                return

    async def _list_dots(self, ino: int, start_id: int, token: Any) -> bool:
        """Whether both fitted; the kernel takes no references by them."""
        here = await self._do(self._fs.getattr, ino)
        if start_id < _DOT:
            await self._do(self._fs.accessed, ino)
            if not pyfuse3.readdir_reply(token, b".", self._attributes(here), _DOT):
                return False
        above = await self._do(self._fs.getattr, here.parent)
        return bool(pyfuse3.readdir_reply(token, b"..", self._attributes(above), _DOTDOT))

    async def releasedir(self, fh: int) -> None:
        """See pyfuse3."""

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """See pyfuse3."""
        await self._wait(self._backend.sync)

    # -- inodes ----------------------------------------------------------------------

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        """See pyfuse3."""
        return self._attributes(await self._do(self._fs.getattr, inode))

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
        return self._attributes(await self._change(self._fs.setattr, inode, changes))

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
        if name in (acl.ACCESS, acl.DEFAULT):
            owner = await self._do(self._fs.getattr, inode)
            member = ctx.uid == 0 or _is_in_group(ctx, owner.gid)

            def set_acl() -> None:
                self._fs.set_acl(inode, name, value, keep_setgid=member)

            await self._change(set_acl)
            return
        _check_namespace(name)
        await self._change(self._fs.setxattr, inode, name, value)

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """See pyfuse3."""
        found = (await self._do(self._fs.xattrs, inode)).get(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return found[1]

    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        """See pyfuse3."""
        return await self._do(self._fs.listxattr, inode)

    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """See pyfuse3."""
        await self._change(self._fs.removexattr, inode, name)

    # -- data ------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """See pyfuse3."""
        if flags & os.O_TRUNC:
            await self._change(self._fs.setattr, inode, Changes(size=0))
        return self._opened(inode, flags)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """See pyfuse3."""
        reading = self._reads.get(fh)
        if reading is None:
            if len(self._reads) >= MOST_READERS:
                self._reads.clear()
            reading = self._reads[fh] = _Reading()
        ahead = reading.go_on(off, size)
        if ahead:
            self._read_ahead(fh, ahead)
        return await self._do(self._read, fh, off, size)

    def _read(self, ino: int, offset: int, size: int) -> bytes:
        data = self._fs.read(ino, offset, size)
        self._fs.accessed(ino)
        return data

    def _read_ahead(self, ino: int, blocks: range) -> None:
        try:
            last = -(-self._fs.getattr(ino).size // BLOCK)
            blocks = range(blocks.start, min(blocks.stop, last))
            refs: list[BlobRef] = self._fs.view.extent_refs(ino, blocks)
        except Exception:
            return  # only a hint: the read itself will say what is wrong
        if refs:
            self._backend.prefetch(refs)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """See pyfuse3."""
        if self._backend.is_crowded(len(buf)):
            await self._wait(self._backend.admit, len(buf))
        inode = await self._do(self._fs.getattr, fh)
        size = await self._do(self._write, fh, off, buf)
        if inode.mode & _PRIVILEGES:
            # the mode it cached is no longer true; only attributes, so this cannot block
            pyfuse3.invalidate_inode(fh, attr_only=True)
        return size

    def _write(self, ino: int, offset: int, data: bytes) -> int:
        # a kernel that holds what is written knows better when that was
        return self._fs.write(ino, offset, data, stamp=not self.enable_writeback_cache)

    async def flush(self, fh: int) -> None:
        """See pyfuse3; nothing is held back, so the kernel need not ask again."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        """See pyfuse3."""
        self._reads.pop(fh, None)
        self._writeback.closed(fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """See pyfuse3."""
        await self._wait(self._backend.sync)


class _Reading:
    """How one file is read: what follows is fetched ahead, more each time it is wanted."""

    __slots__ = ("_asked", "_end", "_window")

    def __init__(self) -> None:
        self._end = -1
        self._window = 0
        self._asked = 0

    def go_on(self, offset: int, size: int) -> range:
        """The blocks to fetch ahead, now that this is read."""
        in_order = offset == self._end
        self._end = offset + size
        next_block = -(-self._end // BLOCK)
        if not in_order:
            self._window, self._asked = 0, next_block
            return range(0)
        start = max(self._asked, next_block)
        if start > next_block + self._window // 2:
            return range(0)  # enough is on its way
        self._window = min(max(2 * self._window, LEAST_AHEAD), MOST_AHEAD)
        self._asked = max(start, next_block + self._window)
        return range(start, self._asked)


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
    """EOPNOTSUPP for what only the kernel gives a meaning, and we do not."""
    if name.startswith(b"system."):
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)


def _is_in_group(ctx: Any, gid: int) -> bool:
    try:
        return ctx.gid == gid or gid in pyfuse3.get_sup_groups(ctx.pid)
    except (OSError, RuntimeError):
        return False  # it has ended, or lives where we cannot see it


def _unforeseen(operation: Callable[..., Any], error: Exception) -> pyfuse3.FUSEError:
    """What a program is told when the store failed, or we have a bug."""
    name = getattr(operation, "__name__", "operation")
    if isinstance(error, HpkvError):
        log.warning("%s: %s", name, error)
        return pyfuse3.FUSEError(errno_of(error))
    log.error("%s failed", name, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def _absent() -> pyfuse3.EntryAttributes:
    """Tells the kernel that a name does not exist, and that it may remember this."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
    return entry


def mount_options(*, read_only: bool, allow_other: bool, source: str = "hpkvfs") -> set[str]:
    """Options for pyfuse3.init; `source` is what it is mounted from, as mount(8) shows it."""
    options = set(pyfuse3.default_options)
    options |= {f"fsname={source}", "subtype=hpkvfs"}
    if read_only:
        options.add("ro")
    if allow_other:
        options.add("allow_other")
    return options


async def serve(
    backend: Backend,
    mountpoint: str,
    options: set[str],
    ready: Callable[[], None],
    writeback: Writeback,
    *,
    follows: bool = False,
) -> None:
    """Mount, answer the kernel until unmounted, and clean up the mount.

    `follows`: what is below may change, so the kernel may not rely on it for long.
    """
    shake = handshake.mounted(mountpoint, options)
    try:
        # as pyfuse3.asyncio does
        pending = Pending()
        vars(pyfuse3)["trio"] = Trio(pending) if shake is None else Trio(pending, shake.settle)
        where = mountpoint if shake is None else shake.path
        # a kernel that does would not believe in another client's size; handshake.py has the rest
        caches_writes = shake is not None and not follows
        adapter = Adapter(backend, follows, writeback, pending, caches_writes=caches_writes)
        pyfuse3.init(adapter, where, options)
        try:
            ready()
            await pyfuse3.main()
        finally:
            # harmless when unmounted already; asking first whether it is would ask ourselves
            pyfuse3.close(unmount=True)
    finally:
        if shake is not None:
            shake.close()


def forget_name(parent: int, name: bytes) -> None:
    """Have the kernel look again at a name and its directory: they changed behind its back."""
    pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
    with suppress(OSError):  # it does not know the directory
        pyfuse3.invalidate_inode(parent, attr_only=True)


def forget_alias(name: bytes) -> None:
    """Have the kernel let go of a name in the root directory that was for a moment."""
    pyfuse3.invalidate_entry_async(ROOT_INO, name, ignore_enoent=True)


async def forget_caches(fs: Filesystem) -> None:
    """Have the kernel forget attributes and pages: what is below has changed."""
    # In a thread: the kernel waits for pages that are being read, which is for us to answer.
    await trio.to_thread.run_sync(_forget_caches, fs.held())


def _forget_caches(inodes: list[int]) -> None:
    for ino in inodes:
        try:
            pyfuse3.invalidate_inode(ino)
        except OSError as error:  # ENOENT: it forgot it already
            log.debug("inode %d: %s", ino, error)


def stop() -> None:
    """Make `serve` return: it answers what was asked already, then detaches the mount."""
    pyfuse3.terminate()
