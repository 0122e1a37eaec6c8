"""Reading through the layers: active, frozen if there is one, then the published tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from hpkvfs.fs.layer import Layer
from hpkvfs.types import BlobRef, Missing
from hpkvfs.volume.items import BLOCK, ItemKind, decode_extent, key, split_key, trim
from hpkvfs.volume.volume import together

Pair = tuple[bytes, bytes]

MOST_REFS: Final = 1_024
"""Extents found lately that are known by (inode, block): what is fetched ahead is read soon."""


class Below(Protocol):
    """The published tree; every method may raise types.Missing."""

    @property
    def state(self) -> object:
        """Another object when something in the tree is another than before."""
        ...

    def get(self, key: bytes) -> bytes | None:
        """An item's value."""
        ...

    def scan(self, low: bytes, high: bytes) -> Iterator[Pair]:
        """Items in [low, high)."""
        ...

    def extent(self, ref: BlobRef) -> bytes:
        """An extent's payload."""
        ...

    def extents(self, refs: Sequence[BlobRef]) -> list[bytes]:
        """Several extents' payloads."""
        ...


class View:
    """A file tree made of layers (newest first) over a published tree."""

    def __init__(self, layers: list[Layer], below: Below) -> None:
        self._layers = layers
        self._below = below
        self._refs: dict[tuple[int, int], BlobRef] = {}
        self._state: object = None

    def get(self, key: bytes) -> bytes | None:
        """An item's value, or None; Missing."""
        for layer in self._layers:
            if key in layer.items:
                value: bytes | None = layer.items[key]
                return value
            if layer.hides(key):
                return None
        return self._below.get(key)

    def scan(self, low: bytes, high: bytes) -> Iterator[Pair]:
        """Items with low <= key < high, in order; Missing."""
        pairs: Iterator[Pair] = self._below.scan(low, high)
        for layer in reversed(self._layers):
            pairs = _over(layer, low, high, pairs)
        return pairs

    def block(self, ino: int, number: int) -> bytes:
        """A file's block without the zeros at its end; Missing."""
        return trim(self.read(ino, range(number, number + 1))[0])

    def blocks(self, wanted: Iterable[tuple[int, int]]) -> list[bytes]:
        """As `block`, for several (inode, block)s; what they miss is reported together."""
        found, misses = [], []
        for ino, number in wanted:
            try:
                found.append(self.block(ino, number))
            except Missing as miss:
                misses.append(miss)
        if misses:
            raise together(misses)
        return found

    def read(self, ino: int, numbers: range) -> list[bytes]:
        """A run of a file's blocks, where zeros at the end may be left out; Missing, of all."""
        shown = self._shown(ino, numbers)
        extents = self._extents(ino, shown)
        if shown is numbers and len(numbers) > 1 and None not in extents:
            return self._below.extents(extents)  # type: ignore[arg-type]
        refs = dict(zip(shown, extents, strict=True))
        found, misses = [], []
        for number in numbers:
            try:
                found.append(self._block(0, ino, number, refs))
            except Missing as miss:
                misses.append(miss)
        if misses:
            raise together(misses)
        return found

    def extent_refs(self, ino: int, numbers: range) -> list[BlobRef]:
        """The extents that reading these blocks would fetch; Missing."""
        return [ref for ref in self._extents(ino, self._shown(ino, numbers)) if ref is not None]

    def _shown(self, ino: int, numbers: range) -> Sequence[int]:
        """Those blocks of which something published shows through the layers."""
        for layer in self._layers:
            if ino in layer.blocks or ino in layer.gone or ino in layer.cuts:
                return [number for number in numbers if self._shows(ino, number)]
        return numbers

    def _shows(self, ino: int, number: int) -> bool:
        for layer in self._layers:
            block = layer.blocks.get(ino, {}).get(number)
            if (block is not None and block.full) or layer.hides_block(ino, number):
                return False
        return True

    def _extents(self, ino: int, numbers: Sequence[int]) -> list[BlobRef | None]:
        """The published extents of these ascending blocks, None for one that has none; Missing."""
        if len(numbers) == 1:
            raw = self._below.get(key(ino, ItemKind.EXTENT, numbers[0] * BLOCK))
            return [None if raw is None else decode_extent(raw)]
        if self._below.state is not self._state or len(self._refs) > MOST_REFS:
            self._refs.clear()
            self._state = self._below.state
        refs = [self._refs.get((ino, number)) for number in numbers]
        if None in refs:
            self._search(ino, numbers[0], numbers[-1] + 1)
            refs = [self._refs.get((ino, number)) for number in numbers]
        return refs

    def _search(self, ino: int, first: int, stop: int) -> None:
        low, high = (key(ino, ItemKind.EXTENT, number * BLOCK) for number in (first, stop))
        for raw, value in self._below.scan(low, high):
            self._refs[ino, split_key(raw)[2] // BLOCK] = decode_extent(value)

    def _block(self, depth: int, ino: int, number: int, refs: dict[int, BlobRef | None]) -> bytes:
        for at, layer in enumerate(self._layers[depth:], depth):
            block = layer.blocks.get(ino, {}).get(number)
            if block is not None and block.full:
                return bytes(block.data)
            hidden = layer.hides_block(ino, number)
            if block is not None:
                return block.over(b"" if hidden else self._block(at + 1, ino, number, refs))
            if hidden:
                return b""
        return self._published(ino, number, refs)

    def _published(self, ino: int, number: int, refs: dict[int, BlobRef | None]) -> bytes:
        ref = refs.get(number)
        if ref is not None:
            return self._below.extent(ref)
        start = number * BLOCK
        low, high = key(ino, ItemKind.INLINE, start), key(ino, ItemKind.INLINE, start + BLOCK)
        return b"".join(piece for _, piece in self._below.scan(low, high))


def _over(layer: Layer, low: bytes, high: bytes, below: Iterator[Pair]) -> Iterator[Pair]:
    changes = layer.range(low, high)
    change = next(changes, None)
    for raw, value in below:
        while change is not None and change[0] < raw:
            if change[1] is not None:
                yield change[0], change[1]
            change = next(changes, None)
        if change is not None and change[0] == raw:
            if change[1] is not None:
                yield change[0], change[1]
            change = next(changes, None)
        elif not layer.hides(raw):
            yield raw, value
    while change is not None:
        if change[1] is not None:
            yield change[0], change[1]
        change = next(changes, None)
