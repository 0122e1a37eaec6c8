"""What the items of one tree say, compared with each other (FORMAT.md, "Items").

Every `Finding` is a sentence and, where there is one thing to do about it, the edits that do
it. Each is judged alone, and edits of one may bring about or settle another: whoever repairs
applies all edits, then looks again, until nothing is left that has any (as passes of e2fsck).
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hpkvfs.errors import CorruptBlob
from hpkvfs.types import BlobRef
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
    key,
    split_key,
)

Edits = dict[bytes, bytes | None]


@dataclass(slots=True)
class Finding:
    """Something wrong. unnamed: an inode to be given a name, so that it is found again."""

    text: str
    edits: Edits = field(default_factory=dict)
    unnamed: int = 0


@dataclass(slots=True)
class Facts:
    """The items of a tree by what they are about; `bad` could not be read."""

    inodes: dict[int, Inode] = field(default_factory=dict)
    entries: list[tuple[int, Dirent]] = field(default_factory=list)
    orphans: set[int] = field(default_factory=set)
    extents: list[tuple[int, int, BlobRef]] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    others: list[tuple[int, bytes]] = field(default_factory=list)
    bad: list[tuple[bytes, str]] = field(default_factory=list)

    def read(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Take in some items."""
        for raw, value in items:
            try:
                self._read(raw, value)
            except (CorruptBlob, ValueError) as error:
                self.bad.append((raw, str(error)))

    def _read(self, raw: bytes, value: bytes) -> None:
        ino, kind, offset = split_key(raw)
        match kind:
            case ItemKind.ORPHAN if ino == 0:
                self.orphans.add(offset)
            case ItemKind.INODE if ino:
                self.inodes[ino] = Inode.decode(ino, value)
            case ItemKind.DIRENT:
                self.entries.append((ino, Dirent.decode(offset, value)))
            case ItemKind.EXTENT:
                self.extents.append((ino, offset, decode_extent(value)))
            case ItemKind.INLINE:
                self.pieces.append((ino, offset, len(value)))
            case ItemKind.XATTR:
                decode_xattr(value)
                self.others.append((ino, raw))
            case ItemKind.SYMLINK:
                self.others.append((ino, raw))
            case _:
                raise ValueError(f"an item of unknown kind {kind}")

    @property
    def bytes(self) -> int:
        """The sum of all files' sizes."""
        return sum(inode.size for inode in self.inodes.values())

    def names(self) -> dict[int, tuple[int, Dirent]]:
        """One name of each inode that has any: the directory, and the entry in it."""
        return {entry.ino: (parent, entry) for parent, entry in reversed(self.entries)}


class Paths:
    """Where inodes are found, as far as their directories are."""

    def __init__(self, facts: Facts) -> None:
        self._names = facts.names()

    def of(self, ino: int) -> str:
        """The path from the root, without a slash before it; `#INO` for what has no name."""
        parts: list[str] = []
        while ino != ROOT_INO and len(parts) < 4_096:
            found = self._names.get(ino)
            if found is None:
                parts.append(f"#{ino}")
                break
            parts.append(found[1].name.decode(errors="surrogateescape"))
            ino = found[0]
        return "/".join(reversed(parts)) or "/"

    def entry(self, parent: int, entry: Dirent) -> str:
        """The path of an entry."""
        name = entry.name.decode(errors="surrogateescape")
        return name if parent == ROOT_INO else f"{self.of(parent)}/{name}"


def judge(facts: Facts, paths: Paths) -> Iterator[Finding]:
    """Everything that is wrong with a tree's items."""
    for raw, why in facts.bad:
        ino, kind, offset = split_key(raw)
        known = kind in set(ItemKind)
        text = f"{paths.of(ino)}: item {kind} at {offset} can't be read: {why}"
        yield Finding(text, {raw: None} if known else {})
    yield from _judge_entries(facts, paths)
    yield from _judge_inodes(facts, paths)
    yield from _judge_data(facts, paths)


