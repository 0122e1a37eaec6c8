"""Collection: deletes dead blobs for their refund.

Only blobs that are dead in a generation already published are deleted, in random order.
The dead list itself changes with the next generation published; until then the caller
keeps what was deleted, and a crash in between costs nothing but look-ups of absent keys.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

from hpkvfs.errors import KeyAbsent
from hpkvfs.parallel import each
from hpkvfs.types import BlobRef, Generation, Missing
from hpkvfs.volume.deadlist import Dead
from hpkvfs.volume.volume import Volume

DELETES_AT_ONCE = 16

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Collected:
    """What one collection did: blobs deleted, and those the server no longer had."""

    deleted: list[BlobRef] = field(default_factory=list)
    absent: list[BlobRef] = field(default_factory=list)


async def dead_entries(volume: Volume) -> tuple[list[Dead], list[BlobRef]]:
    """Every dead blob of the newest known generation, and the pages that list them."""
    while True:
        try:
            return volume.dead_entries()
        except Missing as missing:
            await volume.load(missing)


async def collect(
    volume: Volume, result: Collected, shuffle: Callable[[list[Dead]], None], progress: Progress
) -> None:
    """Delete every dead blob; `result` tells how far it got even when StoreError is raised."""
    entries, _ = await dead_entries(volume)
    shuffle(entries)

    async def delete(entry: Dead) -> None:
        await _delete(volume, entry.ref, result)
        progress(len(result.deleted) + len(result.absent), len(entries))

    await each(entries, delete, DELETES_AT_ONCE)


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
    entries, pages = await dead_entries(volume)
    died = volume.known.anchor.generation if volume.known else Generation(0)
    left = [entry for entry in entries if entry.ref not in removed]
    return left + [Dead(page, died) for page in pages if page not in removed]
