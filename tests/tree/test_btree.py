"""What a tree costs in blobs, what it reads, and what it refuses."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.tree import btree
from hpkvfs.tree.btree import HALF, LEAST
from hpkvfs.tree.check import check
from hpkvfs.tree.node import CAPACITY, MAX_KEY, MAX_VALUE, CorruptNode, Node
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, Missing
from tests.examples import examples
from tests.tree.doubles import Cold, MissingHere, Shelf, Vault, narrow

Edits = dict[bytes, bytes | None]
END = b"\xff" * 17
NOWHERE = BlobRef(BlobId(1 << 40), bytes(32))


def key(ino: int, kind: int, offset: int = 0) -> bytes:
    return struct.pack(">QBQ", ino, kind, offset)


def small_files(rng: random.Random, start: int, count: int) -> Edits:
    """Files of 1 KiB: an inode, its data, and a name at a random place in directory 1."""
    edits: Edits = {}
    for ino in range(start, start + count):
        edits[key(ino, 1)] = rng.randbytes(60)
        edits[key(ino, 5)] = rng.randbytes(1_024)
        edits[key(1, 2, rng.getrandbits(63))] = rng.randbytes(40)
    return edits


def filled(edits: Edits) -> Vault:
    vault = Vault()
    vault.commit(edits)
    vault.check()
    return vault


def extents(count: int, ino: int = 9) -> Edits:
    return {key(ino, 5, block << 14): block.to_bytes(40, "big") for block in range(count)}


def leaf_weights(vault: Vault) -> list[int]:
    nodes = map(vault.shelf.node, check(vault.shelf, vault.root).refs)
    return [node.weight for node in nodes if node.level == 0]


# Space


def test_a_thousand_small_files_in_ten_commits_fit_in_88_leaves() -> None:
    vault, rng = Vault(), random.Random(1)
    for batch in range(10):
        vault.commit(small_files(rng, 2 + 100 * batch, 100))
    report = vault.check()
    assert report.items == 3_000
    assert report.leaves <= 80
    assert report.fill >= 0.90
    # Per commit: about eight new leaves, the names' leaves, the root.
    assert vault.written <= 135


def test_a_thousand_small_files_in_one_commit_fit_in_78_leaves() -> None:
    report = filled(small_files(random.Random(2), 2, 1_000)).check()
    assert report.leaves <= 78


@pytest.mark.parametrize(
    ("size", "fill"), [(40, 0.99), (60, 0.99), (250, 0.98), (260, 0.98), (1_024, 0.95)]
)
def test_a_bulk_load_packs_its_leaves(size: int, fill: float) -> None:
    vault = filled({key(ino, 1): bytes(size) for ino in range(2_000_000 // size)})
    *full, _last = leaf_weights(vault)
    assert min(full) >= (fill - 0.02) * PAYLOAD_SIZE
    assert sum(full) >= fill * PAYLOAD_SIZE * len(full)


@pytest.mark.parametrize("batch", [1, 7, 100, 1_000])
def test_appending_in_small_commits_packs_as_well(batch: int) -> None:
    vault = Vault()
    for start in range(0, 3_000, batch):
        vault.commit({key(ino, 1): bytes(60) for ino in range(start, min(start + batch, 3_000))})
    report = vault.check()
    assert report.leaves == -(-3_000 * 81 // (PAYLOAD_SIZE - 60))
    # The last leaf again with every commit, and its path.
    assert vault.written <= report.leaves + 2 * (3_000 // batch + 1)


def test_a_file_growing_in_the_middle_leaves_full_leaves_behind() -> None:
    vault = filled(small_files(random.Random(3), 2, 200))
    before = vault.check().leaves
    for commit in range(40):
        vault.commit({key(50, 6, commit * 100 + i): bytes(40) for i in range(100)})
    assert vault.check().leaves - before <= 4_000 * 61 / PAYLOAD_SIZE / 0.75


@pytest.mark.parametrize("size", [40, 1_000, MAX_VALUE])
def test_random_single_edits_keep_the_tree_half_full(size: int) -> None:
    vault, rng = Vault(), random.Random(4)
    names = [rng.randbytes(17) for _ in range(2_400_000 // (size + 560))]
    least = 0.47 * CAPACITY

    def fair() -> bool:
        weights = leaf_weights(vault)
        return len(weights) < 3 or sum(weights) > least * len(weights)

    for step, name in enumerate(names):
        vault.commit({name: bytes(size)})
        assert step % 100 or fair()
    rng.shuffle(names)
    for step, name in enumerate(names):
        vault.commit({name: None})
        assert step % 100 or fair()


def test_replacing_values_by_small_ones_gives_the_space_back() -> None:
    vault = filled({key(ino, 5): bytes(1_000) for ino in range(3_000)})
    before = vault.check().leaves
    names = list(vault.model)
    random.Random(5).shuffle(names)
    for start in range(0, 3_000, 50):
        vault.commit(dict.fromkeys(names[start : start + 50], b""))
    assert vault.check().leaves <= before / 20


def test_deleting_all_but_a_few_items_leaves_few_nodes() -> None:
    vault = filled({key(ino, 1): bytes(60) for ino in range(120_000)})
    assert vault.check().depth == 3
    vault.commit({k: None for i, k in enumerate(sorted(vault.model)) if i % 1_000})
    report = vault.check()
    assert (report.leaves, report.depth, report.items) == (1, 1, 120)


def test_only_the_right_edge_of_a_level_may_hold_a_scrap() -> None:
    """The end of an inner node that is not the last one of its level is no right edge."""
    vault = filled(extents(100_000))
    assert vault.root is not None
    bound = vault.shelf.node(vault.root).keys[1]
    last = max(name for name in vault.model if name < bound)
    vault.commit({last[:-1] + bytes([low]): bytes(40) for low in (1, 2, 3)})
    assert min(leaf_weights(vault)[:-1]) >= LEAST
    vault.check()


def test_a_node_emptied_between_full_ones_is_shared_out_again() -> None:
    vault = filled(extents(1_000))
    names = vault.shelf.node(check(vault.shelf, vault.root).refs[2]).keys
    assert vault.commit(dict.fromkeys(names[1:])).written == 3
    assert min(leaf_weights(vault)[:-1]) >= LEAST
    vault.check()


def test_an_untouched_node_left_alone_becomes_the_root() -> None:
    vault = filled(extents(400))
    assert vault.check().depth == 2
    applied = vault.commit(
        dict.fromkeys(vault.shelf.node(check(vault.shelf, vault.root).refs[1]).keys)
    )
    assert applied.written == 0
    assert vault.check().depth == 1


def test_scattered_inserts_into_full_leaves_cost_only_their_bytes() -> None:
    vault, rng = filled(extents(20_000)), random.Random(6)
    before = vault.check().nodes
    vault.commit({key(9, 5, rng.getrandbits(28)): bytes(40) for _ in range(4_000)})
    assert vault.check().nodes <= before * 1.25


# Writing and reading no more than needed


def depth_and_writes(vault: Vault, edits: Edits) -> tuple[int, int]:
    applied = vault.commit(edits)
    return vault.check().depth, applied.written


def test_one_edit_writes_one_path() -> None:
    vault = filled(extents(100_000))
    for edits in (
        {key(9, 5, 5 << 14): b"x" * 40},
        {key(9, 5, 50_000 << 14): None},
        {key(9, 5, 99_999 << 14): b""},
        {key(10, 5): b"appended"},
    ):
        assert depth_and_writes(vault, dict(edits)) == (3, 3)


def test_an_insert_into_a_full_leaf_writes_one_node_more() -> None:
    vault = filled(extents(10_000))
    assert depth_and_writes(vault, {key(9, 5, (5_000 << 14) + 1): bytes(40)}) == (2, 3)


def test_a_merger_reads_and_writes_no_more_than_two_neighbours() -> None:
    vault = filled({key(ino, 5): bytes(1_000) for ino in range(1_000)})
    names = sorted(vault.model)
    written = [vault.commit({name: None}).written for name in names[400:460]]
    assert max(written) <= 3
    vault.check()


def test_edits_that_change_nothing_write_nothing() -> None:
    vault = filled(extents(1_000))
    reads = vault.shelf.reads
    edits: Edits = dict(list(vault.model.items())[::3]) | {key(1, 1): None, END: None}
    applied = vault.commit(edits)
    assert applied == (vault.root, [], [], 0)
    assert vault.shelf.reads - reads < 50
    assert btree.apply(vault.shelf, None, [(b"a", None)], vault.shelf.emit).root is None
    assert btree.apply(vault.shelf, None, [], vault.shelf.emit) == (None, [], [], 0)


def test_an_unchanged_leaf_between_changed_ones_is_left_alone() -> None:
    vault = filled(extents(800))
    assert len(leaf_weights(vault)) == 3
    middle = check(vault.shelf, vault.root).refs[2]
    edits: Edits = dict(sorted(vault.model.items())[400:420])
    edits |= {min(vault.model): b"new", max(vault.model): b"new"}
    applied = vault.commit(edits)
    assert middle not in applied.freed
    assert applied.written == 3


def test_a_read_touches_one_path() -> None:
    vault = filled(extents(100_000))
    vault.shelf.reads = 0
    assert btree.get(vault.shelf, vault.root, key(9, 5, 77 << 14)) == (77).to_bytes(40, "big")
    assert vault.shelf.reads == 3
    assert btree.get(vault.shelf, vault.root, key(8, 5)) is None
    assert vault.shelf.reads == 4
    vault.shelf.reads = 0
    narrow = btree.scan(vault.shelf, vault.root, key(9, 5, 77 << 14), key(9, 5, 80 << 14))
    assert len(list(narrow)) == 3
    assert vault.shelf.reads == 3


def test_work_grows_with_the_edits_and_not_with_the_tree() -> None:
    vault = filled(extents(100_000))
    vault.shelf.reads = 0
    applied = vault.commit({key(9, 5, block << 14): b"" for block in range(0, 100_000, 9_000)})
    assert applied.written == 12 + 2 + 1
    assert vault.shelf.reads <= 4 * 15


# Missing


def run_cold(cold: Cold, work: Callable[[], object]) -> list[int]:
    """Run until nothing is missing; how many nodes each round asked for."""
    rounds = []
    while True:
        try:
            work()
        except MissingHere as missing:
            rounds.append(len(missing.refs))
            cold.load(missing.refs)
        else:
            return rounds


def test_apply_raises_missing_for_a_whole_level_and_before_it_emits() -> None:
    vault = filled(extents(100_000))
    edits = [(key(9, 5, block << 14), b"x") for block in range(0, 100_000, 9_000)]
    cold, out = Cold(vault.shelf), Shelf()
    emitted_at: list[int] = []

    def work() -> None:
        emitted_at.append(len(out.emitted))
        btree.apply(cold, vault.root, edits, out.emit)

    assert run_cold(cold, work) == [1, 2, 12]
    assert emitted_at == [0, 0, 0, 0]
    assert len(out.emitted) == 15


def test_wanted_asks_for_neighbours_only_where_a_merger_is_possible() -> None:
    vault = filled(extents(10_000))

    def asked(keys: list[bytes]) -> int:
        cold, total = Cold(vault.shelf), 0
        while refs := btree.wanted(cold, vault.root, keys):
            cold.load(refs)
            total += len(refs)
        return total

    assert asked([]) == 0
    assert asked([key(9, 5, 5_000 << 14)]) == 2
    assert asked([key(10, 1)]) == 2
    emptied = [key(9, 5, block << 14) for block in range(5_000, 5_250)]
    assert 4 <= asked(emptied) <= 6
    assert btree.wanted(Cold(vault.shelf), None, emptied) == []
    with pytest.raises(ValueError, match="ascend"):
        btree.wanted(vault.shelf, vault.root, emptied[::-1])


def test_wanted_foresees_an_inner_node_made_small_by_a_merger_of_three_leaves() -> None:
    """Seven entries are above half; without three, and with the merger's, they are not."""
    shelf, names = Shelf(), [key(ino, 1) for ino in range(30)]
    leaves = [Node(0, (names[2 * i], names[2 * i + 1]), (bytes(80),) * 2) for i in range(15)]
    refs = [shelf.emit(node).encode() for node in leaves]
    first = Node(1, tuple(names[0:16:2]), tuple(refs[:8]))
    second = Node(1, tuple(names[16:30:2]), tuple(refs[8:]))
    inner = tuple(shelf.emit(node).encode() for node in (first, second))
    root = shelf.emit(Node(2, (names[0], names[16]), inner))
    edits: list[btree.Edit] = [(names[22], None), (names[23], b"")]
    cold = Cold(shelf)
    with narrow():
        while refs_wanted := btree.wanted(cold, root, [name for name, _ in edits]):
            cold.load(refs_wanted)
        applied = btree.apply(cold, root, edits, shelf.emit)
    shelf.drop(applied.freed)
    assert len(applied.freed) == 3 + 1 + 1
    report = check(shelf, applied.root)
    assert report.problems == []
    assert set(report.refs) == set(shelf.payloads)


