"""A disk in memory that loses what was not synced: the files of a redo log.

Two ways to die: a killed process loses nothing that it wrote; a machine that loses power keeps,
of each file, what was synced and any part of what came after it (or zeros in its place), and
of names made or removed since their directory was synced, any.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.simulation.points import Point, Side


@dataclass(eq=False)
class File:
    """Bytes as a reader sees them, and as they are on the disk for certain."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


class Disk:
    """A directory of files, and directories below it whose names hold the whole path.

    Syncing one directory syncs the names in all of them; a directory itself is never lost.
    """

    def __init__(self, side: Side, chance: random.Random) -> None:
        self._side = side
        self._chance = chance
        self.files: dict[str, File] = {}
        self.directories: set[str] = set()
        self._named: dict[str, File] = {}

    def check(self, point: Point) -> None:
        """Pass a point."""
        self._side.at(point)

    @property
    def alive(self) -> bool:
        """Whether who holds a file of it still lives."""
        return self._side.alive

    @property
    def full(self) -> bool:
        """Whether nothing more can be written."""
        return self._side.disk_full

    def sync_names(self) -> None:
        """What fsync of the directory does."""
        self._named = dict(self.files)

    def lose_power(self) -> None:
        """Keep what was synced, and of the rest whatever chance keeps."""
        for name in sorted(self.files.keys() | self._named.keys()):
            durable = self.files.get(name) is self._named.get(name)
            file = self.files.get(name) if durable else self._either(name)
            if file is None:
                self.files.pop(name, None)
            else:
                self.files[name] = file
        for file in self.files.values():
            self._lose_unsynced(file)
        self.sync_names()

    def _either(self, name: str) -> File | None:
        return self._chance.choice([self.files.get(name), self._named.get(name)])

    def _lose_unsynced(self, file: File) -> None:
        length = len(file.data)
        same = next(
            (
                at
                for at, (new, old) in enumerate(zip(file.data, file.synced, strict=False))
                if new != old
            ),
            min(length, len(file.synced)),
        )
        end = max(same, len(file.data.rstrip(b"\0")))  # the zeros written ahead say nothing
        if end > same:
            kept = self._chance.randint(same, end)
            zeros = self._chance.choice([0, 0, length - kept])
            # what was overwritten is as it was synced; what was appended is gone, or zeros
            file.data = file.data[:kept] + (file.synced[kept:] or bytes(zeros))
        elif length < len(file.synced):
            file.data = bytearray(file.synced)
        file.synced = bytes(file.data)


@dataclass(frozen=True)
class Place:
    """As much of a pathlib.Path as a redo log, or a copy of one, uses."""

    disk: Disk
    path: str = ""

    def __truediv__(self, name: str) -> Place:
        return Place(self.disk, f"{self.path}/{name}" if self.path else name)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return "." + self.name.rpartition(".")[2]

    def mkdir(self, mode: int, exist_ok: bool) -> None:
        self.disk.directories.add(self.path)

    def iterdir(self) -> Iterator[Place]:
        inside = f"{self.path}/" if self.path else ""
        names = sorted(self.disk.directories | self.disk.files.keys())
        below = [name.removeprefix(inside) for name in names if name.startswith(inside)]
        return iter([self / name for name in below if name and "/" not in name])

    def glob(self, pattern: str) -> Iterator[Place]:
        prefix = pattern.removesuffix("*")
        return iter([one for one in self.iterdir() if one.name.startswith(prefix)])

    def unlink(self, missing_ok: bool = False) -> None:
        self.disk.check(Point.REDO_KEPT)
        self.disk.files.pop(self.path, None)
        self.disk.check(Point.REDO_DROPPED)


class DiskOs:
    """As much of the module os as a redo log uses, on Disks."""

    O_CREAT, O_EXCL = os.O_CREAT, os.O_EXCL
    O_CLOEXEC = os.O_CLOEXEC
    O_RDONLY, O_RDWR, O_DIRECTORY = os.O_RDONLY, os.O_RDWR, os.O_DIRECTORY
    strerror = staticmethod(os.strerror)

    def __init__(self) -> None:
        self._open: dict[int, tuple[Disk, File | None]] = {}
        self._next = 1_000

    def open(self, path: Place, flags: int, mode: int = 0o777) -> int:
        """Make a file, or open one that is there, or the directory."""
        disk, file = path.disk, None
        is_directory = not path.path or path.path in disk.directories
        if not is_directory and not flags & os.O_CREAT:
            file = disk.files[path.path]
        elif not is_directory:
            disk._side.check()
            if path.path in disk.files:
                raise FileExistsError(errno.EEXIST, path.path)
            if disk.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file = disk.files[path.path] = File()
            disk.check(Point.REDO_CREATED)
        return self._give(disk, file)

    def link(self, old: Place, new: Place) -> None:
        """Another name of a file."""
        old.disk._side.check()
        if old.disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        old.disk.files[new.path] = old.disk.files[old.path]

    def write(self, fd: int, data: bytes) -> int:
        """Append; half of it when the disk is full."""
        return self.pwritev(fd, [data], len(self._file(fd)[1].data))

    def pwritev(self, fd: int, parts: Sequence[bytes], offset: int) -> int:
        """Write at a place; half of it when the disk is full."""
        disk, file = self._file(fd)
        disk.check(Point.REDO_BEFORE)
        data = b"".join(parts)
        half = len(data.rstrip(b"\0")) // 2
        file.data[offset : offset + half] = data[:half]
        if disk.full:
            return half
        disk.check(Point.REDO_TORN)
        file.data[offset : offset + len(data)] = data
        disk.check(Point.REDO_AFTER)
        return len(data)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read at a place."""
        return bytes(self._file(fd)[1].data[offset : offset + size])

    def ftruncate(self, fd: int, size: int) -> None:
        """Shorten."""
        disk, file = self._file(fd)
        if disk.alive:
            del file.data[size:]

    def fstat(self, fd: int) -> SimpleNamespace:
        """Its size."""
        return SimpleNamespace(st_size=len(self._file(fd)[1].data))

    def fdatasync(self, fd: int) -> None:
        """Make a file's bytes durable; nothing happens when the process is dead."""
        disk, file = self._file(fd)
        if disk.alive:
            disk.check(Point.REDO_UNSYNCED)
            file.synced = bytes(file.data)
            disk.check(Point.REDO_SYNCED)

    def fsync(self, fd: int) -> None:
        """Make the names in the directory durable."""
        disk, _ = self._open[fd]
        if disk.alive:
            disk.sync_names()

    def dup(self, fd: int) -> int:
        """Another descriptor of the same file."""
        return self._give(*self._open[fd])

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        del self._open[fd]

    def _give(self, disk: Disk, file: File | None) -> int:
        self._next += 1
        self._open[self._next] = disk, file
        return self._next

    def _file(self, fd: int) -> tuple[Disk, File]:
        disk, file = self._open[fd]
        assert file is not None
        return disk, file


def as_os() -> Any:
    """A DiskOs, to stand in for the module."""
    return DiskOs()
