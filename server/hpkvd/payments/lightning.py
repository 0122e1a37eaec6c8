"""Lightning: a node, or a mint, makes an invoice (BOLT11); when it is paid, so is the voucher.

An invoice is made once for each sale, whatever is cut short: Core Lightning takes a label and
LND a preimage, both of which follow from the sale's seed; a mint's quote is asked for before
the sale is kept, and one that nobody was told of costs nothing. A node takes at most one
payment for an invoice, and none for less than it asks.

    Core Lightning (clnrest)   https://docs.corelightning.org/docs/rest
    LND (REST)                 https://lightning.engineering/api-docs/api/lnd/
    a mint                     NUT-04 (https://github.com/cashubtc/nuts)
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final, Protocol

from hpkvd.ledger import Sale
from hpkvd.payments import (
    LONGEST_EXPIRY,
    Outcome,
    Plan,
    Prices,
    Refuse,
    Settled,
    Unsettled,
    Waiting,
)
from hpkvd.payments.cashu import SEED_SIZE, Order, settled
from hpkvd.payments.mint import Lies, Mint, Quote
from hpkvd.payments.web import Away, Declined, Web
from hpkvfs.protocol import bolt11
from hpkvfs.protocol.ecash import SAT
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import tagged_hash
from hpkvfs.protocol.messages import MAX_INVOICE, MAX_SATS, Method, Offer, Reason

DESCRIPTION: Final = "hpkvd"


class Invoices(Protocol):
    """A node: makes invoices and knows which were paid. Away, Declined, Lies, Refuse."""

    async def begin(self, sats: int, rng: Callable[[int], bytes], now: int) -> bytes:
        """What `collect` needs: a seed, at least."""
        ...

    async def collect(self, data: bytes, sats: int, expiry: int, now: int) -> Outcome:
        """Make the invoice unless there is one; see how it is."""
        ...


class Lightning:
    """Payable by invoices of a node, which can be paid for `expiry` seconds."""

    def __init__(
        self,
        node: Invoices,
        prices: Prices,
        expiry: int,
        rng: Callable[[int], bytes],
        clock: Callable[[], float],
    ) -> None:
        self._node = node
        self._expiry = expiry
        self._rng = rng
        self._clock = clock
        self.offer: Offer = prices.offer(Method.LIGHTNING)

    async def plan(self, amount: int, proof: bytes) -> Plan:
        """See Payable."""
        if amount < self.offer.least:
            raise Refuse(Reason.TOO_LITTLE)
        sats = self.offer.price(amount)
        if amount > self.offer.most or sats > MAX_SATS:
            raise Refuse(Reason.TOO_MUCH)
        with _Failures():
            data = await self._node.begin(sats, self._rng, self._now)
        return Plan(amount, sats, self._expiry, data)

    async def collect(self, sale: Sale) -> Outcome:
        """See Payable."""
        with _Failures():
            return await self._node.collect(sale.data, sale.sats, self._expiry, self._now)

    @property
    def _now(self) -> int:
        return int(self._clock())


class _Failures:
    """Whatever a node does wrong, the sale stays."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, Away | Declined):
            raise Unsettled(f"the Lightning node does not do as asked ({error})") from error
        wrong = (Lies, Malformed, ValueError, TypeError, LookupError, AttributeError)
        if isinstance(error, wrong):
            raise Unsettled("the Lightning node's answer cannot be read") from error


def _label(seed: bytes) -> str:
    """Not the voucher's digest: a node's records shall not name what is in the ledger."""
    return f"hpkvd-{tagged_hash('hpkv/invoice/label/v1', seed).hex()}"


def _waiting(invoice: Any, seconds: int) -> Waiting:
    if not isinstance(invoice, str) or not invoice.isascii() or not invoice.isalnum():
        raise ValueError("no invoice")
    if not 0 < len(invoice) <= MAX_INVOICE:
        raise ValueError("an invoice too long")
    return Waiting(invoice, max(0, seconds))


def _enough(paid: Any, sats: int) -> Settled:
    """`paid` in thousandths of a sat."""
    if int(paid) < 1_000 * sats:  # which no node does; whoever paid it has to be heard
        raise Unsettled("the node took less than it asked for", Reason.OTHER_AMOUNT)
    return Settled()


