"""The methods of payment over one ledger: offers, payments, and what was left unsettled.

    PayRequest -> known to the ledger?  -> plan -> Begin (durable) -> collect -> Settle
                  no second plan           ^ takes nothing           ^ again and again, until

A sale is begun by one request and may be gone on with by any: the client's next one, on this
worker or another, or `settle_due` by the hour. How many are at work at a time is bounded, and so
is how many are unsettled, since beginning one by Lightning is free. When there are that many, a
new one asks about some of the oldest first: one that was paid is settled, one whose invoice
expired unpaid is given up, and no other ever makes room. Ecash, which is not free, has places
that invoices cannot fill.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from hpkvd.ledger import Begin, GiveUp, Ledger, LedgerError, Paid, Sale, Settle
from hpkvd.log import Complaints
from hpkvd.payments import (
    Mints,
    Node,
    Outcome,
    Payable,
    Prices,
    Refuse,
    Settled,
    Unsettled,
    Waiting,
)
from hpkvfs.protocol.messages import (
    Method,
    Offers,
    Payment,
    PayRequest,
    Reason,
    Refused,
    Reply,
)

AT_WORK: Final = 16
RETRY_AFTER: Final = 2
ABANDON_HOURS: Final = 24
GRACE_HOURS: Final = 1  # for a payment on its way when its invoice expired
ROOM_TRIES: Final = 4
SECONDS_PER_HOUR: Final = 3_600

Rng = Callable[[int], bytes]
Clock = Callable[[], float]


class Cashier:
    """Answers OffersRequest and PayRequest."""

    def __init__(
        self,
        ledger: Ledger,
        methods: Mapping[Method, Payable],
        clock: Clock,
        most_open: int = Prices().open,
    ) -> None:
        self._ledger = ledger
        self._methods = methods
        self._clock = clock
        self._most_open = most_open
        self._working: set[bytes] = set()
        self._makes_room = False
        self._complaints = Complaints()

    @property
    def offers(self) -> Offers:
        """What there is to choose from."""
        return Offers(tuple(one.offer for one in self._methods.values()))

    async def pay(self, request: PayRequest) -> Reply:
        """How far the payment is after this; LedgerError."""
        known = await self._ledger.sale(request.voucher)
        if isinstance(known, Paid):
            return Payment(True, known.tokens)
        method = self._methods.get(known.method if known else request.method)
        if method is None:
            return Refused(Reason.NOT_OFFERED)
        if request.voucher in self._working or len(self._working) >= AT_WORK:
            return Refused(Reason.BUSY, RETRY_AFTER)
        with self._at_work(request.voucher):
            return await self._pay(request, method, known)

    @contextmanager
    def _at_work(self, voucher: bytes) -> Iterator[None]:
        self._working.add(voucher)
        try:
            yield
        finally:
            self._working.discard(voucher)

    async def _pay(self, request: PayRequest, method: Payable, known: Sale | None) -> Reply:
        try:
            sale = known or await self._begin(request, method)
            if isinstance(sale, Paid):
                return Payment(True, sale.tokens)
            if not _is_as_ordered(request, sale):
                return Refused(Reason.OTHER_AMOUNT)
            outcome = await self._collect(sale, method)
        except Refuse as refusal:
            return Refused(refusal.reason)
        except Unsettled as trouble:
            self._complaints.complain(f"a payment is not settled yet: {trouble}")
            return Refused(trouble.reason, RETRY_AFTER)
        if isinstance(outcome, Waiting):
            invoice = outcome.invoice.encode()
            return Payment(False, sale.tokens, sale.sats, invoice, outcome.seconds)
        return Payment(True, sale.tokens)

    async def _begin(self, request: PayRequest, method: Payable) -> Sale | Paid:
        if not await self._has_room(request.method):
            await self._make_room()
            if not await self._has_room(request.method):
                raise Refuse(Reason.FULL)
        plan = await method.plan(request.amount, request.proof)
        due = self._hour + plan.seconds // SECONDS_PER_HOUR + 1
        sale = Sale(request.voucher, request.method, plan.tokens, plan.sats, due, plan.data)
        kept = await self._ledger.account(Begin(sale))
        assert kept is not None
        return kept

    async def _has_room(self, method: Method) -> bool:
        """A quarter is for ecash alone."""
        kept = 0 if method is Method.CASHU else self._most_open // 4
        return await self._ledger.open_sales() < self._most_open - kept

    async def _make_room(self) -> None:
        """Ask about a few of those due longest: when full, their hour is not waited for."""
        if self._makes_room:
            return
        self._makes_room = True
        try:
            due = sorted(await self._ledger.sales(self._hour), key=lambda sale: sale.due)
            for sale in due[:ROOM_TRIES]:
                await self._look_again(sale, GRACE_HOURS)
        finally:
            self._makes_room = False

    async def _collect(self, sale: Sale, method: Payable) -> Outcome:
        """Refuse only when the sale is given up, durably."""
        try:
            outcome = await method.collect(sale)
        except Refuse:
            await self._ledger.account(GiveUp(sale.voucher))
            raise
        if isinstance(outcome, Settled):
            await self._ledger.account(Settle(sale, outcome.takings))
        return outcome

    @property
    def _hour(self) -> int:
        return int(self._clock()) // SECONDS_PER_HOUR

    async def settle_due(self) -> None:
        """Settle or give up what nobody asked about for long enough; what cannot be, stays."""
        for sale in await self._ledger.sales(self._hour):
            await self._look_again(sale, ABANDON_HOURS)

    async def _look_again(self, sale: Sale, hours: int) -> None:
        """Settle it, or give it up: refused, or expired and unpaid for so many hours."""
        method = self._methods.get(sale.method)
        if method is None or sale.voucher in self._working:
            return
        with self._at_work(sale.voucher), suppress(Refuse, Unsettled):
            outcome = await self._collect(sale, method)
            late = self._hour >= sale.due + hours
            if isinstance(outcome, Waiting) and not outcome.seconds and late:
                await self._ledger.account(GiveUp(sale.voucher))

    async def keep_time(self) -> None:
        """`settle_due` at the start and by the hour, until cancelled."""
        while self._methods:
            with suppress(LedgerError):
                await self.settle_due()
            await trio.sleep(SECONDS_PER_HOUR)


def _is_as_ordered(request: PayRequest, sale: Sale) -> bool:
    if request.method is not sale.method:
        return False
    if request.method is Method.CASHU:
        return sale.tokens >= request.amount
    return sale.tokens == request.amount


@asynccontextmanager
async def opened(
    data: Path, prices: Prices, mints: Mints, node: Node, ledger: Ledger, rng: Rng, clock: Clock
) -> AsyncIterator[Cashier]:
    """A cashier with the methods in the settings; OSError if a file they name cannot be read."""
    methods: dict[Method, Payable] = {}
    async with AsyncExitStack() as stack:
        if mints.mints:
            methods[Method.CASHU] = await _cashu(stack, prices, mints, rng)
        if node.kind:
            methods[Method.LIGHTNING] = await _lightning(stack, data, prices, node, rng, clock)
        yield Cashier(ledger, methods, clock, prices.open)


async def _cashu(stack: AsyncExitStack, prices: Prices, mints: Mints, rng: Rng) -> Payable:
    from hpkvd.payments import web
    from hpkvd.payments.cashu import Cashu
    from hpkvd.payments.mint import Mint

    found = {}
    for url in (one.rstrip("/") for one in mints.mints):
        client = await stack.enter_async_context(
            web.opened(url, socks=prices.socks, always=prices.socks_always)
        )
        found[url] = Mint(client, url)
    return Cashu(found, prices, rng)


async def _lightning(
    stack: AsyncExitStack, data: Path, prices: Prices, node: Node, rng: Rng, clock: Clock
) -> Payable:
    from hpkvd.payments import lightning, web
    from hpkvd.payments.mint import Mint

    client = await stack.enter_async_context(
        web.opened(
            node.url,
            socks=prices.socks,
            always=prices.socks_always,
            ca_file=data / node.ca_file if node.ca_file else None,
            headers=_credentials(data, node),
        )
    )
    kinds: dict[str, Callable[[], lightning.Invoices]] = {
        "cln": lambda: lightning.CoreLightning(client),
        "lnd": lambda: lightning.Lnd(client),
        "mint": lambda: lightning.MintInvoices(Mint(client, node.url.rstrip("/"))),
    }
    return lightning.Lightning(kinds[node.kind](), prices, node.expiry, rng, clock)


def _credentials(data: Path, node: Node) -> dict[str, str]:
    """The header that a node asks for, from a file: a rune's text, a macaroon's bytes."""
    if not node.secret_file:
        return {}
    secret = (data / node.secret_file).read_bytes()
    if node.kind == "cln":
        return {"Rune": secret.decode().strip()}
    return {"Grpc-Metadata-macaroon": secret.hex()}
