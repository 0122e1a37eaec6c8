"""Random programs against the model, with crashes, a failing store, publication and collection.

The oracle after every reboot and at the end: the visible tree equals the model's, fsck of the
published generation finds nothing, and every blob at the store is accounted for.
"""

from __future__ import annotations

import errno
import tempfile
from contextlib import suppress
from pathlib import Path

import trio
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from hpkvfs.errors import StoreError
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.shelf import NoLog, Shelf
from hpkvfs.tree.node import Node
from hpkvfs.types import BlobRef
from hpkvfs.volume.blob import Kind
from hpkvfs.volume.fsck import Report
from hpkvfs.volume.gc import loading, read_list
from hpkvfs.volume.items import ItemKind
from hpkvfs.volume.snapshots import Snapshot
from tests.examples import examples
from tests.fs.harness import Machine
from tests.fs.model import Model
from tests.fs.play import CHANGES, START, Step, Tree, play, play_on_model, tree

EVENTS = st.one_of(
    st.just(("publish",)),
    st.just(("publish",)),
    st.just(("crash",)),
    st.just(("collect",)),
    st.tuples(st.just("lose"), st.integers(1, 3)),
    st.tuples(st.just("die"), st.integers(0, 6)),
    st.tuples(st.just("snapshot"), st.integers(0, 9), st.none() | st.integers(0, 6)),
    st.tuples(st.just("snapshot"), st.integers(0, 9), st.none()),
    st.tuples(st.just("unsnapshot"), st.integers(0, 9), st.none() | st.integers(0, 6)),
    st.tuples(st.just("unsnapshot"), st.integers(0, 9), st.none()),
)
PROGRAMS = st.lists(st.one_of(CHANGES, CHANGES, CHANGES, EVENTS), min_size=5, max_size=60)


