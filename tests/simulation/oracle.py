"""What must hold, during a run and after it; a breach is an AssertionError that says which."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from hpkvd import handler
from hpkvfs.protocol.credential import Credential
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    Done,
    decode_reply,
    decode_request,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.session import Session
from tests.fs.model import Model, Thing
from tests.fs.play import Step, Tree, play_on_model
from tests.simulation.money import CheapRequest

TO_A_FILE = ("write", "truncate", "chmod", "setxattr")
"""Steps that concern the file at their path alone."""


def check_status(session: Session, stored: int) -> None:
    """`hpkvfs status` counts as many blobs as fsck did, without having looked at any."""
    told = session.status()
    assert told["blobs_exact"], "what it takes is on this machine"
    counted = sum(told[f"blobs_{which}"] for which in ("live", "dead", "held"))
    assert counted == stored, (counted, stored)


def totals_of(found: Tree) -> tuple[int, int]:
    """Inodes, and the sum of their sizes; of each, every name has its share."""
    files, size = Fraction(), Fraction()
    for mode, links, data, target, _ in found.values():
        share = Fraction(1) if stat.S_ISDIR(mode) else Fraction(1, links)
        files += share
        size += share * (len(data) + len(target))
    assert files.denominator == size.denominator == 1
    return int(files), int(size)


def together(first: list[Step], then: list[Step], base: int) -> list[Step] | None:
    """Steps on top of others; None if one is not possible there. Both follow the first `base`.

    What only concerns files follows them, if `first` moved them, since they are the same inodes.
    """
    model = Model()
    if any(play_on_model(model, step) for step in first[:base]):
        return None
    things = places(model) if all(step[0] in TO_A_FILE for step in then) else {}
    if any(play_on_model(model, step) for step in first[base:]):
        return None
    moved = {id(thing): path for path, thing in places(model).items()}
    steps = list(first)
    for name, path, *rest in then:
        if path in things and places(model).get(path) is not things[path]:
            path = moved.get(id(things[path]), path)
        steps.append((name, path, *rest))
        if play_on_model(model, steps[-1]):
            return None
    return steps


def places(model: Model) -> dict[tuple[bytes, ...], Thing]:
    """Everything in it, by path."""
    found = dict[tuple[bytes, ...], Thing]()
    left: list[tuple[tuple[bytes, ...], Thing]] = [((), model.root)]
    while left:
        path, thing = left.pop()
        found[path] = thing
        left += [((*path, name), below) for name, below in thing.names.items()]
    return found


@dataclass
class Watcher:
    """Sees every answer as it leaves, remembers all of them, and forgets nothing in a crash."""

    spent: dict[bytes, bytes] = field(default_factory=dict)
    shown: dict[bytes, set[Operation]] = field(default_factory=dict)
    answers: dict[bytes, Done] = field(default_factory=dict)
    issued: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Of each cheap credential of value that was exchanged for others: by its r, the digest of its
    epoch and its serial."""

    def answered(self, frame: bytes, reply: bytes) -> None:
        """No credential pays twice, a request has one answer, no serial is in two operations."""
        try:
            request = decode_request(frame)
        except Malformed as error:
            raise AssertionError("a client sent what no server reads") from error
        if not isinstance(request, CredentialedRequest) or not request.presented:
            return
        parsed: Any = handler.parse(  # type: ignore[attr-defined]  # as patches.py left it
            request.credentials, request.presented
        )
        self._link(request, parsed.serials)
        answer = decode_reply(reply)
        if isinstance(answer, Done):
            self._performed(request.fingerprint, parsed.serials, answer)
            if isinstance(parsed, CheapRequest):
                self._issued(getattr(request, "into", None) or request.epoch, parsed)

    def _link(self, request: CredentialedRequest, serials: tuple[bytes, ...]) -> None:
        for serial in serials:
            operations = self.shown.setdefault(serial, set())
            operations |= {request.operation} - {Operation.REISSUE}
            assert len(operations) <= 1, "two operations showed one serial: they are linked"

    def _issued(self, epoch: bytes, request: CheapRequest) -> None:
        for (amount, r), serial in zip(request.wanted, request.wanted_serials, strict=True):
            if amount:
                self.issued[int.from_bytes(r, "big")] = epoch, serial

    def check_nothing_forgotten(
        self, held: Iterable[Credential], spent: set[bytes], epochs: set[bytes]
    ) -> None:
        """What was issued, and can be presented still, its owner has or has spent."""
        mine = {credential.r for credential in held}
        for r, (epoch, serial) in self.issued.items():
            if epoch in epochs and r not in mine:
                assert serial in spent, "a credential that lasts still was given up"

    def _performed(self, fingerprint: bytes, serials: tuple[bytes, ...], answer: Done) -> None:
        before = self.answers.setdefault(fingerprint, answer)
        assert (before.fact, before.issued) == (answer.fact, answer.issued), (
            "a request was answered in two ways"
        )
        for serial in serials:
            assert self.spent.setdefault(serial, fingerprint) == fingerprint, (
                "a credential was accepted twice"
            )


class Story:
    """What was done to the filesystem, and how much of it must survive what.

    The tree after a crash must be one of those after the first n steps, n at least `durable`.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.trees: list[Tree] = []
        self.durable = 0
        self.begun: Step | None = None
        self._model = Model()

    @property
    def now(self) -> int:
        """How many steps are done."""
        return len(self.steps)

    def begin(self) -> None:
        """The empty vault is the first state."""
        if not self.trees:
            self.trees = [self._model.tree()]

    def expect(self, step: Step, found: int) -> None:
        """A step came to `found` (an errno or 0): so must the model's."""
        self.begun = None
        expected = play_on_model(self._model, step)
        assert found == expected, f"{step[:2]} came to errno {found}, expected {expected}"
        if not expected:
            self.steps.append(step)
            self.trees.append(self._model.tree())

    def survived(self, tree: Tree, *, power: bool) -> None:
        """The tree after a death; a process alone that died loses nothing that was done."""
        least = self.durable if power else self.now
        if self.begun is not None:
            step, self.begun = self.begun, None
            if not play_on_model(self._model, step):
                self.steps.append(step)
                self.trees.append(self._model.tree())
        for count in reversed(range(least, len(self.trees))):
            if self.trees[count] == tree:
                self._back_to(count)
                return
        lost = next((n for n in reversed(range(len(self.trees))) if self.trees[n] == tree), None)
        raise AssertionError(
            f"of {self.now} steps, {least} of them durable, "
            + ("none gives the tree that was found" if lost is None else f"{lost} were found")
        )

    def _back_to(self, count: int) -> None:
        del self.steps[count:], self.trees[count + 1 :]
        self._model = Model()
        for step in self.steps:
            play_on_model(self._model, step)
