"""Publishing one generation, as a generator of steps; it does no I/O itself.

    extents -> tree nodes, list pages and tables of snapshots -> (all of them stored) -> anchor

The caller carries out each step completely before it sends the generator on, so a step
boundary is a barrier; in particular nothing names a blob before that blob is stored, and
the anchor comes last: inserting it is the moment the generation exists. A caller that
fails keeps the generator and the rest of the step, and goes on later with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol, TypeAlias, TypeVar

from sortedcontainers import SortedDict

from hpkvfs.tree import btree
from hpkvfs.tree.node import Node
from hpkvfs.types import BlobId, BlobRef, Generation, Missing, anchor_id
from hpkvfs.volume.anchor import Anchor, handed_over, successors
from hpkvfs.volume.blob import Kind, Opened, Sealer
from hpkvfs.volume.deadlist import INLINE_HELD, Dead, DeadList
from hpkvfs.volume.items import (
    BLOCK,
    INLINE_LIMIT,
    PIECE,
    ItemKind,
    decode_extent,
    encode_extent,
    key,
    split_key,
)
from hpkvfs.volume.snapshots import Plan, Snapshot, encode_tables
from hpkvfs.volume.volume import Known, MissingNode

EXTENTS_AT_ONCE = 256
SEALS_AT_ONCE = 4
READS_AT_ONCE = 64

T = TypeVar("T")
Block: TypeAlias = tuple[int, int]
"""(inode, number)."""
KeyRange: TypeAlias = tuple[bytes, bytes]
"""[low, high)."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A blob ready to be stored."""

    ref: BlobRef
    blob: bytes
    opened: Opened
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Step: bring these into memory."""

    missing: Missing


@dataclass(frozen=True, slots=True)
class Insert:
    """Step: store all of these, in any order."""

    blobs: tuple[Sealed, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """Step: nothing but a moment for whoever waits; sealing takes a quarter of a millisecond."""


Step = Load | Insert | Turn
Steps = Generator[Step, None, Known]


class Changes(Protocol):
    """A frozen layer, as far as publishing it is concerned."""

    @property
    def usage_bytes(self) -> int:
        """Change of the sum of file sizes."""
        ...

    @property
    def usage_files(self) -> int:
        """Change of the number of inodes."""
        ...

    def dirty_blocks(self) -> list[Block]:
        """Every block that was written, in order."""
        ...

    def items_changed(self) -> Iterable[tuple[bytes, bytes | None]]:
        """Items put or removed."""
        ...

    def hidden_ranges(self) -> Iterable[KeyRange]:
        """Ranges of keys removed from the tree, before the items and blocks above."""
        ...


class Source(Protocol):
    """The tree being changed."""

    @property
    def root(self) -> BlobRef | None:
        """Its root."""
        ...

    def node(self, ref: BlobRef) -> Node:
        """A node; Missing."""
        ...


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A tree of which nodes are lost or miscounted: the items left of it, and its old nodes."""

    items: tuple[tuple[bytes, bytes], ...]
    nodes: tuple[BlobRef, ...]


@dataclass(slots=True)
class Base:
    """What a generation is built on.

    known: the newest published generation, if any; next_id: above every id ever used;
    orphans: stored blobs that no generation names (of attempts that did not get to their
    anchor); remaining: the dead list as collection left it, None if it was not touched;
    snapshots: what becomes of them, None if they stay as they are; rewrite: the tree to begin
    with, if not the known generation's.
    """

    known: Known | None
    writer: bytes
    redo: int
    next_id: BlobId
    next_ino: int
    now: int
    orphans: list[BlobRef] = field(default_factory=list)
    remaining: list[Dead] | None = None
    snapshots: Plan | None = None
    rewrite: Rewrite | None = None


