"""Random histories of a tree against a dict, with the checker and the books as oracles."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpkvfs.tree import btree
from hpkvfs.tree.btree import Applied, Edit
from hpkvfs.tree.node import MAX_KEY, MAX_LEVEL, MAX_VALUE
from hpkvfs.types import BlobRef
from tests.examples import examples
from tests.tree.doubles import Cold, MissingHere, Shelf, Vault, displaced_by, narrow

SPAN = 3_000


def key_of(number: int) -> bytes:
    """Keys of all lengths, most of the longest, so that inner nodes fill up soon."""
    key = number.to_bytes(2, "big")
    return key if number % 7 == 0 else key.ljust(2 + (MAX_KEY - 2) // (1 + number % 3), b"k")


numbers = st.integers(0, SPAN - 1)
fills = st.integers(0, 255)
sizes = st.one_of(st.integers(0, 60), st.integers(200, 300), st.integers(0, MAX_VALUE))
values = st.builds(lambda fill, size: bytes([fill]) * size, fills, sizes)
ranges = st.tuples(numbers, st.integers(1, 400), st.sampled_from([1, 1, 2, 7])).map(
    lambda r: range(r[0], min(r[0] + r[1], SPAN), r[2])
)


class TreeHistory(RuleBasedStateMachine):
    """The node source remembers nothing: each commit loads what wanted asks for."""

    longest = MAX_VALUE
    rounds = 8

    def __init__(self) -> None:
        super().__init__()
        self.vault = Vault()

    def commit(self, edits: dict[bytes, bytes | None]) -> None:
        edits = {k: None if v is None else v[: self.longest] for k, v in edits.items()}
        vault, ordered = self.vault, sorted(edits.items())
        expected = displaced_by(vault.model, ordered)
        changes = any(vault.model.get(k) != v for k, v in ordered)
        rehearsed = self.rehearse(ordered)
        start = len(vault.shelf.emitted)
        applied = self.apply_cold(ordered)
        fresh = vault.shelf.emitted[start:]

        assert applied.displaced == expected
        assert applied.written == len(fresh)
        assert len(set(applied.freed)) == len(applied.freed)
        assert not set(applied.freed) & set(fresh)
        if not changes:
            assert applied == Applied(vault.root, [], [], 0)
        assert (rehearsed.root, rehearsed.freed) == (applied.root, applied.freed)
        vault.settle(edits, applied)

    def rehearse(self, ordered: list[Edit]) -> Applied:
        """The same edits of the same tree, on a shelf of their own."""
        shelf = self.vault.shelf
        copy = Shelf(dict(shelf.payloads), list(shelf.emitted))
        return btree.apply(copy, self.vault.root, ordered, copy.emit)

    def apply_cold(self, ordered: list[Edit]) -> Applied:
        shelf, root = self.vault.shelf, self.vault.root
        cold = Cold(shelf)
        keys = [key for key, _ in ordered]
        rounds = 0
        while refs := btree.wanted(cold, root, keys):
            cold.load(refs)
            rounds += 1
        assert rounds <= self.rounds
        return btree.apply(cold, root, ordered, shelf.emit)

    @rule(number=numbers, value=values)
    def put(self, number: int, value: bytes) -> None:
        self.commit({key_of(number): value})

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        self.commit({key_of(number): None})

    @rule(
        edits=st.dictionaries(numbers.map(key_of), st.one_of(st.none(), values), max_size=30),
    )
    def scattered(self, edits: dict[bytes, bytes | None]) -> None:
        self.commit(edits)

    @rule(where=ranges, size=sizes, fill=fills)
    def put_range(self, where: range, size: int, fill: int) -> None:
        self.commit({key_of(n): bytes([fill]) * size for n in where})

    @rule(where=ranges)
    def delete_range(self, where: range) -> None:
        self.commit({key_of(n): None for n in where})

    @rule(where=ranges, size=sizes)
    def append(self, where: range, size: int) -> None:
        top = max((int.from_bytes(k[:2], "big") for k in self.vault.model), default=-1) + 1
        self.commit({key_of(top + i): b"a" * size for i in range(len(where)) if top + i < 65_536})

    @rule(fill=fills, start=st.integers(0, 600))
    def grow_tall(self, fill: int, start: int) -> None:
        """Enough leaves for a third level."""
        self.commit(
            {key_of(n): bytes([fill]) * (self.longest // 2) for n in range(start, start + 900)}
        )

    @precondition(lambda self: len(self.vault.model) > 200)
    @rule(keep=st.integers(2, 60))
    def thin_out(self, keep: int) -> None:
        self.commit({k: None for i, k in enumerate(sorted(self.vault.model)) if i % keep})

    @rule()
    def repeat(self) -> None:
        self.commit(dict(self.vault.model))

    @rule()
    def clear(self) -> None:
        self.commit(dict.fromkeys(self.vault.model))
        assert self.vault.root is None

    @rule(lo=numbers, hi=numbers)
    def scan(self, lo: int, hi: int) -> None:
        cold, found = Cold(self.vault.shelf), None
        low, high = key_of(lo), key_of(hi)
        while found is None:
            try:
                found = list(btree.scan(cold, self.vault.root, low, high))
            except MissingHere as missing:
                cold.load(missing.refs)
        assert found == sorted((k, v) for k, v in self.vault.model.items() if low <= k < high)

    @rule(number=numbers, suffix=st.sampled_from([b"", b"\0"]))
    def get(self, number: int, suffix: bytes) -> None:
        key = (key_of(number) + suffix)[:MAX_KEY]
        assert btree.get(self.vault.shelf, self.vault.root, key) == self.vault.model.get(key)

    @invariant()
    def sound(self) -> None:
        """Live = emitted - freed = reachable; the items are the model's."""
        report = self.vault.check()
        assert report.items == len(self.vault.model)
        assert (self.vault.root is None) == (not self.vault.model)
        root: BlobRef | None = self.vault.root
        if root is not None and self.vault.shelf.node(root).level:
            assert report.depth == self.vault.shelf.node(root).level + 1


class NarrowHistory(TreeHistory):
    """The same in tall trees."""

    longest = 280
    rounds = 2 * MAX_LEVEL

    def __init__(self) -> None:
        super().__init__()
        self.narrow = narrow()
        self.narrow.__enter__()

    def teardown(self) -> None:
        self.narrow.__exit__(None, None, None)


NarrowHistory.TestCase.settings = examples(40, stateful_step_count=25)
TestNarrowHistory = NarrowHistory.TestCase
TreeHistory.TestCase.settings = examples(40, stateful_step_count=25)
TestTreeHistory = TreeHistory.TestCase
