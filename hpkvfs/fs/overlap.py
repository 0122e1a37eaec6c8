"""Whether changes that were made upon one generation can be made upon another client's.

An operation changes the inode items of all that it concerns (their times, at the least), so its
effects depend on nothing but the items that a layer changes or removes. If the other client left
each of those as it was, the changes mean the same upon its generation as upon ours. New inodes
need numbers that the other client cannot have used.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpkvfs.fs.layer import Layer
from hpkvfs.tree import btree
from hpkvfs.types import BlobRef
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.items import BLOCK, INLINE_LIMIT, PIECE, ItemKind, key
from hpkvfs.volume.volume import Volume


def applies(volume: Volume, ours: Anchor, theirs: Anchor, layer: Layer, next_ino: int) -> bool:
    """Whether `layer`, upon `ours` until now, can lie upon `theirs`; Missing.

    `next_ino`: above every inode number that the layer uses.
    """
    if next_ino > ours.next_ino and theirs.next_ino > ours.next_ino:
        return False
    roots = (ours.root, theirs.root)
    return all(_same(volume, roots, low, high) for low, high in _concerned(layer))


def _concerned(layer: Layer) -> Iterator[tuple[bytes, bytes]]:
    """The ranges of keys that a layer depends on, at least; an item is the range from its key on
    to what could come right after it."""
    yield from layer.hidden_ranges()
    for name, _ in layer.items_changed():
        yield name, name + b"\0"
    for ino, number in layer.dirty_blocks():
        start = number * BLOCK
        for kind, at in [
            (ItemKind.EXTENT, start),
            *((ItemKind.INLINE, piece) for piece in range(start, start + INLINE_LIMIT, PIECE)),
        ]:
            name = key(ino, kind, at)
            yield name, name + b"\0"


def _same(volume: Volume, roots: tuple[BlobRef | None, ...], low: bytes, high: bytes) -> bool:
    first, second = (list(btree.scan(volume, root, low, high)) for root in roots)
    return first == second
