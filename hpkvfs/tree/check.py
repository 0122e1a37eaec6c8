"""Checks a whole tree against its invariants; shares no code with the b-tree it judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from hpkvfs.tree.node import CorruptNode, Node
from hpkvfs.types import PAYLOAD_SIZE, BlobRef, Missing


class NodeSource(Protocol):
    """Where nodes come from."""

    def node(self, ref: BlobRef) -> Node:
        """The node; Missing when it is not in memory, CorruptNode when it is none."""
        ...


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. `fill` is the used part of all nodes' bytes, 1.0 for no node."""

    nodes: int
    leaves: int
    items: int
    depth: int
    fill: float
    problems: list[str]
    refs: list[BlobRef]
    """Every node that the tree reaches, sound or not, once, level by level from the root."""


class _Place(NamedTuple):
    ref: BlobRef
    level: int | None
    first: bytes | None
    upper: bytes | None


def check(source: NodeSource, root: BlobRef | None) -> Report:
    """Visit every node. Raises Missing, for a whole level at once, when nodes are not in memory.

    What is wrong becomes a sentence in `problems`; nothing below a bad node is visited.
    """
    problems: list[str] = []
    seen: dict[BlobRef, None] = {}
    nodes: list[Node] = []
    depth = 0
    places = [_Place(root, None, None, None)] if root is not None else []
    while places:
        depth += 1
        below: list[_Place] = []
        for place, node in _read(source, _once(places, seen, problems), problems):
            complaint = _judge(place, node)
            if complaint:
                problems.append(f"node {place.ref!r} {complaint}")
                continue
            nodes.append(node)
            if node.level:
                below += _children(node, place.upper)
        places = below
    leaves = [node for node in nodes if node.level == 0]
    used = sum(node.size for node in nodes)
    return Report(
        nodes=len(nodes),
        leaves=len(leaves),
        items=sum(len(leaf.keys) for leaf in leaves),
        depth=depth,
        fill=used / (len(nodes) * PAYLOAD_SIZE) if nodes else 1.0,
        problems=problems,
        refs=list(seen),
    )


def _once(places: list[_Place], seen: dict[BlobRef, None], problems: list[str]) -> list[_Place]:
    fresh = []
    for place in places:
        if place.ref in seen:
            problems.append(f"node {place.ref!r} is in the tree twice")
        else:
            seen[place.ref] = None
            fresh.append(place)
    return fresh


def _read(
    source: NodeSource, places: list[_Place], problems: list[str]
) -> list[tuple[_Place, Node]]:
    read: list[tuple[_Place, Node]] = []
    kind: type[Missing] | None = None
    missing: list[BlobRef] = []
    for place in places:
        try:
            read.append((place, source.node(place.ref)))
        except Missing as more:
            kind = kind or type(more)
            missing += more.refs
        except CorruptNode as error:
            problems.append(f"node {place.ref!r} is damaged: {error}")
    if kind:
        raise kind(tuple(missing))
    return read


def _judge(place: _Place, node: Node) -> str | None:
    """What is wrong with a node in this place, or None."""
    if place.level is not None and node.level != place.level:
        return f"has level {node.level} where {place.level} belongs"
    if place.first is not None and node.keys[0] != place.first:
        return "does not begin with the key its parent gives it"
    if any(a >= b for a, b in zip(node.keys, node.keys[1:], strict=False)):
        return "has keys out of order"
    if place.upper is not None and node.keys[-1] >= place.upper:
        return "has keys beyond the next node's first"
    return None


def _children(node: Node, upper: bytes | None) -> list[_Place]:
    uppers = [*node.keys[1:], upper]
    return [
        _Place(node.child(i), node.level - 1, first, uppers[i]) for i, first in enumerate(node.keys)
    ]
