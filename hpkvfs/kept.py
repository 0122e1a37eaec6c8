"""What a client knows of generations, in its journal; copies of changes that did not fit another's.

    known           the newest known generation: reference and anchor
    covered         up to which redo log file another client's generation has our changes in it; an
                    anchor says so only of its own writer's log
    left            the last generation before another client's were gone on from, until one of ours
                    is published: what receipts tell was stored above its ids is in none
    kept/N          the generation upon which the changes in the directory kept.N were made

A copy of changes is made when another client's generation is taken over and they do not fit it:
the redo log's files, linked to kept.N. It is read with `hpkvfs mount --kept N`, as long as the
server has the blobs of its generation, and can be deleted like any directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgpack

from hpkvfs.errors import UserError
from hpkvfs.state import StateDirectory
from hpkvfs.types import PAYLOAD_SIZE, BlobRef
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.volume import Known
from hpkvfs.wallet.journal import KNOWN, Journal

_COVERED: Final = "covered"
_LEFT: Final = "left"


def save_known(journal: Journal, newest: Known) -> None:
    """Put the newest known generation into the journal's batch."""
    journal.put_meta(KNOWN, _encode(newest))


def known(journal: Journal, number: int | None) -> Known | None:
    """The newest known generation, or that of a copy; UserError when there is no such copy."""
    row = journal.meta(KNOWN if number is None else f"kept/{number}")
    if row is None and number is not None:
        raise UserError(f"there are no changes kept under {number}", "see hpkvfs status")
    return None if row is None else _decode(row)[0]


def covered(journal: Journal, newest: Known) -> int:
    """The last file of our redo log whose changes are in a generation, or gone otherwise."""
    for name in (_COVERED, *journal.names("kept/")):
        generation, number = _decode(journal.meta(name) or _NONE)
        if generation is not None and generation.ref == newest.ref:
            return number
    return newest.anchor.redo


def leave(journal: Journal, last: Known) -> None:
    """Put into the journal's batch that another client's generation takes this one's place."""
    if not journal.meta(_LEFT):
        journal.put_meta(_LEFT, _encode(last))


def come_back(journal: Journal) -> None:
    """Put into the journal's batch that a generation of ours is the newest."""
    if journal.meta(_LEFT):
        journal.put_meta(_LEFT, b"")


def left(journal: Journal) -> Known | None:
    """The generation that was left, if none of ours was published since."""
    row = journal.meta(_LEFT)
    return _decode(row)[0] if row else None


def rest_on(journal: Journal, newest: Known, number: int) -> None:
    """Put into the journal's batch that our log, from file `number` + 1 on, lies upon this."""
    journal.put_meta(_COVERED, _encode(newest, number))


def put_aside(state: StateDirectory, journal: Journal, base: Known, number: int) -> int:
    """Copy the redo log after file `number`, which lies upon `base`; the number of the copy.

    It becomes known to the journal with its next commit.
    """
    chosen = 1 + max(
        (int(name.removeprefix("kept/")) for name in journal.names("kept/")), default=0
    )
    directory = log_directory(state, chosen)
    directory.mkdir(mode=0o700, exist_ok=True)
    for stale in directory.iterdir():
        stale.unlink()
    for path in state.path.glob("redo.*"):
        if path.suffix[1:].isdigit() and int(path.suffix[1:]) > number:
            os.link(path, directory / path.name)
    for path in (directory, state.path):
        _sync(path)
    journal.put_meta(f"kept/{chosen}", _encode(base, number))
    return chosen


def log_directory(state: StateDirectory, number: int | None) -> Path:
    """Where the redo log is, or that of a copy."""
    return state.path if number is None else state.path / f"kept.{number}"


def numbers(state: StateDirectory) -> list[int]:
    """The copies that there are."""
    names = (path.name.removeprefix("kept.") for path in state.path.glob("kept.*"))
    return sorted(int(name) for name in names if name.isdigit())


_NONE: Final = bytes(msgpack.packb([None, b"", 0]))


def _encode(generation: Known, number: int = 0) -> bytes:
    payload = generation.anchor.encode().rstrip(b"\0")
    packed: bytes = msgpack.packb([generation.ref.encode(), payload, number])
    return packed


def _decode(row: bytes) -> tuple[Known | None, int]:
    ref, payload, *number = msgpack.unpackb(row)
    if ref is None:
        return None, 0
    anchor = Anchor.decode(payload.ljust(PAYLOAD_SIZE, b"\0"))
    return Known(anchor, BlobRef.decode(ref)), number[0] if number else 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
