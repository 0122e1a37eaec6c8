"""Copy-on-write Merkle b-tree over nodes that a source hands out. Sans-io and synchronous.

A tree is a root reference, or None when it is empty. Nothing here waits: a source that does
not have a node in memory raises Missing, and the caller loads it and runs the operation again.
Missing is passed on as the class that the source raised.

How apply works. It walks down to the leaves that the edits touch, then plans one level at a
time from the leaves up: the changed nodes of a level form runs of neighbours, each run is
packed anew, and what became of it is an edit of the level above. Only when all levels are
planned are the new nodes emitted, children first.

Invariants:
- An inner node's key for a child is the child's first key; a child that is not as its parent
  describes it raises CorruptNode.
- Missing is raised before the first node is emitted: an apply that fails so has done nothing.
- Each node emitted is part of the new tree. Each node of the old tree that is not part of the
  new one is in `freed`, once.
- A node is rewritten only if its content changes, or to take in an under-full neighbour.
- The outcome depends on the tree and the edits alone.

Fill policy: see FORMAT.md, "Node".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from operator import itemgetter, le, lt
from typing import NamedTuple, Protocol, cast

from hpkvfs.tree.node import (
    CAPACITY,
    CHILD_WEIGHT,
    MAX_KEY,
    MAX_VALUE,
    CorruptNode,
    Node,
    weigh,
    weigh_each,
)
from hpkvfs.types import BlobRef, Missing

Edit = tuple[bytes, bytes | None]
"""A key with its new value, or None to delete it."""

HALF = CAPACITY // 2
"""A run that shrank below this looks for a neighbour to merge with."""

MERGED = CAPACITY * 15 // 16
"""A merger may weigh this much: it leaves some room, lest the next insert splits it again."""

LEAST = CAPACITY // 4
"""A node lighter than this is made only at the right edge, where the next items go."""

TOLERANCE = 20
"""A run is left as it is cut while packing could save at most one node in so many."""

READAHEAD = 32
"""So many missing nodes of a scan are asked for together."""


class NodeSource(Protocol):
    """Where nodes come from."""

    def node(self, ref: BlobRef) -> Node:
        """The node; Missing when it is not in memory, CorruptNode when it is none."""
        ...


class Applied(NamedTuple):
    """What apply did."""

    root: BlobRef | None
    freed: list[BlobRef]
    """Nodes of the old tree that are not in the new one."""
    displaced: list[tuple[bytes, bytes]]
    """Keys whose value was overwritten or deleted, ascending, with the old value."""
    written: int
    """Nodes emitted."""


def get(source: NodeSource, root: BlobRef | None, key: bytes) -> bytes | None:
    """The value of a key, or None. Raises Missing, CorruptNode."""
    if root is None:
        return None
    node, upper = source.node(root), None
    while node.level:
        keys = node.keys
        index = bisect_right(keys, key) - 1
        if index < 0:
            return None
        if index + 1 < len(keys):
            upper = keys[index + 1]
        child = source.node(node.child(index))
        _check_child(child, node.level - 1, keys[index], upper)
        node = child
    index = bisect_left(node.keys, key)
    if index < len(node.keys) and node.keys[index] == key:
        return node.values[index]
    return None


def scan(
    source: NodeSource, root: BlobRef | None, lo: bytes, hi: bytes
) -> Iterator[tuple[bytes, bytes]]:
    """Items with lo <= key < hi, ascending. Raises Missing, CorruptNode.

    When a node is missing, those that follow it in the range are asked for with it, so choose
    `hi` no higher than needed.
    """
    if root is None or lo >= hi:
        return
    visit = _visit_root(source, root, 0)
    ahead: list[tuple[_Visit, int]] = []
    while True:
        keys, values = visit.node.keys, visit.node.values
        end = bisect_left(keys, hi)
        if visit.node.level == 0:
            start = bisect_left(keys, lo)
            yield from zip(keys[start:end], values[start:end], strict=True)
        else:
            start = max(bisect_right(keys, lo) - 1, 0)
            ahead += [(visit, index) for index in range(end - 1, start - 1, -1)]
        if not ahead:
            return
        visit = _next_of_scan(source, ahead)


def beside(source: NodeSource, root: BlobRef | None, key: bytes) -> Iterator[BlobRef]:
    """The leaves after the one where this key belongs, then those before it, near ones first.

    All have the same parent; none when that, or a node above it, is not in memory.
    """
    if root is None:
        return
    try:
        node = source.node(root)
        while node.level > 1:
            node = source.node(node.child(max(bisect_right(node.keys, key) - 1, 0)))
    except Missing:
        return
    if node.level == 1:
        index = max(bisect_right(node.keys, key) - 1, 0)
        for other in chain(range(index + 1, len(node.keys)), range(index - 1, -1, -1)):
            yield node.child(other)


def wanted(source: NodeSource, root: BlobRef | None, keys: Sequence[bytes]) -> list[BlobRef]:
    """Nodes to load before edits of these ascending keys; [] when apply needs none.

    They are all that is missing of one level, or of the neighbours that apply may merge with;
    so load them and ask again. Raises CorruptNode.
    """
    if root is None or not keys:
        return []
    if not all(map(le, keys, islice(keys, 1, None))):
        raise ValueError("the keys do not ascend")
    try:
        levels = _paths(source, root, keys)
        gather(source, list(dict.fromkeys(_possible_mergers(levels, keys))))
    except Missing as missing:
        return list(missing.refs)
    return []


def apply(
    source: NodeSource,
    root: BlobRef | None,
    edits: Sequence[Edit],
    emit: Callable[[Node], BlobRef],
) -> Applied:
    """Make the tree that has these edits; keys ascend strictly, None deletes.

    `emit` is called for each new node, children before parents, and returns where it will be
    stored. Edits that change nothing write nothing. Raises Missing and CorruptNode, both
    before the first emit, and ValueError for edits out of order or too long.
    """
    keys = _check_edits(edits)
    displaced: list[tuple[bytes, bytes]] = []
    freed: list[BlobRef] = []
    if root is None:
        items = cast("dict[bytes, _Value]", {k: v for k, v in edits if v is not None})
        levels = [_pack(0, items, set(), at_edge=True)]
    else:
        leaves = _paths(source, root, keys)[-1] if keys else []
        changed = {
            leaf.first: change
            for leaf in leaves
            if (change := _change_leaf(leaf, edits[leaf.start : leaf.stop], displaced))
        }
        if not changed:
            return Applied(root, [], [], 0)
        levels = _plan(source, changed, freed)
    emitted: list[BlobRef] = []
    new_root = _emit(levels, emit, emitted)
    return Applied(new_root, freed, displaced, len(emitted))


# Walking down


@dataclass(slots=True, eq=False)
class _Visit:
    """A node of the old tree and its place: entry `index` of `parent` (None: it is the root)."""

    ref: BlobRef
    node: Node
    parent: _Visit | None
    index: int
    upper: bytes | None
    """Every key in the node is below this; None: no limit."""
    at_edge: bool
    """The node is the last of its level."""
    start: int = 0
    stop: int = 0
    """The edits under this node: edits[start:stop]."""

    @property
    def first(self) -> bytes:
        return self.node.keys[0]


def _visit_root(source: NodeSource, root: BlobRef, count: int) -> _Visit:
    return _Visit(root, source.node(root), None, 0, None, True, 0, count)


def _visit_child(source: NodeSource, parent: _Visit, index: int) -> _Visit:
    keys = parent.node.keys
    last = index + 1 == len(keys)
    upper = parent.upper if last else keys[index + 1]
    ref = parent.node.child(index)
    child = source.node(ref)
    _check_child(child, parent.node.level - 1, keys[index], upper)
    return _Visit(ref, child, parent, index, upper, parent.at_edge and last)


def _check_child(child: Node, level: int, first: bytes, upper: bytes | None) -> None:
    if child.level != level:
        raise CorruptNode(f"a child of level {child.level} hangs where level {level} belongs")
    if child.keys[0] != first or (upper is not None and child.keys[-1] >= upper):
        raise CorruptNode("a child's keys are not those its parent gives it")


def gather(source: NodeSource, refs: Iterable[BlobRef]) -> None:
    """See that all of these nodes are in memory; one Missing for all that are not."""
    kind: type[Missing] | None = None
    missing: list[BlobRef] = []
    for ref in refs:
        try:
            source.node(ref)
        except Missing as more:
            kind = kind or type(more)
            missing += more.refs
    if kind:
        raise kind(tuple(missing))


def _next_of_scan(source: NodeSource, ahead: list[tuple[_Visit, int]]) -> _Visit:
    try:
        return _visit_child(source, *ahead[-1])
    except Missing:
        gather(source, (visit.node.child(i) for visit, i in ahead[: -READAHEAD - 1 : -1]))
        raise
    finally:
        ahead.pop()


def _paths(source: NodeSource, root: BlobRef, keys: Sequence[bytes]) -> list[list[_Visit]]:
    """The nodes on the paths of these ascending keys, level by level from the root."""
    levels = [[_visit_root(source, root, len(keys))]]
    while levels[-1][0].node.level:
        steps = [step for visit in levels[-1] for step in _route(visit, keys)]
        gather(source, (visit.node.child(index) for visit, index, _, _ in steps))
        below = []
        for parent, index, start, stop in steps:
            child = _visit_child(source, parent, index)
            child.start, child.stop = start, stop
            below.append(child)
        levels.append(below)
    return levels


def _route(visit: _Visit, keys: Sequence[bytes]) -> Iterator[tuple[_Visit, int, int, int]]:
    """Share a visit's edits out among its children: (visit, index, start, stop)."""
    bounds, start = visit.node.keys, visit.start
    while start < visit.stop:
        index = max(bisect_right(bounds, keys[start]) - 1, 0)
        stop = visit.stop
        if index + 1 < len(bounds):
            stop = bisect_left(keys, bounds[index + 1], start, stop)
        yield visit, index, start, stop
        start = stop