def test_leaves_at_the_near_ends_of_two_inner_nodes_are_no_neighbours_if_a_third_is_between() -> (
    None
):
    with narrow():
        vault = filled({key(ino, 1): bytes(60) for ino in range(600)})
        nodes = map(vault.shelf.node, check(vault.shelf, vault.root).refs)
        inner = [node for node in nodes if node.level == 1]
        for left, right in zip(inner, inner[2:], strict=False):
            vault.commit({left.keys[-1]: b"left", right.keys[0]: b"right"})
            vault.check()


def test_a_scan_asks_for_the_nodes_ahead_together() -> None:
    vault = filled(extents(10_000))
    cold = Cold(vault.shelf)
    rounds = run_cold(cold, lambda: list(btree.scan(cold, vault.root, b"", END)))
    assert rounds == [1, 32, 6]
    cold = Cold(vault.shelf)
    low, high = key(9, 5, 5_000 << 14), key(9, 5, 5_001 << 14)
    assert run_cold(cold, lambda: list(btree.scan(cold, vault.root, low, high))) == [1, 1]


def test_check_asks_for_a_level_at_a_time() -> None:
    vault = filled(extents(100_000))
    cold = Cold(vault.shelf)
    assert run_cold(cold, lambda: check(cold, vault.root)) == [1, 2, 374]


