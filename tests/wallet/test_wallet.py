"""The wallet's states: whatever happens to requests, no token appears or disappears."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hpkvfs.errors import EmptyWallet
from hpkvfs.protocol.tariff import Operation, Tariff
from hpkvfs.wallet.wallet import Pending, Selection, Wallet, split
from tests.examples import examples
from tests.wallet.strategies import EPOCH, attempt, credential

TARIFF = Tariff()
PAID = (Operation.LOOK_UP, Operation.INSERT, Operation.DELETE)


def bought(wallet: Wallet, *amounts: int, epoch: bytes = EPOCH) -> None:
    """Buy two credentials for each two amounts."""
    for pair in zip(amounts[::2], amounts[1::2], strict=True):
        one = attempt(Operation.ISSUE, sum(pair))
        wallet.settle(wallet.begin(epoch, (), one), one, (credential(pair[0]), credential(pair[1])))


def perform(wallet: Wallet, selection: Selection, operation: Operation, delta: int) -> None:
    one = attempt(operation, delta)
    pending = wallet.begin(EPOCH, selection.inputs, one)
    first, second = map(credential, selection.amounts)
    wallet.settle(pending, one, (first, second))


def pay(wallet: Wallet, operation: Operation) -> int:
    """Pay for one operation, merging as long as it takes; how many reissues that took."""
    delta, merges = TARIFF.delta(operation), 0
    while True:
        selection = wallet.select(EPOCH, delta, TARIFF.insert)
        assert selection is not None
        if not selection.merges:
            perform(wallet, selection, operation, delta)
            return merges
        perform(wallet, selection, Operation.REISSUE, 0)
        merges += 1


@given(st.integers(0, 2**32), st.integers(1, 2**31))
def test_split_gives_whole_halves_or_all_and_nothing(total: int, whole: int) -> None:
    one, other = split(total, whole)
    assert one + other == total
    assert other == 0 or (other >= whole and one - other in (0, 1))


@given(st.lists(st.integers(0, 30), min_size=2, max_size=12).filter(lambda a: len(a) % 2 == 0))
def test_what_the_balance_pays_for_can_be_paid(amounts: list[int]) -> None:
    wallet = Wallet()
    bought(wallet, *amounts)
    for _ in range(sum(amounts) // TARIFF.insert):
        pay(wallet, Operation.INSERT)
    for _ in range(sum(amounts) % TARIFF.insert):
        pay(wallet, Operation.LOOK_UP)
    assert wallet.balance.total == 0 and wallet.conservation.holds
    with pytest.raises(EmptyWallet):
        wallet.select(EPOCH, -1, TARIFF.insert)


def test_a_rich_wallet_never_merges() -> None:
    wallet = Wallet()
    bought(wallet, 50_000, 50_000, *[0] * 30)
    assert sum(pay(wallet, Operation.INSERT) for _ in range(2_000)) == 0
    assert min(held.amount for held in wallet.held()) > 1_000


def test_many_can_be_in_flight() -> None:
    """From one purchase and null credentials, each halving doubles what can run at a time."""
    wallet = Wallet()
    bought(wallet, 5_000, 5_000, *[0] * 30)
    for _ in range(64):
        pay(wallet, Operation.INSERT)
    selections = [wallet.select(EPOCH, -10, TARIFF.insert) for _ in range(16)]
    assert all(one is not None and not one.merges for one in selections)
    assert wallet.select(EPOCH, -10, TARIFF.insert) is None


def test_a_refund_needs_no_tokens() -> None:
    wallet = Wallet()
    bought(wallet, 0, 0)
    pay(wallet, Operation.DELETE)
    assert wallet.balance.total == TARIFF.refund


def test_epochs_are_not_mixed() -> None:
    wallet = Wallet()
    bought(wallet, 6, 0)
    bought(wallet, 6, 0, epoch=b"f" * 32)
    with pytest.raises(EmptyWallet):
        wallet.select(EPOCH, -10, TARIFF.insert)


def test_a_settlement_must_balance() -> None:
    wallet = Wallet()
    bought(wallet, 20, 20)
    selection = wallet.select(EPOCH, -10, TARIFF.insert)
    assert selection is not None
    one = attempt(Operation.INSERT, -10)
    pending = wallet.begin(EPOCH, selection.inputs, one)
    with pytest.raises(ValueError, match="balance"):
        wallet.settle(pending, one, (credential(16), credential(15)))
    assert wallet.conservation.holds


def test_secrets_have_no_repr() -> None:
    one = attempt(Operation.ISSUE, 5, b"the voucher")
    wallet = Wallet()
    pending = wallet.begin(EPOCH, (), one)
    assert "secrets" not in repr(pending).replace("secrets=", "") and "voucher" not in repr(pending)


class WalletMachine(RuleBasedStateMachine):
    """Selections and pendings interleave; each is put back, released, retried or settled."""

    selections = Bundle("selections")
    pendings = Bundle("pendings")

    def __init__(self) -> None:
        super().__init__()
        self.wallet = Wallet()
        self.total = 0

    @rule(one=st.integers(0, 40), other=st.integers(0, 40))
    def buy(self, one: int, other: int) -> None:
        bought(self.wallet, one, other)
        self.total += one + other

    @rule(target=selections, operation=st.sampled_from(PAID))
    def select(self, operation: Operation) -> tuple[Selection, Operation] | None:
        delta = TARIFF.delta(operation)
        try:
            selection = self.wallet.select(EPOCH, delta, TARIFF.insert)
        except EmptyWallet:
            assert self.wallet.balance.held < max(1, -delta) or not self.wallet.size
            return None
        if selection is None:
            assert self.wallet.pending or self.wallet.size > len(self.wallet.held())
            return None
        gain = 0 if selection.merges else delta
        assert sum(selection.amounts) == sum(held.amount for held in selection.inputs) + gain
        return selection, Operation.REISSUE if selection.merges else operation

    @rule(chosen=consumes(selections))
    def put_back(self, chosen: tuple[Selection, Operation] | None) -> None:
        if chosen:
            self.wallet.put_back(chosen[0])

    @rule(target=pendings, chosen=consumes(selections))
    def begin(self, chosen: tuple[Selection, Operation] | None) -> tuple[Pending, Selection] | None:
        if not chosen:
            return None
        selection, operation = chosen
        one = attempt(operation, TARIFF.delta(operation))
        return self.wallet.begin(EPOCH, selection.inputs, one), selection

    @rule(begun=consumes(pendings))
    def release(self, begun: tuple[Pending, Selection] | None) -> None:
        if begun:
            self.wallet.release(begun[0])

    @rule(begun=consumes(pendings))
    def settle(self, begun: tuple[Pending, Selection] | None) -> None:
        if begun:
            pending, selection = begun
            first, second = map(credential, selection.amounts)
            self.wallet.settle(pending, pending.attempts[0], (first, second))
            self.total += pending.attempts[0].delta

    @rule(begun=consumes(pendings), original=st.booleans())
    def resolve(self, begun: tuple[Pending, Selection] | None, original: bool) -> None:
        if not begun:
            return
        pending, selection = begun
        amounts = split(pending.amount, TARIFF.insert)
        pending = self.wallet.retry(pending, attempt(Operation.REISSUE, 0))
        performed = pending.attempts[0 if original else 1]
        first, second = map(credential, selection.amounts if original else amounts)
        self.wallet.settle(pending, performed, (first, second))
        self.total += performed.delta

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.wallet.conservation.holds
        assert self.wallet.balance.total == self.total


TestWallet = WalletMachine.TestCase
TestWallet.settings = examples(60, stateful_step_count=40)
