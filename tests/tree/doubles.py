"""Nodes in memory, in place of blobs on a server."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from unittest.mock import patch

from hpkvfs.tree import btree
from hpkvfs.tree.btree import Applied, Edit
from hpkvfs.tree.check import Report, check
from hpkvfs.tree.node import Node
from hpkvfs.types import BlobId, BlobRef, Missing


class MissingHere(Missing):
    """As the volume does: a source raises a class of its own."""


@dataclass
class Shelf:
    """Holds nodes as payloads, so that each went through encode and decode."""

    payloads: dict[BlobRef, bytes] = field(default_factory=dict)
    emitted: list[BlobRef] = field(default_factory=list)
    nodes: dict[BlobRef, Node] = field(default_factory=dict)
    reads: int = 0

    def node(self, ref: BlobRef) -> Node:
        self.reads += 1
        if ref not in self.nodes:
            if ref not in self.payloads:
                raise AssertionError(f"{ref!r} was freed or never emitted")
            self.nodes[ref] = Node.decode(self.payloads[ref])
        return self.nodes[ref]

    def emit(self, node: Node) -> BlobRef:
        payload = node.encode()
        ref = BlobRef(BlobId(len(self.emitted) + 1), hashlib.sha256(payload).digest())
        self.payloads[ref] = payload
        self.emitted.append(ref)
        return ref

    def drop(self, refs: Iterable[BlobRef]) -> None:
        for ref in refs:
            del self.payloads[ref]
            self.nodes.pop(ref, None)


@dataclass
class Cold:
    """A memory that holds only what was asked for."""

    below: Shelf
    loaded: set[BlobRef] = field(default_factory=set)

    def node(self, ref: BlobRef) -> Node:
        if ref not in self.loaded:
            raise MissingHere((ref,))
        return self.below.node(ref)

    def load(self, refs: Iterable[BlobRef]) -> None:
        """Each node may be asked for once: whoever asks again did not read what it got."""
        for ref in refs:
            assert ref not in self.loaded
            self.loaded.add(ref)


@dataclass
class Vault:
    """A tree that is committed to, with everything checked after each commit."""

    shelf: Shelf = field(default_factory=Shelf)
    root: BlobRef | None = None
    model: dict[bytes, bytes] = field(default_factory=dict)
    written: int = 0

    def commit(self, edits: dict[bytes, bytes | None]) -> Applied:
        """Apply, free what was freed, and keep the model in step. Checks nothing."""
        applied = btree.apply(self.shelf, self.root, sorted(edits.items()), self.shelf.emit)
        self.settle(edits, applied)
        return applied

    def settle(self, edits: dict[bytes, bytes | None], applied: Applied) -> None:
        self.shelf.drop(applied.freed)
        self.root = applied.root
        self.written += applied.written
        for key, value in edits.items():
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    def check(self) -> Report:
        """The tree is sound, holds the model, and is all that is left of what was emitted."""
        report = check(self.shelf, self.root)
        assert report.problems == []
        assert len(report.refs) == len(set(report.refs)) == report.nodes
        assert set(report.refs) == set(self.shelf.payloads)
        assert list(btree.scan(self.shelf, self.root, b"", b"\xff" * 65)) == sorted(
            self.model.items()
        )
        return report


NARROW = 720


def narrow() -> AbstractContextManager[object]:
    """While it lasts apply makes nodes of about ten small items, so that trees get tall."""
    return patch.multiple(
        btree,
        CAPACITY=NARROW,
        HALF=NARROW // 2,
        MERGED=NARROW * 15 // 16,
        LEAST=NARROW // 4,
    )


def displaced_by(model: dict[bytes, bytes], edits: Iterable[Edit]) -> list[tuple[bytes, bytes]]:
    """What apply must report as displaced, from the model before it."""
    return [(k, model[k]) for k, v in edits if k in model and model[k] != v]