# Determinism


@examples(20)
@given(st.integers(0, 1 << 32), st.integers(1, 2_000))
def test_the_same_edits_of_the_same_tree_give_the_same_bytes(seed: int, count: int) -> None:
    def build() -> dict[BlobRef, bytes]:
        rng, vault = random.Random(seed), Vault()
        for _ in range(3):
            vault.commit(
                {rng.randbytes(3): rng.randbytes(rng.choice([5, 500])) for _ in "x" * count}
            )
        return vault.shelf.payloads

    assert build() == build()


# Refusals


@pytest.mark.parametrize(
    "edits",
    [
        [(b"b", b"1"), (b"a", b"1")],
        [(b"a", b"1"), (b"a", None)],
        [(b"k" * (MAX_KEY + 1), b"1")],
        [(b"a", b"v" * (MAX_VALUE + 1))],
    ],
    ids=["unsorted", "duplicate", "long key", "long value"],
)
def test_bad_edits_are_refused_and_nothing_is_written(edits: list[btree.Edit]) -> None:
    shelf = Shelf()
    with pytest.raises(ValueError, match=r"key|value"):
        btree.apply(shelf, None, edits, shelf.emit)
    assert not shelf.emitted


def leaf(*names: bytes) -> Node:
    return Node(0, names, (b"value",) * len(names))