def _possible_mergers(levels: list[list[_Visit]], keys: Sequence[bytes]) -> Iterator[BlobRef]:
    """Neighbours of the nodes that some edits of these keys could make under-full.

    The most that edits can take from a leaf is the items they name; from an inner node, the
    entries of the children they touch and of those children's neighbours.
    """
    entries: dict[int, set[int]] = {}
    for visit in chain.from_iterable(levels[1:]):
        around = entries.setdefault(id(visit.parent), set())
        around.update((visit.index - 1, visit.index, visit.index + 1))
    for visit in chain.from_iterable(levels[1:]):
        if visit.node.level:
            lost = _entries_weight(visit.node, entries[id(visit)])
        else:
            lost = _items_weight(visit.node, keys[visit.start : visit.stop])
        if lost and visit.node.weight - lost < HALF:
            parent = cast(_Visit, visit.parent)
            yield from map(parent.node.child, _beside(visit))


def _entries_weight(node: Node, indexes: set[int]) -> int:
    keys = node.keys
    return sum(len(keys[i]) + CHILD_WEIGHT for i in indexes if 0 <= i < len(keys))


def _items_weight(leaf: Node, keys: Sequence[bytes]) -> int:
    items = dict(zip(leaf.keys, leaf.values, strict=True))
    named = [key for key in dict.fromkeys(keys) if key in items]
    return weigh(named, map(items.__getitem__, named))