class Pinned:
    """A source that keeps every node it was asked for until the commit is done."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._nodes: dict[BlobRef, Node] = {}

    def node(self, ref: BlobRef) -> Node:
        """A node; Missing."""
        node = self._nodes.get(ref)
        if node is None:
            node = self._nodes[ref] = self._source.node(ref)
        return node


class _Maker:
    """Numbers and seals blobs, and remembers them until they are handed over."""

    def __init__(self, sealer: Sealer, next_id: BlobId) -> None:
        self._sealer = sealer
        self.next_id = next_id
        self.made: list[Sealed] = []

    def make(self, kind: Kind, payload: bytes, node: Node | None = None) -> BlobRef:
        ref, blob, opened = self._sealer.make(self.next_id, kind, payload)
        self.next_id = BlobId(self.next_id + 1)
        self.made.append(Sealed(ref, blob, opened, node))
        return ref

    def node(self, node: Node) -> BlobRef:
        return self.make(Kind.NODE, node.encode(), node)

    def page(self, payload: bytes) -> BlobRef:
        return self.make(Kind.PAGE, payload)

    def take(self) -> Insert:
        made, self.made = self.made, []
        return Insert(tuple(made))


def publish(
    base: Base,
    changes: Changes,
    read_blocks: Callable[[list[Block]], list[bytes]],
    source: Source,
    sealer: Sealer,
) -> Steps:
    """Publish `changes` as the generation after base's; returns it.

    read_blocks([(ino, block), ...]) is the new contents of dirty blocks, without their
    trailing zeros; it may raise Missing.
    """
    maker = _Maker(sealer, base.next_id)
    dirty = changes.dirty_blocks()
    edits, fresh = yield from _blocks(dirty, read_blocks, maker)
    if base.rewrite is None:
        ranges = [*changes.hidden_ranges(), *_overwritten(dirty, _first_new(base))]
        freed, root, written = yield from _change(changes, ranges, edits, source, maker)
        live = -len(freed)
    else:
        freed, root, written = _rewrite(base.rewrite, changes, dirty, edits, maker)
        kept = sum(_is_extent(raw) for raw, _ in base.rewrite.items)
        live = kept + len(base.rewrite.nodes) - len(freed) - _live(base)
    live += fresh + written
    previous = base.known.anchor if base.known else _NOTHING
    anchor = replace(
        previous,
        generation=Generation(previous.generation + 1),
        writer=base.writer,
        redo=base.redo,
        time=base.now,
        root=root,
        next_id=maker.next_id,
        next_ino=base.next_ino,
        live=previous.live + live,
        size=previous.size + changes.usage_bytes,
        files=previous.files + changes.usage_files,
    )
    anchor = _bury(base, anchor, freed, maker)
    if maker.made:
        yield maker.take()
    generation = anchor.generation
    ref, blob, opened = sealer.make(anchor_id(generation), Kind.ANCHOR, anchor.encode())
    yield Insert((Sealed(ref, blob, opened),))
    return Known(anchor, ref)


def _change(
    changes: Changes,
    ranges: list[KeyRange],
    blocks: dict[bytes, bytes],
    source: Source,
    maker: _Maker,
) -> Generator[Step, None, tuple[list[BlobRef], BlobRef | None, int]]:
    """Write the changed nodes: (blobs that are no longer needed, new root, nodes written).

    `ranges` are removed before the blocks and items are put.
    """
    pinned = Pinned(source)
    items: dict[bytes, bytes | None] = {}
    items.update((yield from _removed(ranges, pinned, source.root)))
    items.update(blocks)
    items.update(changes.items_changed())
    applied = yield from _apply(pinned, source.root, sorted(items.items()), maker)
    displaced = [decode_extent(old) for raw, old in applied.displaced if _is_extent(raw)]
    return applied.freed + displaced, applied.root, applied.written


def _rewrite(
    rewrite: Rewrite,
    changes: Changes,
    dirty: Sequence[Block],
    blocks: dict[bytes, bytes],
    maker: _Maker,
) -> tuple[list[BlobRef], BlobRef | None, int]:
    """As _change, writing all of the tree; there may be no ranges to remove."""
    assert not list(changes.hidden_ranges())
    before = SortedDict(rewrite.items)
    after: dict[bytes, bytes | None] = dict(before)
    for low, high in _overwritten(dirty):
        after.update(dict.fromkeys(before.irange(low, high, (True, False))))
    after |= blocks | dict(changes.items_changed())
    displaced = [
        decode_extent(old) for raw, old in before.items() if _is_extent(raw) and after[raw] != old
    ]
    none = Pinned(_Empty())
    applied = btree.apply(none, None, sorted(after.items()), maker.node)
    return [*rewrite.nodes, *displaced], applied.root, applied.written


class _Empty:
    """A source of a tree without nodes."""

    root = None

    def node(self, ref: BlobRef) -> Node:
        raise AssertionError(ref)


def _live(base: Base) -> int:
    return base.known.anchor.live if base.known else 0


def _first_new(base: Base) -> int:
    """The inodes from this number on are not in the tree that is changed."""
    return base.known.anchor.next_ino if base.known else 0


def _blocks(
    dirty: list[Block], read_blocks: Callable[[list[Block]], list[bytes]], maker: _Maker
) -> Generator[Step, None, tuple[dict[bytes, bytes], int]]:
    """Store dirty blocks; the items that tell the tree where they are, and how many are extents."""
    edits: dict[bytes, bytes] = {}
    extents = 0
    for start in range(0, len(dirty), READS_AT_ONCE):
        batch = dirty[start : start + READS_AT_ONCE]
        contents = yield from _until_loaded(lambda b=batch: read_blocks(b))  # type: ignore[misc]
        for (ino, number), content in zip(batch, contents, strict=True):
            if len(content) > INLINE_LIMIT:
                if len(maker.made) % SEALS_AT_ONCE == 0:
                    yield Turn()
                ref = maker.make(Kind.EXTENT, content.ljust(BLOCK, b"\0"))
                extents += 1
                edits[key(ino, ItemKind.EXTENT, number * BLOCK)] = encode_extent(ref)
            else:
                edits.update(_pieces(ino, number, content))
        if len(maker.made) >= EXTENTS_AT_ONCE:
            yield maker.take()
    if maker.made:
        yield maker.take()
    return edits, extents


def _overwritten(dirty: Iterable[Block], first_new: int = 0) -> Iterator[KeyRange]:
    """Where blocks may be that are written anew, in whichever form: neighbours as one.

    Those of inodes from `first_new` on, if given, are nowhere yet.
    """
    old = (block for block in dirty if not first_new or block[0] < first_new)
    for _, run in groupby(enumerate(old), lambda one: (one[1][0], one[1][1] - one[0])):
        blocks = [block for _, block in run]
        (ino, first), (_, last) = blocks[0], blocks[-1]
        for kind in (ItemKind.EXTENT, ItemKind.INLINE):
            yield key(ino, kind, first * BLOCK), key(ino, kind, (last + 1) * BLOCK)


def _pieces(ino: int, number: int, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    for at in range(0, len(content), PIECE):
        yield key(ino, ItemKind.INLINE, number * BLOCK + at), content[at : at + PIECE]


def _removed(
    ranges: list[KeyRange], source: Pinned, root: BlobRef | None
) -> Generator[Step, None, list[tuple[bytes, None]]]:
    """Deletions of all that lies in these ranges."""
    found: list[tuple[bytes, None]] = []
    for low, high in sorted(ranges):
        pairs = yield from _until_loaded(
            lambda lo=low, hi=high: list(btree.scan(source, root, lo, hi))  # type: ignore[misc]
        )
        found += ((raw, None) for raw, _ in pairs)
    return found


def _apply(
    source: Pinned,
    root: BlobRef | None,
    edits: list[tuple[bytes, bytes | None]],
    maker: _Maker,
) -> Generator[Step, None, btree.Applied]:
    keys = [raw for raw, _ in edits]
    while wanted := btree.wanted(source, root, keys):
        yield Load(MissingNode(tuple(wanted)))
        for ref in wanted:
            source.node(ref)
    return btree.apply(source, root, edits, maker.node)


def _bury(base: Base, anchor: Anchor, freed: list[BlobRef], maker: _Maker) -> Anchor:
    """The anchor with its dead and held lists, its snapshots, and the anchors that stay."""
    born = anchor.next_id
    gone = list(base.orphans)
    dead = anchor.dead
    if base.known is not None:
        handovers = handed_over(base.known.anchor, base.writer)
        kept, collected = successors(base.known.anchor, base.known.ref, handovers)
        anchor = replace(anchor, kept=kept, handovers=handovers)
        gone += collected
    if base.remaining is not None:
        dead = DeadList().add(base.remaining, maker.page)
    plan = base.snapshots
    horizon = anchor.horizon if plan is None else plan.horizon
    died = [Dead(ref, anchor.generation) for ref in freed]
    held = [entry for entry in died if entry.ref.id < horizon]
    dying = [entry for entry in died if entry.ref.id >= horizon]
    if plan is None:
        anchor = replace(anchor, held=anchor.held.add(held, maker.page, INLINE_HELD))
    else:
        gone += plan.emptied
        dying += plan.freed
        anchor = _keep(replace(anchor, next_id=born), plan, held, maker)
    dying += [Dead(ref, anchor.generation) for ref in gone]
    dead = dead.add(dying, maker.page)
    return replace(anchor, dead=dead, next_id=maker.next_id)


def _keep(anchor: Anchor, plan: Plan, held: list[Dead], maker: _Maker) -> Anchor:
    """Write the table of snapshots anew; `held` died in this generation and is held."""
    if plan.stay:
        plan.stay[-1].more.extend(held)
    lists = [stay.held.add(stay.more, maker.page, INLINE_HELD) for stay in plan.stay]
    records = [stay.snapshot for stay in plan.stay]
    for name in plan.create:
        records.append(_record(name, anchor))
        lists.append(DeadList())
    newest = lists.pop() if lists else DeadList()
    packed = [dead.add([], maker.page, 0) for dead in lists]
    older = [replace(r, held=h) for r, h in zip(records, packed, strict=False)]
    last = [replace(r, held=DeadList()) for r in records[-1:]]
    tables = [maker.make(Kind.TABLE, payload) for payload in encode_tables([*older, *last])]
    return replace(
        anchor,
        tables=tuple(tables),
        horizon=records[-1].next_id if records else BlobId(0),
        held=newest,
        held_before=sum(dead.count for dead in packed),
    )


def _record(name: str, anchor: Anchor) -> Snapshot:
    return Snapshot(
        name=name,
        generation=anchor.generation,
        time=anchor.time,
        writer=anchor.writer,
        root=anchor.root,
        next_id=anchor.next_id,
        live=anchor.live,
        size=anchor.size,
        files=anchor.files,
    )


_NOTHING = Anchor(Generation(-1), b"", 0, 0, None, (), BlobId(0), 0, 0, 0, 0, DeadList())


def _is_extent(raw: bytes) -> bool:
    return split_key(raw)[1] == ItemKind.EXTENT


def _until_loaded(read: Callable[[], T]) -> Generator[Step, None, T]:
    while True:
        try:
            return read()
        except Missing as missing:
            yield Load(missing)
