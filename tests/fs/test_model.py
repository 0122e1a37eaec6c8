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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpkvfs.errors import StoreError
from hpkvfs.volume.gc import dead_entries
from tests.fs.harness import Machine
from tests.fs.model import Model
from tests.fs.play import CHANGES, START, Step, play, play_on_model, tree

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
        finally:
            world.client.close()


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(PROGRAMS)
@example([("file", (b"a",)), ("write", (b"a",), 0, b"x" * 50_000), ("die", 2), ("publish",)])
def test_programs_against_the_model(program: list[Step]) -> None:
    """Whatever is done, and whenever the client or the store dies, the model's tree is there."""
    trio.run(_run_program, program)
