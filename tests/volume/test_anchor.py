"""Anchors, the search for the newest one, and the dead list."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpkvfs.errors import CorruptBlob, NewerFormat, VaultError
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, Generation, anchor_id
from hpkvfs.volume.anchor import (
    HANDOVERS,
    Anchor,
    find_newest,
    handed_over,
    heralds,
    kept_generations,
    successors,
)
from hpkvfs.volume.deadlist import (
    INLINE_ENTRIES,
    INLINE_HELD,
    INLINE_PAGES,
    Dead,
    DeadList,
    read_page,
)
from hpkvfs.volume.snapshots import MAX_TABLES

REFS = st.builds(
    lambda number: BlobRef(BlobId(number), hashlib.sha256(str(number).encode()).digest()),
    st.integers(0, 2**62),
)
DEAD = st.builds(Dead, REFS, st.integers(0, 2**40).map(Generation))
LISTS = st.lists(DEAD, max_size=50).map(lambda dead: DeadList(tuple(dead), (), len(dead)))
ANCHORS = st.builds(
    Anchor,
    generation=st.integers(0, 2**40).map(Generation),
    writer=st.binary(min_size=8, max_size=8),
    redo=st.integers(0, 2**40),
    time=st.integers(0, 2**63),
    root=st.none() | REFS,
    kept=st.lists(REFS, max_size=80).map(tuple),
    next_id=st.integers(0, 2**63).map(BlobId),
    next_ino=st.integers(0, 2**63),
    live=st.integers(0, 2**40),
    size=st.integers(0, 2**60),
    files=st.integers(0, 2**40),
    dead=LISTS,
    tables=st.lists(REFS, max_size=32).map(tuple),
    horizon=st.integers(0, 2**63).map(BlobId),
    held=LISTS,
    held_before=st.integers(0, 2**40),
    handovers=st.lists(st.integers(0, 2**40).map(Generation), max_size=HANDOVERS).map(tuple),
)


@given(ANCHORS)
def test_an_anchor_comes_back_as_it_was(anchor: Anchor) -> None:
    payload = anchor.encode()
    assert len(payload) == PAYLOAD_SIZE
    assert Anchor.decode(payload) == anchor


@given(ANCHORS, st.integers(0, PAYLOAD_SIZE - 1), st.integers(1, 255))
def test_a_damaged_anchor_raises_what_is_declared(anchor: Anchor, place: int, flip: int) -> None:
    payload = bytearray(anchor.encode())
    payload[place] ^= flip
    with suppress(CorruptBlob, VaultError):
        Anchor.decode(bytes(payload))


@pytest.mark.parametrize(
    ("version", "error", "said"),
    [(4, NewerFormat, "format 4, newer"), (2, VaultError, "format 2, older")],
)
def test_another_format_is_named(version: int, error: type[VaultError], said: str) -> None:
    payload = bytes([0, 0, 0, 2, 0x91, version]).ljust(PAYLOAD_SIZE, b"\0")
    with pytest.raises(error, match=said):
        Anchor.decode(payload)


def test_the_fullest_anchor_fits_its_blob() -> None:
    """The lists spill before they can crowd an anchor, whatever else is in it."""
    ref = BlobRef(BlobId(2**64 - 1), bytes(32))
    most = Generation(2**32 - 1)
    dead, held = (
        DeadList((Dead(ref, most),) * inline, ((ref,) * INLINE_PAGES,) * 4, 2**40)
        for inline in (INLINE_ENTRIES, INLINE_HELD)
    )
    kept = (ref,) * (len(kept_generations(most)) + HANDOVERS)
    big, tables = 2**63 - 1, (ref,) * MAX_TABLES
    anchor = Anchor(most, b"w" * 8, big, big, ref, kept, BlobId(big), big, big, big, big, dead,
                    tables, BlobId(big), held, big, (most,) * HANDOVERS)  # fmt: skip
    assert Anchor.decode(anchor.encode()) == anchor


def _search(stored: Iterable[int], floor: int | None = None) -> tuple[int | None, int, int]:
    """What is found, in so many look-ups and rounds."""
    search = find_newest(None if floor is None else Generation(floor))
    present, asked, rounds = set(stored), set[int](), 0
    try:
        wanted = next(search)
        while True:
            assert wanted and not wanted & asked
            asked |= wanted
            rounds += 1
            wanted = search.send(wanted & present)
    except StopIteration as stop:
        return stop.value, len(asked), rounds


newest_ones = st.integers(0, 40).flatmap(lambda bits: st.integers(0, 2**bits))


@given(newest_ones)
def test_the_newest_is_found_in_logarithmically_many_look_ups(newest: int) -> None:
    found, asked, rounds = _search(kept_generations(Generation(newest)))
    assert found == newest
    assert asked <= 2 * math.log2(max(newest, 1)) + 10
    assert rounds <= asked


def test_every_small_vault_is_found_in_as_many() -> None:
    for newest in range(3_000):
        found, asked, _ = _search(kept_generations(Generation(newest)))
        assert found == newest
        assert asked <= 2 * math.log2(max(newest, 1)) + 10


@given(newest_ones, st.data())
def test_a_generation_that_existed_saves_look_ups(newest: int, data: st.DataObject) -> None:
    """Whatever of the older anchors is there still; no more look-ups than without it, but two."""
    floor = data.draw(st.integers(0, newest))
    more = data.draw(st.sets(st.integers(0, newest), max_size=20))
    stored = kept_generations(Generation(newest)) | more
    found, asked, _ = _search(stored, floor)
    assert found == newest
    assert asked <= 2 * math.log2(max(newest, 1)) + 10


def test_from_the_newest_itself_it_takes_half_a_look_up_a_bit_at_most() -> None:
    newest = 0b1011_0110_0101_1001
    found, asked, _ = _search(kept_generations(Generation(newest)), newest)
    assert found == newest and asked <= 17


@given(st.integers(0, 3_000), st.data())
def test_the_newest_is_found_whatever_is_left_uncollected(newest: int, data: st.DataObject) -> None:
    more = data.draw(st.sets(st.integers(0, newest)))
    assert _search(kept_generations(Generation(newest)) | more)[0] == newest


def test_where_there_is_nothing_nothing_is_found() -> None:
    assert _search([]) == (None, 5, 1)


def test_each_anchor_is_kept_as_long_as_needed_and_then_listed_dead_once() -> None:
    anchor = Anchor(Generation(0), b"w" * 8, 0, 0, None, (), BlobId(0), 1, 0, 0, 0, DeadList())
    died: list[BlobId] = []
    for n in range(200):
        ref = BlobRef(anchor_id(Generation(n)), bytes(32))
        kept, dead = successors(anchor, ref, ())
        died += (old.id for old in dead)
        stay = {anchor_id(g) for g in kept_generations(Generation(n + 1))}
        assert {old.id for old in kept} == stay - {anchor_id(Generation(n + 1))}
        fields = {name: getattr(anchor, name) for name in Anchor.__slots__}
        anchor = Anchor(**{**fields, "generation": Generation(n + 1), "kept": kept})
    assert len(died) == len(set(died)) == 201 - len(kept) - 1


def test_the_first_anchor_of_each_of_the_last_writers_stays() -> None:
    """Whoever published the one before finds it in his way, however far others went."""
    anchor = Anchor(Generation(0), b"a", 0, 0, None, (), BlobId(0), 1, 0, 0, 0, DeadList())
    first: list[Generation] = []
    for n in range(1, 400):
        writer = b"ab"[n // 17 % 2 :][:1]
        if writer != anchor.writer:
            first.append(Generation(n))
        handovers = handed_over(anchor, writer)
        kept, _ = successors(anchor, BlobRef(anchor_id(anchor.generation), bytes(32)), handovers)
        assert handovers == tuple(first[-HANDOVERS:])
        assert {anchor_id(one) for one in handovers if one < n} <= {ref.id for ref in kept}
        assert len(kept) <= len(kept_generations(Generation(n))) - 1 + HANDOVERS
        anchor = replace(
            anchor, generation=Generation(n), writer=writer, kept=kept, handovers=handovers
        )
    assert first == [Generation(n) for n in range(17, 400, 17)]


@given(st.lists(st.integers(0, 2_000), max_size=12))
@example([INLINE_ENTRIES + 1] * 320)  # pages of three levels
def test_a_dead_list_holds_just_what_was_added(batches: list[int]) -> None:
    pages: dict[BlobRef, bytes] = {}

    def write(payload: bytes) -> BlobRef:
        ref = BlobRef(BlobId(10**9 + len(pages)), hashlib.sha256(payload).digest())
        pages[ref] = payload
        return ref

    dead, added = DeadList(), list[Dead]()
    for batch in batches:
        more = [
            Dead(BlobRef(BlobId(len(added) + i), bytes(32)), Generation(1)) for i in range(batch)
        ]
        added += more
        dead = dead.add(more, write)
        assert len(repr(dead.encode())) < 4 * PAYLOAD_SIZE
    assert dead.pages == len(pages)
    assert sorted(_all(dead, pages)) == sorted(added)
    assert dead.count == len(added)
    assert DeadList.decode(dead.encode()) == dead


def _all(dead: DeadList, pages: dict[BlobRef, bytes]) -> list[Dead]:
    found = list(dead.entries)
    work = [(level, ref) for level, refs in enumerate(dead.levels, 1) for ref in refs]
    while work:
        level, ref = work.pop()
        entries, below = read_page(pages.pop(ref), level)
        found += entries
        work += [(level - 1, page) for page in below]
    assert not pages, "a page was written and is not listed"
    return found


def test_a_page_of_another_level_is_refused() -> None:
    with pytest.raises(CorruptBlob):
        read_page(bytes(PAYLOAD_SIZE), 1)


@given(st.integers(-1, 70_000), st.integers(0, 70_000))
def test_any_newer_generation_is_heralded_and_no_older_one(here: int, newest: int) -> None:
    """Whatever was collected meanwhile; the next generation alone would not tell."""
    generation = None if here < 0 else Generation(here)
    asked = heralds(generation)
    assert asked[0] == here + 1 and sorted(asked) == asked
    assert len(asked) <= here.bit_length() + 2
    assert any(one in kept_generations(Generation(newest)) for one in asked) == (newest > here)
