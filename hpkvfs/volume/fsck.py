"""Checks one published generation, its snapshots and its books against FORMAT.md.

    1. the trees: every node of the newest tree and of every snapshot's, wherever it comes from
       (the cache will do); what is in the newest tree's items (facts.py);
    2. the books: which blobs there should be, each once, as the anchor counts them; what the
       snapshots hold is exactly what the held lists say;
    3. if asked, the blobs: every one that a tree, a list or the search for anchors needs, from
       the server, in random order, up to a number of look-ups.

It changes nothing. What can be done about what it finds is in the report as well: edits of
items, inodes to be given a name, blobs that the cache has and the server has not, and, when
nodes are lost or miscounted, that the tree must be written anew from what is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hpkvfs.errors import CorruptBlob, UserError
from hpkvfs.parallel import each
from hpkvfs.tree import check
from hpkvfs.tree.node import CorruptNode, Node
from hpkvfs.types import BlobId, BlobRef
from hpkvfs.volume.blob import Kind
from hpkvfs.volume.deadlist import Dead, DeadList
from hpkvfs.volume.facts import Edits, Facts, Paths, judge
from hpkvfs.volume.gc import loading, read_list
from hpkvfs.volume.items import BLOCK, PIECE, ItemKind, key, kind_range
from hpkvfs.volume.snapshots import Snapshot
from hpkvfs.volume.volume import FETCHES_AT_ONCE, Known, Volume

Progress = Callable[[int, int], None]
Shuffle = Callable[[list[tuple[BlobRef, Kind]]], None]
Range = tuple[int, int]
Lists = tuple[list[Dead], list[Dead], list[BlobRef]]


@dataclass(frozen=True, slots=True, order=True)
class Damage:
    """A file that is not all there: byte ranges [start, end), none when it is lost whole."""

    path: str
    snapshot: str = ""
    ino: int = 0
    ranges: tuple[Range, ...] = ()


@dataclass(slots=True)
class Repairs:
    """What can be done about what was found; empty when there is nothing to do, or no way.

    holes: extents that are lost, to become holes; marks: the bytes lost of files, to be named by
    an attribute of theirs; again: blobs that the cache still has; rewrite: items that are left
    of a tree with lost or miscounted nodes, and the nodes it had.
    """

    edits: Edits = field(default_factory=dict)
    unnamed: list[int] = field(default_factory=list)
    holes: dict[int, list[int]] = field(default_factory=dict)
    marks: dict[int, tuple[Range, ...]] = field(default_factory=dict)
    again: list[tuple[BlobRef, bytes]] = field(default_factory=list)
    rewrite: tuple[list[tuple[bytes, bytes]], list[BlobRef]] | None = None
    size: int = 0
    files: int = 0

    def __bool__(self) -> bool:
        lists = self.edits or self.unnamed or self.holes or self.again or self.size or self.files
        return bool(lists) or self.rewrite is not None


@dataclass(slots=True)
class Report:
    """What a check found; `problems` is empty when all is well.

    stored: every blob that the generation accounts for: live, held, dead, listing or anchor;
    verified: blobs fetched from the server and found right; unchecked: blobs that the bound
    on look-ups left out.
    """

    generation: int = -1
    files: int = 0
    bytes: int = 0
    nodes: int = 0
    extents: int = 0
    dead: int = 0
    held: int = 0
    snapshots: int = 0
    verified: int = 0
    unchecked: int = 0
    stored: frozenset[BlobId] = frozenset()
    problems: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    repairs: Repairs = field(default_factory=Repairs)


@dataclass(slots=True)
class _Tree:
    """One tree as far as it can be read. lost: key ranges [low, high) that can't."""

    name: str
    root: BlobRef | None
    nodes: list[BlobRef] = field(default_factory=list)
    leaves: list[BlobRef] = field(default_factory=list)
    lost: list[tuple[BlobRef, bytes, bytes]] = field(default_factory=list)


async def fsck(
    volume: Volume,
    *,
    extents: bool,
    progress: Progress,
    limit: int | None = None,
    shuffle: Shuffle = lambda blobs: None,
    known: Known | None = None,
) -> Report:
    """Check a generation (the newest known one); StoreError when the server can't be asked.

    extents: also look every blob up at the server, at most `limit` of them.
    """
    known = known or volume.known
    if known is None:
        return Report()
    return await _Check(volume, known, limit, progress).run(extents, shuffle)