def planted(level: int, *children: tuple[bytes, Node]) -> tuple[Shelf, BlobRef]:
    """An inner node that describes its children as told, whatever they are."""
    shelf = Shelf()
    refs = tuple(shelf.emit(child).encode() for _, child in children)
    return shelf, shelf.emit(Node(level, tuple(name for name, _ in children), refs))


GOOD = (b"m", leaf(b"m", b"n"))
FORGED = {
    "level too high": planted(2, (b"a", leaf(b"a", b"b")), GOOD),
    "begins late": planted(1, (b"a", leaf(b"b", b"c")), GOOD),
    "begins early": planted(1, (b"a", leaf(b"A", b"b")), GOOD),
    "ends in the next": planted(1, (b"a", leaf(b"a", b"m")), GOOD),
    "ends beyond the next": planted(1, (b"a", leaf(b"a", b"z")), GOOD),
}


@pytest.mark.parametrize(("shelf", "root"), FORGED.values(), ids=FORGED.keys())
def test_a_child_that_is_not_what_its_parent_says_is_refused(shelf: Shelf, root: BlobRef) -> None:
    emitted = len(shelf.emitted)
    for work in (
        lambda: btree.get(shelf, root, b"b"),
        lambda: list(btree.scan(shelf, root, b"b", b"c")),
        lambda: btree.wanted(shelf, root, [b"b"]),
        lambda: btree.apply(shelf, root, [(b"b", b"new")], shelf.emit),
    ):
        with pytest.raises(CorruptNode):
            work()
    assert len(shelf.emitted) == emitted
    assert len(check(shelf, root).problems) >= 1


