"""The ledger: each thing happens once, as a whole, or not at all.

This is the contract of hpkvd.ledger, which both engines keep; what each has of its own is in
test_sqlite.py and test_postgresql.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from hpkvd.ledger import (
    Begin,
    Change,
    Delete,
    Engine,
    GiveUp,
    Insert,
    Known,
    Paid,
    Read,
    Redeem,
    Sale,
    Settle,
    Taking,
    Totals,
    Transaction,
    Verdict,
)
from hpkvd.ledger.urls import create
from hpkvfs.protocol.messages import Done, Fact, Method, Outcome, Reason, Refused
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from tests.examples import examples
from tests.server.ledgers import (
    FLOAT,
    VOUCHER,
    blob,
    delete,
    entry,
    fund,
    insert,
    key,
    name,
    opened,
    opening,
    outcome,
    refusal,
    sale,
    transaction,
)
from tests.server.postgres import Cluster


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty ledger of either engine."""
    if request.param == "sqlite":
        url = f"sqlite://{tmp_path}/ledger.sqlite"
    else:
        cluster: Cluster = request.getfixturevalue("cluster")
        url = cluster.new_url()
    create(url)
    return url


@pytest.fixture
async def ledger(url: str) -> AsyncIterator[Engine]:
    async with opened(url) as ledger:
        yield ledger


@pytest.fixture
async def funded(ledger: Engine) -> Engine:
    await fund(ledger)
    return ledger


async def test_what_is_stored_is_found_until_it_is_deleted(funded: Engine) -> None:
    assert outcome(await funded.apply(transaction("a", insert("x"), "s1", "s2"))) == (
        Outcome.INSERTED
    )
    found = await funded.apply(transaction("b", Read(key("x")), "s3", "s4"))
    assert found == Done(Fact(Operation.LOOK_UP, Outcome.FOUND, -1), b"issued for b", blob("x"))
    assert outcome(await funded.apply(transaction("c", delete("x"), "s5", "s6"))) == (
        Outcome.DELETED
    )
    assert outcome(await funded.apply(transaction("d", Read(key("x")), "s7", "s8"))) == (
        Outcome.ABSENT
    )
    assert await funded.read(key("x")) is None


async def test_a_repeated_transaction_is_recalled_and_changes_nothing(
    funded: Engine,
) -> None:
    first = transaction("a", insert("x"), "s1", "s2")
    done = await funded.apply(first)
    assert isinstance(done, Done)
    before = funded.totals()
    again = await funded.apply(first)
    assert isinstance(again, Known)
    (stored,) = again.facts
    assert (stored.fingerprint, stored.fact, stored.issued) == (name("a"), done.fact, done.issued)
    assert await funded.foresee(first.fingerprint, first.serials) == again
    assert funded.totals() == before


async def test_serials_of_two_requests_recall_both(funded: Engine) -> None:
    await funded.apply(transaction("a", None, "s1", "s2"))
    await funded.apply(transaction("b", None, "s3", "s4"))
    both = await funded.apply(transaction("c", insert("x"), "s1", "s3"))
    assert isinstance(both, Known)
    assert {stored.fingerprint for stored in both.facts} == {name("a"), name("b")}
    one = await funded.apply(transaction("d", insert("x"), "s2", "fresh"))
    assert isinstance(one, Known)
    assert [stored.fingerprint for stored in one.facts] == [name("a")]
    assert await funded.read(key("x")) is None
    assert await funded.foresee(name("e"), [b"\3" + name("fresh"), b"\3" + name("other")]) is None


