"""Random programs against the model, with crashes, a failing store, publication and collection.

The oracle after every reboot and at the end: the visible tree equals the model's, fsck of the
published generation finds nothing, and every blob at the store is accounted for.
"""

from __future__ import annotations

import errno
import stat
import tempfile
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpkvfs.errors import StoreError
from hpkvfs.fs.filesystem import Changes
from hpkvfs.volume.gc import dead_entries
from hpkvfs.volume.items import Inode
from tests.fs.harness import Machine
from tests.fs.model import Model

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
EVENTS = st.one_of(
    st.just(("publish",)),
    st.just(("publish",)),
    st.just(("crash",)),
    st.just(("collect",)),
    st.tuples(st.just("lose"), st.integers(1, 3)),
    st.tuples(st.just("die"), st.integers(0, 6)),
)
PROGRAMS = st.lists(st.one_of(CHANGES, CHANGES, CHANGES, EVENTS), min_size=5, max_size=60)


class World:
    """One client after another on one machine, beside the model."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine(directory)
        self.client = self.machine.boot()
        self.model = Model()

    async def step(self, step: tuple[Any, ...]) -> None:
        name, *args = step
        handler = getattr(self, f"_{name}", None)
        if handler is not None:
            await handler(*args)
            return
        expected = _outcome(lambda: self._apply_to_model(name, args))
        found = await self._apply(name, args)
        assert found == expected, (step, errno.errorcode.get(found), errno.errorcode.get(expected))

    async def _apply(self, name: str, args: list[Any]) -> int:
        fs, do = self.client.fs, self.client.do
        try:
            parent = await self._directory(args[0][:-1])
            last = args[0][-1]
            match name:
                case "file":
                    await do(fs.make, parent, last, stat.S_IFREG | 0o644, 0, 0)
                case "dir":
                    await do(fs.make, parent, last, stat.S_IFDIR | 0o755, 0, 0)
                case "fifo":
                    await do(fs.make, parent, last, stat.S_IFIFO | 0o600, 0, 0)
                case "symlink":
                    await do(fs.symlink, parent, last, args[1], 0, 0)
                case "link":
                    ino = await self._find(args[0])
                    await do(fs.link, ino, await self._directory(args[1][:-1]), args[1][-1])
                case "unlink":
                    await do(fs.unlink, parent, last)
                case "rmdir":
                    await do(fs.rmdir, parent, last)
                case "rename":
                    above = await self._directory(args[1][:-1])
                    await do(fs.rename, parent, last, above, args[1][-1], args[2])
                case _:
                    await self._change_inode(name, await self._find(args[0]), args)
        except OSError as error:
            return error.errno or -1
        return 0

    async def _change_inode(self, name: str, ino: int, args: list[Any]) -> None:
        fs, do = self.client.fs, self.client.do
        inode = await do(fs.getattr, ino)
        match name:
            case "write":
                if inode.is_dir:  # the kernel does not send such writes
                    raise OSError(errno.EISDIR, "")
                if not inode.is_file:
                    raise OSError(errno.EINVAL, "")
                await do(fs.write, ino, args[1], args[2])
            case "truncate":
                await do(fs.setattr, ino, Changes(size=args[1]))
            case "chmod":
                await do(fs.setattr, ino, Changes(mode=args[1]))
            case "setxattr":
                await do(fs.setxattr, ino, args[1], args[2])
            case "removexattr":
                await do(fs.removexattr, ino, args[1])

    def _apply_to_model(self, name: str, args: list[Any]) -> None:
        model = self.model
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

    async def _find(self, path: tuple[bytes, ...]) -> int:
        ino = 1
        for name in path:
            ino = (await self.client.do(self.client.fs.lookup, ino, name)).ino
        return ino

    async def _directory(self, path: tuple[bytes, ...]) -> int:
        """As the kernel resolves a parent."""
        inode = await self.client.do(self.client.fs.getattr, await self._find(path))
        if not inode.is_dir:
            raise OSError(errno.ENOTDIR, "")
        return inode.ino

    # -- events ----------------------------------------------------------------------

    async def _publish(self) -> None:
        self.machine.store.down = False
        await self.client.publish()

    async def _collect(self) -> None:
        try:
            await self.client.collect()
        except StoreError:
            self.machine.store.down = False

    async def _lose(self, replies: int) -> None:
        self.machine.store.lose_next = replies
        await self._try_to_publish()

    async def _die(self, calls: int) -> None:
        """The store goes away in the middle of a publication; then the client is killed."""
        self.machine.store.fail_after = calls
        await self._try_to_publish()
        await self._crash()

    async def _try_to_publish(self) -> None:
        try:
            await self.client.publish()
        except StoreError:
            pass
        store = self.machine.store
        store.down, store.fail_after, store.lose_next = False, None, 0

    async def _crash(self) -> None:
        # what a kill leaves: the log as it is; the old process writes nothing more
        old = self.client
        self.client = self.machine.boot()
        old.close()
        await self._adopt()
        assert await self.tree() == self.model.tree()

    async def _adopt(self) -> None:
        """As Session does: the anchor after ours may be there already."""
        known = self.machine.known
        generation = known.anchor.generation + 1 if known else 0
        newer = await self.client.volume.find_anchor(generation)  # type: ignore[arg-type]
        if newer is not None:
            old = known.anchor if known else None
            self.client.fs.rebase(
                newer.anchor.size - (old.size if old else 0),
                newer.anchor.files - (old.files if old else 0),
            )
            self.client.volume.known = self.machine.known = newer
            self.client.publisher.next_id = max(
                self.client.publisher.next_id, newer.anchor.next_id
            )
            first = newer.anchor.next_id
            self.client.publisher.orphans = {
                ref for ref in self.client.publisher.orphans if ref.id >= first
            }

    # -- oracle ----------------------------------------------------------------------

    async def tree(self) -> dict[tuple[bytes, ...], Any]:
        seen: dict[tuple[bytes, ...], Any] = {}
        await self._walk((), await self.client.do(self.client.fs.getattr, 1), seen)
        return seen

    async def _walk(self, path: tuple[bytes, ...], inode: Inode, seen: dict[Any, Any]) -> None:
        fs, do = self.client.fs, self.client.do
        data = await do(fs.read, inode.ino, 0, 1 << 30) if inode.is_file else b""
        target = await do(fs.readlink, inode.ino) if stat.S_ISLNK(inode.mode) else b""
        names = await do(fs.listxattr, inode.ino)
        xattrs = {name: await do(fs.getxattr, inode.ino, name) for name in names}
        seen[path] = (inode.mode, inode.nlink, data, target, xattrs)
        for entry in await do(fs.readdir, inode.ino, -1, 1_000) if inode.is_dir else []:
            below = await do(fs.getattr, entry.ino)
            await self._walk((*path, entry.name), below, seen)

    async def check(self) -> None:
        assert await self.tree() == self.model.tree()
        await self._publish()
        assert await self.tree() == self.model.tree()
        report = await self.client.check()
        assert report.problems == []
        await self.check_blobs()

    async def check_blobs(self) -> None:
        """Every stored blob is live, dead, a page or an anchor: nothing leaks, nothing lacks."""
        volume, store = self.client.volume, self.machine.store
        known = volume.known
        assert known is not None
        dead, pages = await dead_entries(volume)
        anchors = len(known.anchor.kept) + 1
        absent = [e for e in dead if volume.keys.signer(e.ref.id).public not in store.blobs]
        assert [e.ref for e in absent if e.ref not in self.client.publisher.removed] == []
        accounted = known.anchor.live + len(dead) - len(absent) + len(pages) + anchors
        assert len(store.blobs) == accounted


def _outcome(call: Any) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


START: list[tuple[Any, ...]] = [
    ("dir", (b"a",)),
    ("dir", (b"a", b"b")),
    ("file", (b"b",)),
    ("write", (b"b",), 0, b"\1" * 40_000),
    ("file", (b"a", b"c")),
    ("write", (b"a", b"c"), 100, b"\2" * 3_000),
]


async def _run_program(program: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        try:
            for step in START + program:
                await world.step(step)
            await world.check()
            await world._collect()
            await world.check()
            await world._crash()
            await world.check()
        finally:
            world.client.close()


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(PROGRAMS)
@example([("file", (b"a",)), ("write", (b"a",), 0, b"x" * 50_000), ("die", 2), ("publish",)])
def test_programs_against_the_model(program: list[tuple[Any, ...]]) -> None:
    """Whatever is done, and whenever the client or the store dies, the model's tree is there."""
    trio.run(_run_program, program)