def test_a_child_beyond_its_grandparents_bound_is_refused() -> None:
    shelf = Shelf()
    left = shelf.emit(Node(1, (b"a",), (shelf.emit(leaf(b"a", b"n")).encode(),)))
    right = shelf.emit(Node(1, (b"m",), (shelf.emit(leaf(b"m")).encode(),)))
    root = shelf.emit(Node(2, (b"a", b"m"), (left.encode(), right.encode())))
    for work in (
        lambda: btree.get(shelf, root, b"b"),
        lambda: list(btree.scan(shelf, root, b"", b"z")),
        lambda: btree.apply(shelf, root, [(b"b", b"new")], shelf.emit),
    ):
        with pytest.raises(CorruptNode):
            work()
    assert check(shelf, root).problems


def test_the_control_of_the_forged_trees_is_accepted() -> None:
    shelf, root = planted(1, (b"a", leaf(b"a", b"b")), GOOD)
    assert btree.get(shelf, root, b"b") == b"value"
    assert check(shelf, root).problems == []
    assert btree.apply(shelf, root, [(b"b", b"new")], shelf.emit).written == 1


def test_check_reports_a_node_that_is_there_twice_and_one_that_is_damaged() -> None:
    shelf, root = planted(1, (b"a", leaf(b"a")), GOOD)
    twice = shelf.node(root).values[0]
    doubled = shelf.emit(Node(1, (b"a", b"b"), (twice, twice)))
    assert any("twice" in problem for problem in check(shelf, doubled).problems)

    child = shelf.node(root).child(1)
    shelf.payloads[child] = bytes(PAYLOAD_SIZE)
    shelf.nodes.clear()
    report = check(shelf, root)
    assert len(report.problems) == 1
    assert "damaged" in report.problems[0]
    assert child in report.refs
    with pytest.raises(CorruptNode):
        btree.get(shelf, root, b"m")


def test_check_of_the_empty_tree() -> None:
    report = check(Shelf(), None)
    assert (report.nodes, report.items, report.depth, report.refs) == (0, 0, 0, [])


def test_missing_is_not_swallowed_when_the_root_is_not_there() -> None:
    cold = Cold(Shelf())
    assert btree.wanted(cold, NOWHERE, [b"a"]) == [NOWHERE]
    for work in (
        lambda: btree.get(cold, NOWHERE, b"a"),
        lambda: list(btree.scan(cold, NOWHERE, b"a", b"b")),
        lambda: check(cold, NOWHERE),
    ):
        with pytest.raises(Missing) as caught:
            work()
        assert caught.value.refs == (NOWHERE,)
        assert type(caught.value) is MissingHere


def test_the_policy_keeps_its_own_bounds() -> None:
    """Two nodes cut from what does not fit in one are both at least LEAST."""
    assert LEAST < HALF
    vault = filled({key(ino, 5): bytes(1_000) for ino in range(16)})
    vault.commit({key(7, 6): bytes(900)})
    assert min(leaf_weights(vault)) >= LEAST
