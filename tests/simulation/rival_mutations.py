"""Planted bugs about several clients, snapshots and collection: see mutations.py.

The simulator plays them with rivals.Rivals.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import hpkvfs.fs.overlap
import hpkvfs.fs.publisher
import hpkvfs.kept
import hpkvfs.session.footing
import hpkvfs.volume.commit
from hpkvfs.errors import SecondWriter
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.publisher import Publisher
from hpkvfs.session import Session
from hpkvfs.types import BlobId, Generation
from hpkvfs.volume.snapshots import Plan, plan
from tests.simulation.mutations import Replacement

RIVAL_MUTATIONS: Final[dict[str, Callable[[], list[Replacement]]]] = {}


def _mutation(make: Callable[[], list[Replacement]]) -> Callable[[], list[Replacement]]:
    RIVAL_MUTATIONS[make.__name__.strip("_").replace("_", " ")] = make
    return make


@_mutation
def _second_writer_overwrites_the_anchor() -> list[Replacement]:
    """Who is refused goes on as if the other's anchor were its own."""
    store_one = Publisher._store_one

    async def stubborn(self: Publisher, sealed: Any) -> None:
        with suppress(SecondWriter):
            await store_one(self, sealed)

    return [(Publisher, "_store_one", stubborn)]


@_mutation
def _collected_anchor_taken_for_a_free_one() -> list[Replacement]:
    """Only the next generation is looked for, whose anchor another client may have collected."""

    def next_one(generation: Generation | None) -> list[Generation]:
        return [Generation(0 if generation is None else generation + 1)]

    return [
        (hpkvfs.session.footing, "heralds", next_one),
        (hpkvfs.fs.publisher, "heralds", next_one),
        (hpkvfs.volume.commit, "handed_over", lambda previous, writer: ()),
    ]


@_mutation
def _refused_commit_drops_the_log() -> list[Replacement]:
    """Who is refused forgets what it could not publish."""
    publish = Publisher.publish

    async def hasty(self: Publisher, *arguments: Any) -> None:
        try:
            await publish(self, *arguments)
        except SecondWriter:
            self._fs.drop_log(self._fs.end_log())
            raise

    return [(Publisher, "publish", hasty)]


@_mutation
def _takeover_forgets_the_log() -> list[Replacement]:
    """What does not fit is given up instead of kept aside."""

    def forget(state: Any, journal: Any, base: Any, number: int) -> int:
        return 1

    return [(hpkvfs.kept, "put_aside", forget)]


@_mutation
def _takeover_forgets_what_it_had_stored() -> list[Replacement]:
    """Blobs of the refused attempt are not accounted for, by whoever goes on."""
    return [(hpkvfs.kept, "left", lambda journal: None)]


@_mutation
def _takeover_puts_on_top_what_does_not_fit() -> list[Replacement]:
    """Changes of both are merged without a look at what they concern."""
    return [(hpkvfs.fs.overlap, "applies", lambda *arguments: True)]


@_mutation
def _takeover_keeps_the_totals_of_before() -> list[Replacement]:
    """Numbers of inodes are the other's, sums of files and bytes those that were there."""

    def rest_on(self: Filesystem, next_ino: int, size: int, files: int) -> None:
        self.next_ino = max(self.next_ino, next_ino)

    return [(Filesystem, "rest_on", rest_on)]


@_mutation
def _gc_takes_what_a_snapshot_holds() -> list[Replacement]:
    """What dies is on the dead list, snapshot or not."""
    bury = hpkvfs.volume.commit._bury

    def ruthless(base: Any, anchor: Any, freed: Any, maker: Any) -> Any:
        return bury(base, replace(anchor, horizon=BlobId(0)), freed, maker)

    return [(hpkvfs.volume.commit, "_bury", ruthless)]


@_mutation
def _deleted_snapshot_takes_what_an_older_one_holds() -> list[Replacement]:
    """All that a deleted snapshot held is freed, whoever else holds it."""

    def greedy(*arguments: Any) -> Plan:
        made = plan(*arguments)
        for stay in made.stay:
            made.freed += stay.more
            stay.more.clear()
        return made

    return [(hpkvfs.fs.publisher, "plan", greedy)]


@_mutation
def _follower_stays_where_it_is() -> list[Replacement]:
    """A read-only client never looks beyond the generation it began with."""

    async def lazy(self: Session, *, thorough: bool) -> bool:
        return False

    async def content(self: Session) -> None:
        if self.options.read_only:
            self._footing._look_for_newer = nothing  # type: ignore[method-assign]
        await connect(self)

    async def nothing(known: Any) -> None:
        pass

    connect = Session.connect
    return [(Session, "follow", lazy), (Session, "connect", content)]
