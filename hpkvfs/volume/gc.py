"""Collection: deletes dead blobs for their refund.

Only blobs that are dead in a generation already published are deleted, in random order; at
random times, if wanted, so that a server does not see them go together.
The dead list itself changes with the next generation published; until then the caller
keeps what was deleted, and a crash in between costs nothing but look-ups of absent keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from hpkvfs.errors import KeyAbsent
from hpkvfs.parallel import each
from hpkvfs.types import BlobRef, Generation, Missing
from hpkvfs.volume.deadlist import Dead, DeadList
from hpkvfs.volume.volume import Volume

DELETES_AT_ONCE = 16
CHUNKS = 8
LEAST_CHUNK = 1_000

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(slots=True)
class Collected:
    """What one collection did: blobs deleted, and those the server no longer had."""

    deleted: list[BlobRef] = field(default_factory=list)
    absent: list[BlobRef] = field(default_factory=list)

    @property
    def gone(self) -> set[BlobRef]:
        """Both."""
        return {*self.deleted, *self.absent}


async def read_list(volume: Volume, dead: DeadList) -> tuple[list[Dead], list[BlobRef]]:
    """Every blob on a dead list, and the pages of the list."""
    return await loading(volume, lambda: volume.entries(dead))


async def loading(volume: Volume, read: Callable[[], T]) -> T:
    """What `read` returns once all that it misses is in memory."""
    while True:
        try:
            return read()
        except Missing as missing:
            await volume.load(missing)


async def collect(
    volume: Volume,
    timed: Sequence[tuple[Dead, float]],
    start: float,
    result: Collected,
    progress: Progress,
    total: int,
) -> None:
    """Delete dead blobs, each no sooner than so many seconds after `start` (ascending).

    `result` tells how far it got even when StoreError is raised.
    """

    async def delete(item: tuple[Dead, float]) -> None:
        entry, after = item
        await trio.sleep_until(start + after)
        await _delete(volume, entry.ref, result)
        progress(len(result.deleted) + len(result.absent), total)

    await each(timed, delete, DELETES_AT_ONCE)


async def _delete(volume: Volume, ref: BlobRef, result: Collected) -> None:
    signer = volume.keys.signer(ref.id)
    try:
        await volume.store.delete(signer, ref.digest, ref.encode())
        result.deleted.append(ref)
    except KeyAbsent:
        result.absent.append(ref)
    volume.forget(ref)


async def remaining(volume: Volume, removed: Set[BlobRef]) -> list[Dead]:
    """The dead list without what was deleted; its pages are themselves dead now."""
    entries, pages = await read_list(volume, volume.dead)
    died = volume.known.anchor.generation if volume.known else Generation(0)
    left = [entry for entry in entries if entry.ref not in removed]
    return left + [Dead(page, died) for page in pages if page not in removed]
