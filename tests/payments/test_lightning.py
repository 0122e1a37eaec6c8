"""Lightning: an invoice for each sale, whatever is cut short; paid, it sells one voucher.

The nodes are doubles (nodes.py says of what); the mint that makes invoices too is a real one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from hpkvd.ledger import Engine
from hpkvd.ledger.urls import create
from hpkvd.payments import Mints, Prices, cashier
from hpkvd.payments import Node as Settings
from hpkvd.payments.cashier import Cashier
from hpkvd.payments.lightning import Lightning, MintInvoices
from hpkvd.payments.mint import Keyset, Quote
from hpkvfs.protocol import bolt11
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import Method, Payment, PayRequest, Reason, Refused
from hpkvfs.protocol.voucher import voucher_digest
from tests.doubles import Clock
from tests.payments.mint import MintProcess
from tests.payments.nodes import NODES, Node
from tests.server.ledgers import opened

PRICES = Prices(tokens_per_ksat=10_000, least=10, most=1_000_000)
ORDER = PayRequest(Method.LIGHTNING, voucher_digest(b"s" * 20), 2_505)
SATS = 251  # 250.5, rounded up
MADE = 1_496_314_658  # when the invoices of BOLT 11's examples were


class Moving:
    """The real time, moved on: the doubles' invoices are of now."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@dataclass
class Shop:
    ledger: Engine
    cashier: Cashier
    clock: Moving

    async def bill(self, order: PayRequest = ORDER) -> Payment:
        reply = await self.cashier.pay(order)
        assert isinstance(reply, Payment) and not reply.paid, reply
        return reply

    async def paid(self, order: PayRequest = ORDER) -> int:
        reply = await self.cashier.pay(order)
        assert isinstance(reply, Payment) and reply.paid, reply
        return reply.tokens

    async def refused(self, order: PayRequest = ORDER) -> Reason:
        reply = await self.cashier.pay(order)
        assert isinstance(reply, Refused), reply
        return reply.reason

    def assert_sold(self, tokens: int, sats: int) -> None:
        totals = self.ledger.totals()
        assert (totals.lightning_tokens, totals.lightning_sats) == (tokens, sats)
        assert (totals.voucher_amount, totals.sales) == (tokens, 0)


@pytest.fixture(params=sorted(NODES))
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with NODES[request.param]() as node:
        yield node


@asynccontextmanager
async def shop(
    data: Path, node: Node | Settings, secret: bytes | None = None
) -> AsyncIterator[Shop]:
    """A server's cashier in a data directory, as the settings would have it."""
    url = f"sqlite://{data / 'ledger'}"
    if not (data / "ledger").exists():
        create(url)
    where = node
    if isinstance(node, Node):
        (data / "secret").write_bytes(secret or node.secret_file)
        where = Settings(node.kind, node.url, "secret")
    assert isinstance(where, Settings)
    async with opened(url) as ledger:
        clock = Moving()
        async with cashier.opened(
            data, PRICES, Mints(), where, ledger, secrets.token_bytes, clock
        ) as desk:
            yield Shop(ledger, desk, clock)


