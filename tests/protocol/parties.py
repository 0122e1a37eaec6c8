"""An issuer, its epoch, and clients whose randomness can be repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

from hpkvfs.protocol.credential import (
    Credential,
    CredentialRequest,
    Draft,
    Issuer,
    IssuerParameters,
    Statement,
    parse,
    prepare,
)
from hpkvfs.protocol.epoch import NO_EPOCH, EpochParameters
from hpkvfs.protocol.group import Rng
from hpkvfs.protocol.tariff import Operation, Tariff

TARIFF = Tariff(look_up=1, insert=10, refund=8)
VOUCHER = 1_000


class Stream:
    """Randomness that only depends on a seed, whatever pieces it is asked for."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self.drawn: list[int] = []

    def __call__(self, count: int) -> bytes:
        position = len(self.drawn).to_bytes(4, "big")
        self.drawn.append(count)
        return hashlib.shake_256(self._seed + position).digest(count)


@cache
def issuer() -> Issuer:
    return Issuer.generate(Stream("issuer"))


@cache
def parameters() -> IssuerParameters:
    """As a client has them: decoded and verified."""
    decoded = IssuerParameters.decode(issuer().parameters.encoded)
    decoded.verify()
    return decoded


@cache
def next_issuer() -> Issuer:
    return Issuer.generate(Stream("next issuer"))


@cache
def next_epoch() -> EpochParameters:
    return EpochParameters(1, TARIFF, next_issuer().parameters, epoch().digest)


@cache
def epoch() -> EpochParameters:
    return EpochParameters(0, TARIFF, issuer().parameters, NO_EPOCH)


def statement(operation: Operation, context: bytes = b"", delta: int | None = None) -> Statement:
    amount = TARIFF.delta(operation) if delta is None else delta
    return Statement(epoch().digest, operation, context, amount)


def settle(
    about: Statement, presented: Sequence[Credential], amounts: tuple[int, int], rng: Rng
) -> tuple[Draft, CredentialRequest, bytes]:
    """An honest exchange: draft, what the issuer parsed and verified, and its reply."""
    draft = prepare(parameters(), about, presented, amounts, rng)
    request = parse(draft.request, len(presented))
    issuer().verify(about, request)
    return draft, request, issuer().issue(about, request)


def buy(amounts: tuple[int, int], seed: str = "buy") -> tuple[Credential, Credential]:
    """Two credentials for a voucher of their sum."""
    about = statement(Operation.ISSUE, b"voucher", sum(amounts))
    draft, _, reply = settle(about, (), amounts, Stream(seed))
    return draft.finish(parameters(), reply)


@cache
def purse() -> tuple[Credential, Credential]:
    return buy((VOUCHER, 0), "purse")