def _beside(visit: _Visit) -> list[int]:
    """The entries of the node's neighbours in its parent."""
    parent = cast(_Visit, visit.parent)
    return [i for i in (visit.index - 1, visit.index + 1) if 0 <= i < len(parent.node.keys)]


# Planning


@dataclass(slots=True, eq=False)
class _Draft:
    """A new node; those of its children that are new are drafts too."""

    level: int
    keys: list[bytes]
    values: list[_Value]
    ref: bytes = b""
    """Where it is stored, once it was emitted."""

    def stored_values(self) -> tuple[bytes, ...]:
        if self.level == 0:
            return tuple(cast("list[bytes]", self.values))
        return tuple(v.ref if isinstance(v, _Draft) else v for v in self.values)


_Value = bytes | _Draft


@dataclass(slots=True, eq=False)
class _Change:
    """What is to become of a node of the old tree."""

    visit: _Visit
    items: dict[bytes, _Value]
    weight: int
    shrank: bool
    """Some of its items went, or were replaced."""


_Run = list[_Change]


def _check_edits(edits: Sequence[Edit]) -> list[bytes]:
    keys = list(map(itemgetter(0), edits))
    if not all(map(lt, keys, islice(keys, 1, None))):
        raise ValueError("the keys of the edits do not ascend strictly")
    if max(map(len, keys), default=0) > MAX_KEY:
        raise ValueError(f"a key has at most {MAX_KEY} bytes")
    if max((len(value) for _, value in edits if value is not None), default=0) > MAX_VALUE:
        raise ValueError(f"a value has at most {MAX_VALUE} bytes")
    return keys


