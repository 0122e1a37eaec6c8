"""The places where a side can die, by name: each is a moment between two that matter.

Simulated devices (disk, journal, ledger, network) call `Side.at(point)` when they pass one.
"""

from __future__ import annotations

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import trio


class Point(Enum):
    """A moment at which a process can be killed or its machine lose power."""

    JOURNAL_BEFORE = "journal: before a commit"
    JOURNAL_AFTER = "journal: after a commit"
    REDO_CREATED = "redo log: a file is made, nothing of it is synced"
    REDO_BEFORE = "redo log: before a record is written"
    REDO_TORN = "redo log: half of a record is written"
    REDO_AFTER = "redo log: after a record is written"
    REDO_UNSYNCED = "redo log: before it is flushed"
    REDO_SYNCED = "redo log: after it was flushed"
    REDO_KEPT = "redo log: before a file is dropped"
    REDO_DROPPED = "redo log: after a file is dropped"
    ANCHOR_BEFORE = "publication: all but the anchor is stored"
    ANCHOR_AFTER = "publication: the anchor is stored"
    KNOWN_BEFORE = "generation: before it is noted"
    KNOWN_AFTER = "generation: after it was noted"
    DELETED = "collection: a blob is deleted"
    SEND_BEFORE = "client: before a request leaves"
    SEND_AFTER = "client: after a request left"
    REPLY_CAME = "client: a reply came"
    REQUEST_CAME = "server: a request came"
    LEDGER_BEFORE = "ledger: before a commit"
    LEDGER_AFTER = "ledger: after a commit"
    REPLY_BEFORE = "server: before a reply leaves"


class Crash(BaseException):
    """The side this is raised in is dead: nothing it does from now on has an effect."""


@dataclass
class Faults:
    """Where this run's sides die: at the nth passage of a point, then at the mth after it..."""

    crashes: dict[Point, list[int]] = field(default_factory=dict)
    passed: Counter[Point] = field(default_factory=Counter)
    struck: Counter[Point] = field(default_factory=Counter)
    armed: bool = True

    def strikes(self, point: Point) -> bool:
        """Count a passage; whether the side dies here."""
        self.passed[point] += 1
        counts = self.crashes.get(point)
        if not self.armed or not counts:
            return False
        counts[0] -= 1
        if counts[0] > 0:
            return False
        del counts[0]
        self.struck[point] += 1
        return True


class Side:
    """A machine with one process on it, client or server, that can die and start again."""

    def __init__(self, name: str, faults: Faults) -> None:
        self.name = name
        self.faults = faults
        self.alive = False
        self.disk_full = False
        self.scope = trio.CancelScope()

    def at(self, point: Point) -> None:
        """Pass a point; Crash if the side is dead, or dies here."""
        self.check()
        if self.faults.strikes(point):
            self.crash()

    def check(self) -> None:
        """Crash if the side is dead."""
        if not self.alive:
            raise Crash(self.name)

    def crash(self) -> None:
        """Die now, whatever it is doing."""
        self.kill()
        raise Crash(self.name)

    def kill(self) -> None:
        """Die now, at another task's hand."""
        self.alive = False
        self.scope.cancel()


SIDE: Final[ContextVar[Side]] = ContextVar("SIDE")
"""The side that the running task belongs to."""
