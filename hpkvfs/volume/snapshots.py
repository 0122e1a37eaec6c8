"""Snapshots: generations that stay readable, and the blobs that only they still hold.

A snapshot is a record: its name, and of its generation's anchor what reading the tree takes.
The records are a table in blobs of their own, which the anchor refers to and which only
making or deleting a snapshot rewrites. Between two snapshots a generation costs what it
changed, as ever; what it frees is not dead but *held* when a snapshot was made of it.

Which blobs a snapshot holds is never looked for. Ids are in order of birth, so a blob that dies
now is held exactly if it was born before the newest snapshot (id < that one's next_id, the
`horizon` in the anchor). It then goes on the held list of that snapshot. So

    held list of snapshot s = blobs that it holds and that died before the one after s was made

and deleting s concerns this list alone: what was born before the snapshot preceding s is held
by that one and goes on its list; nobody holds the rest, and it is dead (the dead lists of ZFS,
Matthew Ahrens 2007, but for one list of each snapshot).

Nodes and extents can be held. Pages, tables and anchors are in no tree: they just die.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from hpkvfs.errors import CorruptBlob, UserError
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, Generation
from hpkvfs.volume.deadlist import Dead, DeadList

MAX_NAME = 255
MAX_TABLES = 32
_LENGTH = 4
_SHAPE = [str, int, int, bytes, bytes, int, int, int, int, list]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One generation kept.

    time: ns since 1970, when its generation was made; writer, live, size, files: as in the
    anchor of that generation; held: its held list, except for the newest snapshot, whose list
    grows with every generation and is in the anchor.
    """

    name: str
    generation: Generation
    time: int
    writer: bytes
    root: BlobRef | None
    next_id: BlobId
    live: int
    size: int
    files: int
    held: DeadList = field(default_factory=DeadList)

    def encode(self) -> list[object]:
        """A msgpack-able form."""
        root = self.root.encode() if self.root else b""
        return [
            self.name,
            self.generation,
            self.time,
            self.writer,
            root,
            self.next_id,
            self.live,
            self.size,
            self.files,
            self.held.encode(),
        ]

    @classmethod
    def decode(cls, form: list[Any]) -> Snapshot:
        """Inverse of encode; ValueError or TypeError on anything else."""
        if list(map(type, form)) != _SHAPE:
            raise TypeError("not a snapshot")
        name, generation, time, writer, root, next_id, live, size, files, held = form
        return cls(
            name,
            generation,
            time,
            writer,
            BlobRef.decode(root) if root else None,
            next_id,
            live,
            size,
            files,
            DeadList.decode(held),
        )


def check_name(name: str) -> str:
    """The name; UserError when a snapshot can't be called so."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or name.startswith("-"):
        raise UserError(
            f"a snapshot can't be called {name!r}", "use letters, digits, dots, dashes, colons"
        )
    if len(name.encode()) > MAX_NAME:
        raise UserError(f"a snapshot's name has at most {MAX_NAME} bytes")
    return name


def encode_tables(snapshots: Iterable[Snapshot]) -> list[bytes]:
    """The 16,384-byte payloads that hold these records, in order."""
    packer, tables = msgpack.Packer(use_bin_type=True), list[list[bytes]]()
    room = 0
    for snapshot in snapshots:
        record: bytes = packer.pack(snapshot.encode())
        if len(record) > room:
            tables.append([])
            room = PAYLOAD_SIZE - _LENGTH - 5  # an array header has at most 5 bytes
        tables[-1].append(record)
        room -= len(record)
    return [_table(packer.pack_array_header(len(t)) + b"".join(t)) for t in tables]


def _table(body: bytes) -> bytes:
    return (len(body).to_bytes(_LENGTH, "big") + body).ljust(PAYLOAD_SIZE, b"\0")


def decode_table(payload: bytes) -> list[Snapshot]:
    """Records of one payload; CorruptBlob if it is none."""
    end = _LENGTH + int.from_bytes(payload[:_LENGTH], "big")
    try:
        forms = msgpack.unpackb(payload[_LENGTH:end], raw=False)
        snapshots = [Snapshot.decode(form) for form in forms]
        if encode_tables(snapshots) != [payload]:
            raise ValueError("not encoded canonically")
        return snapshots
    except (ValueError, TypeError, msgpack.UnpackException):
        raise CorruptBlob("a table of snapshots is damaged") from None


@dataclass(slots=True)
class Stay:
    """A snapshot that stays: its held list as it is stored, and what is to be added to it."""

    snapshot: Snapshot
    held: DeadList
    more: list[Dead] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """What becomes of the snapshots in one publication.

    freed: blobs that no snapshot holds any more; emptied: pages and tables to be written anew.
    """

    stay: list[Stay]
    freed: list[Dead]
    emptied: list[BlobRef]
    create: tuple[str, ...]
    delete: frozenset[str]

    @property
    def horizon(self) -> BlobId:
        """Blobs below this id are held by the newest snapshot that stays."""
        return self.stay[-1].snapshot.next_id if self.stay else BlobId(0)


def plan(
    snapshots: Sequence[Snapshot],
    newest: DeadList,
    tables: Iterable[BlobRef],
    read: Callable[[DeadList], tuple[list[Dead], list[BlobRef]]],
    create: Iterable[str],
    delete: Collection[str],
) -> Plan:
    """Make and delete snapshots. `newest` is the newest one's held list.

    read(list) is all of a list's entries and pages; it may raise Missing.
    """
    result = Plan([], [], list(tables), tuple(create), frozenset(delete))
    for place, snapshot in enumerate(snapshots, 1):
        held = newest if place == len(snapshots) else snapshot.held
        if snapshot.name not in delete:
            result.stay.append(Stay(snapshot, held))
            continue
        entries, pages = read(held)
        result.emptied += pages
        horizon = result.horizon
        for entry in entries:
            if entry.ref.id < horizon:
                result.stay[-1].more.append(entry)
            else:
                result.freed.append(entry)
    return result