def _items(node: Node) -> dict[bytes, _Value]:
    return dict(zip(node.keys, node.values, strict=True))


def _change_leaf(
    leaf: _Visit, edits: Sequence[Edit], displaced: list[tuple[bytes, bytes]]
) -> _Change | None:
    """The leaf with its edits; None when they change nothing."""
    items = cast("dict[bytes, bytes]", _items(leaf.node))
    count, before = len(displaced), len(items)
    for key, value in edits:
        old = items.get(key)
        if old is not None and old != value:
            displaced.append((key, old))
        if value is not None:
            items[key] = value
        elif old is not None:
            del items[key]
    shrank = len(displaced) > count
    if not shrank and len(items) == before:
        return None
    weight = weigh(items.keys(), items.values())
    return _Change(leaf, cast("dict[bytes, _Value]", items), weight, shrank)


def _plan(
    source: NodeSource, changed: dict[bytes, _Change], freed: list[BlobRef]
) -> list[list[_Draft]]:
    """The new nodes of each level from the leaves up; the top level has at most one."""
    levels: list[list[_Draft]] = []
    while changed:
        for run in _runs(changed):
            for neighbour in _mergers(source, run):
                node = neighbour.node
                changed[neighbour.first] = _Change(neighbour, _items(node), node.weight, False)
        drafts: list[_Draft] = []
        above: dict[bytes, _Change] = {}
        for run in _runs(changed):
            packed = _pack_run(run)
            drafts += packed
            freed += [change.visit.ref for change in run]
            _change_parents(above, run, packed)
        levels.append(drafts)
        changed = above
    return levels


def _runs(changed: dict[bytes, _Change]) -> list[_Run]:
    """The changed nodes of a level in order, cut where an unchanged node lies between."""
    runs: list[_Run] = []
    for key in sorted(changed):
        change = changed[key]
        if runs and _adjoin(runs[-1][-1].visit, change.visit):
            runs[-1].append(change)
        else:
            runs.append([change])
    return runs


def _adjoin(left: _Visit, right: _Visit) -> bool:
    """Whether nothing lies between two nodes of a level."""
    if left.parent is right.parent:
        return left.index + 1 == right.index
    left_parent, right_parent = cast(_Visit, left.parent), cast(_Visit, right.parent)
    last = left.index + 1 == len(left_parent.node.keys)
    return last and right.index == 0 and _adjoin(left_parent, right_parent)


def _mergers(source: NodeSource, run: _Run) -> list[_Visit]:
    """Unchanged neighbours to take into a run that shrank below HALF.

    `wanted` must foresee each node read here.
    """
    weight = sum(change.weight for change in run)
    first, last = run[0], run[-1]
    if not 0 < weight < min(HALF, sum(change.visit.node.weight for change in run)):
        return []
    beside = []
    if first.shrank:
        beside += [i for i in _neighbours(source, first.visit) if i.index < first.visit.index]
    if last.shrank:
        beside += [i for i in _neighbours(source, last.visit) if i.index > last.visit.index]
    chosen = []
    for visit in beside:
        if weight + visit.node.weight <= MERGED:
            chosen.append(visit)
            weight += visit.node.weight
    if not chosen and beside and weight < LEAST and not last.visit.at_edge:
        chosen = [min(beside, key=lambda visit: visit.node.weight)]
    return chosen


def _neighbours(source: NodeSource, visit: _Visit) -> list[_Visit]:
    if visit.parent is None:
        return []
    parent = visit.parent
    gather(source, map(parent.node.child, _beside(visit)))
    return [_visit_child(source, parent, index) for index in _beside(visit)]


def _change_parents(above: dict[bytes, _Change], run: _Run, packed: list[_Draft]) -> None:
    """Put the packed nodes in the place of the run's; the first one's parent gets them all."""
    for change in run:
        parent = change.visit.parent
        if parent is None:
            return
        if parent.first not in above:
            above[parent.first] = _Change(parent, _items(parent.node), parent.node.weight, True)
        del above[parent.first].items[change.visit.first]
        above[parent.first].weight -= len(change.visit.first) + CHILD_WEIGHT
    adopter = above[cast(_Visit, run[0].visit.parent).first]
    for draft in packed:
        adopter.items[draft.keys[0]] = draft
        adopter.weight += len(draft.keys[0]) + CHILD_WEIGHT


# Packing