REFUSALS: list[tuple[Change, Reason]] = [
    (insert("x"), Reason.KEY_EXISTS),
    (delete("absent"), Reason.KEY_ABSENT),
    (Delete(key("x"), name("another blob")), Reason.DIGEST_MISMATCH),
    (Redeem(name("no voucher"), 5), Reason.UNKNOWN_VOUCHER),
    (Redeem(VOUCHER.digest, VOUCHER.amount), Reason.VOUCHER_SPENT),
    (Redeem(Voucher(5, b"u" * 20).digest, 6), Reason.VOUCHER_AMOUNT),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
async def test_a_refused_transaction_spends_nothing(
    funded: Engine, change: Change, reason: Reason
) -> None:
    funded.add_vouchers([Voucher(5, b"u" * 20)])
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    before = funded.totals()
    assert await refusal(funded, change) is reason
    refused = transaction("refused", change, "s3", "s4")
    assert outcome(await funded.apply(refused)) is reason
    assert await funded.foresee(refused.fingerprint, refused.serials) is None
    assert funded.totals() == before
    assert isinstance(await funded.apply(transaction("b", None, "s3", "s4")), Done)


async def test_an_entry_can_be_opened_until_its_timer_fires_and_is_gone_then(
    funded: Engine,
) -> None:
    one = entry("one", 1)
    assert outcome(await funded.apply(transaction("a", one, "s1", "s2"))) is Outcome.STORED
    assert funded.totals().entries == 1
    asked = await funded.entry(one.key, 900)
    assert asked is not None and asked.gone_at is None  # asking starts nothing
    opened = await funded.open_entry(opening(one, 1_000))
    assert opened is not None
    assert (opened.counter, opened.value, opened.gone_at) == (1, one.value, 1_073)
    assert await funded.open_entry(opening(one, 1_072)) == opened
    await funded.drop_entries(1_072)
    assert await funded.entry(one.key, 1_072) == opened
    assert await funded.open_entry(opening(one, 1_073)) is None
    assert await funded.entry(one.key, 1_073) is None
    await funded.drop_entries(1_073)
    assert funded.totals().entries == 0


async def test_an_entry_replaced_has_no_timer_and_cannot_be_opened_as_the_old_one(
    funded: Engine,
) -> None:
    old, new = entry("old", 1), entry("new", 2, now=1_000)
    await funded.apply(transaction("a", old, "s1", "s2"))
    assert await funded.open_entry(opening(old, 1_000)) is not None
    assert outcome(await funded.apply(transaction("b", new, "s3", "s4"))) is Outcome.STORED
    assert await funded.open_entry(opening(old, 1_000)) is None
    stored = await funded.entry(new.key, 9_999)
    assert stored is not None and (stored.value, stored.gone_at) == (new.value, None)
    assert funded.totals().entries == 1


async def test_the_first_opening_is_durable(url: str) -> None:
    one = entry("one", 1)
    async with opened(url) as ledger:
        ledger.add_vouchers([VOUCHER])
        await ledger.apply(sale())
        await ledger.apply(transaction("a", one, "s1", "s2"))
        await ledger.open_entry(opening(one, 10))
    async with opened(url) as ledger:
        stored = await ledger.entry(one.key, 10)
        assert stored is not None and stored.gone_at == 83


@pytest.mark.parametrize("counter", [1, 2])
async def test_a_counter_that_does_not_grow_is_refused(funded: Engine, counter: int) -> None:
    await funded.apply(transaction("a", entry("new", 2), "s1", "s2"))
    before = funded.totals()
    late = entry("old", counter)
    assert await refusal(funded, late) is Reason.OLD_COUNTER
    assert outcome(await funded.apply(transaction("b", late, "s3", "s4"))) is Reason.OLD_COUNTER
    assert funded.totals() == before


async def test_an_entry_that_is_gone_is_replaced_whatever_its_counter(
    funded: Engine,
) -> None:
    await funded.apply(transaction("a", entry("old", 9), "s1", "s2"))
    await funded.open_entry(opening(entry("old", 9), 0))
    again = transaction("b", entry("new", 1, now=73), "s3", "s4")
    assert outcome(await funded.apply(again)) is Outcome.STORED


async def test_of_transactions_that_race_one_is_performed(funded: Engine) -> None:
    verdicts: list[Verdict] = []

    async def race(one: Transaction) -> None:
        verdicts.append(await funded.apply(one))

    async with trio.open_nursery() as nursery:
        for racer in ("a", "a", "b", "c"):
            nursery.start_soon(race, transaction(racer, insert(racer), "s1", "s2"))
    (done,) = (verdict for verdict in verdicts if isinstance(verdict, Done))
    for verdict in verdicts:
        if isinstance(verdict, Known):
            (stored,) = verdict.facts
            assert stored.issued == done.issued
    assert sum(isinstance(verdict, Known) for verdict in verdicts) == 3
    assert funded.totals().blobs == 1


async def test_of_insertions_under_one_key_one_is_performed(funded: Engine) -> None:
    outcomes: list[Outcome | Reason] = []

    async def race(number: int) -> None:
        one = transaction(f"r{number}", insert("x"), f"s{number}", f"t{number}")
        outcomes.append(outcome(await funded.apply(one)))

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(race, number)
    assert sorted(outcomes) == [Outcome.INSERTED] + [Reason.KEY_EXISTS] * 9


async def test_what_comes_together_happens_in_the_order_in_which_it_came(funded: Engine) -> None:
    """All but the first wait while that is written, and then share a batch."""
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    changes: list[Change] = [
        insert("y"),
        delete("x"),
        insert("x"),
        delete("x"),
        insert("x"),
        delete("y"),
    ]
    verdicts: dict[int, Verdict] = {}

    async def apply(number: int, change: Change) -> None:
        one = transaction(f"r{number}", change, f"t{number}", f"u{number}")
        verdicts[number] = await funded.apply(one)

    async with trio.open_nursery() as nursery:
        for number, change in enumerate(changes):
            nursery.start_soon(apply, number, change)
            await trio.testing.wait_all_tasks_blocked()
    assert all(isinstance(verdict, Done) for verdict in verdicts.values())
    assert await funded.read(key("x")) == blob("x")
    assert await funded.read(key("y")) is None


async def test_a_caller_who_gives_up_is_served_all_the_same(funded: Engine) -> None:
    one = transaction("a", insert("x"), "s1", "s2")
    with trio.CancelScope() as scope:
        scope.cancel()
        await funded.apply(one)
    with trio.fail_after(60):
        while await funded.foresee(one.fingerprint, one.serials) is None:
            await trio.sleep(0.001)
    assert await funded.read(key("x")) == blob("x")


async def test_all_is_there_after_reopening(url: str) -> None:
    async with opened(url) as ledger:
        ledger.add_vouchers([VOUCHER, Voucher(7, b"w" * 20)])
        await ledger.apply(sale())
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
        before = ledger.totals()
    async with opened(url) as ledger:
        assert ledger.totals() == before
        assert await ledger.read(key("x")) == blob("x")
        assert isinstance(await ledger.apply(transaction("b", None, "s1", "s9")), Known)


async def test_the_books_are_those_of_what_happened(funded: Engine) -> None:
    funded.add_vouchers([Voucher(7, b"w" * 20)])
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    await funded.apply(transaction("b", Read(key("x")), "s3", "s4"))
    await funded.apply(transaction("c", delete("x"), "s5", "s6"))
    await funded.apply(transaction("d", None, "s7", "s8"))
    assert funded.totals() == _totals(
        issued=1_000_000,
        charged=11,
        refunded=8,
        outstanding=999_997,
        requests=5,
        serials=8,
        blobs=0,
        entries=0,
        vouchers=1,
        voucher_amount=7,
    )


changes = st.one_of(
    st.builds(insert, st.sampled_from("xyz")),
    st.builds(delete, st.sampled_from("xyz")),
    st.builds(lambda text: Read(key(text)), st.sampled_from("xyz")),
    st.just(Redeem(VOUCHER.digest, VOUCHER.amount)),
    st.none(),
)
steps = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), changes, st.sampled_from("pqrstu"), st.booleans()),
    max_size=25,
)


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
@examples(20, suppress_health_check=list(HealthCheck))
@given(steps=steps)
def test_whatever_happens_the_books_balance_and_no_serial_is_spent_twice(
    engine: str, cluster: Cluster, steps: list[tuple[str, Change, str, bool]]
) -> None:
    """Batches of any transactions, with serials and fingerprints that collide, against a model."""
    with tempfile.TemporaryDirectory() as directory:
        sqlite = f"sqlite://{directory}/ledger.sqlite"
        url = sqlite if engine == "sqlite" else cluster.new_url()
        create(url)
        trio.run(_model, url, steps)