async def test_an_invoice_that_is_paid_sells_one_voucher(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        bill = await till.bill()
        assert (bill.tokens, bill.sats) == (2_505, SATS)
        assert bolt11.millisats(bill.invoice.decode()) == 1_000 * SATS
        assert 800 < bill.seconds <= 901  # the node's clock may be a second further
        assert (await till.bill()).invoice == bill.invoice
        node.only.pay()
        for _ in range(2):
            assert await till.paid() == 2_505
        till.assert_sold(2_505, SATS)
        assert node.made == 1


async def test_the_node_hears_neither_the_voucher_nor_who_buys(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        await till.bill()
    assert ORDER.voucher.hex() not in repr(vars(node.only))


async def test_paid_while_the_server_was_dead(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        await till.bill()
    node.only.pay()
    async with shop(tmp_path, node) as till:
        assert await till.paid() == 2_505
        till.assert_sold(2_505, SATS)


async def test_dead_between_paid_and_sold(node: Node, tmp_path: Path) -> None:
    """The node said that it was paid, and the ledger did not hear of it."""
    async with shop(tmp_path, node) as till:
        await till.bill()
        node.only.pay()
        till.cashier._ledger = Deaf(till.ledger)  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="killed"):
            await till.cashier.pay(ORDER)
        assert till.ledger.totals().voucher_amount == 0
    async with shop(tmp_path, node) as till:
        assert await till.paid() == 2_505
        till.assert_sold(2_505, SATS)


class Deaf:
    """A ledger of a server that is killed when it would settle."""

    def __init__(self, under: Engine) -> None:
        self._under = under

    def __getattr__(self, name: str) -> object:
        if name == "account":
            raise RuntimeError("killed")
        return getattr(self._under, name)


@pytest.mark.parametrize("unheard", [1, 2, 3])
async def test_a_node_whose_answer_is_lost_makes_one_invoice(
    node: Node, tmp_path: Path, unheard: int
) -> None:
    async with shop(tmp_path, node) as till:
        node.unheard = unheard
        while node.unheard:
            reply = await till.cashier.pay(ORDER)
            assert isinstance(reply, Payment) or reply.reason is Reason.PAYMENT_UNSETTLED  # type: ignore[union-attr]
        bill = await till.bill()
        assert len(node.invoices) == 1
        node.only.pay()
        assert await till.paid() == bill.tokens
        till.assert_sold(2_505, SATS)


async def test_the_node_is_down_and_comes_back(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        node.stop()
        try:
            assert await till.refused() is Reason.PAYMENT_UNSETTLED
        finally:
            node.start()
        await till.bill()
        node.only.pay()
        node.stop()
        try:
            assert await till.refused() is Reason.PAYMENT_UNSETTLED
        finally:
            node.start()
        assert await till.paid() == 2_505


async def test_an_invoice_that_expired_sells_nothing(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        await till.bill()
        node.only.state = "gone"
        assert await till.refused() is Reason.INVOICE_EXPIRED
        till.assert_sold(0, 0)


async def test_less_than_was_asked_for_sells_nothing_and_is_not_forgotten(
    node: Node, tmp_path: Path
) -> None:
    async with shop(tmp_path, node) as till:
        await till.bill()
        node.only.pay(1_000 * SATS - 1)
        assert await till.refused() is Reason.OTHER_AMOUNT
        totals = till.ledger.totals()
        assert (totals.voucher_amount, totals.sales) == (0, 1)


async def test_more_than_was_asked_for_sells_what_was_ordered(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        await till.bill()
        node.only.pay(2_000 * SATS)
        assert await till.paid() == 2_505


async def test_another_amount_under_the_same_voucher_is_refused(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        await till.bill()
        assert await till.refused(replace(ORDER, amount=9_999)) is Reason.OTHER_AMOUNT
        assert await till.refused(replace(ORDER, voucher=bytes(32), amount=9)) is Reason.TOO_LITTLE
        much = replace(ORDER, voucher=bytes(32), amount=1_000_001)
        assert await till.refused(much) is Reason.TOO_MUCH


async def test_who_paid_and_never_came_back_finds_the_voucher(node: Node, tmp_path: Path) -> None:
    paid, unpaid = ORDER, replace(ORDER, voucher=bytes(32))
    async with shop(tmp_path, node) as till:
        await till.bill(paid)
        node.only.pay()
        await till.bill(unpaid)
        for one in node.invoices.values():
            one.state = "paid" if one.state == "paid" else "gone"
        till.clock.offset = 3 * 3_600.0
        await till.cashier.settle_due()
        till.assert_sold(2_505, SATS)


async def test_a_wrong_macaroon_or_rune_is_no_sale_and_no_secret_is_told(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = b"wrong-secret-of-another"
    async with shop(tmp_path, node, secret=wrong) as till:
        assert await till.refused() is Reason.PAYMENT_UNSETTLED
    assert "not settled" in caplog.text
    assert wrong.decode() not in caplog.text and wrong.hex() not in caplog.text


async def test_a_mint_as_the_node(mint: MintProcess, tmp_path: Path) -> None:
    """A real mint; its FakeWallet pays every invoice soon after it was made."""
    async with shop(tmp_path, Settings("mint", mint.url)) as till:
        reply = await till.cashier.pay(ORDER)
        assert isinstance(reply, Payment), reply
        if not reply.paid:
            assert bolt11.millisats(reply.invoice.decode()) == 1_000 * SATS
        with trio.fail_after(60):
            while not reply.paid:
                await trio.sleep(0.05)
                reply = await till.cashier.pay(ORDER)
                assert isinstance(reply, Payment), reply
        till.assert_sold(2_505, SATS)
        assert till.ledger.totals().takings_sats == SATS


@pytest.mark.parametrize(
    "text, amount",
    [
        ("lnbc2500u1" + "q" * 60, 250_000_000),
        ("lnbc20m1" + "q" * 60, 2_000_000_000),
        ("LNBC10N1" + "Q" * 60, 1_000),
        ("lnbc9678785340p1" + "q" * 60, 967_878_534),
    ],
)
def test_the_amount_of_an_invoice(text: str, amount: int) -> None:
    """The amounts of BOLT 11's examples."""
    assert bolt11.millisats(text) == amount


COFFEE = (  # "please send $3 for a cup of coffee ... within one minute"
    "lnbc2500u1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqq"
    "syqcyq5rqwzqfqqqsyqcyq5rqwzqfqypqdq5xysxxatsyp3k7enxv4jsxqzpu9qrsgquk0rl77nj30yxdy8j9vdx85fkpmd"
    "la2087ne0xh8nhedh8w27kyke0lp53ut353s06fv3qfegext0eh0ymjpf39tuven09sam30g4vgpfna3rh"
)
HASHED = (  # "the whole list of things (hashed)", which names no expiry
    "lnbc20m1pvjluezsp5zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zyg3zygspp5qqqsyqcyq5rqwzqfqqqsy"
    "qcyq5rqwzqfqqqsyqcyq5rqwzqfqypqhp58yjmdan79s6qqdhdzgynm4zwqd5d7xmw5fk98klysy043l2ahrqs9qrsgq7ea9"
    "76txfraylvgzuxs8kgcw23ezlrszfnh8r6qtfpr6cxga50aj6txm9rxrydzd06dfeawfk6swupvz4erwnyutnjq7x39ymw6"
    "j38gp7ynn44"
)


@pytest.mark.parametrize("text, seconds", [(COFFEE, 60), (COFFEE.upper(), 60), (HASHED, 3_600)])
def test_until_when_an_invoice_can_be_paid(text: str, seconds: int) -> None:
    """Two of BOLT 11's examples."""
    assert bolt11.expires(text) == 1_496_314_658 + seconds


@pytest.mark.parametrize("text", [COFFEE[:90], COFFEE.replace("xqzpu", "xlzpu"), "lnbc2500u1"])
def test_what_is_cut_off_has_no_end(text: str) -> None:
    with pytest.raises(Malformed):
        bolt11.expires(text)


@pytest.mark.parametrize("text", ["", "lnbc1" + "q" * 60, "lnbc1p1" + "q" * 60, "bc1q", "lnbc-1n1"])
def test_what_is_no_invoice_with_an_amount(text: str) -> None:
    with pytest.raises(Malformed):
        bolt11.millisats(text)


def another(number: int) -> PayRequest:
    return replace(ORDER, voucher=voucher_digest(b"%20d" % number))


async def test_when_full_who_expired_unpaid_makes_room_and_nobody_else(
    node: Node, tmp_path: Path
) -> None:
    """Beginning is free: the flood's invoices go when they expired; what was paid is sold."""
    async with shop(tmp_path, node) as till:
        till.cashier._most_open = 4  # of which one is for ecash
        await till.bill()
        node.only.pay()
        for number in (1, 2):
            await till.bill(another(number))
        assert await till.refused(another(3)) is Reason.FULL
        assert till.ledger.totals().sales == 3  # nothing is due: not even looked at
        till.clock.offset = 2 * 3_600.0
        await till.bill(another(3))  # what was paid is settled now, not dropped
        assert till.ledger.totals().lightning_tokens == 2_505
        made = list(node.invoices.values())
        assert [one.state for one in made[1:3]] == ["open", "open"], "the node's clock is behind"
        for one in made[1:3]:
            one.state = "gone"
        for number in (4, 5):
            await till.bill(another(number))
        assert await till.refused(another(6)) is Reason.FULL
        assert till.ledger.totals().sales == 3
        assert await till.paid() == 2_505


async def test_a_flood_of_invoices_leaves_places_to_ecash(node: Node, tmp_path: Path) -> None:
    async with shop(tmp_path, node) as till:
        till.cashier._most_open = 4
        for number in range(3):
            await till.bill(another(number))
        assert await till.refused(another(3)) is Reason.FULL
        assert not await till.cashier._has_room(Method.LIGHTNING)
        assert await till.cashier._has_room(Method.CASHU)


class Forgetful:
    """A mint.Mint that asks for COFFEE: nobody pays it, and `expiry` is all it says of that."""

    url = "https://mint.example"

    def __init__(self, expiry: int) -> None:
        self.expiry = expiry

    async def keysets(self) -> list[Keyset]:
        return [Keyset("00", "sat", True, 0)]

    async def quote(self, sats: int) -> Quote:
        return await self.quoted(secrets.token_hex(8))

    async def quoted(self, quote: str) -> Quote:
        return Quote(quote, COFFEE, "UNPAID", self.expiry)


@pytest.mark.parametrize("expiry", [0, 2**40, MADE + 30])
async def test_a_mints_quote_makes_room_when_its_invoice_can_be_paid_no_more(
    tmp_path: Path, expiry: int
) -> None:
    """Also one that says no expiry, or one behind the invoice's own; not while it can be paid."""
    clock = Clock(MADE)
    create(url := f"sqlite://{tmp_path / 'ledger'}")
    node = MintInvoices(Forgetful(expiry))  # type: ignore[arg-type]
    method = Lightning(node, PRICES, 60, secrets.token_bytes, clock)
    async with opened(url) as ledger:
        desk = Cashier(ledger, {Method.LIGHTNING: method}, clock, most_open=1)
        bill = await desk.pay(ORDER)
        assert isinstance(bill, Payment) and bill.seconds == (30 if expiry == MADE + 30 else 60)
        clock.seconds = MADE + 59.0 if expiry != MADE + 30 else MADE + 29.0
        assert await desk.pay(another(1)) == Refused(Reason.FULL)
        clock.seconds = MADE + 3 * 3_600.0
        assert isinstance(await desk.pay(another(1)), Payment)
        assert ledger.totals().sales == 1


async def test_an_invoice_for_longer_than_a_week_is_not_begun(tmp_path: Path) -> None:
    clock = Clock(MADE - 8 * 86_400.0)
    create(url := f"sqlite://{tmp_path / 'ledger'}")
    node = MintInvoices(Forgetful(0))  # type: ignore[arg-type]
    method = Lightning(node, PRICES, 60, secrets.token_bytes, clock)
    async with opened(url) as ledger:
        desk = Cashier(ledger, {Method.LIGHTNING: method}, clock)
        reply = await desk.pay(ORDER)
        assert isinstance(reply, Refused) and reply.reason is Reason.PAYMENT_UNSETTLED
        assert ledger.totals().sales == 0
