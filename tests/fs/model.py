"""A filesystem in dictionaries, written from the man pages and not from our code."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NOREPLACE, EXCHANGE = 1, 2


@dataclass
class Thing:
    """An inode of any type."""

    mode: int
    nlink: int = 1
    data: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    names: dict[bytes, Thing] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def lend_no_rights(self) -> None:
        """What was written to runs as whoever runs it."""
        self.mode &= ~stat.S_ISUID


class Model:
    """Paths are tuples of names."""

    def __init__(self) -> None:
        self.root = Thing(stat.S_IFDIR | 0o755, 2)

    def at(self, path: tuple[bytes, ...]) -> Thing:
        here = self.root
        for name in path:
            if not here.is_dir:
                raise OSError(errno.ENOTDIR, "")
            if name not in here.names:
                raise OSError(errno.ENOENT, "")
            here = here.names[name]
        return here

    def _parent(self, path: tuple[bytes, ...]) -> Thing:
        parent = self.at(path[:-1])
        if not parent.is_dir:
            raise OSError(errno.ENOTDIR, "")
        return parent

    def make(self, path: tuple[bytes, ...], mode: int, target: bytes = b"") -> None:
        parent = self._parent(path)
        if path[-1] in parent.names:
            raise OSError(errno.EEXIST, "")
        new = Thing(mode, 2 if stat.S_ISDIR(mode) else 1, target=target)
        parent.names[path[-1]] = new
        parent.nlink += new.is_dir

    def link(self, old: tuple[bytes, ...], path: tuple[bytes, ...]) -> None:
        thing, parent = self.at(old), self._parent(path)
        if thing.is_dir:
            raise OSError(errno.EPERM, "")
        if path[-1] in parent.names:
            raise OSError(errno.EEXIST, "")
        parent.names[path[-1]] = thing
        thing.nlink += 1

    def unlink(self, path: tuple[bytes, ...]) -> None:
        parent, thing = self._parent(path), self.at(path)
        if thing.is_dir:
            raise OSError(errno.EISDIR, "")
        del parent.names[path[-1]]
        thing.nlink -= 1

    def rmdir(self, path: tuple[bytes, ...]) -> None:
        parent, thing = self._parent(path), self.at(path)
        if not thing.is_dir:
            raise OSError(errno.ENOTDIR, "")
        if thing.names:
            raise OSError(errno.ENOTEMPTY, "")
        del parent.names[path[-1]]
        parent.nlink -= 1

    def rename(self, old: tuple[bytes, ...], new: tuple[bytes, ...], flags: int) -> None:
        source, target = self._parent(old), self._parent(new)
        moved = self.at(old)
        other = target.names.get(new[-1])
        if flags == NOREPLACE and other is not None:
            raise OSError(errno.EEXIST, "")
        if flags == EXCHANGE and other is None:
            raise OSError(errno.ENOENT, "")
        if moved is other:
            return
        if moved.is_dir and new[: len(old)] == old:
            raise OSError(errno.EINVAL, "")
        if flags == EXCHANGE:
            assert other is not None
            if other.is_dir and old[: len(new)] == new:
                raise OSError(errno.EINVAL, "")
            source.names[old[-1]], target.names[new[-1]] = other, moved
            source.nlink += other.is_dir - moved.is_dir
            target.nlink += moved.is_dir - other.is_dir
            return
        if other is not None:
            if other.is_dir and not moved.is_dir:
                raise OSError(errno.EISDIR, "")
            if moved.is_dir and not other.is_dir:
                raise OSError(errno.ENOTDIR, "")
            if other.names:
                raise OSError(errno.ENOTEMPTY, "")
            other.nlink -= 1
            target.nlink -= other.is_dir
        del source.names[old[-1]]
        target.names[new[-1]] = moved
        source.nlink -= moved.is_dir
        target.nlink += moved.is_dir

    def write(self, path: tuple[bytes, ...], offset: int, data: bytes) -> None:
        file = self._file(path)
        if data and len(file.data) < offset:
            file.data.extend(bytes(offset - len(file.data)))
        if data:
            file.data[offset : offset + len(data)] = data
            file.lend_no_rights()

    def truncate(self, path: tuple[bytes, ...], size: int) -> None:
        file = self._file(path)
        del file.data[size:]
        file.data.extend(bytes(size - len(file.data)))
        file.lend_no_rights()

    def _file(self, path: tuple[bytes, ...]) -> Thing:
        thing = self.at(path)
        if thing.is_dir:
            raise OSError(errno.EISDIR, "")
        if not stat.S_ISREG(thing.mode):
            raise OSError(errno.EINVAL, "")
        return thing

    def chmod(self, path: tuple[bytes, ...], mode: int) -> None:
        thing = self.at(path)
        thing.mode = stat.S_IFMT(thing.mode) | mode

    def setxattr(self, path: tuple[bytes, ...], name: bytes, value: bytes) -> None:
        self.at(path).xattrs[name] = value

    def removexattr(self, path: tuple[bytes, ...], name: bytes) -> None:
        if name not in self.at(path).xattrs:
            raise OSError(errno.ENODATA, "")
        del self.at(path).xattrs[name]

    def tree(self) -> dict[tuple[bytes, ...], Any]:
        """Everything that can be seen, by path."""
        seen: dict[tuple[bytes, ...], Any] = {}
        self._walk((), self.root, seen)
        return seen

    def _walk(self, path: tuple[bytes, ...], thing: Thing, seen: dict[Any, Any]) -> None:
        seen[path] = (thing.mode, thing.nlink, bytes(thing.data), thing.target, thing.xattrs.copy())
        for name, below in thing.names.items():
            self._walk((*path, name), below, seen)


def errno_of(call: Callable[..., Any], *args: Any) -> int:
    """0, or the errno that the call fails with."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or os.EX_SOFTWARE
    return 0