async def _model(url: str, steps: list[tuple[str, Change, str, bool]]) -> None:
    facts: dict[bytes, Transaction] = {}
    spent: dict[bytes, bytes] = {}
    blobs: set[bytes] = set()
    redeemed = False

    async def check(one: Transaction) -> None:
        nonlocal redeemed
        verdict = await book.apply(one)
        owners = {spent[serial] for serial in one.serials if serial in spent}
        owners |= {one.fingerprint} & facts.keys()
        if owners:
            assert isinstance(verdict, Known)
            assert {stored.fingerprint for stored in verdict.facts} == owners
            return
        match one.change:
            case Insert(where):
                done = where not in blobs
                blobs.add(where)
            case Delete(where):
                done = where in blobs
                blobs.discard(where)
            case Redeem():
                done, redeemed = not redeemed, True
            case _:
                done = True
        assert isinstance(verdict, Done if done else Refused)
        if done:
            facts[one.fingerprint] = one
            spent.update(dict.fromkeys(one.serials, one.fingerprint))

    async with opened(url) as book:
        # Nothing can be spent before it was sold: in life, the proof of balance sees to that.
        float_ = Voucher(FLOAT, b"float" * 4)
        book.add_vouchers([VOUCHER, float_])
        await book.apply(transaction("float", Redeem(float_.digest, FLOAT)))
        for what, change, serial, pause in steps:
            await check(transaction(what + type(change).__name__, change, serial, serial + "'"))
            if pause:
                await trio.sleep(0)
        totals = book.totals()
    assert totals.issued == totals.outstanding + totals.charged - totals.refunded
    assert totals.outstanding == FLOAT + sum(one.delta for one in facts.values())
    assert (totals.blobs, totals.serials) == (len(blobs), len(spent))
    assert totals.requests == len(facts) + 1