def _pack_run(run: _Run) -> list[_Draft]:
    """The new nodes in the place of a run's: the same cuts if they still fit and serve."""
    level, at_edge = run[0].visit.node.level, run[-1].visit.at_edge
    least = -(-sum(change.weight for change in run) // CAPACITY)
    spare = len(run) - least
    if spare * TOLERANCE <= len(run) and all(LEAST <= c.weight <= CAPACITY for c in run):
        return [_Draft(level, *_columns(change.items)) for change in run]
    items: dict[bytes, _Value] = {}
    for change in run:
        items.update(change.items)
    old = set(chain.from_iterable(change.visit.node.keys for change in run))
    return _pack(level, items, old, at_edge=at_edge)


def _columns(items: dict[bytes, _Value]) -> tuple[list[bytes], list[_Value]]:
    keys = sorted(items)
    return keys, list(map(items.__getitem__, keys))


def _pack(
    level: int, items: dict[bytes, _Value], old: set[bytes], *, at_edge: bool
) -> list[_Draft]:
    """The fewest nodes that hold these items, cut by where the keys that are not old lie."""
    keys, values = _columns(items)
    if level:
        weights = [len(key) + CHILD_WEIGHT for key in keys]
    else:
        weights = weigh_each(keys, cast("list[bytes]", values))
    fresh = [index for index, key in enumerate(keys) if key not in old]
    in_order = len(fresh) > 1 and fresh[-1] - fresh[0] + 1 == len(fresh)
    appended = at_edge and bool(fresh) and fresh[-1] + 1 == len(keys)
    cuts = _cuts(weights, in_order=in_order, appended=appended)
    return [_Draft(level, keys[a:b], values[a:b]) for a, b in pairwise(cuts)]


def _cuts(weights: Sequence[int], *, in_order: bool, appended: bool) -> list[int]:
    """Where to cut items into nodes: [0, ..., len(weights)].

    There are as few nodes as can be. Items appended at the right edge fill each node, however
    little is left for the last, which the next ones will fill. So do several items that came in
    order elsewhere, but the last node gets at least LEAST. Otherwise all get about the same.
    """
    ends = list(accumulate(weights, initial=0))
    cuts = _fill(ends)
    if appended or len(cuts) <= 2:
        return cuts
    if in_order:
        return _lift_last(ends, cuts, LEAST)
    even = _share(ends, len(cuts) - 1)
    if all(0 < ends[b] - ends[a] <= CAPACITY for a, b in pairwise(even)):
        return even
    return _lift_last(ends, cuts, (ends[-1] - ends[cuts[-3]]) // 2)


def _fill(ends: list[int]) -> list[int]:
    cuts = [0]
    while cuts[-1] + 1 < len(ends):
        cuts.append(bisect_right(ends, ends[cuts[-1]] + CAPACITY) - 1)
    return cuts


def _share(ends: list[int], count: int) -> list[int]:
    return [bisect_left(ends, ends[-1] * part // count) for part in range(count)] + [len(ends) - 1]


def _lift_last(ends: list[int], cuts: list[int], least: int) -> list[int]:
    """Move the last cut left until the last node weighs `least`, or would not fit any more.

    No item weighs more than half a node, so both nodes keep at least one.
    """
    total = ends[-1]
    if total - ends[cuts[-2]] >= least:
        return cuts
    cut = bisect_right(ends, total - least) - 1
    if total - ends[cut] > CAPACITY:
        cut += 1
    return [*cuts[:-2], cut, cuts[-1]]


# Writing


def _emit(
    levels: list[list[_Draft]], emit: Callable[[Node], BlobRef], emitted: list[BlobRef]
) -> BlobRef | None:
    """Emit the planned levels under as low a root as they allow; returns the root."""
    while len(levels[-1]) > 1:
        top = levels[-1]
        items: dict[bytes, _Value] = {draft.keys[0]: draft for draft in top}
        levels.append(_pack(top[0].level + 1, items, set(), at_edge=True))
    while levels[-1]:
        (top_draft,) = levels[-1]
        if top_draft.level == 0 or len(top_draft.keys) > 1:
            break
        only = top_draft.values[0]
        if isinstance(only, bytes):
            return BlobRef.decode(only)
        levels.pop()
    for draft in chain.from_iterable(levels):
        ref = emit(Node(draft.level, tuple(draft.keys), draft.stored_values()))
        draft.ref = ref.encode()
        emitted.append(ref)
    return emitted[-1] if emitted else None
