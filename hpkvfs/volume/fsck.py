"""Checks a published generation against every invariant of FORMAT.md.

Reads every node of the tree; with `extents`, also fetches every extent and every dead blob's
place from the server. It changes nothing. Problems are sentences that name the inode or blob.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from hpkvfs.errors import CorruptBlob
from hpkvfs.parallel import each
from hpkvfs.tree import check
from hpkvfs.tree.node import CorruptNode, Node
from hpkvfs.types import BlobId, BlobRef
from hpkvfs.volume.blob import Kind
from hpkvfs.volume.gc import dead_entries
from hpkvfs.volume.items import (
    BLOCK,
    PIECE,
    ROOT_INO,
    Dirent,
    Inode,
    ItemKind,
    decode_extent,
    decode_xattr,
    file_type,
    split_key,
)
from hpkvfs.volume.volume import FETCHES_AT_ONCE, Volume

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Report:
    """What a check found; `problems` is empty when all is well.

    stored: every blob that the generation accounts for: live, dead, listing or anchor.
    """

    generation: int = -1
    files: int = 0
    bytes: int = 0
    nodes: int = 0
    extents: int = 0
    dead: int = 0
    stored: frozenset[BlobId] = frozenset()
    problems: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Facts:
    """What the items say, to be compared with each other at the end."""

    inodes: dict[int, Inode] = field(default_factory=dict)
    names: Counter[int] = field(default_factory=Counter)
    subdirectories: Counter[int] = field(default_factory=Counter)
    entries: list[tuple[int, Dirent]] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)
    extents: list[tuple[int, int, BlobRef]] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)


async def fsck(volume: Volume, *, extents: bool, progress: Progress) -> Report:
    """Check the newest known generation; StoreError when the server can't be asked."""
    report = Report()
    if volume.known is None:
        return report
    report.generation = volume.known.anchor.generation
    nodes = await _read_tree(volume, report)
    facts = _Facts()
    if not report.problems:
        structure = check.check(_Nodes(nodes), volume.root)
        report.problems += structure.problems
        for node in nodes.values():
            if node.level == 0:
                _read_leaf(node, facts, report)
    report.nodes, report.extents = len(nodes), len(facts.extents)
    if not report.problems:
        _check_names(facts, report)
        _check_data(facts, report)
        await _check_books(volume, nodes, facts, report)
    if extents:
        await _check_extents(volume, facts, report, progress)
    return report


class _Nodes:
    def __init__(self, nodes: dict[BlobRef, Node]) -> None:
        self._nodes = nodes

    def node(self, ref: BlobRef) -> Node:
        return self._nodes[ref]


async def _read_tree(volume: Volume, report: Report) -> dict[BlobRef, Node]:
    """Every node reachable from the root, level by level."""
    nodes: dict[BlobRef, Node] = {}
    level = [volume.root] if volume.root else []
    while level:
        async for ref, payload in _fetch_all(volume, level, Kind.NODE, report):
            try:
                nodes[ref] = Node.decode(payload)
            except CorruptNode as error:
                report.problems.append(f"node {ref!r}: {error}")
        below = [nodes[ref] for ref in level if ref in nodes and nodes[ref].level]
        level = [BlobRef.decode(raw) for node in below for raw in node.values]
        level = [ref for ref in level if ref not in nodes]
    return nodes


async def _fetch_all(
    volume: Volume, refs: list[BlobRef], kind: Kind, report: Report
) -> AsyncIterator[tuple[BlobRef, bytes]]:
    for start in range(0, len(refs), FETCHES_AT_ONCE):
        batch = refs[start : start + FETCHES_AT_ONCE]
        found: dict[BlobRef, bytes] = {}

        async def fetch(ref: BlobRef, found: dict[BlobRef, bytes] = found) -> None:
            try:
                found[ref] = await volume.fetch(ref, kind, fresh=kind is Kind.EXTENT)
            except CorruptBlob as error:
                report.problems.append(error.message)

        await each(batch, fetch, FETCHES_AT_ONCE)
        for ref in batch:
            if ref in found:
                yield ref, found[ref]


def _read_leaf(node: Node, facts: _Facts, report: Report) -> None:
    for raw, value in zip(node.keys, node.values, strict=True):
        ino, kind, offset = split_key(raw)
        try:
            _read_item(ino, kind, offset, value, facts)
        except (CorruptBlob, ValueError) as error:
            report.problems.append(f"inode {ino}: {error}")
            report.damaged.add(ino)


def _read_item(ino: int, kind: int, offset: int, value: bytes, facts: _Facts) -> None:
    match kind:
        case ItemKind.ORPHAN if ino == 0:
            facts.orphans.add(offset)
        case ItemKind.INODE if ino:
            facts.inodes[ino] = Inode.decode(ino, value)
        case ItemKind.DIRENT:
            entry = Dirent.decode(offset, value)
            facts.entries.append((ino, entry))
            facts.names[entry.ino] += 1
            facts.subdirectories[ino] += entry.type == stat.S_IFDIR >> 12
        case ItemKind.EXTENT:
            facts.extents.append((ino, offset, decode_extent(value)))
        case ItemKind.INLINE:
            facts.pieces.append((ino, offset, len(value)))
        case ItemKind.XATTR:
            decode_xattr(value)
        case ItemKind.SYMLINK:
            pass
        case _:
            raise ValueError(f"an item of unknown kind {kind}")