async def test_a_store_that_is_full_refuses_growth_and_still_reads_and_deletes(url: str) -> None:
    async with opened(url, max_blobs=1) as ledger:
        await fund(ledger)
        assert await refusal(ledger, insert("x")) is None
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
        with trio.fail_after(60):  # a count may be a second old
            while await refusal(ledger, insert("y")) is None:
                await trio.sleep(0.05)
        assert await refusal(ledger, insert("y")) is Reason.FULL
        assert await refusal(ledger, entry("y", 1)) is Reason.FULL
        assert await refusal(ledger, delete("x")) is None
        assert isinstance(await ledger.apply(transaction("b", delete("x"), "s3", "s4")), Done)


async def test_an_epoch_that_ended_is_refused_and_forgotten(funded: Engine) -> None:
    late = replace(transaction("late", insert("late"), "s5", "s6"), epoch=2)
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    await funded.apply(replace(transaction("b", insert("y"), "s3", "s4"), epoch=2))
    before = funded.totals()
    await funded.retire(2)
    await funded.retire(1)
    assert funded.oldest_epoch == 2
    for what in ("a", "new"):
        again = transaction(what, insert("z"), "s1", "s2")
        assert outcome(await funded.apply(again)) is Reason.EPOCH_ENDED
    known = await funded.apply(replace(transaction("c", insert("z"), "s3", "s4"), epoch=2))
    assert isinstance(known, Known)
    with trio.fail_after(60):
        while funded.totals().requests != 1:
            await trio.sleep(0.01)
    assert funded.totals() == replace(before, requests=1, serials=2)
    assert outcome(await funded.apply(late)) is Outcome.INSERTED
    assert await funded.read(key("x")) == blob("x")


async def test_a_move_is_kept_as_long_as_where_it_went(funded: Engine) -> None:
    """Out of epoch 1 into 2; presented again when 1 has ended, and when 2 has."""
    move = transaction("move", None, "s1", "s2", into=2)
    other = transaction("other", None, "s1", "s3", into=2)
    done = await funded.apply(replace(move, delta=0))
    assert isinstance(done, Done)
    before = funded.totals()
    await funded.retire(2)
    await funded.retire(1)
    assert isinstance(await funded.apply(move), Known)
    assert outcome(await funded.apply(other)) is Reason.EPOCH_ENDED
    with trio.fail_after(60):
        while funded.totals().requests != before.requests - 1:  # the sale is of epoch 1
            await trio.sleep(0.01)
    assert isinstance(await funded.foresee(move.fingerprint, ()), Known)
    await funded.retire(3)
    assert outcome(await funded.apply(move)) is Reason.EPOCH_ENDED
    with trio.fail_after(60):
        while funded.totals().requests:
            await trio.sleep(0.01)
    assert await funded.foresee(move.fingerprint, ()) is None


