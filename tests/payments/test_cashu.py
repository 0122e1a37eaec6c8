"""Ecash of a real mint: what a token buys, once, whatever is cut short, and who is lied to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from hpkvd.ledger.urls import create
from hpkvd.payments import web
from hpkvd.payments.mint import Mint
from hpkvfs.protocol.ecash import Token
from hpkvfs.protocol.messages import Method, Reason
from tests.payments.mint import MintProcess
from tests.payments.shop import Died, Shop, request, shop
from tests.server.postgres import Cluster


@pytest.fixture
async def till(mint: MintProcess, tmp_path: Path) -> AsyncIterator[Shop]:
    url = f"sqlite://{tmp_path / 'ledger'}"
    create(url)
    async with shop(url, mint.url) as opened:
        yield opened


async def test_a_token_buys_a_voucher_less_the_mint_s_fee(till: Shop, mint: MintProcess) -> None:
    """100 sat in 3 coins: a fee of 0.3 sat, rounded up; 10 tokens for each sat that is left."""
    text = mint.token(100)
    assert till.cashier.offers.offers[0].places == (mint.url.encode(),)
    assert await till.paid(text) == 990
    await till.assert_sold(990, 99)


async def test_tokens_of_both_versions_are_taken(till: Shop, mint: MintProcess) -> None:
    first, second = mint.token(), mint.token()
    assert {text[:6] for text in (first, second)} == {"cashuA", "cashuB"}
    assert await till.paid(first) == await till.paid(second) == 990
    await till.assert_sold(2 * 990, 2 * 99)


async def test_a_token_handed_over_again_buys_nothing_more(till: Shop, mint: MintProcess) -> None:
    text = mint.token()
    assert await till.paid(text) == 990
    till.line.calls.clear()
    assert await till.paid(text) == 990
    assert not till.line.calls, "the mint was asked about what is settled"
    await till.assert_sold(990, 99)


async def test_the_same_coins_under_another_voucher_are_spent(
    till: Shop, mint: MintProcess
) -> None:
    text = mint.token()
    await till.paid(text)
    thief = replace(request(text), voucher=b"t" * 32)
    assert getattr(await till.cashier.pay(thief), "reason", None) is Reason.TOKEN_SPENT
    await till.assert_sold(990, 99)


CUTS = {
    "the keys are not heard": {"keysets": ["lost"]},
    "the state is not heard": {"checkstate": ["unheard"]},
    "the swap never arrives": {"swap": ["lost"]},
    "the swap is not heard": {"swap": ["unheard"]},
    "the swap is not heard, nor the search": {"swap": ["unheard"], "restore": ["lost"]},
    "dead before the swap": {"swap": ["dies"]},
    "dead after the swap": {"swap": ["dies after"]},
    "dead before the search": {"swap": ["unheard"], "restore": ["dies"]},
    "dead after the search": {"swap": ["unheard"], "restore": ["dies after"]},
}


# What is cut off from the mint alone leaves either engine the same; where the server dies, and what
# it finds then, is up to the ledger.
DEATHS = [cut for cut in CUTS if cut.startswith("dead")]


@pytest.mark.parametrize(
    ("cut", "engine"),
    [*((cut, "sqlite") for cut in CUTS), *((cut, "postgresql") for cut in DEATHS)],
)
async def test_whatever_is_cut_short_the_token_buys_what_it_is_worth_once(
    cut: str, engine: str, mint: MintProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite://{tmp_path / 'ledger'}"
    if engine == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        url = cluster.new_url()
    create(url)
    text = mint.token()
    async with shop(url, mint.url) as till:
        till.line.fates = {name: list(fates) for name, fates in CUTS[cut].items()}
        try:
            reply = await till.pay(text)
            assert getattr(reply, "paid", False) or reply == _unsettled(reply)
        except Died:
            pass
    async with shop(url, mint.url) as till:
        assert await till.paid(text) == 990
        await till.assert_sold(990, 99)


def _unsettled(reply: Any) -> Any:
    assert reply.reason is Reason.PAYMENT_UNSETTLED
    return reply


async def test_who_never_comes_back_is_settled_by_the_hour(till: Shop, mint: MintProcess) -> None:
    """The coins are in the till, and the voucher is there for whoever has the token."""
    text = mint.token()
    till.line.fates = {"swap": ["dies after"]}
    with pytest.raises(Died):
        await till.pay(text)
    till.restart()
    await till.cashier.settle_due()
    assert till.ledger.totals().sales == 1  # not due yet
    till.clock.pass_hours(2)
    await till.cashier.settle_due()
    await till.assert_sold(990, 99)
    assert await till.paid(text) == 990


async def test_two_servers_that_take_one_token_sell_one_voucher(
    mint: MintProcess, cluster: Cluster
) -> None:
    url = cluster.new_url()
    create(url)
    text = mint.token()
    async with shop(url, mint.url) as one, shop(url, mint.url) as two:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.pay, text)
            nursery.start_soon(two.pay, text)
        assert await one.paid(text) == await two.paid(text) == 990
        await one.assert_sold(990, 99)


async def test_a_token_that_was_spent_elsewhere_buys_nothing(
    till: Shop, mint: MintProcess, tmp_path: Path
) -> None:
    text = mint.token()
    url = f"sqlite://{tmp_path / 'other'}"
    create(url)
    async with shop(url, mint.url) as other:
        await other.paid(text)
    assert await till.refused(text) is Reason.TOKEN_SPENT
    await till.assert_sold(0, 0)


async def test_spent_between_the_question_and_the_swap(
    till: Shop, mint: MintProcess, tmp_path: Path
) -> None:
    text = mint.token()
    till.line.fates = {"swap": ["dies"]}
    with pytest.raises(Died):
        await till.pay(text)
    url = f"sqlite://{tmp_path / 'other'}"
    create(url)
    async with shop(url, mint.url) as other:
        await other.paid(text)
    till.restart()
    assert await till.refused(text) is Reason.TOKEN_SPENT
    await till.assert_sold(0, 0)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mint": "https://another.example"}, Reason.OTHER_MINT),
        ({"unit": "usd"}, Reason.OTHER_UNIT),
    ],
)
async def test_what_is_not_taken_is_said(
    till: Shop, mint: MintProcess, change: dict[str, Any], reason: Reason
) -> None:
    text = mint.token(33)
    other = replace(Token.decode(text), **change).encode()
    assert await till.refused(other) is reason
    assert await till.paid(text) == 320  # it is as good as it was


async def test_less_than_its_fee_more_than_allowed_and_garbage(
    till: Shop, mint: MintProcess
) -> None:
    token = Token.decode(mint.token(33))
    crumbs = replace(token, proofs=token.proofs[:1])
    assert crumbs.amount == 1
    assert await till.refused(crumbs.encode()) is Reason.TOO_LITTLE
    assert await till.refused(mint.token(21), least=10_000) is Reason.OTHER_AMOUNT
    strange = replace(token, proofs=(replace(token.proofs[0], keyset="00" * 8),))
    assert await till.refused(strange.encode()) is Reason.BAD_TOKEN
    rich = replace(token, proofs=(replace(token.proofs[0], amount=2**40),))
    assert await till.refused(rich.encode()) is Reason.TOO_MUCH
    bad = replace(request(token.encode()), proof=b"cashuBgarbage")
    assert getattr(await till.cashier.pay(bad), "reason", None) is Reason.BAD_TOKEN
    await till.assert_sold(0, 0)


async def test_a_coin_that_nobody_signed_is_refused_by_the_mint_and_forgotten(
    till: Shop, mint: MintProcess
) -> None:
    token = Token.decode(mint.token(33))
    forged = replace(token, proofs=tuple(replace(one, secret="x" * n) for n, one in
                                         enumerate(token.proofs, 1)))  # fmt: skip
    assert await till.refused(forged.encode()) is Reason.BAD_TOKEN
    await till.assert_sold(0, 0)


async def test_the_mint_is_away_and_the_token_is_as_good_as_it_was(
    till: Shop, mint: MintProcess
) -> None:
    text = mint.token()
    mint.stop()
    try:
        assert await till.refused(text) is Reason.PAYMENT_UNSETTLED
        assert till.ledger.totals().sales == 0
    finally:
        mint.start()
    assert await till.paid(text) == 990
    await till.assert_sold(990, 99)


def _fewer(answer: Any) -> Any:
    return answer | {"signatures": answer["signatures"][1:]}


def _other_amount(answer: Any) -> Any:
    first = answer["signatures"][0]
    return answer | {"signatures": [first | {"amount": 1024}, *answer["signatures"][1:]]}


def _forged(answer: Any) -> Any:
    first, second, *rest = answer["signatures"]
    return answer | {"signatures": [first | {"C_": second["C_"]}, second, *rest]}


def _unproven(answer: Any) -> Any:
    return answer | {"signatures": [one | {"dleq": None} for one in answer["signatures"]]}


@pytest.mark.parametrize("lie", [_fewer, _other_amount, _forged, _unproven])
async def test_a_mint_that_lies_sells_nothing_and_loses_nothing(
    till: Shop, mint: MintProcess, lie: Callable[[Any], Any]
) -> None:
    text = mint.token()
    till.line.lies = {"swap": lie, "restore": lie}
    assert await till.refused(text) is Reason.MINT_LIES
    assert till.ledger.totals().sales == 1
    assert till.ledger.totals().voucher_amount == 0
    till.restart()  # and if it tells the truth one day
    assert await till.paid(text) == 990
    await till.assert_sold(990, 99)


async def test_the_fates_do_happen(till: Shop, mint: MintProcess) -> None:
    """A negative control: a swap that is not found again does cost the token."""
    text = mint.token()
    till.line.fates = {"swap": ["dies after"]}
    with pytest.raises(Died):
        await till.pay(text)
    async with web.opened(mint.url) as line:
        assert await Mint(line, mint.url).states(Token.decode(text).proofs) == {"SPENT"}
    assert till.ledger.totals().voucher_amount == 0


async def test_too_many_unsettled_sales_are_refused(till: Shop, mint: MintProcess) -> None:
    till.cashier._most_open = 0
    assert await till.refused(mint.token(21)) is Reason.FULL


async def test_another_method_is_not_offered(till: Shop, mint: MintProcess) -> None:
    lightning = replace(request(mint.token(21)), method=Method.LIGHTNING)
    assert getattr(await till.cashier.pay(lightning), "reason", None) is Reason.NOT_OFFERED