def _check_names(facts: _Facts, report: Report) -> None:
    problems = report.problems
    if ROOT_INO not in facts.inodes:
        problems.append("there is no root directory")
    for parent, entry in facts.entries:
        inode, above = facts.inodes.get(entry.ino), facts.inodes.get(parent)
        if above is None or not above.is_dir:
            problems.append(f"inode {parent} has entries but is not a directory")
        if inode is None:
            problems.append(f"an entry of directory {parent} leads to missing inode {entry.ino}")
        elif file_type(inode.mode) != entry.type:
            problems.append(f"an entry of directory {parent} tells a wrong type of {entry.ino}")
        elif inode.is_dir and inode.parent != parent:
            problems.append(f"directory {entry.ino} does not know its parent {parent}")
    for ino, inode in facts.inodes.items():
        _check_links(ino, inode, facts, problems)
    report.files = len(facts.inodes)


def _check_links(ino: int, inode: Inode, facts: _Facts, problems: list[str]) -> None:
    names = facts.names[ino] + (ino == ROOT_INO)
    orphan = ino in facts.orphans
    if orphan != (inode.nlink == 0) or (names == 0) != orphan:
        problems.append(f"inode {ino} has {names} names and is {'' if orphan else 'not '}an orphan")
    expected = names and (2 + facts.subdirectories[ino] if inode.is_dir else names)
    if inode.nlink != expected:
        problems.append(f"inode {ino} has link count {inode.nlink}, expected {expected}")
    seen = 0
    while inode.is_dir and inode.nlink and inode.ino != ROOT_INO and seen <= len(facts.inodes):
        above = facts.inodes.get(inode.parent)
        if above is None:
            problems.append(f"directory {ino} hangs on missing inode {inode.parent}")
            return
        inode, seen = above, seen + 1
    if seen > len(facts.inodes):
        problems.append(f"directory {ino} is its own ancestor")


def _check_data(facts: _Facts, report: Report) -> None:
    extents = {(ino, offset) for ino, offset, _ in facts.extents}
    for ino, offset in extents:
        _check_place(ino, offset, BLOCK, facts, report)
    for ino, offset, length in facts.pieces:
        _check_place(ino, offset, PIECE, facts, report)
        if not 0 < length <= PIECE:
            report.problems.append(f"inode {ino} has an inline piece of {length} bytes")
        if (ino, offset // BLOCK * BLOCK) in extents:
            report.problems.append(f"inode {ino} has a block twice, inline and as an extent")
    report.bytes = sum(inode.size for inode in facts.inodes.values())


def _check_place(ino: int, offset: int, unit: int, facts: _Facts, report: Report) -> None:
    inode = facts.inodes.get(ino)
    if inode is None or not inode.is_file:
        report.problems.append(f"inode {ino} has data but is not a file")
    elif offset % unit or offset >= inode.size:
        report.problems.append(f"inode {ino} has data at {offset}, where none can be")


async def _check_books(
    volume: Volume, nodes: dict[BlobRef, Node], facts: _Facts, report: Report
) -> None:
    assert volume.known is not None
    anchor, problems = volume.known.anchor, report.problems
    live = [*nodes, *(ref for _, _, ref in facts.extents)]
    dead, pages = await dead_entries(volume)
    report.dead = len(dead)
    expected = {"live": len(live), "size": report.bytes, "files": report.files}
    for name, value in expected.items():
        if getattr(anchor, name) != value:
            problems.append(f"the anchor counts {getattr(anchor, name)} {name}, found {value}")
    if anchor.dead.count != len(dead):
        problems.append(f"the anchor counts {anchor.dead.count} dead blobs, found {len(dead)}")
    stored: list[BlobId] = [
        *(ref.id for ref in live),
        *(entry.ref.id for entry in dead),
        *(page.id for page in pages),
        *(ref.id for ref in anchor.kept),
        volume.known.ref.id,
    ]
    report.stored = frozenset(stored)
    for blob_id, times in Counter(stored).items():
        if times > 1:
            problems.append(f"{BlobRef(blob_id, b'')!r} is listed {times} times")
    above = [ref for ref in live if ref.id >= anchor.next_id]
    problems += [f"{ref!r} is numbered above the anchor's next id" for ref in above]
    problems += [
        f"inode {i} is above the next number" for i in facts.inodes if i >= anchor.next_ino
    ]


async def _check_extents(volume: Volume, facts: _Facts, report: Report, progress: Progress) -> None:
    owners = {ref: ino for ino, _, ref in facts.extents}
    good: set[BlobRef] = set()
    async for ref, _ in _fetch_all(volume, list(owners), Kind.EXTENT, report):
        good.add(ref)
        progress(len(good), len(owners))
    report.damaged |= {ino for ref, ino in owners.items() if ref not in good}