def _totals(**counts: int) -> Totals:
    """The rest is 0: nothing was paid for but by vouchers made here."""
    return Totals(**dict.fromkeys((one.name for one in fields(Totals)), 0) | counts)


# -- payments --------------------------------------------------------------------------------

BOUGHT = Sale(name("voucher"), Method.CASHU, 990, 99, 7, b"a seed and a token")
TAKEN = (Taking(64, "cashuBone"), Taking(35, "cashuBtwo"))


async def test_a_sale_is_kept_until_it_is_settled(ledger: Engine) -> None:
    assert await ledger.sale(BOUGHT.voucher) is None
    assert await ledger.account(Begin(BOUGHT)) == BOUGHT
    other = replace(BOUGHT, tokens=1, data=b"another try")
    assert await ledger.account(Begin(other)) == BOUGHT  # the first one counts
    assert await ledger.sale(BOUGHT.voucher) == BOUGHT
    assert (await ledger.sales(6), await ledger.sales(7)) == ([], [BOUGHT])
    assert await ledger.open_sales() == ledger.totals().sales == 1


async def test_settling_makes_one_voucher_that_is_redeemed_like_any(ledger: Engine) -> None:
    await ledger.account(Begin(BOUGHT))
    redeem = transaction("redeem", Redeem(BOUGHT.voucher, BOUGHT.tokens))
    assert outcome(await ledger.apply(redeem)) is Reason.UNKNOWN_VOUCHER
    for _ in range(2):
        assert await ledger.account(Settle(BOUGHT, TAKEN)) == Paid(990)
    assert await ledger.account(Begin(BOUGHT)) == Paid(990)
    assert await ledger.account(GiveUp(BOUGHT.voucher)) == Paid(990)
    totals = ledger.totals()
    assert (totals.cashu_tokens, totals.cashu_sats, totals.sales) == (990, 99, 0)
    assert (totals.vouchers, totals.voucher_amount) == (1, 990)
    assert (totals.takings, totals.takings_sats) == (2, 99)
    assert outcome(await ledger.apply(redeem)) is Outcome.ISSUED
    assert await ledger.sale(BOUGHT.voucher) == Paid(990)
    again = transaction("again", Redeem(BOUGHT.voucher, BOUGHT.tokens))
    assert outcome(await ledger.apply(again)) is Reason.VOUCHER_SPENT
    assert ledger.totals().issued == 990


async def test_a_sale_that_is_given_up_leaves_nothing(ledger: Engine) -> None:
    await ledger.account(Begin(BOUGHT))
    assert await ledger.account(GiveUp(BOUGHT.voucher)) is None
    assert await ledger.sale(BOUGHT.voucher) is None
    assert ledger.totals().vouchers == 0


async def test_what_many_settle_at_a_time_is_sold_once(ledger: Engine) -> None:
    await ledger.account(Begin(BOUGHT))
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ledger.account, Settle(BOUGHT, TAKEN))
    assert ledger.totals().voucher_amount == ledger.totals().cashu_tokens == 990
    assert ledger.totals().takings == 2


async def test_ecash_is_taken_out_once_or_again_when_asked(ledger: Engine) -> None:
    await ledger.account(Settle(BOUGHT, TAKEN))
    assert set(ledger.takings()) == set(TAKEN)
    ledger.mark_taken(TAKEN[:1])
    assert ledger.takings() == [TAKEN[1]]
    assert set(ledger.takings(again=True)) == set(TAKEN)
    assert ledger.totals().takings_sats == 35


async def test_payments_are_there_when_the_ledger_is_opened_again(url: str) -> None:
    async with opened(url) as ledger:
        await ledger.account(Begin(BOUGHT))
    async with opened(url) as ledger:
        assert await ledger.sale(BOUGHT.voucher) == BOUGHT