class _Node(ABC):
    """Makes an invoice that follows from the sale's seed, so that it can be looked for."""

    def __init__(self, web: Web) -> None:
        self._web = web

    async def begin(self, sats: int, rng: Callable[[int], bytes], now: int) -> bytes:
        """See Invoices."""
        return rng(SEED_SIZE)

    async def collect(self, data: bytes, sats: int, expiry: int, now: int) -> Outcome:
        """See Invoices."""
        return self._outcome(await self._found(data, sats, expiry), sats, now)

    async def _found(self, seed: bytes, sats: int, expiry: int) -> Any:
        """The invoice, made unless it is there. Whatever making it comes to, looking tells."""
        found = await self._find(seed)
        if found is not None:
            return found
        failure: Exception = Away("an invoice that was made is not there")
        try:
            await self._make(seed, sats, expiry)
        except (Away, Declined) as error:
            failure = error
        found = await self._find(seed)
        if found is None:
            raise failure
        return found

    @abstractmethod
    async def _find(self, seed: bytes) -> Any:
        """The invoice as the node describes it; None if there is none."""

    @abstractmethod
    async def _make(self, seed: bytes, sats: int, expiry: int) -> None:
        """Make it, payable for `expiry` seconds."""

    @abstractmethod
    def _outcome(self, found: Any, sats: int, now: int) -> Outcome:
        """How it is, from its description."""


class CoreLightning(_Node):
    """clnrest: POST /v1/METHOD with a rune, for methods `invoice` and `listinvoices` alone."""

    def _outcome(self, found: Any, sats: int, now: int) -> Outcome:
        match found["status"]:
            case "paid":
                return _enough(found["amount_received_msat"], sats)
            case "expired":
                raise Refuse(Reason.INVOICE_EXPIRED)
            case "unpaid":
                return _waiting(found["bolt11"], found["expires_at"] - now)
        raise ValueError("an invoice in no state")

    async def _find(self, seed: bytes) -> Any:
        answer = await self._web.post("v1/listinvoices", {"label": _label(seed)})
        invoices = answer["invoices"]
        return invoices[0] if invoices else None

    async def _make(self, seed: bytes, sats: int, expiry: int) -> None:
        body = {
            "amount_msat": 1_000 * sats,
            "label": _label(seed),
            "description": DESCRIPTION,
            "expiry": expiry,
        }
        await self._web.post("v1/invoice", body)


class Lnd(_Node):
    """REST with a macaroon, for `invoices:read invoices:write` alone."""

    def _outcome(self, found: Any, sats: int, now: int) -> Outcome:
        match found["state"]:
            case "SETTLED":
                return _enough(found["amt_paid_msat"], sats)
            case "CANCELED":
                raise Refuse(Reason.INVOICE_EXPIRED)
            case "OPEN" | "ACCEPTED":
                until = int(found["creation_date"]) + int(found["expiry"])
                return _waiting(found["payment_request"], until - now)
        raise ValueError("an invoice in no state")

    async def _find(self, seed: bytes) -> Any:
        try:
            return await self._web.get(f"v1/invoice/{sha256(_preimage(seed)).hexdigest()}")
        except Declined as error:
            if error.status != 404:
                raise
            return None

    async def _make(self, seed: bytes, sats: int, expiry: int) -> None:
        body = {
            "r_preimage": base64.b64encode(_preimage(seed)).decode(),
            "value_msat": str(1_000 * sats),
            "memo": DESCRIPTION,
            "expiry": str(expiry),
        }
        await self._web.post("v1/invoices", body)


def _preimage(seed: bytes) -> bytes:
    return tagged_hash("hpkv/invoice/preimage/v1", seed)


class MintInvoices:
    """A mint as node: its invoice, and the coins that it issues when that was paid.

    How long an invoice can be paid is the mint's to say. Of a quote without an expiry, or with one
    behind the invoice's own, it is what the invoice says; one of over a week is not begun, since
    the sale's place among the open ones is taken for as long.
    """

    def __init__(self, mint: Mint) -> None:
        self._mint = mint

    async def begin(self, sats: int, rng: Callable[[int], bytes], now: int) -> bytes:
        """See Invoices. The quote's id goes where a token would be."""
        active = [one for one in await self._mint.keysets() if one.active and one.unit == SAT]
        if not active:
            raise Away("the mint has no keys for sat")
        keyset, quote = min(active, key=lambda one: one.fee), await self._mint.quote(sats)
        if _payable_until(quote) > now + LONGEST_EXPIRY:
            raise Lies("the mint's invoices can be paid for more than a week")
        return Order(self._mint.url, keyset.id, sats, rng(SEED_SIZE), quote.id).encode()

    async def collect(self, data: bytes, sats: int, expiry: int, now: int) -> Outcome:
        """See Invoices."""
        order = Order.decode(data)
        quote: Quote = await self._mint.quoted(order.token)
        if quote.state in ("PAID", "ISSUED"):
            outputs = order.outputs
            return await settled(
                self._mint, sats, outputs, lambda: self._mint.issue(quote.id, outputs)
            )
        return _waiting(quote.invoice, _payable_until(quote) - now)


def _payable_until(quote: Quote) -> int:
    """Seconds since 1970; Malformed when the invoice is none."""
    until = bolt11.expires(quote.invoice)
    return min(quote.expiry, until) if quote.expiry else until
