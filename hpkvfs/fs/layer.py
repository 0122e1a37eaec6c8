"""Layers: what changed since the last published generation, in memory.

A layer is a set of changes over what lies below it: items put or removed, inodes removed
whole (`gone`), files cut short (`cuts`), and blocks written. Two of them exist at most:
the active one, which operations change, and a frozen one that is being published; below
both lies the tree. Everything is applied through `Effect`s, which are also exactly what the
redo log stores, so replaying the log and having lived through it give the same layer.

A block whose bytes came with one write can leave them to the log's record of it (`ease`), so what
waits to be published needs little memory, however much it is.

Invariants
  - within one layer, items and blocks are newer than its cuts and gone marks: applying a cut
    first drops what it covers from the layer;
  - a block's bytes outside `valid` come from the layers below, through this layer's cuts;
  - nothing a layer below holds is ever changed;
  - `held` is the bytes of blocks that are in memory; a block that left its bytes to the log still
    tells them, for as long as the log has the record.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from sortedcontainers import SortedDict

from hpkvfs.volume.items import BLOCK, ItemKind, inode_range, kind_range, split_key

_ITEM_COST = 48
_FULL = [(0, BLOCK)]


class Put(NamedTuple):
    """Set an item, or remove it (value None)."""

    key: bytes
    value: bytes | None


class Gone(NamedTuple):
    """Remove every item and block of an inode."""

    ino: int


class Cut(NamedTuple):
    """Remove all blocks of a file from this one on."""

    ino: int
    block: int


class Write(NamedTuple):
    """Write bytes at an offset; blocks from `fresh` on hold nothing in the layers below."""

    ino: int
    offset: int
    data: bytes
    fresh: int


class Usage(NamedTuple):
    """Change the volume's totals: sum of file sizes, number of inodes."""

    bytes: int
    files: int


Effect = Put | Gone | Cut | Write | Usage


class Record(Protocol):
    """An operation's effects in the redo log."""

    def written(self, at: int) -> bytes:
        """The bytes of its effect number `at`, a Write; VaultError when they are not there."""
        ...


class Origin(NamedTuple):
    """Where a block's bytes are in the log: from `start` on in the bytes of an effect."""

    record: Record
    at: int
    start: int


class DirtyBlock:
    """One block of a file, known in the byte ranges `valid`, elsewhere as below.

    `size`: of its bytes; they are in memory, or in the log only (after `leave`).
    """

    __slots__ = ("_data", "_origin", "size", "valid")

    def __init__(self, fresh: bool) -> None:
        self._data: bytearray | None = bytearray()
        self._origin: Origin | None = None
        self.size = 0
        self.valid: list[tuple[int, int]] = list(_FULL) if fresh else []

    @property
    def full(self) -> bool:
        """Whether nothing of the block comes from below (bytes past its size are zeros)."""
        return self.valid == _FULL

    @property
    def data(self) -> bytes | bytearray:
        """Its bytes; VaultError when the log does not have them any more."""
        if self._data is not None:
            return self._data
        assert self._origin is not None
        record, at, start = self._origin
        return record.written(at)[start : start + self.size]

    @property
    def held(self) -> int:
        """How many bytes of it are in memory."""
        return 0 if self._data is None else self.size

    def write(self, start: int, data: bytes | memoryview, origin: Origin | None = None) -> bool:
        """Overwrite bytes from `start`; they must end within the block.

        Whether all its bytes are those now, so that they can be left to their `origin`.
        """
        end = start + len(data)
        whole = start == 0 and end >= self.size and (self.full or end == BLOCK)
        if whole:
            self._data = bytearray(data)
        else:
            self._data = known = bytearray(self.data) if self._data is None else self._data
            if len(known) < start:
                known.extend(bytes(start - len(known)))
            known[start:end] = data
        self._origin = origin if whole else None
        self.size = len(self._data)
        if not self.full:
            self._mark(start, end)
        return self._origin is not None

    def leave(self) -> int:
        """Leave its bytes to the log, if that has them in one piece; how many left memory."""
        if self._origin is None or self._data is None:
            return 0
        self._data = None
        return self.size

    def drop(self) -> None:
        """It is no longer part of a layer: there is nothing to leave."""
        self._origin = None

    def over(self, base: bytes) -> bytes:
        """The block's content, given what lies below it."""
        if self.full:
            return bytes(self.data)
        data = self.data
        merged = bytearray(base.ljust(len(data), b"\0"))
        for start, end in self.valid:
            merged[start:end] = data[start:end].ljust(end - start, b"\0")
        return bytes(merged)

    def _mark(self, start: int, end: int) -> None:
        keep = [r for r in self.valid if r[1] < start or r[0] > end]
        touching = [r for r in self.valid if not (r[1] < start or r[0] > end)]
        for low, high in touching:
            start, end = min(start, low), max(end, high)
        insort(keep, (start, end))
        self.valid = keep


