"""Dead lists: blobs that are no longer part of the newest tree and not yet deleted.

There is one of those that may be deleted, and one of those that a snapshot still holds for
each snapshot (snapshots.py). The former, and the latter of the newest snapshot, live in the
anchor.

A list lives in the anchor, not in the tree, so that freeing a blob never changes a node. New
entries are written in the anchor itself; when they would crowd it, whole pages of them are
packed into blobs and only the pages' references stay; pages of pages likewise. Each dead
blob is thus written about once however long the list grows (a log-structured list).

An entry is 48 bytes: the blob's reference and the generation in which it died.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from hpkvfs.errors import CorruptBlob
from hpkvfs.types import PAYLOAD_SIZE, REF_SIZE, BlobRef, Generation

_DIED = struct.Struct(">Q")
_HEADER = struct.Struct(">BH")
ENTRY_SIZE = REF_SIZE + _DIED.size
INLINE_ENTRIES = 90
INLINE_HELD = 50
INLINE_PAGES = 16
_FAN = INLINE_PAGES + 1
PAGE_ENTRIES = (PAYLOAD_SIZE - _HEADER.size) // ENTRY_SIZE


class Dead(NamedTuple):
    """A blob to delete and the generation in which it died."""

    ref: BlobRef
    died: Generation


@dataclass(frozen=True, slots=True)
class DeadList:
    """Entries in the anchor and, per level from 1 up, references to pages of that level.

    A page of level 1 holds entries; one of level l > 1 references to pages of level l - 1.
    """

    entries: tuple[Dead, ...] = ()
    levels: tuple[tuple[BlobRef, ...], ...] = field(default=())
    count: int = 0

    @property
    def pages(self) -> int:
        """Pages it has in all; those of level l > 1 are full, of _FAN pages of level l - 1 each."""
        total = below = 0
        for level in self.levels:
            below = 1 + _FAN * below
            total += len(level) * below
        return total

    def encode(self) -> list[object]:
        """A msgpack-able form: [count, entries, [pages of level 1, ...]]."""
        return [
            self.count,
            _join_entries(self.entries),
            [join_refs(level) for level in self.levels],
        ]

    @classmethod
    def decode(cls, form: list[object]) -> DeadList:
        """Inverse of encode; ValueError or TypeError on anything else."""
        count, entries, levels = form
        if not (isinstance(count, int) and isinstance(entries, bytes) and isinstance(levels, list)):
            raise TypeError("not a dead list")
        return cls(_split_entries(entries), tuple(map(split_refs, levels)), count)

    def add(
        self,
        dead: Iterable[Dead],
        write_page: Callable[[bytes], BlobRef],
        inline: int = INLINE_ENTRIES,
    ) -> DeadList:
        """The list with more entries, at most `inline` of them not in pages.

        Pages that become necessary are given to write_page.
        """
        entries = [*self.entries, *dead]
        added = len(entries) - len(self.entries)
        levels = [list(level) for level in self.levels]
        while len(entries) > inline:
            page, entries = entries[:PAGE_ENTRIES], entries[PAGE_ENTRIES:]
            _push(levels, 0, write_page(_page(1, len(page), _join_entries(page))), write_page)
        return DeadList(tuple(entries), tuple(map(tuple, levels)), self.count + added)


def _push(
    levels: list[list[BlobRef]], at: int, ref: BlobRef, write_page: Callable[[bytes], BlobRef]
) -> None:
    if at == len(levels):
        levels.append([])
    levels[at].append(ref)
    if len(levels[at]) == _FAN:
        packed = write_page(_page(at + 2, len(levels[at]), join_refs(levels[at])))
        levels[at] = []
        _push(levels, at + 1, packed, write_page)


def _page(level: int, count: int, body: bytes) -> bytes:
    return (_HEADER.pack(level, count) + body).ljust(PAYLOAD_SIZE, b"\0")


def read_page(payload: bytes, level: int) -> tuple[list[Dead], list[BlobRef]]:
    """(entries, pages one level down) of a page of this level; CorruptBlob if it is none."""
    if len(payload) != PAYLOAD_SIZE:
        raise CorruptBlob(f"a page of the dead list has {PAYLOAD_SIZE} bytes, not {len(payload)}")
    found, count = _HEADER.unpack_from(payload)
    size = count * (ENTRY_SIZE if level == 1 else REF_SIZE)
    body, padding = payload[_HEADER.size :][:size], payload[_HEADER.size + size :]
    if found != level or not level or len(body) != size or padding.strip(b"\0"):
        raise CorruptBlob("a page of the dead list is damaged")
    if level == 1:
        return list(_split_entries(body)), []
    return [], list(split_refs(body))


def _join_entries(entries: Iterable[Dead]) -> bytes:
    return b"".join(ref.encode() + _DIED.pack(died) for ref, died in entries)


def _split_entries(raw: bytes) -> tuple[Dead, ...]:
    if len(raw) % ENTRY_SIZE:
        raise ValueError("dead entries cut short")
    return tuple(
        Dead(BlobRef.decode(raw[i : i + REF_SIZE]), _DIED.unpack_from(raw, i + REF_SIZE)[0])
        for i in range(0, len(raw), ENTRY_SIZE)
    )


def join_refs(refs: Iterable[BlobRef]) -> bytes:
    """References one after another, 40 bytes each."""
    return b"".join(ref.encode() for ref in refs)


def split_refs(raw: bytes) -> tuple[BlobRef, ...]:
    """Inverse of join_refs; ValueError when one is cut short."""
    if len(raw) % REF_SIZE:
        raise ValueError("references cut short")
    return tuple(BlobRef.decode(raw[i : i + REF_SIZE]) for i in range(0, len(raw), REF_SIZE))