class World:
    """One client after another on one machine, beside the model."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine(directory)
        self.client = self.machine.boot()
        self.model = Model()
        self.snapshots: dict[str, Tree] = {}
        self.wavering: dict[str, Tree] = {}  # about to be made or deleted when the store failed

    async def step(self, step: Step) -> None:
        handler = getattr(self, f"_{step[0]}", None)
        if handler is not None:
            await handler(*step[1:])
            return
        expected, found = play_on_model(self.model, step), await play(self.client, step)
        assert found == expected, (step, errno.errorcode.get(found), errno.errorcode.get(expected))

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

    async def _snapshot(self, number: int, calls: int | None) -> None:
        name = f"s{number}"
        if name in {*self.snapshots, *self.wavering}:
            return
        await self._change_snapshots([name], [], self.model.tree(), calls)
        if name not in self.wavering and name in await self._names():
            self.snapshots[name] = self.model.tree()

    async def _unsnapshot(self, number: int, calls: int | None) -> None:
        name = f"s{number}"
        if name not in self.snapshots or name in self.wavering:
            return
        await self._change_snapshots([], [name], self.snapshots[name], calls)
        if name not in self.wavering and name not in await self._names():
            del self.snapshots[name]

    async def _change_snapshots(
        self, create: list[str], delete: list[str], tree: Tree, calls: int | None
    ) -> None:
        """Ask for it, with a store that may fail after some calls; the client may be killed."""
        publisher, store = self.client.publisher, self.machine.store
        publisher.create += create
        publisher.delete |= set(delete)
        store.fail_after = calls
        try:
            await self.client.publish()
        except StoreError:
            if not publisher.withdraw(create, delete):
                self.wavering |= dict.fromkeys([*create, *delete], tree)
                if calls and calls % 2:
                    store.down, store.fail_after = False, None
                    await self._crash()
        store.down, store.fail_after = False, None

    async def _settle(self) -> None:
        """See what became of what was under way."""
        there = await self._names()
        for name, tree_then in self.wavering.items():
            self.snapshots.pop(name, None)
            if name in there:
                self.snapshots[name] = tree_then
        self.wavering.clear()

    async def _names(self) -> set[str]:
        return {snapshot.name for snapshot in await self._table()}

    async def _table(self) -> list[Snapshot]:
        volume = self.client.volume
        return await loading(volume, lambda: volume.snapshots())

    async def _try_to_publish(self) -> None:
        with suppress(StoreError):
            await self.client.publish()
        store = self.machine.store
        store.down, store.fail_after, store.lose_next = False, None, 0

    async def _crash(self) -> None:
        # what a kill leaves: the log as it is; the old process writes nothing more
        old = self.client
        self.client = self.machine.boot()
        old.close()
        await self._adopt()
        await self._settle()
        assert await tree(self.client) == self.model.tree()

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
            self.client.publisher.next_id = max(self.client.publisher.next_id, newer.anchor.next_id)
            first = newer.anchor.next_id
            self.client.publisher.orphans = {
                ref for ref in self.client.publisher.orphans if ref.id >= first
            }

    # -- oracle ----------------------------------------------------------------------

    async def check(self) -> None:
        assert await tree(self.client) == self.model.tree()
        await self._publish()
        assert await tree(self.client) == self.model.tree()
        await self._settle()
        await self._check_snapshots()
        report = await self.client.check()
        assert report.problems == []
        await self.check_blobs(report)

    async def _check_snapshots(self) -> None:
        """Each is as the tree was, both by itself and on the shelf."""
        table = await self._table()
        assert {snapshot.name for snapshot in table} == set(self.snapshots)
        names, client = self.client.shelf._names, self.client
        for snapshot in table:
            fs = client.fs
            try:
                client.fs = Filesystem(
                    Shelf(client.volume, names, only=snapshot), NoLog(), names, lambda: 0
                )
                assert await tree(client) == self.snapshots[snapshot.name]
            finally:
                client.fs = fs
            root = client.shelf.root_of(snapshot)
            assert await tree(client, root) == self.snapshots[snapshot.name]

    async def check_blobs(self, report: Report) -> None:
        """What is at the store is what can be reached, or is dead: nothing leaks, nothing lacks."""
        volume, store = self.client.volume, self.machine.store
        assert volume.known is not None
        removed = self.client.publisher.removed
        stored = report.stored - {ref.id for ref in removed}
        assert {volume.keys.signer(blob_id).public for blob_id in stored} == set(store.blobs)

    async def check_collected(self) -> None:
        """After collection nothing is left but what can be reached, and one round of lists."""
        await self._publish()
        await self._collect()
        await self._publish()
        known, volume = self.client.volume.known, self.client.volume
        assert known is not None
        dead, _ = await read_list(volume, known.anchor.dead)
        await self._collect()
        reachable = {known.ref, *known.anchor.kept, *known.anchor.tables}
        roots = [known.anchor.root, *(snapshot.root for snapshot in await self._table())]
        for root in roots:
            reachable |= await self._reach(root)
        lists = [known.anchor.held, *(snapshot.held for snapshot in await self._table())]
        for held in lists:
            reachable |= set((await read_list(volume, held))[1])
        keys = {volume.keys.signer(ref.id).public for ref in reachable}
        assert keys == set(self.machine.store.blobs), len(dead)

    async def _reach(self, root: BlobRef | None) -> set[BlobRef]:
        """Every blob of a tree, by walking it; shares nothing with what fsck does."""
        volume, found, work = self.client.volume, set[BlobRef](), [root] if root else []
        while work:
            ref = work.pop()
            found.add(ref)
            node = Node.decode(await volume.fetch(ref, Kind.NODE))
            for raw, value in zip(node.keys, node.values, strict=True):
                if node.level:
                    work.append(BlobRef.decode(value))
                elif raw[8] == ItemKind.EXTENT:
                    found.add(BlobRef.decode(value))
        return found


async def _run_program(program: list[Step]) -> None:
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
            await world.check_collected()
        finally:
            world.client.close()


@examples(250, suppress_health_check=list(HealthCheck))
@given(PROGRAMS)
@example([("snapshot", 1, None), ("write", (b"b",), 0, b"x" * 50_000), ("snapshot", 2, None),
          ("write", (b"b",), 0, b"y" * 50_000), ("unsnapshot", 1, None)])  # fmt: skip
@example([("file", (b"a",)), ("write", (b"a",), 0, b"x" * 50_000), ("die", 2), ("publish",)])
def test_programs_against_the_model(program: list[Step]) -> None:
    """Whatever is done, and whenever the client or the store dies, the model's tree is there."""
    trio.run(_run_program, program)
