"""Reading through the layers: active, frozen if there is one, then the published tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from hpkvfs.fs.layer import Layer
from hpkvfs.types import BlobRef, Missing
from hpkvfs.volume.items import BLOCK, ItemKind, decode_extent, key, trim
from hpkvfs.volume.volume import together

Pair = tuple[bytes, bytes]


class Below(Protocol):
    """The published tree; every method may raise types.Missing."""

    def get(self, key: bytes) -> bytes | None:
        """An item's value."""
        ...

    def scan(self, low: bytes, high: bytes) -> Iterator[Pair]:
        """Items in [low, high)."""
        ...

    def extent(self, ref: BlobRef) -> bytes:
        """An extent's payload."""
        ...


class View:
    """A file tree made of layers (newest first) over a published tree."""

    def __init__(self, layers: list[Layer], below: Below) -> None:
        self._layers = layers
        self._below = below

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
        """A file's block; zeros at its end may be left out. Missing."""
        return self._block(0, ino, number)

    def blocks(self, wanted: Iterable[tuple[int, int]]) -> list[bytes]:
        """Several (inode, block)s; what is missing for any of them is reported together."""
        found, misses = [], []
        for ino, number in wanted:
            try:
                found.append(trim(self.block(ino, number)))
            except Missing as miss:
                misses.append(miss)
        if misses:
            raise together(misses)
        return found

    def extent_refs(self, ino: int, numbers: Iterable[int]) -> list[BlobRef]:
        """The extents that reading these blocks would fetch, as far as known in memory."""
        refs = []
        for number in numbers:
            hidden = any(
                number in layer.blocks.get(ino, ()) or layer.hides_block(ino, number)
                for layer in self._layers
            )
            raw = None if hidden else self._below.get(key(ino, ItemKind.EXTENT, number * BLOCK))
            if raw is not None:
                refs.append(decode_extent(raw))
        return refs

    def _block(self, depth: int, ino: int, number: int) -> bytes:
        for at, layer in enumerate(self._layers[depth:], depth):
            block = layer.blocks.get(ino, {}).get(number)
            if block is not None and block.full:
                return bytes(block.data)
            hidden = layer.hides_block(ino, number)
            if block is not None:
                return block.over(b"" if hidden else self._block(at + 1, ino, number))
            if hidden:
                return b""
        return self._published(ino, number)

    def _published(self, ino: int, number: int) -> bytes:
        start = number * BLOCK
        raw = self._below.get(key(ino, ItemKind.EXTENT, start))
        if raw is not None:
            return trim(self._below.extent(decode_extent(raw)))
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
