"""The dead list: blobs no longer part of the newest tree and not yet deleted.

It lives in the anchor, not in the tree, so that freeing a blob never changes a node. New
entries are written in the anchor itself; when they would crowd it, whole pages of them are
packed into blobs and only the pages' references stay; pages of pages likewise. Each dead
blob is thus written about once however long the list grows (a log-structured list).

An entry is 48 bytes: the blob's reference and the generation in which it died. Ids are
ordered by birth, so a snapshot of generation s holds the entry exactly when the blob was
born before s (id < the snapshot's next_id) and died after it.
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
INLINE_ENTRIES = 120
INLINE_PAGES = 40
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
        """Pages referenced from the anchor itself."""
        return sum(map(len, self.levels))

    def encode(self) -> list[object]:
        """A msgpack-able form: [count, entries, [pages of level 1, ...]]."""
        return [
            self.count,
            _join_entries(self.entries),
            [b"".join(ref.encode() for ref in level) for level in self.levels],
        ]

    @classmethod
    def decode(cls, form: list[object]) -> DeadList:
        """Inverse of encode; ValueError or TypeError on anything else."""
        count, entries, levels = form
        if not (isinstance(count, int) and isinstance(entries, bytes) and isinstance(levels, list)):
            raise TypeError("not a dead list")
        return cls(_split_entries(entries), tuple(map(_split_refs, levels)), count)

    def add(self, dead: Iterable[Dead], write_page: Callable[[bytes], BlobRef]) -> DeadList:
        """The list with more entries; pages that become necessary are given to write_page."""
        entries = [*self.entries, *dead]
        added = len(entries) - len(self.entries)
        levels = [list(level) for level in self.levels]
        while len(entries) > INLINE_ENTRIES:
            page, entries = entries[:PAGE_ENTRIES], entries[PAGE_ENTRIES:]
            _push(levels, 0, write_page(_page(1, len(page), _join_entries(page))), write_page)
        return DeadList(tuple(entries), tuple(map(tuple, levels)), self.count + added)


def _push(
    levels: list[list[BlobRef]], at: int, ref: BlobRef, write_page: Callable[[bytes], BlobRef]
) -> None:
    if at == len(levels):
        levels.append([])
    levels[at].append(ref)
    if len(levels[at]) > INLINE_PAGES:
        body = b"".join(page.encode() for page in levels[at])
        packed = write_page(_page(at + 2, len(levels[at]), body))
        levels[at] = []
        _push(levels, at + 1, packed, write_page)


def _page(level: int, count: int, body: bytes) -> bytes:
    return (_HEADER.pack(level, count) + body).ljust(PAYLOAD_SIZE, b"\0")


def read_page(payload: bytes, level: int) -> tuple[list[Dead], list[BlobRef]]:
    """(entries, pages one level down) of a page of this level; CorruptBlob if it is none."""
    found, count = _HEADER.unpack_from(payload)
    size = count * (ENTRY_SIZE if level == 1 else REF_SIZE)
    body = payload[_HEADER.size : _HEADER.size + size]
    if found != level or len(body) != size:
        raise CorruptBlob("a page of the dead list is damaged")
    if level == 1:
        return list(_split_entries(body)), []
    return [], list(_split_refs(body))


def _join_entries(entries: Iterable[Dead]) -> bytes:
    return b"".join(ref.encode() + _DIED.pack(died) for ref, died in entries)


def _split_entries(raw: bytes) -> tuple[Dead, ...]:
    if len(raw) % ENTRY_SIZE:
        raise ValueError("dead entries cut short")
    return tuple(
        Dead(BlobRef.decode(raw[i : i + REF_SIZE]), _DIED.unpack_from(raw, i + REF_SIZE)[0])
        for i in range(0, len(raw), ENTRY_SIZE)
    )


def _split_refs(raw: bytes) -> tuple[BlobRef, ...]:
    if len(raw) % REF_SIZE:
        raise ValueError("references cut short")
    return tuple(BlobRef.decode(raw[i : i + REF_SIZE]) for i in range(0, len(raw), REF_SIZE))
