"""Buying tokens: a voucher of our own choosing, paid for by ecash or Lightning, then redeemed.

    begin: secret (journalled) -> pay, again and again, until paid -> redeem -> forgotten

Invariants: nobody hears of a purchase before the journal has its secret, without which what was
paid would be nobody's; and the journal forgets it in the transaction that has its credentials, or
when the server says that nothing was taken. Interrupted anywhere, it is gone on with by `advance`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hpkvfs.errors import Misbehaviour, UserError
from hpkvfs.net.line import Line
from hpkvfs.net.refusals import PaymentRefused, out_of_place, refusal
from hpkvfs.protocol import bolt11, codec
from hpkvfs.protocol.ecash import TOKEN_LIMIT, Token
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import (
    MAX_DELTA,
    Method,
    Offer,
    Offers,
    OffersRequest,
    Payment,
    PayRequest,
    Refused,
)
from hpkvfs.protocol.voucher import SECRET_SIZE, Voucher, voucher_digest
from hpkvfs.wallet.journal import PURCHASE, Journal

_fields = codec.fields(
    codec.integer(1, 255),
    codec.octets(SECRET_SIZE),
    codec.integer(1, MAX_DELTA),
    codec.octets(0, TOKEN_LIMIT),
)


@dataclass(frozen=True, slots=True)
class Purchase:
    """A voucher that is being paid for: `amount` tokens, or for a token of ecash at least those."""

    method: Method
    secret: bytes = field(repr=False)
    amount: int
    proof: bytes = field(default=b"", repr=False)

    @property
    def digest(self) -> bytes:
        """The voucher's."""
        return voucher_digest(self.secret)

    def encode(self) -> bytes:
        """For the journal."""
        return codec.pack([int(self.method), self.secret, self.amount, self.proof])

    @classmethod
    def decode(cls, raw: bytes) -> Purchase:
        """Inverse of encode; Malformed."""
        method, *rest = _fields(codec.unpack(raw))
        try:
            return cls(Method(method), *rest)
        except ValueError as error:
            raise Malformed("a way to pay that this version does not have") from error


@dataclass(frozen=True, slots=True)
class Bill:
    """What is to be paid, to whom, and for how many seconds it still can be."""

    tokens: int
    sats: int
    invoice: str
    seconds: int


class Purchases:
    """The purchases of one journal, at one server."""

    def __init__(self, journal: Journal, line: Line, rng: Callable[[int], bytes]) -> None:
        self._journal = journal
        self._line = line
        self._rng = rng

    async def offers(self) -> tuple[Offer, ...]:
        """What the server takes, beside vouchers."""
        reply = await self._line.ask(OffersRequest().encode())
        match reply:
            case Offers(offers):
                return offers
            case Refused(reason):
                raise refusal(reason)
        raise out_of_place()

    @property
    def unfinished(self) -> list[Purchase]:
        """Those begun, by an earlier run too."""
        found = [self._journal.meta(name) for name in self._journal.names(PURCHASE)]
        return [Purchase.decode(raw) for raw in found if raw is not None]

    async def begin_lightning(self, tokens: int) -> Purchase:
        """A new purchase of so many tokens, durably."""
        return await self._begin(Purchase(Method.LIGHTNING, self._rng(SECRET_SIZE), tokens))

    async def begin_cashu(self, text: str, least: int) -> Purchase:
        """That of a token, new or not: its voucher follows from its coins. UserError."""
        token = read_token(text)
        proof = text.strip().encode()
        return await self._begin(Purchase(Method.CASHU, token.voucher_secret, least, proof))

    async def _begin(self, purchase: Purchase) -> Purchase:
        await self._journal.flush()  # if it was begun and forgotten before, that is settled
        self._journal.put_meta(PURCHASE + purchase.digest.hex(), purchase.encode())
        await self._journal.flush()
        return purchase

    async def advance(self, purchase: Purchase) -> Voucher | Bill:
        """Pay, or see how it is: the voucher when it is paid for, else what is to be paid.

        PaymentRefused when nothing was taken and nothing can be: then it is forgotten.
        """
        request = PayRequest(purchase.method, purchase.digest, purchase.amount, purchase.proof)
        reply = await self._line.ask(request.encode())
        match reply:
            case Payment():
                return _checked(purchase, reply)
            case Refused(reason):
                failure = refusal(reason)
                if isinstance(failure, PaymentRefused):
                    await self.forget(purchase)
                raise failure
        raise out_of_place()

    async def forget(self, purchase: Purchase) -> None:
        """Nothing more will come of it."""
        self._journal.drop_meta(PURCHASE + purchase.digest.hex())
        await self._journal.flush()


def read_token(text: str) -> Token:
    """A Cashu token; UserError."""
    try:
        return Token.decode(text)
    except Malformed as error:
        raise UserError(
            f"this is no Cashu token that can be taken: {error}", "copy it whole, one at a time"
        ) from error


def _checked(purchase: Purchase, reply: Payment) -> Voucher | Bill:
    """What an honest server may say; Misbehaviour."""
    is_exact = purchase.method is Method.LIGHTNING
    if reply.tokens < purchase.amount or (is_exact and reply.tokens != purchase.amount):
        raise Misbehaviour("the server sells another number of tokens than was asked for")
    if reply.paid:
        return Voucher(reply.tokens, purchase.secret)
    try:
        invoice = reply.invoice.decode("ascii")
        asked = bolt11.millisats(invoice)
    except (ValueError, Malformed) as error:
        raise Misbehaviour("the server's invoice cannot be read") from error
    if asked != 1_000 * reply.sats:
        raise Misbehaviour("the server's invoice is for another amount than the server says")
    return Bill(reply.tokens, reply.sats, invoice, reply.seconds)
