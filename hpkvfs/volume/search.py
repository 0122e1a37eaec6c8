"""Looking for what the server has of a vault, with nothing but its keys.

Every look-up costs a token, and tells nothing but that somebody looked for something. What is
found is authentic: an anchor or blob is opened with the vault's keys, or it is not there.
"""

from __future__ import annotations

from typing import Final

from hpkvfs.errors import CorruptBlob, NothingThere
from hpkvfs.parallel import each
from hpkvfs.types import BlobId, BlobRef, Generation
from hpkvfs.volume.anchor import find_newest
from hpkvfs.volume.volume import Known, Volume

PROBE_GAP: Final = 32


async def find_anchors(volume: Volume, *generations: Generation) -> dict[Generation, Known]:
    """Look up several anchors at a time; the first failure of them, bare."""
    found: dict[Generation, Known] = {}

    async def look(generation: Generation) -> None:
        anchor = await volume.find_anchor(generation)
        if anchor is not None:
            found[generation] = anchor

    await each(generations, look, len(generations))
    return found


async def search(volume: Volume, floor: Generation | None) -> Known:
    """The newest generation.

    `floor`: one that existed once; CorruptBlob when the server has none that new. NothingThere
    when there is none at all.
    """
    questions, found = find_newest(floor), dict[Generation, Known]()
    try:
        wanted = next(questions)
        while True:
            found |= await find_anchors(volume, *wanted)
            wanted = questions.send(wanted & found.keys())
    except StopIteration as stop:
        newest: Generation | None = stop.value
    if newest is None:
        raise NothingThere(
            "this server holds nothing for these words",
            "check the server's address, and the passphrase if you used one",
        )
    if newest not in found:
        found |= await find_anchors(volume, newest)
    if newest not in found:
        raise CorruptBlob(
            f"the server no longer has generation {newest}, which existed before",
            "it was rolled back, or it lies; what is cached here can still be read",
        )
    return found[newest]


async def probe(volume: Volume, start: BlobId) -> tuple[set[BlobRef], BlobId]:
    """Blobs under ids from `start` on, as far as there are any; an id above them all.

    They are looked for PROBE_GAP at a time, until none of so many is there.
    """
    found = set[BlobRef]()

    async def look(number: int) -> None:
        ref = await volume.find_own(BlobId(number))
        if ref is not None:
            found.add(ref)

    before = -1
    while len(found) > before:
        before = len(found)
        await each(range(start, start + PROBE_GAP), look, PROBE_GAP)
        start = BlobId(start + PROBE_GAP)
    return found, start
