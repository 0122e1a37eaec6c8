"""Ways to pay: each turns a proof of payment into a voucher, once.

A client chooses a voucher's secret, tells the server its digest, and pays for it; when that is
settled the voucher is there, like those that an operator makes and sells by hand, and the client
redeems it by an IssueRequest. So whatever was paid with, credentials are issued in one place,
once, and nothing but an amount passes from the payment to them.

    vouchers.py     sold by hand: the proof is that there is one
    cashu.py        ecash, swapped at a mint that the operator allows
    lightning.py    an invoice of a node (Core Lightning, LND) or of a mint
    cashier.py      the methods over one ledger: what is begun is durable before anybody is asked

Persist, then speak. A Sale is in the ledger, with all that it takes to go on, before a mint or
a node hears of it; and it is dropped in the transaction that makes its voucher. In between,
`collect` may be called any number of times, by any process, and finds out what happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from hpkvd.ledger import Sale, Taking
from hpkvfs.protocol.messages import Method, Offer, Reason

LONGEST_EXPIRY: Final = 7 * 86_400
"""Seconds for which an invoice can be paid at most: its sale is one of the open ones as long."""


class Refuse(Exception):
    """Nobody can pay in this way: the sale is given up. Nothing was taken."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class Unsettled(Exception):
    """It is not known yet, or somebody is away: the sale stays, and is asked about again."""

    def __init__(self, why: str, reason: Reason = Reason.PAYMENT_UNSETTLED) -> None:
        """`why` is for the operator's log: without amounts, tokens or addresses."""
        super().__init__(why)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Plan:
    """What a payment will come to; see Sale. `seconds`: how long it may take."""

    tokens: int
    sats: int
    seconds: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """To be paid by somebody else: the invoice, and for how many seconds it can be."""

    invoice: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Settled:
    """Paid: what of it is in our hands."""

    takings: tuple[Taking, ...] = ()


Outcome: TypeAlias = Waiting | Settled


class Payable(Protocol):
    """A method of payment. Every call may raise Refuse and Unsettled."""

    @property
    def offer(self) -> Offer:
        """What is offered to everybody alike."""
        ...

    async def plan(self, amount: int, proof: bytes) -> Plan:
        """Look at what is offered in payment; takes nothing."""
        ...

    async def collect(self, sale: Sale) -> Outcome:
        """Take it, or find that it was taken; the sale is durable. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Prices:
    """Settings: what a voucher costs, and how many unsettled sales there may be."""

    tokens_per_ksat: int = 10_000
    least: int = 100
    most: int = 1_000_000
    open: int = 10_000
    socks: str = "127.0.0.1:9050"
    socks_always: bool = False

    def offer(self, method: Method, places: tuple[str, ...] = ()) -> Offer:
        """These prices, as a method offers them."""
        named = tuple(place.encode() for place in places)
        return Offer(method, self.tokens_per_ksat, self.least, self.most, named)


@dataclass(frozen=True, slots=True)
class Mints:
    """Settings: the URLs of the mints whose ecash is taken."""

    mints: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Node:
    """Settings: who makes invoices (`kind`: cln, lnd, mint or nobody); secrets by path alone."""

    kind: str = ""
    url: str = ""
    secret_file: str = ""
    ca_file: str = ""
    expiry: int = 900