@dataclass(slots=True)
class Layer:
    """Changes not yet published.

    weight: estimates the bytes they will cost in blobs; item_weight: those of its items;
    held: bytes of blocks in memory.
    """

    items: SortedDict[bytes, bytes | None] = field(default_factory=SortedDict)
    blocks: dict[int, dict[int, DirtyBlock]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    cuts: dict[int, int] = field(default_factory=dict)
    usage_bytes: int = 0
    usage_files: int = 0
    weight: int = 0
    item_weight: int = 0
    held: int = 0
    _whole: deque[DirtyBlock] = field(default_factory=deque)

    def __bool__(self) -> bool:
        return bool(self.items or self.blocks or self.gone or self.cuts)

    def apply(self, effect: Effect, record: Record | None = None, at: int = 0) -> None:
        """Make one change, which the log has as effect number `at` of a record."""
        if type(effect) is Write:
            self._write(effect, record, at)
        else:
            _APPLY[type(effect)](self, *effect)

    def ease(self, held: int) -> None:
        """Leave bytes of blocks to the log, the longest unwritten first, until `held` are left
        or all others are in the log in pieces."""
        while self.held > held and self._whole:
            self.held -= self._whole.popleft().leave()

    def hides(self, key: bytes) -> bool:
        """Whether an item of a lower layer is removed by a cut or a gone mark of this one."""
        if not (self.gone or self.cuts):
            return False
        ino, kind, offset = split_key(key)
        if ino in self.gone:
            return True
        cut = self.cuts.get(ino)
        data = kind in (ItemKind.EXTENT, ItemKind.INLINE)
        return cut is not None and data and offset >= cut * BLOCK

    def hides_block(self, ino: int, block: int) -> bool:
        """As hides, for a block of a file."""
        return ino in self.gone or block >= self.cuts.get(ino, block + 1)

    def range(self, low: bytes, high: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        """The items put or removed with low <= key < high, in order."""
        for key in self.items.irange(low, high, inclusive=(True, False)):
            yield key, self.items[key]

    def items_changed(self) -> Iterable[tuple[bytes, bytes | None]]:
        """Every item put or removed, in order."""
        changed: Iterable[tuple[bytes, bytes | None]] = self.items.items()
        return changed

    def dirty_blocks(self) -> list[tuple[int, int]]:
        """(inode, block) of every block written, in order."""
        return sorted((ino, number) for ino, blocks in self.blocks.items() for number in blocks)

    def hidden_ranges(self) -> Iterator[tuple[bytes, bytes]]:
        """The key ranges that are removed from below, in no order."""
        for ino in self.gone:
            yield inode_range(ino)
        for ino, block in self.cuts.items():
            yield kind_range(ino, ItemKind.EXTENT, block * BLOCK)
            yield kind_range(ino, ItemKind.INLINE, block * BLOCK)

    def _put(self, key: bytes, value: bytes | None) -> None:
        if key in self.items:
            self._weigh(-_ITEM_COST - len(self.items[key] or b""))
        self._weigh(_ITEM_COST + len(value or b""))
        self.items[key] = value

    def _weigh(self, change: int) -> None:
        self.weight += change
        self.item_weight += change

    def _use(self, size: int, files: int) -> None:
        self.usage_bytes += size
        self.usage_files += files

    def _cut(self, ino: int, block: int) -> None:
        self._drop_blocks(ino, block)
        self.cuts[ino] = min(block, self.cuts.get(ino, block))

    def _remove(self, ino: int) -> None:
        self._drop_blocks(ino, 0)
        self._drop_items(*inode_range(ino))
        self.cuts.pop(ino, None)
        self.gone.add(ino)

    def _write(self, effect: Write, record: Record | None, at: int) -> None:
        ino, offset, data, fresh = effect
        blocks = self.blocks.setdefault(ino, {})
        view, done = memoryview(data), 0
        while done < len(data):
            number, start = divmod(offset + done, BLOCK)
            piece = view[done : done + BLOCK - start]
            block = blocks.get(number)
            if block is None:
                block = blocks[number] = DirtyBlock(number >= fresh or len(piece) == BLOCK)
            size, held = block.size, block.held
            origin = None if record is None else Origin(record, at, done)
            if block.write(start, piece, origin):
                self._whole.append(block)
            self.weight += block.size - size
            self.held += block.held - held
            done += len(piece)

    def _drop_blocks(self, ino: int, start: int) -> None:
        blocks = self.blocks.get(ino)
        if blocks is None:
            return
        for number in [n for n in blocks if n >= start]:
            block = blocks.pop(number)
            self.weight -= block.size
            self.held -= block.held
            block.drop()
        if not blocks:
            del self.blocks[ino]

    def _drop_items(self, low: bytes, high: bytes) -> None:
        for key in list(self.items.irange(low, high, inclusive=(True, False))):
            self._weigh(-_ITEM_COST - len(self.items.pop(key) or b""))


_APPLY: dict[type[Effect], Callable[..., None]] = {
    Put: Layer._put,
    Gone: Layer._remove,
    Cut: Layer._cut,
    Usage: Layer._use,
}
