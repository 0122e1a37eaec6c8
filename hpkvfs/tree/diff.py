"""What differs between two trees, reading only the nodes that they do not share."""

from __future__ import annotations

from collections.abc import Iterator

from hpkvfs.tree.btree import NodeSource, gather
from hpkvfs.tree.node import Node
from hpkvfs.types import BlobRef

Difference = tuple[bytes, bytes | None, bytes | None]


def diff(source: NodeSource, old: BlobRef | None, new: BlobRef | None) -> Iterator[Difference]:
    """(key, old value, new value) of every item that differs, by key; None: it is not there.

    A node that is in both trees holds the same items in both, and a key is in one leaf of a
    tree, so what differs is in the leaves that are in one of them only. Raises Missing for all
    that is missing of one level, and CorruptNode.
    """
    before = _leaves(source, {old} if old else set(), {new} if new else set())
    lost, found = before
    for key in sorted(lost.keys() | found.keys()):
        if lost.get(key) != found.get(key):
            yield key, lost.get(key), found.get(key)


def _leaves(
    source: NodeSource, old: set[BlobRef], new: set[BlobRef]
) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """The items of the leaves that only one of the trees has."""
    items: tuple[dict[bytes, bytes], dict[bytes, bytes]] = ({}, {})
    while old or new:
        old, new = old - new, new - old
        gather(source, [*old, *new])
        nodes = {ref: source.node(ref) for ref in old | new}
        top = max((node.level for node in nodes.values()), default=0)
        old, new = (
            _down({ref: nodes[ref] for ref in side}, top, found)
            for side, found in zip((old, new), items, strict=True)
        )
    return items


def _down(side: dict[BlobRef, Node], top: int, items: dict[bytes, bytes]) -> set[BlobRef]:
    """One level down from the highest; leaves give their items."""
    below: set[BlobRef] = set()
    for ref, node in side.items():
        if node.level < top:
            below.add(ref)
        elif node.level:
            below.update(map(BlobRef.decode, node.values))
        else:
            items.update(zip(node.keys, node.values, strict=True))
    return below
