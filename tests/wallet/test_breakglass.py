"""What an entry has in it, and the reserve that keeps it worth something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.errors import CorruptBlob, EmptyWallet, NewerFormat
from hpkvfs.protocol.tariff import Operation, Tariff
from hpkvfs.types import ENTRY_SIZE, Generation
from hpkvfs.wallet import breakglass
from hpkvfs.wallet.breakglass import MOST_CREDENTIALS, Contents
from hpkvfs.wallet.wallet import Wallet
from tests.wallet.strategies import EPOCH, attempt, credential
from tests.wallet.test_wallet import bought, perform

KEY = bytes(range(32))
TARIFF = Tariff()


def rng(size: int) -> bytes:
    return bytes(range(size))


contents = st.builds(
    Contents,
    st.none() | st.integers(0, 2**62).map(Generation),
    st.lists(st.integers(0, 2**32 - 1).map(credential), max_size=MOST_CREDENTIALS).map(tuple),
)


@given(contents)
def test_an_entry_comes_back_as_it_was_and_has_one_size(made: Contents) -> None:
    entry = breakglass.seal(made, KEY, EPOCH, rng)
    assert len(entry) == ENTRY_SIZE
    assert breakglass.unseal(entry, KEY, EPOCH) == made


@given(contents, st.integers(0, ENTRY_SIZE - 1), st.integers(1, 255))
def test_an_altered_entry_is_refused(made: Contents, place: int, flip: int) -> None:
    entry = bytearray(breakglass.seal(made, KEY, EPOCH, rng))
    entry[place] ^= flip
    with pytest.raises(CorruptBlob):
        breakglass.unseal(bytes(entry), KEY, EPOCH)


def test_an_entry_of_another_epoch_or_vault_is_refused() -> None:
    entry = breakglass.seal(Contents(None, ()), KEY, EPOCH, rng)
    for key, epoch in ((KEY, b"f" * 32), (bytes(32), EPOCH)):
        with pytest.raises(CorruptBlob):
            breakglass.unseal(entry, key, epoch)


def test_a_newer_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakglass, "VERSION", 2)
    entry = breakglass.seal(Contents(None, ()), KEY, EPOCH, rng)
    monkeypatch.undo()
    with pytest.raises(NewerFormat):
        breakglass.unseal(entry, KEY, EPOCH)


def test_more_than_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        breakglass.seal(Contents(None, (credential(1),) * 8), KEY, EPOCH, rng)


def test_nothing_secret_is_shown() -> None:
    assert "credentials" not in repr(Contents(None, (credential(1),)))


def reserve(wallet: Wallet, *amounts: int) -> None:
    """As the teller does."""
    wallet.release_reserve()
    for amount in amounts:
        merges = True
        while merges:
            selection = wallet.carve(EPOCH, amount)
            assert selection is not None
            merges = selection.merges
            perform(wallet, selection, Operation.REISSUE, 0)
        wallet.reserve_one(EPOCH, amount)


@given(
    st.lists(st.integers(0, 200), min_size=4, max_size=16).filter(lambda a: len(a) % 2 == 0),
    st.data(),
)
def test_whatever_there_is_can_be_reserved(amounts: list[int], data: st.DataObject) -> None:
    wallet = Wallet()
    bought(wallet, *amounts)
    first = data.draw(st.integers(0, sum(amounts)))
    second = data.draw(st.integers(0, sum(amounts) - first))
    reserve(wallet, first, second)
    assert sorted(one.amount for one in wallet.reserve) == sorted([first, second])
    assert wallet.balance.total == sum(amounts) and wallet.conservation.holds
    assert wallet.worth(EPOCH) == sum(amounts) - first - second


def test_what_there_is_not_cannot_be_reserved() -> None:
    wallet = Wallet()
    bought(wallet, 5, 5)
    with pytest.raises(EmptyWallet):
        reserve(wallet, 11)
    assert wallet.conservation.holds


def pay(wallet: Wallet, operation: Operation = Operation.INSERT) -> None:
    delta = TARIFF.delta(operation)
    while True:
        selection = wallet.select(EPOCH, delta, TARIFF.insert)
        assert selection is not None
        if not selection.merges:
            perform(wallet, selection, operation, delta)
            return
        perform(wallet, selection, Operation.REISSUE, 0)


def test_the_reserve_is_spent_last_and_one_half_after_the_other() -> None:
    wallet = Wallet()
    bought(wallet, 100, 100, 0, 0)
    reserve(wallet, 80, 70)
    for _ in range(5):
        pay(wallet)
        assert sum(one.amount for one in wallet.reserve) == 150
    pay(wallet)
    assert [one.amount for one in wallet.reserve] == [80]
    for _ in range(14):
        pay(wallet)
    assert not wallet.reserve and wallet.balance.total == 0
    with pytest.raises(EmptyWallet):
        pay(wallet)


def test_what_was_not_spent_is_the_reserve_again_after_a_restart() -> None:
    wallet = Wallet()
    bought(wallet, 100, 100, 0, 0)
    reserve(wallet, 80, 70)
    numbers = {one.number for one in wallet.reserve}
    for _ in range(6):
        pay(wallet)
    kept = [*wallet.held(), *wallet.reserve]
    again = Wallet(kept, (), wallet.book, numbers)
    assert [one.amount for one in again.reserve] == [80]
    assert again.conservation.holds


def test_what_is_taken_in_counts_when_it_turns_out_to_be_good() -> None:
    wallet = Wallet()
    bought(wallet, 0, 0, 0, 0)
    for good in (True, False):
        inputs = wallet.take_in(EPOCH, credential(50))
        assert inputs is not None and wallet.conservation.holds
        one = attempt(Operation.REISSUE, 0)
        pending = wallet.begin(EPOCH, inputs, one)
        assert wallet.conservation.holds
        if good:
            wallet.settle(pending, one, (credential(25), credential(25)))
        else:
            wallet.write_off(pending)
        assert wallet.conservation.holds and wallet.balance.total == 50


def test_what_is_taken_in_is_shown_with_nothing_of_value() -> None:
    wallet = Wallet()
    bought(wallet, 10, 10)
    assert wallet.take_in(EPOCH, credential(50)) is None


def test_the_fixed_vector() -> None:
    """tests/vectors/format.json: an entry with no credentials, generation 5."""
    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "format.json").read_text())
    entry = breakglass.seal(Contents(Generation(5), ()), KEY, EPOCH, rng)
    assert breakglass.digest(entry).hex() == vectors["entry_sha256"]
