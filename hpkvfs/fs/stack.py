"""What a filesystem rests on: the published tree, the layers above it, and the redo log.

Every operation is one synchronous step: it first reads all it needs (which may raise
types.Missing: load, then call again), then decides, then applies its effects in one record
of the redo log. So an operation happens whole or not at all, and no lock is needed.

Invariants
  - what is in a layer is in the log;
  - `usage` always equals the sum over inodes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpkvfs.fs.layer import Effect, Gone, Layer, Put, Record
from hpkvfs.fs.memo import Memo
from hpkvfs.fs.shelf import in_snapshot
from hpkvfs.fs.view import Below, View
from hpkvfs.volume.items import ROOT_INO, Clock, Dirent, Inode, ItemKind, key, split_key

HELD = 16 << 20


def fail(code: int) -> OSError:
    """The OSError of an errno."""
    return OSError(code, os.strerror(code))


Change = Effect | Inode
"""An effect; an Inode stands for putting it."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What statfs is computed from: bytes and files held, and dirty bytes not published."""

    bytes: int
    files: int
    dirty: int


class Base(Below, Protocol):
    """The published tree, and names in it that are not listed."""

    def hidden(self, parent: int, name: bytes) -> Dirent | None:
        """The entry of a name that is there and not listed."""
        ...


class Log(Protocol):
    """What a filesystem needs of its redo log; see redolog.py."""

    @property
    def size(self) -> int:
        """Bytes of it that no published generation covers."""
        ...

    def replay(self, covered: int) -> Iterator[tuple[Record, list[Effect]]]:
        """Records after those that a generation covers."""
        ...

    def append(self, effects: Iterable[Effect]) -> Record:
        """Add one operation; OSError when it can't be."""
        ...

    def syncer(self) -> Callable[[], None]:
        """A function that returns when all appended so far is on the disk."""
        ...

    def rotate(self) -> int:
        """Go on in another file; the number of the last."""
        ...

    def drop(self, covered: int) -> None:
        """Delete the files that a published generation covers."""
        ...


class Stack:
    """Layers of changes over a published tree, and the one way to make more.

    `room(n)` tells whether n more dirty bytes can be accepted; it raises OSError if not.
    `held`: so many bytes of the blocks of a layer stay in memory, if the log has the others.
    """

    def __init__(
        self,
        below: Base,
        log: Log,
        clock: Clock,
        room: Callable[[int], None] = lambda _: None,
        held: int = HELD,
    ) -> None:
        self._below = below
        self._held = held
        self._log = log
        self._clock = clock
        self._room = room
        self._memo = Memo()
        self.position = 0
        """Grows with every change."""
        self._base = (0, 0)
        self.active = Layer()
        self.frozen: Layer | None = None
        self.next_ino = ROOT_INO
        self.begun: Callable[[], None] = lambda: None
        """Is called before the first change of those that are to be published together."""
        self._restack()

    # -- life cycle ------------------------------------------------------------------

    def start(self, next_ino: int, size: int, files: int, covered: int) -> int:
        """Take over from a published generation and the redo log; records replayed."""
        self._memo.clear()
        self.next_ino = max(next_ino, ROOT_INO)
        self._base = (size, files)
        replayed = 0
        for record, effects in self._log.replay(covered):
            self._take(effects, record)
            replayed += 1
        return replayed

    def freeze(self) -> int:
        """Set the active layer aside to be published; the last redo log it includes."""
        assert self.frozen is None
        covered = self._log.rotate()
        self.frozen, self.active = self.active, Layer()
        self._restack()
        return covered

    @property
    def state(self) -> object:
        """The state of the tree below: another object when something in it is another."""
        return self._below.state

    def published(self, covered: int, before: object = None) -> None:
        """The frozen layer is now in the tree below: forget it, and its log.

        before: what `state` was, if nothing else came into the tree with it.
        """
        if before is not None:
            self._memo.move(before, self._below.state)
        if self.frozen is not None:
            size, files = self._base
            self._base = (size + self.frozen.usage_bytes, files + self.frozen.usage_files)
        self.frozen = None
        self._restack()
        self._log.drop(covered)

    def mend(self, effects: list[Effect]) -> None:
        """Repair: apply changes as they are, which may break rules to restore others."""
        self._commit(effects)

    def rebase(self, size: int, files: int) -> None:
        """The generation below turned out to hold some of the active layer already."""
        base_size, base_files = self._base
        self._base = (base_size + size, base_files + files)
        self.active.usage_bytes -= size
        self.active.usage_files -= files

    def rest_on(self, next_ino: int, size: int, files: int) -> None:
        """The active layer lies upon another generation from now on."""
        self.next_ino = max(self.next_ino, next_ino)
        self._base = (size, files)

    def discard(self) -> None:
        """Give the active layer up; its log is there until it is dropped."""
        assert self.frozen is None
        self.active = Layer()
        self._restack()

    def drop_log(self, number: int) -> None:
        """Delete the files of the redo log up to this one."""
        self._log.drop(number)

    def end_log(self) -> int:
        """End the redo log's newest file: later changes go to the next. Its number."""
        return self._log.rotate()

    def syncer(self) -> Callable[[], None]:
        """A function that returns when all changes so far are on the local disk."""
        return self._log.syncer()

    def totals(self) -> Totals:
        """Sums over the whole filesystem, unpublished changes included."""
        layers = self._layers
        size, files = self._base
        return Totals(
            size + sum(layer.usage_bytes for layer in layers),
            files + sum(layer.usage_files for layer in layers),
            self.dirty,
        )

    @property
    def dirty(self) -> int:
        """Bytes that publishing what is not published will cost, about."""
        return self.active.weight + (self.frozen.weight if self.frozen is not None else 0)

    @property
    def _layers(self) -> list[Layer]:
        return [self.active] if self.frozen is None else [self.active, self.frozen]

    @property
    def logged(self) -> int:
        """Bytes that wait to be published, in the log."""
        return self._log.size

    @property
    def in_memory(self) -> int:
        """Bytes that wait to be published, in memory: names and attributes, and those blocks that
        the log has in pieces, or that were written just now."""
        return sum(layer.held + layer.item_weight for layer in self._layers)

    @property
    def view(self) -> View:
        """Reading access to what is below and above."""
        return self._view

    # -- effects ---------------------------------------------------------------------

    def _commit(self, changes: Sequence[Change]) -> None:
        """The one way to change anything: first the log, then memory. EROFS for snapshots."""
        inodes = [change for change in changes if type(change) is Inode]
        effects = [_effect(change) for change in changes]
        if any(in_snapshot(_inode_of(effect)) for effect in effects):
            raise fail(errno.EROFS)
        record = self._log.append(effects)
        self.position += 1
        self._take(effects, record)
        for inode in inodes:
            self._memo.inodes[inode.ino] = inode

    def _take(self, effects: list[Effect], record: Record) -> None:
        if not self.active:
            self.begun()
        for at, effect in enumerate(effects):
            self.active.apply(effect, record, at)
            ino = self._memo.note(effect)
            if ino >= self.next_ino:
                self.next_ino = ino + 1
        if self.active.held > self._held:
            self.active.ease(self._held)

    def _restack(self) -> None:
        self._view = View(self._layers, self._below)


def _inode_of(effect: Effect) -> int:
    match effect:
        case Put(raw, _):
            return split_key(raw)[0]
        case Gone(ino):
            return ino
    return 0  # nothing else comes without one of these


def _effect(change: Change) -> Effect:
    if type(change) is Inode:
        return Put(key(change.ino, ItemKind.INODE), change.encode())
    return change  # type: ignore[return-value]
