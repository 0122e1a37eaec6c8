"""The protocol of docs/sharding.md, as a model: servers that die anywhere, in any interleaving.

Every `yield` is where another server may go on, or this one die. What happens between two of them
is one transaction in one database. The mutations show that the model would notice: the first two
are mistakes that drafts of the protocol made.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest

PENDING, DONE, ABORTED = "pending", "done", "aborted"


@dataclass(frozen=True)
class Asked:
    """A request: two serials, in order, and what it does to a key."""

    name: str
    serials: tuple[int, int]
    kind: str
    key: int


@dataclass(frozen=True)
class Try:
    """One attempt at a request: what rows point to."""

    asked: Asked
    number: int


@dataclass
class Record:
    attempt: Try
    state: str = PENDING


@dataclass
class Row:
    """A blob: stored, or reserved by the attempt that inserts it; or marked by one that deletes."""

    stored: bool
    holder: Try | None


@dataclass
class Shards:
    """All databases; who touches two rows of different shards yields in between."""

    mutation: str = ""
    records: dict[str, Record] = field(default_factory=dict)
    serials: dict[int, Try] = field(default_factory=dict)
    blobs: dict[int, Row] = field(default_factory=dict)
    done: list[Asked] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=count)

    def state(self, one: Try) -> str:
        record = self.records.get(one.asked.name)
        return record.state if record is not None and record.attempt == one else ABORTED

    def abort(self, one: Try) -> str:
        """At its home: nothing happens to what is decided."""
        if self.state(one) == PENDING and self.mutation != "takes over without aborting":
            self.records[one.asked.name].state = ABORTED
        return self.state(one)

    def refuse(self, one: Try) -> bool:
        """Whether this attempt, and no other of its request, is at an end by this."""
        was = self.state(one)
        now = self.abort(one)
        return now == ABORTED and (was == PENDING or self.mutation == "refuses without looking")

    def commit(self, one: Try) -> bool:
        if self.state(one) == PENDING or self.mutation == "commits without looking":
            self.records[one.asked.name].state = DONE
            self.done.append(one.asked)
        return self.state(one) == DONE

    def check(self) -> None:
        shown = [serial for one in self.done for serial in one.serials]
        assert len(shown) == len(set(shown)), "a serial was spent twice"
        for key in {one.key for one in self.done}:
            kinds = [one.kind for one in self.done if one.key == key and one.kind != "look up"]
            assert kinds == ["insert", "delete"] * (len(kinds) // 2) + ["insert"] * (
                len(kinds) % 2
            ), "a blob was stored or deleted twice"


def perform(shards: Shards, asked: Asked) -> Iterator[str | None]:
    """Carry a request to its end; yields None between transactions, and its answer at last."""
    for _ in range(20):
        answer = yield from attempt(shards, asked)
        if answer is not None:
            yield answer
            return
    yield "busy"


def attempt(shards: Shards, asked: Asked) -> Generator[None, None, str | None]:
    home = asked.serials[0]
    yield
    one = begin(shards, asked)  # home: record and smaller serial
    if one is None:
        other = shards.serials[home]
        if (yield from settled(shards, other)) == DONE:
            return done_or_spent(shards, asked, other)
        yield
        if shards.serials.get(home) == other:
            del shards.serials[home]
        return None
    if shards.state(one) == DONE:
        yield from finish(shards, one)
        return DONE
    yield
    holder = shards.serials.setdefault(asked.serials[1], one)
    if holder != one:
        if (yield from settled(shards, holder)) == DONE:
            yield
            shards.abort(one)
            return done_or_spent(shards, asked, holder)
        yield
        if shards.serials.get(asked.serials[1]) == holder:
            shards.serials[asked.serials[1]] = one
        else:
            return None
    yield
    refused = reserve(shards, one)
    if isinstance(refused, Try):
        if (yield from settled(shards, refused)) == DONE:
            yield from finish(shards, refused)
        else:
            yield
            release(shards, refused)
        return None
    yield
    if refused:
        return "refused" if shards.refuse(one) else None
    if not shards.commit(one):
        return None
    shards.check()
    yield from finish(shards, one)
    return DONE


def begin(shards: Shards, asked: Asked) -> Try | None:
    """The attempt that is under way or done, or a new one; None if the serial is another's."""
    record, holder = shards.records.get(asked.name), shards.serials.get(asked.serials[0])
    if record is not None and record.state != ABORTED:
        return record.attempt
    number = 0 if shards.mutation == "attempts have no number" else next(shards.numbers)
    one = Try(asked, number)
    if holder is not None and holder.asked != asked:
        return None
    shards.records[asked.name] = Record(one)
    shards.serials[asked.serials[0]] = one
    return one