class _Check:
    """The state of one check."""

    def __init__(self, volume: Volume, known: Known, limit: int | None, progress: Progress) -> None:
        self.volume = volume
        self.known = known
        self.left = limit
        self.progress = progress
        self.report = Report(known.anchor.generation)
        self.nodes: dict[BlobRef, Node] = {}
        self.fetched: set[BlobRef] = set()
        self.lost: set[BlobRef] = set()
        self.facts = Facts()
        self.is_whole = True

    async def run(self, blobs: bool, shuffle: Shuffle) -> Report:
        report, anchor = self.report, self.known.anchor
        snapshots = await self.read_snapshots()
        live = await self.read_tree(_Tree("", anchor.root))
        trees = [live] + [await self.read_tree(_Tree(s.name, s.root)) for s in snapshots]
        report.snapshots = len(snapshots)
        for tree in trees:
            self.judge_structure(tree)
        self.facts = self.facts_of(live)
        report.nodes, report.extents = len(live.nodes), len(self.facts.extents)
        report.files, report.bytes = len(self.facts.inodes), self.facts.bytes
        self.judge_items()
        lists = await self.read_lists(snapshots)
        self.judge_books(live, trees[1:], lists)
        if blobs:
            await self.look_up_all(trees, lists, shuffle)
        await self.mend_from_cache()
        self.name_damage(trees)
        self.plan_rewrite(live)
        if live.lost and not live.leaves:  # an empty vault is no repair
            report.repairs = Repairs(again=report.repairs.again)
        report.damaged.sort()
        return report

    # -- reading -------------------------------------------------------------------------

    async def fetch(self, ref: BlobRef, kind: Kind) -> bytes | None:
        """From the cache, else the server; None, and a problem, when it is lost."""
        payload = self.volume.peek(ref, kind)
        if payload is None:
            if self.left is not None:
                if not self.left:
                    raise UserError(
                        "the tokens allowed do not pay for reading the tree alone",
                        "allow more with --max-tokens",
                    )
                self.left -= 1
            payload = await self.fetch_fresh(ref, kind)
        return payload

    async def fetch_fresh(self, ref: BlobRef, kind: Kind) -> bytes | None:
        self.fetched.add(ref)
        try:
            payload = await self.volume.fetch(ref, kind, fresh=True)
        except CorruptBlob as error:
            self.report.problems.append(error.message)
            self.lost.add(ref)
            return None
        self.report.verified += 1
        return payload

    async def read_tree(self, tree: _Tree) -> _Tree:
        """Every node that can be reached, level by level."""
        places = [(tree.root, b"", b"\xff" * 17)] if tree.root else []
        seen: set[BlobRef] = set()
        while places:
            await self.read_nodes([ref for ref, _, _ in places])
            below: list[tuple[BlobRef, bytes, bytes]] = []
            for ref, low, high in places:
                node = self.nodes.get(ref)
                if node is None:
                    tree.lost.append((ref, low, high))
                elif ref not in seen:
                    seen.add(ref)
                    tree.nodes.append(ref)
                    if node.level:
                        bounds = [*node.keys[1:], high]
                        refs = map(BlobRef.decode, node.values)
                        below += zip(refs, node.keys, bounds, strict=True)
                    else:
                        tree.leaves.append(ref)
            places = below
        return tree

    async def read_nodes(self, refs: Iterable[BlobRef]) -> None:
        async def read(ref: BlobRef) -> None:
            payload = await self.fetch(ref, Kind.NODE)
            try:
                if payload is not None:
                    self.nodes[ref] = Node.decode(payload)
            except CorruptNode as error:
                self.report.problems.append(f"node {ref!r}: {error}")
                self.lost.add(ref)

        unread = dict.fromkeys(r for r in refs if r not in self.nodes and r not in self.lost)
        await each(unread, read, FETCHES_AT_ONCE)

    async def read_lists(self, snapshots: list[Snapshot]) -> Lists:
        """(dead, held, pages of all lists)."""
        anchor = self.known.anchor
        dead, pages = await self.read_list(anchor.dead)
        held: list[Dead] = []
        older: list[DeadList] = [snapshot.held for snapshot in snapshots]
        for held_list in [*older, anchor.held]:
            entries, more = await self.read_list(held_list)
            held += entries
            pages += more
        self.expect("blobs held for older snapshots", anchor.held_before,
                    sum(held_list.count for held_list in older))  # fmt: skip
        self.report.dead, self.report.held = len(dead), len(held)
        return dead, held, pages

    async def read_list(self, dead: DeadList) -> tuple[list[Dead], list[BlobRef]]:
        try:
            entries, pages = await read_list(self.volume, dead)
        except CorruptBlob as error:
            self.problem(f"a dead list can't be read: {error.message}")
            self.is_whole = False
            return [], []
        if dead.count != len(entries):
            self.problem(f"a dead list counts {dead.count} blobs, found {len(entries)}")
        return entries, pages

    async def read_snapshots(self) -> list[Snapshot]:
        try:
            return await loading(self.volume, lambda: self.volume.snapshots(self.known))
        except CorruptBlob as error:
            self.problem(f"the table of snapshots can't be read: {error.message}")
            self.is_whole = False
            return []

    def items(self, tree: _Tree) -> Iterator[tuple[bytes, bytes]]:
        for ref in tree.leaves:
            node = self.nodes[ref]
            yield from zip(node.keys, node.values, strict=True)

    def facts_of(self, tree: _Tree) -> Facts:
        facts = Facts()
        facts.read(self.items(tree))
        return facts

    # -- judging -------------------------------------------------------------------------

    def problem(self, text: str) -> None:
        self.report.problems.append(text)

    def expect(self, what: str, counted: int, found: int) -> None:
        if counted != found:
            self.problem(f"the anchor counts {counted} {what}, found {found}")

    def judge_structure(self, tree: _Tree) -> None:
        where = f"snapshot {tree.name}: " if tree.name else ""
        for text in check.check(_Nodes(self.nodes), tree.root).problems:
            if not text.endswith(_UNREADABLE):  # said when it was read
                self.problem(where + text)

    def judge_items(self) -> None:
        repairs = self.report.repairs
        for finding in judge(self.facts, Paths(self.facts)):
            self.problem(finding.text)
            repairs.edits.update(finding.edits)
            if finding.unnamed:
                repairs.unnamed.append(finding.unnamed)
        repairs.unnamed = list(dict.fromkeys(repairs.unnamed))

    def judge_books(
        self,
        live: _Tree,
        snapshots: list[_Tree],
        lists: Lists,
    ) -> None:
        anchor, (dead, held, pages) = self.known.anchor, lists
        reached = [*live.nodes, *(ref for ref, _, _ in live.lost)]
        reached += [ref for _, _, ref in self.facts.extents]
        if not live.lost:
            self.expect("live blobs", anchor.live, len(reached))
            self.expect("bytes", anchor.size, self.report.bytes)
            self.expect("files", anchor.files, self.report.files)
        self.report.repairs.size = self.report.bytes - anchor.size
        self.report.repairs.files = self.report.files - anchor.files
        if self.is_whole and not any(tree.lost for tree in [live, *snapshots]):
            self.judge_held(set(reached), snapshots, {entry.ref for entry in held})
        stored = [
            *(ref.id for ref in reached),
            *(entry.ref.id for entry in [*dead, *held]),
            *(page.id for page in [*pages, *anchor.tables, *anchor.kept, self.known.ref]),
        ]
        self.report.stored = frozenset(stored)
        for blob_id, times in Counter(stored).items():
            if times > 1:
                self.problem(f"{BlobRef(blob_id, b'')!r} is listed {times} times")
        for ref in reached:
            if ref.id >= anchor.next_id:
                self.problem(f"{ref!r} is numbered above the anchor's next id")
        for ino in self.facts.inodes:
            if ino >= anchor.next_ino:
                self.problem(f"inode {ino} is above the next number")

    def judge_held(self, live: set[BlobRef], trees: list[_Tree], held: set[BlobRef]) -> None:
        """What only snapshots reach is what the held lists say."""
        reached: set[BlobRef] = set()
        leaves: set[BlobRef] = set()
        for tree in trees:
            reached.update(tree.nodes)
            leaves.update(tree.leaves)
        for ref in leaves:
            facts = Facts()
            facts.read(zip(self.nodes[ref].keys, self.nodes[ref].values, strict=True))
            reached.update(extent for _, _, extent in facts.extents)
        for ref in sorted(reached - live - held):
            self.problem(f"{ref!r} is in a snapshot and on no held list")
        for ref in sorted(held - reached):
            self.problem(f"{ref!r} is held and in no snapshot")

    # -- looking blobs up ----------------------------------------------------------------

    async def look_up_all(
        self,
        trees: list[_Tree],
        lists: Lists,
        shuffle: Shuffle,
    ) -> None:
        """Have every blob from the server that was not, as far as the bound goes."""
        anchor = self.known.anchor
        wanted: dict[BlobRef, Kind] = {}
        for tree in trees:
            wanted |= dict.fromkeys(tree.nodes, Kind.NODE)
        for node in self.nodes.values():
            if not node.level:
                wanted |= dict.fromkeys(_extents(node), Kind.EXTENT)
        wanted |= dict.fromkeys(lists[2], Kind.PAGE)
        wanted |= dict.fromkeys(anchor.tables, Kind.TABLE)
        wanted |= dict.fromkeys([*anchor.kept, self.known.ref], Kind.ANCHOR)
        todo = [(ref, kind) for ref, kind in wanted.items() if ref not in self.fetched]
        shuffle(todo)
        if self.left is not None:
            self.report.unchecked = max(0, len(todo) - self.left)
            todo = todo[: self.left]
        done = 0

        async def look(blob: tuple[BlobRef, Kind]) -> None:
            nonlocal done
            await self.fetch_fresh(*blob)
            done += 1
            self.progress(done, len(todo))

        await each(todo, look, FETCHES_AT_ONCE)

    async def mend_from_cache(self) -> None:
        """Of lost blobs, those that are here still."""
        for ref in sorted(self.lost):
            blob = self.volume.cached(ref)
            if blob is not None and await self.volume.find_blob(ref.id) is None:
                self.report.repairs.again.append((ref, blob))

    # -- naming what is damaged ----------------------------------------------------------

    def name_damage(self, trees: list[_Tree]) -> None:
        again = {ref for ref, _ in self.report.repairs.again}
        for tree in trees:
            touched = [leaf for leaf in tree.leaves if self._has_lost(leaf)]
            if not (touched or tree.lost):
                continue
            facts = self.facts if tree is trees[0] else self.facts_of(tree)
            holes = _by_inode(facts, self.lost - again)
            for ino, offsets in holes.items():
                if ino in facts.inodes:
                    size = facts.inodes[ino].size
                    self.damage(tree, facts, ino, [(at, min(at + BLOCK, size)) for at in offsets])
            if tree is trees[0]:
                self.report.repairs.holes = holes
            self._name_lost_ranges(tree, facts)

    def _has_lost(self, leaf: BlobRef) -> bool:
        return bool(self.lost) and any(ref in self.lost for ref in _extents(self.nodes[leaf]))

    def _name_lost_ranges(self, tree: _Tree, facts: Facts) -> None:
        """What lies in the nodes that are lost: names that lead there, and data."""
        paths = Paths(facts)
        for _, low, high in tree.lost:
            for parent, entry in facts.entries:
                if low <= key(entry.ino, ItemKind.INODE) < high:
                    path = paths.entry(parent, entry)
                    self.report.damaged.append(Damage(path, tree.name, entry.ino))
            for ino, inode in facts.inodes.items():
                ranges = [*_data_lost(ino, inode.size, low, high)]
                if ranges and inode.is_file:
                    self.damage(tree, facts, ino, ranges)

    def damage(self, tree: _Tree, facts: Facts, ino: int, ranges: list[Range]) -> None:
        path, lost = Paths(facts).of(ino), _joined(ranges)
        self.report.damaged.append(Damage(path, tree.name, ino, lost))
        if not tree.name:
            marks = self.report.repairs.marks
            marks[ino] = _joined([*marks.get(ino, ()), *lost])

    def plan_rewrite(self, live: _Tree) -> None:
        """The tree from what is left of it, if a node is lost and can't be stored again."""
        again = {ref for ref, _ in self.report.repairs.again}
        lost = [ref for ref, _, _ in live.lost if ref not in again]
        miscounted = self.known.anchor.live != len(live.nodes) + len(self.facts.extents)
        if lost or (miscounted and not live.lost):
            self.report.repairs.rewrite = (sorted(self.items(live)), [*live.nodes, *lost])


