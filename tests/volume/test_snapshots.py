"""Snapshots' records, and which blobs they hold, beside a model that knows births and deaths."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.errors import CorruptBlob, UserError
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, Generation
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.deadlist import Dead, DeadList
from hpkvfs.volume.snapshots import Snapshot, check_name, decode_table, encode_tables, plan

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "format.json").read_text())


def ref(number: int) -> BlobRef:
    return BlobRef(BlobId(number), hashlib.sha256(str(number).encode()).digest())


def snapshot(name: str, generation: int = 1, held: DeadList | None = None) -> Snapshot:
    return Snapshot(
        name, Generation(generation), 10**18, b"w" * 8, ref(7), BlobId(9), 2, 100, 3,
        held or DeadList(),
    )  # fmt: skip


LONG = DeadList((), ((ref(1),) * 16,) * 4, 2**40)


@given(st.lists(st.tuples(st.text("abc-ü", min_size=1, max_size=120), st.booleans()), max_size=60))
def test_records_come_back_in_order_and_fill_tables(made: list[tuple[str, bool]]) -> None:
    records = [snapshot(name, i, LONG if long else None) for i, (name, long) in enumerate(made)]
    tables = encode_tables(records)
    assert all(len(table) == PAYLOAD_SIZE for table in tables)
    assert [record for table in tables for record in decode_table(table)] == records
    for one, two in pairwise(map(decode_table, tables)):
        assert len(encode_tables([*one, two[0]])) == 2, "the next record had still fitted"


@given(st.integers(0, 400), st.integers(1, 255))
def test_a_damaged_table_is_no_table_or_other_records(place: int, flip: int) -> None:
    payload = bytearray(encode_tables([snapshot("one"), snapshot("two")])[0])
    payload[place] ^= flip
    with suppress(CorruptBlob):
        assert decode_table(bytes(payload)) != [snapshot("one"), snapshot("two")]


def test_a_table_is_that_of_the_vectors() -> None:
    held = DeadList((), ((ref(3),),), 50)
    payload = encode_tables([snapshot("before-the-move", 41, held)])[0]
    assert payload.rstrip(b"\0").hex() == VECTORS["snapshot_table"]


def test_an_anchor_is_that_of_the_vectors() -> None:
    def one(number: int) -> DeadList:
        return DeadList((Dead(ref(number), Generation(42)),), (), 1)

    anchor = Anchor(
        Generation(42), b"w" * 8, 3, 10**18, ref(7), (ref(2**63 + 40),), BlobId(12), 5, 2, 100, 3,
        one(4), (ref(11),), BlobId(9), one(5), 50, (Generation(40),),
    )  # fmt: skip
    assert anchor.encode().rstrip(b"\0").hex() == VECTORS["anchor"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "a\nb", "-a", "x" * 256, "ü" * 128])
def test_names_that_could_not_be_a_directory_or_an_argument_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        check_name(name)


def test_other_names_are_kept() -> None:
    for name in ("a", "2026-11-24T14:00:00Z", "vor dem Umzug", "ü" * 127):
        assert check_name(name) == name


@dataclass
class Life:
    """Blobs with births and deaths; snapshots; what they hold by definition."""

    alive: set[int] = field(default_factory=set)
    born: dict[int, int] = field(default_factory=dict)
    held: dict[int, set[str]] = field(default_factory=dict)
    seen: dict[str, set[int]] = field(default_factory=dict)

    def is_held(self, blob: int) -> bool:
        return any(blob in tree for tree in self.seen.values())


@given(st.lists(st.tuples(st.sampled_from("bbddsx"), st.integers(0, 1_000)), max_size=80))
def test_a_blob_is_held_exactly_while_a_snapshot_has_it(events: list[tuple[str, int]]) -> None:
    life, ids, names = Life(), count(), count()
    table: list[Snapshot] = []
    newest = DeadList()
    dead: set[int] = set()

    def read(held: DeadList) -> tuple[list[Dead], list[BlobRef]]:
        return list(held.entries), []

    def no_page(_: bytes) -> BlobRef:
        raise AssertionError("these lists are short")

    for generation, (event, number) in enumerate(events, 1):
        horizon = table[-1].next_id if table else 0
        if event == "b":
            life.alive.add(next(ids))
        elif event == "d" and life.alive:
            blob = sorted(life.alive)[number % len(life.alive)]
            life.alive.discard(blob)
            entry = Dead(ref(blob), Generation(generation))
            if blob < horizon:
                newest = newest.add([entry], no_page, 1_000)
            else:
                dead.add(blob)
        elif event in "sx":
            create = [f"s{next(names)}"] if event == "s" else []
            delete = {table[number % len(table)].name} if event == "x" and table else set()
            change = plan(table, newest, [], read, create, delete)
            dead |= {entry.ref.id for entry in change.freed}
            lists = [stay.held.add(stay.more, no_page, 1_000) for stay in change.stay]
            table = [stay.snapshot for stay in change.stay]
            for name in delete:
                del life.seen[name]
            for name in create:
                life.seen[name] = set(life.alive)
                born = BlobId(max(life.alive, default=-1) + 1)
                next_id = BlobId(max(born, next(ids)))
                table.append(Snapshot(name, Generation(generation), 0, b"", None, next_id, 0, 0, 0))
                lists.append(DeadList())
            newest = lists.pop() if lists else DeadList()
            table = [
                Snapshot(s.name, s.generation, 0, b"", None, s.next_id, 0, 0, 0, held)
                for s, held in zip(table, [*lists, DeadList()], strict=False)
            ]
        on_lists = [e.ref.id for held in [*(s.held for s in table), newest] for e in held.entries]
        assert len(on_lists) == len(set(on_lists))
        assert set(on_lists) == {b for tree in life.seen.values() for b in tree} - life.alive
        assert not any(life.is_held(blob) for blob in dead)