def settled(shards: Shards, other: Try) -> Generator[None, None, str]:
    """Its state, now that it has ended."""
    yield
    return shards.abort(other)


def done_or_spent(shards: Shards, asked: Asked, other: Try) -> str:
    return DONE if other.asked == asked else "spent"


def reserve(shards: Shards, one: Try) -> bool | Try:
    """At the key's shard: whether it is refused, or who is in the way."""
    row = shards.blobs.get(one.asked.key)
    if row is not None and row.holder not in (None, one):
        return False if one.asked.kind == "look up" else row.holder
    match one.asked.kind:
        case "insert":
            if row is not None and row.stored:
                return True
            shards.blobs[one.asked.key] = Row(False, one)
        case "delete":
            if row is None:
                return True
            row.holder = one
    return False


def release(shards: Shards, other: Try) -> None:
    row = shards.blobs.get(other.asked.key)
    if row is not None and row.holder == other:
        if row.stored:
            row.holder = None
        else:
            del shards.blobs[other.asked.key]


def finish(shards: Shards, one: Try) -> Iterator[None]:
    """Step 3, by whoever comes by."""
    yield
    row = shards.blobs.get(one.asked.key)
    if row is None or row.holder != one:
        return
    if one.asked.kind == "insert":
        shards.blobs[one.asked.key] = Row(True, None)
    elif one.asked.kind == "delete":
        del shards.blobs[one.asked.key]


def life(seed: int, mutation: str = "") -> dict[str, str]:
    """Requests that share serials and keys, at several servers that die; the clients' answers."""
    rng, shards = random.Random(seed), Shards(mutation)
    asked = [
        Asked(f"{number}", tuple(sorted(rng.sample(range(5), 2))), kind, rng.randrange(2))  # type: ignore[arg-type]
        for number, kind in enumerate(rng.choices(["insert", "delete", "look up"], k=5))
    ]
    answers: dict[str, str] = {}
    running = [(one, perform(shards, one)) for one in asked for _ in range(rng.choice([1, 2]))]
    while running:
        place = rng.randrange(len(running))
        one, steps = running[place]
        if rng.random() < 0.06:
            del running[place]  # the server died; later its client asks again
            if rng.random() < 0.8:
                running.append((one, perform(shards, one)))
            continue
        answer = next(steps, None)
        if answer is not None:
            assert answers.get(one.name) != DONE or answer == DONE, "what was answered is gone"
            answers[one.name] = answer
            del running[place]
    for one in asked:  # in the end every client has an answer
        (answer,) = (answer for answer in perform(shards, one) if answer is not None)
        assert answers.get(one.name) != DONE or answer == DONE, "what was answered is gone"
        answers[one.name] = answer
    shards.check()
    performed = {one.name for one in shards.done}
    assert performed == {name for name, answer in answers.items() if answer == DONE}
    for key in range(2):
        changes = [one.kind for one in shards.done if one.key == key and one.kind != "look up"]
        row = shards.blobs.get(key)
        if row is not None and row.holder is not None and shards.state(row.holder) != DONE:
            release(shards, row.holder)
        row = shards.blobs.get(key)
        assert (row is not None) == (changes[-1:] == ["insert"])
    return answers


def test_whatever_dies_nothing_is_spent_twice_and_everybody_gets_an_answer() -> None:
    seen = set()
    for seed in range(3_000):
        seen |= set(life(seed).values())
    assert seen == {DONE, "spent", "refused"}


@pytest.mark.parametrize(
    "mutation",
    [
        "attempts have no number",
        "refuses without looking",
        "takes over without aborting",
        "commits without looking",
    ],
)
def test_a_protocol_that_is_wrong_is_found_out(mutation: str) -> None:
    with pytest.raises(AssertionError):
        for seed in range(20_000):
            life(seed, mutation)
