"""Copying files out of a snapshot, back into the live tree.

What is restored is made under another name beside its place, complete, and then takes its
place in one step. So whoever looks sees the old or the new, and a restore that was cut short
has changed nothing but left that other name behind (`.hpkvfs-restore-...`). Which one that is is
written down before it is made, so that the next restore, or mount, takes it away: `clear`.

Data is copied, not shared: a blob is in one place of one tree only (volume/snapshots.py).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack

from hpkvfs.control import Progress
from hpkvfs.errors import HpkvError, UserError
from hpkvfs.fs.backend import run
from hpkvfs.fs.filesystem import RENAME_EXCHANGE
from hpkvfs.fs.inodes import Changes
from hpkvfs.session import Session
from hpkvfs.types import Missing
from hpkvfs.volume.items import BLOCK, ROOT_INO, Inode
from hpkvfs.volume.snapshots import Snapshot

T = TypeVar("T")

CHUNK = 64 * BLOCK
_TEMPORARY = b".hpkvfs-restore-"
_NOTE = "restoring"


@dataclass(slots=True)
class Restored:
    """How much was copied."""

    files: int = 0
    bytes: int = 0


@dataclass(slots=True)
class _Place:
    parent: int
    name: bytes
    now: Inode | None
    missing: list[bytes] = field(default_factory=list)


async def restore(
    session: Session,
    snapshot: Snapshot,
    path: str,
    to: str | None,
    *,
    replace: bool,
    token: bytes,
    progress: Progress,
) -> Restored:
    """Copy `path` (from the vault's root) of a snapshot to `to`, or to where it was.

    UserError when it is not in the snapshot, or something is in its place and `replace` is
    not given; StoreError. `token`: random bytes for the name it has meanwhile.
    """
    await clear(session)
    return await _Restorer(session, snapshot, progress).run(path, to, replace, token)


async def clear(session: Session) -> None:
    """Take away what a restore that was cut short has left behind; StoreError."""
    note = session.note(_NOTE)
    if not note:
        return
    parent, name = msgpack.unpackb(note)
    try:
        if (await run(session, lambda: session.fs.getattr(parent))).is_dir:
            await remove(session, parent, name)
            session.changed_behind(parent, name)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise _explained(error, name.decode()) from error
    await session.keep_note(_NOTE, b"")


class _Restorer:
    def __init__(self, session: Session, snapshot: Snapshot, progress: Progress) -> None:
        self.session = session
        self.snapshot = snapshot
        self.progress = progress
        self.done = Restored()
        self.links: dict[int, int] = {}

    async def do(self, operation: Callable[..., T], *args: object) -> T:
        return await run(self.session, lambda: operation(*args))

    async def run(self, path: str, to: str | None, replace: bool, token: bytes) -> Restored:
        fs = self.session.fs
        source = await self.source(path)
        place = await self.place(_parts(path if to is None else to), to is None)
        if place.now is not None and not replace:
            raise UserError(
                f"{to or path} is there already", "name another place, or use --replace"
            )
        if place.now is not None and place.now.is_dir != source.is_dir:
            raise UserError(f"{to or path} is there, and is another kind of thing")
        temporary = _TEMPORARY + token.hex().encode()
        await self.session.keep_note(_NOTE, msgpack.packb([place.parent, temporary]))
        try:
            await self.copy(source, place.parent, temporary)
            flags = RENAME_EXCHANGE if place.now is not None and source.is_dir else 0
            await self.do(fs.rename, place.parent, temporary, place.parent, place.name, flags)
        except (OSError, HpkvError) as error:
            with suppress(HpkvError):  # else it is noted, and done another time
                await clear(self.session)
            raise _explained(error, to or path) from error
        await clear(self.session)
        self.session.changed_behind(place.parent, place.name)
        return self.done

    async def source(self, path: str) -> Inode:
        inode = await self.do(self.session.fs.getattr, self.session.shelf.root_of(self.snapshot))
        for name in _parts(path):
            try:
                inode = await self.do(self.session.fs.lookup, inode.ino, name)
            except OSError:
                raise UserError(
                    f"there is no {path} in snapshot {self.snapshot.name!r}",
                    "write it as it is below the directory where the vault is mounted",
                ) from None
        return inode

    async def place(self, parts: list[bytes], make: bool) -> _Place:
        """Where it goes; directories on the way that are gone are made as they were."""
        if not parts:
            raise UserError("the root directory can't be restored over itself", "name a TO")
        fs, parent = self.session.fs, ROOT_INO
        old: int | None = self.session.shelf.root_of(self.snapshot)
        for name in parts[:-1]:
            below = await self.find(parent, name)
            old_below = await self.find(old, name) if old is not None and make else None
            if below is None and old_below is not None:
                below = await self.do(
                    fs.make, parent, name, old_below.mode, old_below.uid, old_below.gid
                )
                self.session.changed_behind(parent, name)
            if below is None or not below.is_dir:
                where = name.decode(errors="replace")
                raise UserError(f"there is no directory {where} to restore into", "make it first")
            parent, old = below.ino, old_below.ino if old_below else None
        return _Place(parent, parts[-1], await self.find(parent, parts[-1]))

    async def find(self, parent: int, name: bytes) -> Inode | None:
        try:
            return await self.do(self.session.fs.lookup, parent, name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise

    # -- copying -------------------------------------------------------------------------

    async def copy(self, source: Inode, parent: int, name: bytes) -> None:
        """One thing and all below it."""
        work = [(source, parent, name)]
        finished: list[tuple[int, Inode]] = []
        while work:
            source, parent, name = work.pop()
            made = await self.copy_one(source, parent, name)
            if made is None:
                continue
            finished.append((made, source))
            if source.is_dir:
                for entry in await self.entries(source.ino):
                    below = await self.do(self.session.fs.getattr, entry[1])
                    work.append((below, made, entry[0]))
        for made, source in reversed(finished):  # times of directories change while they fill
            times = Changes(mode=source.mode, atime=source.atime, mtime=source.mtime)
            await self.do(self.session.fs.setattr, made, times)

    async def entries(self, ino: int) -> list[tuple[bytes, int]]:
        found: list[tuple[bytes, int]] = []
        after = -1
        while batch := await self.do(self.session.fs.readdir, ino, after, 1_000):
            found += ((entry.name, entry.ino) for entry in batch)
            after = batch[-1].cookie
        return found

    async def copy_one(self, source: Inode, parent: int, name: bytes) -> int | None:
        """Without what is in a directory; None for one more name of what is copied already."""
        await self.session.admit(0)
        fs = self.session.fs
        if source.ino in self.links:
            await self.do(fs.link, self.links[source.ino], parent, name)
            return None
        if stat.S_ISLNK(source.mode):
            target = await self.do(fs.readlink, source.ino)
            made = await self.do(fs.symlink, parent, name, target, source.uid, source.gid)
        else:
            make = (parent, name, source.mode, source.uid, source.gid, source.rdev)
            made = await self.do(fs.make, *make)
        if made.gid != source.gid:
            await self.do(fs.setattr, made.ino, Changes(gid=source.gid))
        if not source.is_dir and source.nlink > 1:
            self.links[source.ino] = made.ino
        if source.is_file:
            await self.copy_data(source, made.ino)
        for attribute in await self.do(fs.listxattr, source.ino):
            value = await self.do(fs.getxattr, source.ino, attribute)
            await self.do(fs.setxattr, made.ino, attribute, value)
        self.done.files += 1
        self.progress(self.done.files, 0)
        return made.ino

    async def copy_data(self, source: Inode, ino: int) -> None:
        fs = self.session.fs
        for offset in range(0, source.size, CHUNK):
            self.session.prefetch(self._ahead(source, offset))
            data = await self.do(fs.read, source.ino, offset, CHUNK)
            for at in range(0, len(data), BLOCK):
                block = data[at : at + BLOCK]
                if any(block):
                    await self.session.admit(len(block))
                    await self.do(fs.write, ino, offset + at, block)
        await self.do(fs.setattr, ino, Changes(size=source.size))
        self.done.bytes += source.size

    def _ahead(self, source: Inode, offset: int) -> list[Any]:
        first = offset // BLOCK
        last = min(first + 2 * CHUNK // BLOCK, -(-source.size // BLOCK))
        try:
            return list(self.session.fs.view.extent_refs(source.ino, range(first, last)))
        except Missing:
            return []  # only a hint


async def remove(session: Session, parent: int, name: bytes) -> None:
    """Remove a tree; OSError (ENOENT when there is none), StoreError."""
    fs = session.fs
    found = await run(session, lambda: fs.lookup(parent, name))
    if not found.is_dir:
        await run(session, lambda: fs.unlink(parent, name))
        return
    while entries := await run(session, lambda: fs.readdir(found.ino, -1, 1_000)):
        for entry in entries:
            await session.admit(0)
            await remove(session, found.ino, entry.name)
    await run(session, lambda: fs.rmdir(parent, name))


def _parts(path: str) -> list[bytes]:
    """The names on a path from the vault's root; UserError when it leaves it."""
    parts = [part for part in os.fsencode(path).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise UserError(f"{path} is not a path from the vault's root", "write it without ..")
    return parts


def _explained(error: OSError | HpkvError, path: str) -> HpkvError:
    if isinstance(error, HpkvError):
        return error
    if error.errno == errno.ENOSPC:
        return UserError(
            f"{path} was not restored: there are not enough tokens for it", "hpkvfs redeem"
        )
    return UserError(f"{path} was not restored: {error.strerror}")