def _judge_entries(facts: Facts, paths: Paths) -> Iterator[Finding]:
    if ROOT_INO not in facts.inodes:
        root = Inode(ROOT_INO, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, 0, 0, 0, ROOT_INO)
        edits: Edits = {key(ROOT_INO, ItemKind.INODE): root.encode()}
        yield Finding("there is no root directory", edits)
    named: Counter[int] = Counter(entry.ino for _, entry in facts.entries)
    for parent, entry in facts.entries:
        place = key(parent, ItemKind.DIRENT, entry.cookie)
        path = paths.entry(parent, entry)
        inode, above = facts.inodes.get(entry.ino), facts.inodes.get(parent)
        if above is None or not above.is_dir:
            yield Finding(f"{path}: is in inode {parent}, which is no directory", {place: None})
        if inode is None:
            yield Finding(f"{path}: leads to inode {entry.ino}, which is not there", {place: None})
        elif file_type(inode.mode) != entry.type:
            right = entry._replace(type=file_type(inode.mode)).encode()
            yield Finding(f"{path}: its entry tells a wrong type", {place: right})
        elif inode.is_dir and inode.parent != parent:
            mended = inode._replace(parent=parent).encode()
            edits = {key(inode.ino, ItemKind.INODE): mended}
            if named[inode.ino] > 1:
                edits = {place: None}
            yield Finding(f"{path}: does not know that it is in directory {parent}", edits)


def _judge_inodes(facts: Facts, paths: Paths) -> Iterator[Finding]:
    names: Counter[int] = Counter(entry.ino for _, entry in facts.entries)
    below: Counter[int] = Counter(
        parent for parent, entry in facts.entries if entry.type == stat.S_IFDIR >> 12
    )
    for ino in facts.orphans:
        if ino not in facts.inodes or names[ino]:
            what = "has names" if ino in facts.inodes else "is not there"
            edits: Edits = {key(0, ItemKind.ORPHAN, ino): None}
            yield Finding(f"inode {ino} is listed as an orphan and {what}", edits)
    for ino, inode in facts.inodes.items():
        count, orphan = names[ino] + (ino == ROOT_INO), ino in facts.orphans
        if not count:
            if not orphan:
                yield Finding(f"inode {ino} has no name", unnamed=ino)
            elif inode.nlink:
                yield _links(inode, 0, f"inode {ino}")
            continue
        expected = 2 + below[ino] if inode.is_dir else count
        if inode.nlink != expected:
            yield _links(inode, expected, paths.of(ino))
        if inode.is_dir:
            yield from _judge_ancestry(inode, facts)


def _links(inode: Inode, expected: int, path: str) -> Finding:
    edits: Edits = {key(inode.ino, ItemKind.INODE): inode._replace(nlink=expected).encode()}
    return Finding(f"{path}: has link count {inode.nlink}, expected {expected}", edits)


def _judge_ancestry(inode: Inode, facts: Facts) -> Iterator[Finding]:
    """A directory that is in itself, by whatever way, is in no other."""
    above: Inode | None = inode
    for _ in range(len(facts.inodes) + 1):
        if above is None or above.ino == ROOT_INO:
            return
        above = facts.inodes.get(above.parent)
        if above is inode:
            break
    else:
        return
    place = next(
        key(parent, ItemKind.DIRENT, entry.cookie)
        for parent, entry in facts.entries
        if entry.ino == inode.ino
    )
    yield Finding(f"directory {inode.ino} is its own ancestor", {place: None})


def _judge_data(facts: Facts, paths: Paths) -> Iterator[Finding]:
    blocks = {(ino, offset) for ino, offset, _ in facts.extents}
    for ino, offset, _ in facts.extents:
        place = key(ino, ItemKind.EXTENT, offset)
        yield from _judge_place(ino, offset, BLOCK, place, facts, paths)
    for ino, offset, length in facts.pieces:
        place = key(ino, ItemKind.INLINE, offset)
        yield from _judge_place(ino, offset, PIECE, place, facts, paths)
        if not 0 < length <= PIECE:
            text = f"{paths.of(ino)}: has an inline piece of {length} bytes"
            yield Finding(text, {place: None})
        if (ino, offset // BLOCK * BLOCK) in blocks:
            text = f"{paths.of(ino)}: has the block at {offset} twice"
            yield Finding(text, {place: None})
    for ino, raw in facts.others:
        if ino not in facts.inodes:
            yield Finding(f"inode {ino} has attributes and is not there", {raw: None})


def _judge_place(
    ino: int, offset: int, unit: int, place: bytes, facts: Facts, paths: Paths
) -> Iterator[Finding]:
    inode = facts.inodes.get(ino)
    if inode is None or not inode.is_file:
        yield Finding(f"inode {ino} has data but is not a file", {place: None})
    elif offset % unit or offset >= inode.size:
        yield Finding(f"{paths.of(ino)}: has data at {offset}, where none can be", {place: None})
