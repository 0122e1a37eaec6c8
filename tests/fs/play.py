"""Playing programs of filesystem operations, on ours and on the model.

A step is a tuple: the operation's name, then paths (tuples of names) and other arguments.
"""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from hpkvfs.fs.backend import Backend, run
from hpkvfs.fs.inodes import Changes
from hpkvfs.volume.items import Inode
from tests.fs.model import Model

Path = tuple[bytes, ...]
Step = tuple[Any, ...]
Tree = dict[Path, Any]

NAMES = [b"a", b"b", b"c"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(tuple)
SIZES = st.one_of(
    st.integers(0, 70_000), st.sampled_from([0, 1, 2_048, 8_192, 8_193, 16_384, 16_385, 40_000])
)
BYTES = st.builds(
    lambda size, fill: bytes([fill]) * size,
    st.sampled_from([1, 100, 2_048, 5_000, 8_192, 9_000, 16_384, 20_000, 50_000]),
    st.integers(0, 3),
)
CHANGES = st.one_of(
    st.tuples(st.just("file"), PATHS),
    st.tuples(st.just("file"), PATHS),
    st.tuples(st.just("dir"), PATHS),
    st.tuples(st.just("symlink"), PATHS, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("fifo"), PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("unlink"), PATHS),
    st.tuples(st.just("rmdir"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS, st.sampled_from([0, 0, 1, 2])),
    st.tuples(st.just("write"), PATHS, SIZES, BYTES),
    st.tuples(st.just("write"), PATHS, SIZES, BYTES),
    st.tuples(st.just("truncate"), PATHS, SIZES),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from([0o600, 0o644, 0o4755])),
    st.tuples(st.just("setxattr"), PATHS, st.sampled_from(NAMES), st.binary(max_size=300)),
    st.tuples(st.just("removexattr"), PATHS, st.sampled_from(NAMES)),
)
START: list[Step] = [
    ("dir", (b"a",)),
    ("dir", (b"a", b"b")),
    ("file", (b"b",)),
    ("write", (b"b",), 0, b"\1" * 40_000),
    ("file", (b"a", b"c")),
    ("write", (b"a", b"c"), 100, b"\2" * 3_000),
]


def random_step(chance: random.Random) -> Step:
    """A step as CHANGES gives, without Hypothesis: for tests that run for long."""

    def path() -> Path:
        return tuple(chance.choice(NAMES) for _ in range(chance.randint(1, 3)))

    def data() -> bytes:
        return bytes([chance.randrange(4)]) * chance.choice([1, 2_048, 5_000, 9_000, 20_000])

    steps: list[Callable[[], Step]] = [
        lambda: ("file", path()),
        lambda: ("file", path()),
        lambda: ("dir", path()),
        lambda: ("symlink", path(), data()[:30]),
        lambda: ("link", path(), path()),
        lambda: ("unlink", path()),
        lambda: ("rmdir", path()),
        lambda: ("rename", path(), path(), chance.choice([0, 0, 1, 2])),
        lambda: ("write", path(), chance.randrange(60_000), data()),
        lambda: ("write", path(), chance.randrange(60_000), data()),
        lambda: ("truncate", path(), chance.randrange(60_000)),
        lambda: ("chmod", path(), chance.choice([0o600, 0o644])),
        lambda: ("setxattr", path(), chance.choice(NAMES), data()[:100]),
    ]
    return chance.choice(steps)()


async def play(backend: Backend, step: Step) -> int:
    """Carry out one step as the kernel would ask for it; 0 or the errno."""
    try:
        await _play(backend, step)
    except OSError as error:
        return error.errno or -1
    return 0


def play_on_model(model: Model, step: Step) -> int:
    """Carry out one step on the model; 0 or the errno."""
    name, *args = step
    try:
        match name:
            case "file":
                model.make(args[0], stat.S_IFREG | 0o644)
            case "dir":
                model.make(args[0], stat.S_IFDIR | 0o755)
            case "fifo":
                model.make(args[0], stat.S_IFIFO | 0o600)
            case "symlink":
                model.make(args[0], stat.S_IFLNK | 0o777, args[1])
            case _:
                getattr(model, name)(*args)
    except OSError as error:
        return error.errno or -1
    return 0


async def _play(backend: Backend, step: Step) -> None:
    fs = backend.fs

    async def do(operation: Callable[..., Any], *args: Any) -> Any:
        return await run(backend, lambda: operation(*args))

    async def find(path: Path) -> int:
        ino = 1
        for name in path:
            ino = (await do(fs.lookup, ino, name)).ino
        return ino

    async def directory(path: Path) -> int:
        inode = await do(fs.getattr, await find(path))
        if not inode.is_dir:
            raise OSError(errno.ENOTDIR, "")
        return int(inode.ino)

    name, path, *args = step
    parent, last = await directory(path[:-1]), path[-1]
    match name:
        case "file":
            await do(fs.make, parent, last, stat.S_IFREG | 0o644, 0, 0)
        case "dir":
            await do(fs.make, parent, last, stat.S_IFDIR | 0o755, 0, 0)
        case "fifo":
            await do(fs.make, parent, last, stat.S_IFIFO | 0o600, 0, 0)
        case "symlink":
            await do(fs.symlink, parent, last, args[0], 0, 0)
        case "link":
            ino = await find(path)
            await do(fs.link, ino, await directory(args[0][:-1]), args[0][-1])
        case "unlink":
            await do(fs.unlink, parent, last)
        case "rmdir":
            await do(fs.rmdir, parent, last)
        case "rename":
            above = await directory(args[0][:-1])
            await do(fs.rename, parent, last, above, args[0][-1], args[1])
        case _:
            await _play_on_inode(backend, name, await do(fs.lookup, parent, last), args)


async def _play_on_inode(backend: Backend, name: str, inode: Inode, args: list[Any]) -> None:
    fs, ino = backend.fs, inode.ino
    match name:
        case "write":
            if not inode.is_file:  # the kernel does not send such writes
                raise OSError(errno.EISDIR if inode.is_dir else errno.EINVAL, "")
            await run(backend, lambda: fs.write(ino, args[0], args[1]))
        case "truncate":
            await run(backend, lambda: fs.setattr(ino, Changes(size=args[0])))
        case "chmod":
            await run(backend, lambda: fs.setattr(ino, Changes(mode=args[0])))
        case "setxattr":
            await run(backend, lambda: fs.setxattr(ino, args[0], args[1]))
        case "removexattr":
            await run(backend, lambda: fs.removexattr(ino, args[0]))
        case _:
            raise AssertionError(name)


async def tree(backend: Backend, root: int = 1) -> Tree:
    """Everything that can be seen, by path; as Model.tree."""
    seen: Tree = {}
    await _walk(backend, (), await run(backend, lambda: backend.fs.getattr(root)), seen)
    return seen


async def _walk(backend: Backend, path: Path, inode: Inode, seen: Tree) -> None:
    fs, ino = backend.fs, inode.ino

    async def do(operation: Callable[..., Any], *args: Any) -> Any:
        return await run(backend, lambda: operation(*args))

    data = await do(fs.read, ino, 0, 1 << 30) if inode.is_file else b""
    target = await do(fs.readlink, ino) if stat.S_ISLNK(inode.mode) else b""
    xattrs = {name: await do(fs.getxattr, ino, name) for name in await do(fs.listxattr, ino)}
    seen[path] = (inode.mode, inode.nlink, data, target, xattrs)
    for entry in await do(fs.readdir, ino, -1, 1_000) if inode.is_dir else []:
        below = await do(fs.getattr, entry.ino)
        await _walk(backend, (*path, entry.name), below, seen)
