"""Anchors: one small blob per generation that names the root and all that is not in the tree.

Anchor n lives under a key derived from n alone, and inserting it is the moment generation n
exists: the server refuses a second one, which is how two writers find out about each other.

Which anchors stay (the rest are dead and get collected), for newest generation n:
  - every binary prefix of n: n with its low l bits cleared, for each l;
  - every power of two up to n.
So a client with nothing but the words finds n by galloping over powers of two (present
exactly up to n's highest bit) and then fixing one bit per look-up: at most
2 log2(n) + 2 look-ups. An absent candidate always means "not reached yet".
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import msgpack

from hpkvfs.errors import CorruptBlob, NewerFormat, VaultError
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, Generation, anchor_id
from hpkvfs.volume.deadlist import DeadList, join_refs, split_refs

FORMAT_VERSION = 2
_LENGTH = 4
_EMPTY = DeadList()
_NO_ID = BlobId(0)
_SHAPE = [
    int,
    int,
    bytes,
    int,
    int,
    bytes,
    bytes,
    int,
    int,
    int,
    int,
    int,
    list,
    bytes,
    int,
    list,
    int,
]


@dataclass(frozen=True, slots=True)
class Anchor:
    """One generation of the vault.

    writer: 8 random bytes of the state directory that published it; redo: the last redo log
    whose effects it includes (counted by that writer); live: nodes and extents reachable
    from root; size: sum of file sizes; kept: older anchors that are still stored.

    tables: the snapshots' records (snapshots.py); horizon: next_id of the newest snapshot, 0
    when there is none; held: that snapshot's held list; held_before: entries in those of the
    older ones.
    """

    generation: Generation
    writer: bytes
    redo: int
    time: int
    root: BlobRef | None
    kept: tuple[BlobRef, ...]
    next_id: BlobId
    next_ino: int
    live: int
    size: int
    files: int
    dead: DeadList
    tables: tuple[BlobRef, ...] = ()
    horizon: BlobId = _NO_ID
    held: DeadList = _EMPTY
    held_before: int = 0

    def encode(self) -> bytes:
        """A 16,384-byte payload; ValueError when it does not fit (spill the dead list)."""
        fields = [
            FORMAT_VERSION,
            self.generation,
            self.writer,
            self.redo,
            self.time,
            self.root.encode() if self.root else b"",
            join_refs(self.kept),
            self.next_id,
            self.next_ino,
            self.live,
            self.size,
            self.files,
            self.dead.encode(),
            join_refs(self.tables),
            self.horizon,
            self.held.encode(),
            self.held_before,
        ]
        body: bytes = msgpack.packb(fields, use_bin_type=True)
        if len(body) + _LENGTH > PAYLOAD_SIZE:
            raise ValueError(f"an anchor of {len(body)} bytes does not fit a blob")
        return (len(body).to_bytes(_LENGTH, "big") + body).ljust(PAYLOAD_SIZE, b"\0")

    @classmethod
    def decode(cls, payload: bytes) -> Anchor:
        """Inverse of encode; NewerFormat, VaultError (an older one) or CorruptBlob."""
        fields = _unpack(payload)
        if fields[0] != FORMAT_VERSION:
            raise _other_format(fields[0])
        if list(map(type, fields)) != _SHAPE:
            raise CorruptBlob("an anchor is damaged")
        try:
            _, generation, writer, redo, time, root, kept, *rest = fields
            next_id, next_ino, live, size, files, dead, tables, horizon, held, held_before = rest
            return cls(
                generation,
                writer,
                redo,
                time,
                BlobRef.decode(root) if root else None,
                split_refs(kept),
                next_id,
                next_ino,
                live,
                size,
                files,
                DeadList.decode(dead),
                split_refs(tables),
                horizon,
                DeadList.decode(held),
                held_before,
            )
        except (ValueError, TypeError):
            raise CorruptBlob("an anchor is damaged") from None


def _other_format(found: object) -> VaultError:
    if isinstance(found, int) and found < FORMAT_VERSION:
        return VaultError(
            f"the vault has format {found}, older than this hpkvfs knows",
            "copy its files out with the hpkvfs that wrote it, into a new vault",
        )
    return NewerFormat(
        f"the vault has format {found}, newer than this hpkvfs knows", "install a newer hpkvfs"
    )


def _unpack(payload: bytes) -> list[Any]:
    length = int.from_bytes(payload[:_LENGTH], "big")
    body = payload[_LENGTH : _LENGTH + length]
    try:
        fields = msgpack.unpackb(body, raw=False)
    except (ValueError, msgpack.UnpackException):
        raise CorruptBlob("an anchor is damaged") from None
    if not isinstance(fields, list) or not fields or any(payload[_LENGTH + length :]):
        raise CorruptBlob("an anchor is damaged")
    return fields


def kept_generations(newest: Generation) -> set[Generation]:
    """The generations whose anchors stay while `newest` is the newest, itself included."""
    bits = range(newest.bit_length() + 1)
    prefixes = {Generation(newest >> bit << bit) for bit in bits}
    powers = {Generation(1 << bit) for bit in range(newest.bit_length())}
    return prefixes | powers


def successors(previous: Anchor, ref: BlobRef) -> tuple[tuple[BlobRef, ...], list[BlobRef]]:
    """(kept, dead) among the stored anchors once the generation after `previous` exists."""
    stay = {anchor_id(n) for n in kept_generations(Generation(previous.generation + 1))}
    stored = [*previous.kept, ref]
    kept = tuple(old for old in stored if old.id in stay)
    return kept, [old for old in stored if old.id not in stay]


def find_newest() -> Generator[Generation, bool, Generation | None]:
    """Search for the newest generation: yields one to look up, is sent whether it exists.

    Returns None when there is none at all.
    """
    if not (yield Generation(0)):
        return None
    top = 0
    while (yield Generation(1 << top)):
        top += 1
    newest = 1 << top >> 1
    for bit in reversed(range(max(top - 1, 0))):
        if (yield Generation(newest | 1 << bit)):
            newest |= 1 << bit
    return Generation(newest)