class _Nodes:
    """Nodes in memory, as a source; those that are lost are damaged."""

    def __init__(self, nodes: dict[BlobRef, Node]) -> None:
        self._nodes = nodes

    def node(self, ref: BlobRef) -> Node:
        node = self._nodes.get(ref)
        if node is None:
            raise CorruptNode(_UNREADABLE)
        return node


_UNREADABLE = "it can't be read"


def _extents(leaf: Node) -> Iterator[BlobRef]:
    facts = Facts()
    facts.read(zip(leaf.keys, leaf.values, strict=True) if not leaf.level else ())
    return (ref for _, _, ref in facts.extents)


def _by_inode(facts: Facts, lost: set[BlobRef]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for ino, offset, ref in facts.extents:
        if ref in lost:
            found.setdefault(ino, []).append(offset)
    return found


def _data_lost(ino: int, size: int, low: bytes, high: bytes) -> Iterator[Range]:
    """The bytes of a file whose items would be in [low, high)."""
    for kind, unit in ((ItemKind.EXTENT, BLOCK), (ItemKind.INLINE, PIECE)):
        first, last = kind_range(ino, kind)
        start, end = max(first, low), min(last, high)
        if start < end:
            begin = 0 if start == first else int.from_bytes(start[9:], "big")
            stop = size if end == last else int.from_bytes(end[9:], "big")
            if begin < min(stop, size):
                yield begin // unit * unit, min(stop, size)


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return tuple(joined)
