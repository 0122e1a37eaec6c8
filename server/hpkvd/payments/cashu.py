"""Ecash: a client hands over a Cashu token, which the server swaps at its mint for its own coins.

    plan      read the token, ask the mint about its keys and fees, and whether it was spent
    (durable: the token, and the seed of the coins to be asked for)
    collect   swap; if that fails in any way, ask whether those very coins were signed before

The coins asked for follow from the seed, so a swap that was cut short anywhere is found again
(NUT-09): either the mint has signed our coins, and then the token is paid for, or it has not, and
then the token is as good as it was or somebody else spent it. There is no third outcome.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from hpkvd.ledger import Sale, Taking
from hpkvd.payments import Plan, Prices, Refuse, Settled, Unsettled
from hpkvd.payments.mint import PENDING, SPENT, Keyset, Lies, Mint
from hpkvd.payments.web import Away, Declined
from hpkvfs.protocol import codec
from hpkvfs.protocol.ecash import SAT, Output, Proof, Token, outputs, powers
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import MAX_DELTA, Method, Offer, Reason

SECONDS: Final = 600
SHORT_ID: Final = 16
SEED_SIZE: Final = 32
MAX_KEYSET: Final = 66
MAX_TOKEN: Final = 2**16


@dataclass(frozen=True, slots=True)
class Order:
    """What collecting needs: the coins offered, and those to be had for them."""

    url: str
    keyset: str
    sats: int
    seed: bytes = field(repr=False)
    token: str = field(repr=False)

    def encode(self) -> bytes:
        """For Sale.data."""
        texts = (self.url.encode(), self.keyset.encode(), self.token.encode())
        return codec.pack([*texts[:2], self.sats, self.seed, texts[2]])

    @classmethod
    def decode(cls, data: bytes) -> Order:
        """Inverse of encode."""
        url, keyset, sats, seed, token = _order(codec.unpack(data))
        return cls(url.decode(), keyset.decode(), sats, seed, token.decode())

    @property
    def outputs(self) -> list[Output]:
        """The coins to be had."""
        return outputs(powers(self.sats), self.keyset, self.seed)


_order = codec.fields(
    codec.octets(1, 256),
    codec.octets(1, MAX_KEYSET),
    codec.integer(1, 2**63),
    codec.octets(SEED_SIZE),
    codec.octets(0, MAX_TOKEN),
)


class Cashu:
    """Payable with tokens of the mints in `mints`, by URL."""

    def __init__(self, mints: dict[str, Mint], prices: Prices, rng: Callable[[int], bytes]) -> None:
        self._mints = mints
        self._rng = rng
        self.offer: Offer = prices.offer(Method.CASHU, tuple(mints))

    async def plan(self, amount: int, proof: bytes) -> Plan:
        """See Payable."""
        token = _token(proof)
        mint = self._mint(token.mint)
        with_ids, keyset = await _about(mint, token)
        sats = token.amount - _fee(with_ids)
        tokens = self.offer.tokens(sats) if sats > 0 else 0
        if tokens < max(1, self.offer.least):
            raise Refuse(Reason.TOO_LITTLE)
        if tokens > min(self.offer.most, MAX_DELTA):
            raise Refuse(Reason.TOO_MUCH)
        if tokens < amount:
            raise Refuse(Reason.OTHER_AMOUNT)
        proofs = tuple(proof for proof, _ in with_ids)
        await _check_unspent(mint, proofs)
        full = Token(mint.url, SAT, proofs).encode()
        order = Order(mint.url, keyset.id, sats, self._rng(SEED_SIZE), full)
        return Plan(tokens, sats, SECONDS, order.encode())

    def _mint(self, url: str) -> Mint:
        mint = self._mints.get(url.rstrip("/"))
        if mint is None:
            raise Refuse(Reason.OTHER_MINT)
        return mint

    async def collect(self, sale: Sale) -> Settled:
        """See Payable."""
        order = Order.decode(sale.data)
        mint = self._mints.get(order.url)
        if mint is None:
            raise Unsettled("a sale waits for a mint that is not in the settings any more")
        proofs, wanted = Token.decode(order.token, limit=MAX_TOKEN).proofs, order.outputs
        return await settled(mint, order.sats, wanted, lambda: mint.swap(proofs, wanted))


async def settled(
    mint: Mint, sats: int, wanted: Sequence[Output], take: Callable[[], Awaitable[Sequence[Proof]]]
) -> Settled:
    """The coins that `take` makes of these outputs, or that an earlier try made."""
    failure: Exception
    try:
        return _takings(mint, sats, await take())
    except (Away, Declined, Lies) as error:
        failure = error
    try:
        coins = await mint.restore(wanted)
    except (Away, Declined) as error:
        raise Unsettled(f"the mint does not answer ({error})") from error
    except Lies as error:
        raise Unsettled(f"the mint lies: {error}", Reason.MINT_LIES) from error
    if coins is not None:
        return _takings(mint, sats, coins)
    raise _refusal(failure) from failure


def _takings(mint: Mint, sats: int, coins: Sequence[Proof]) -> Settled:
    return Settled((Taking(sats, Token(mint.url, SAT, tuple(coins)).encode()),))


def _refusal(failure: Exception) -> Exception:
    """What it means that a mint declined, and has not signed our coins."""
    match failure:
        case Declined(code=code) if code == SPENT:
            return Refuse(Reason.TOKEN_SPENT)
        case Declined(code=code) if code in PENDING:
            return Unsettled("the mint is at work on the same coins")
        case Declined():
            return Refuse(Reason.BAD_TOKEN)
        case Lies():
            return Unsettled(f"the mint lies: {failure}", Reason.MINT_LIES)
    return Unsettled(f"the mint does not answer ({failure})")


def _token(proof: bytes) -> Token:
    try:
        token = Token.decode(proof.decode("ascii"))
    except (Malformed, UnicodeDecodeError) as error:
        raise Refuse(Reason.BAD_TOKEN) from error
    if token.unit != SAT:
        raise Refuse(Reason.OTHER_UNIT)
    return token


async def _about(mint: Mint, token: Token) -> tuple[list[tuple[Proof, Keyset]], Keyset]:
    """The coins with the whole ids of their keysets, and the keyset to ask for new ones of."""
    try:
        known = await mint.keysets()
    except (Away, Declined) as error:
        raise Unsettled(f"the mint does not answer ({error})") from error
    except Lies as error:
        raise Unsettled(f"the mint lies: {error}", Reason.MINT_LIES) from error
    active = [one for one in known if one.active and one.unit == SAT]
    if not active:
        raise Unsettled("the mint has no keys for sat")
    found = [_whole(proof, known) for proof in token.proofs]
    return found, min(active, key=lambda one: one.fee)


def _whole(proof: Proof, known: Sequence[Keyset]) -> tuple[Proof, Keyset]:
    fits = [one for one in known if one.id == proof.keyset]
    if not fits and len(proof.keyset) == SHORT_ID:
        fits = [one for one in known if one.id.startswith(proof.keyset)]
    if len(fits) != 1:
        raise Refuse(Reason.BAD_TOKEN)
    if fits[0].unit != SAT:
        raise Refuse(Reason.OTHER_UNIT)
    whole = Proof(proof.amount, fits[0].id, proof.secret, proof.signature, proof.witness)
    return whole, fits[0]


def _fee(coins: Sequence[tuple[Proof, Keyset]]) -> int:
    """NUT-02: the sum of the coins' fees, in thousandths, rounded up."""
    return -(-sum(keyset.fee for _, keyset in coins) // 1_000)


async def _check_unspent(mint: Mint, proofs: Sequence[Proof]) -> None:
    try:
        states = await mint.states(proofs)
    except (Away, Declined) as error:
        raise Unsettled(f"the mint does not answer ({error})") from error
    except Lies as error:
        raise Unsettled(f"the mint lies: {error}", Reason.MINT_LIES) from error
    if "SPENT" in states:
        raise Refuse(Reason.TOKEN_SPENT)
    if states != {"UNSPENT"}:
        raise Unsettled("the mint is at work on the same coins")
