"""kill -9 of client or server at any moment, hundreds of times, against a model.

After each death of the client the next one must find the tree exactly as the model has it
after some step that had been begun, and no earlier than the last step that was done (a step
that was reported done had reached the redo log; a kill loses nothing the kernel has). At the
end: fsck is clean, the tokens on both sides add up, no blob is unaccounted for.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sqlite3
import time
from pathlib import Path

import pytest

from hpkvd.ledger.sqlite import SqliteLedger
from hpkvfs.types import ANCHOR_BIT, BlobId
from tests.fs.model import Model
from tests.fs.play import Step, play_on_model
from tests.world.processes import (
    KEYS,
    Child,
    World,
    digest,
    inspector,
    moments,
    program,
    redeemer,
    worker,
)

LIVES = 120


class Story:
    """Client lives one after another, and what the model says of them."""

    def __init__(self, world: World, steps: list[Step]) -> None:
        self.world = world
        self.steps = steps
        self.model = Model()
        self.done = 0  # steps that the model has taken

    def believe(self, child: Child) -> None:
        """Compare a dead client's report with the model and bring the model up to it."""
        begun = max((v for e, v in child.lines if e == "begun"), default=self.done - 1)
        results = dict(v for e, v in child.lines if e == "done")
        failed = [v for e, v in child.lines if e == "failed"]
        assert not failed, failed
        while self.done <= begun and self.done in results:
            step = self.steps[self.done]
            assert play_on_model(self.model, step) == results[self.done], (self.done, step)
            self.done += 1
        self.uncertain = begun == self.done

    def difference(self, found: str) -> str:
        theirs, ours = ast.literal_eval(found), ast.literal_eval(digest(self.model.tree()))
        lost = [(path, facts) for path, facts in ours if (path, facts) not in theirs]
        new = [(path, facts) for path, facts in theirs if (path, facts) not in ours]
        around = self.steps[max(self.done - 5, 0) : self.done + 2]
        return f"at step {self.done} of {around}:\nlost {lost}\nnew {new}"[:4_000]

    def meet(self, found: str) -> None:
        """A new client found this tree: as the model has it, or with the step cut short."""
        if digest(self.model.tree()) == found:
            return
        assert self.uncertain, self.difference(found)
        play_on_model(self.model, self.steps[self.done])
        self.done += 1
        assert digest(self.model.tree()) == found, f"step {self.done} was done by halves"


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_client_and_server(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path)
    voucher = world.voucher(100_000)
    server = world.server()
    buyer = world.client(functools.partial(redeemer, voucher))
    assert buyer.wait_for("redeemed") == 100_000
    buyer.end()
    story = Story(world, program(seed, LIVES * 60))
    story.uncertain = False
    lives = moments(seed)
    for life in range(LIVES):
        client = world.client(worker(story.steps, story.done))
        story.meet(client.wait_for("tree"))
        _let_live(client, next(lives))
        if life % 3 == 1:
            server.kill()
            _let_live(client, next(lives))
            server = world.server()
            _let_live(client, next(lives))
        client.kill()
        story.believe(client)
    sums, stored = _check_vault(world, story)
    server.kill()
    _check_server(world, sums, stored)


def _let_live(client: Child, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert client.read(max(0.0, end - time.monotonic())), client.lines[-1]


def _check_vault(world: World, story: Story) -> tuple[list[int], set[bytes]]:
    """fsck is clean; the client's books, and the keys of all blobs it knows."""
    client = world.client(inspector)
    story.meet(client.wait_for("tree"))
    assert client.wait_for("problems") == []
    assert client.wait_for("problems_after_gc") == []
    holds, held, pending = client.wait_for("sums")
    assert holds and pending == 0
    book, stored = client.wait_for("book"), client.wait_for("stored")
    client.end()
    return [*book, held], {KEYS.signer(blob_id).public for blob_id in stored}


def _check_server(world: World, sums: list[int], stored: set[bytes]) -> None:
    """The server's books are the client's, and it holds just the blobs the client knows."""
    with contextlib.closing(SqliteLedger(world.ledger, reserve=0)) as ledger:
        totals = ledger.totals()
        assert [totals.issued, totals.charged, totals.refunded, totals.outstanding] == sums
    with contextlib.closing(sqlite3.connect(world.ledger)) as database:
        keys = {key for (key,) in database.execute("SELECT key FROM blob")}
    assert keys == stored, _name(keys ^ stored)


def _name(keys: set[bytes]) -> str:
    names = {KEYS.signer(BlobId(i)).public: f"blob {i}" for i in range(20_000)}
    anchors = range(ANCHOR_BIT, ANCHOR_BIT + 2_000)
    names |= {KEYS.signer(BlobId(i)).public: f"anchor {i - ANCHOR_BIT}" for i in anchors}
    return ", ".join(names.get(key, "unknown") for key in keys)
