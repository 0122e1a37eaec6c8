"""Cheap credentials behind the interface of protocol/credential.py, for most simulated seeds.

They have the sizes of real ones, are bound to statement, key and request, balance, are refused
when forged, and cannot be presented under two serials; they hide nothing, and cost about a
hundredth. A MAC is t = HMAC(key, amount || r); a request carries (amount, r, t) in the clear.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hpkvfs.protocol.credential import (
    AMOUNT_LIMIT,
    REPLY_SIZE,
    Credential,
    Draft,
    Issuer,
    IssuerParameters,
    Statement,
    request_size,
)
from hpkvfs.protocol.errors import BadIssuance, BadProof, Malformed
from hpkvfs.protocol.group import GV

Rng = Callable[[int], bytes]

_SHOWN: Final = struct.Struct(">I32s32s")
_WANTED: Final = struct.Struct(">I32s")
_TAG: Final = 32
_POINT: Final = GV.point


@dataclass(frozen=True, slots=True)
class CheapRequest:
    """What parse makes of a request."""

    encoded: bytes
    shown: tuple[tuple[int, bytes, bytes], ...]
    wanted: tuple[tuple[int, bytes], ...]

    @property
    def serials(self) -> tuple[bytes, ...]:
        """33 bytes for each credential shown."""
        return tuple(_serial(r) for _, r, _ in self.shown)

    @property
    def wanted_serials(self) -> tuple[bytes, ...]:
        """Those under which what is issued for it can be shown."""
        return tuple(_serial(r) for _, r in self.wanted)


def prepare(
    parameters: IssuerParameters,
    statement: Statement,
    presented: Sequence[Credential],
    amounts: tuple[int, int],
    rng: Rng,
    into: IssuerParameters | None = None,
) -> Draft:
    """As credential.prepare; the statement's context names the epoch of `into` as well."""
    if sum(one.amount for one in presented) + statement.delta != sum(amounts):
        raise ValueError("what is presented and requested does not balance")
    if not all(0 <= amount < AMOUNT_LIMIT for amount in amounts):
        raise ValueError("a request is for two amounts of 0..2^32-1")
    wanted = [(amount, int.from_bytes(b"\1" + rng(30), "big")) for amount in amounts]
    body = b"".join(_SHOWN.pack(c.amount, _32(c.r), _32(c.t)) for c in presented)
    body += b"".join(_WANTED.pack(amount, _32(r)) for amount, r in wanted)
    body += _tag(parameters, statement, body)
    request = body.ljust(request_size(len(presented)), b"\0")
    return Draft(request, statement.binding(len(presented), request), wanted)


def parse(encoded: bytes, presented: int) -> Any:
    """As credential.parse."""
    if len(encoded) != request_size(presented):
        raise Malformed(f"a request of {len(encoded)} bytes")
    end = presented * _SHOWN.size
    shown = tuple(_SHOWN.iter_unpack(encoded[:end]))
    wanted = tuple(_WANTED.iter_unpack(encoded[end : end + 2 * _WANTED.size]))
    if len({r for _, r, _ in shown}) != presented:
        raise Malformed("a serial is presented twice")
    return CheapRequest(encoded, shown, wanted)


def verify(
    issuer: Issuer, statement: Statement, request: CheapRequest, into: Issuer | None = None
) -> None:
    """As Issuer.verify."""
    if not statement.admits(len(request.shown)):
        raise BadProof("so many are not presented")
    end = len(request.shown) * _SHOWN.size + 2 * _WANTED.size
    body, tag = request.encoded[:end], request.encoded[end : end + _TAG]
    if tag != _tag(issuer.parameters, statement, body) or any(request.encoded[end + _TAG :]):
        raise BadProof("the request's proof does not hold")
    if any(t != _mac(issuer, amount, r) for amount, r, t in request.shown):
        raise BadProof("a credential is not ours")
    held = sum(amount for amount, _, _ in request.shown)
    if held + statement.delta != sum(amount for amount, _ in request.wanted):
        raise BadProof("what is presented and requested does not balance")


def issue(issuer: Issuer, statement: Statement, request: CheapRequest) -> bytes:
    """As Issuer.issue."""
    macs = b"".join(_mac(issuer, *one) for one in request.wanted)
    binding = statement.binding(len(request.shown), request.encoded)
    seal = hashlib.sha256(issuer.parameters.digest + binding + macs).digest()
    return (macs + seal).ljust(REPLY_SIZE, b"\0")


def finish(
    draft: Draft, parameters: IssuerParameters, reply: bytes
) -> tuple[Credential, Credential]:
    """As Draft.finish."""
    if len(reply) != REPLY_SIZE:
        raise Malformed(f"a reply of {len(reply)} bytes")
    macs, seal = reply[:64], reply[64:96]
    if seal != hashlib.sha256(parameters.digest + draft._binding + macs).digest():
        raise BadIssuance("the proof of issuance does not hold")
    (a1, r1), (a2, r2) = draft._wanted
    t1, t2 = int.from_bytes(macs[:32], "big"), int.from_bytes(macs[32:], "big")
    return Credential(a1, r1, t1, _POINT, _POINT), Credential(a2, r2, t2, _POINT, _POINT)


def _tag(parameters: IssuerParameters, statement: Statement, body: bytes) -> bytes:
    transcript = statement.transcript("cheap")
    transcript.append("issuer", parameters.digest)
    transcript.append("body", body)
    return transcript.digest()[:_TAG]


def _mac(issuer: Issuer, amount: int, r: bytes) -> bytes:
    mac = hmac.digest(issuer._prf_key, amount.to_bytes(4, "big") + r, "sha256")
    return b"\1" + mac[1:]


def _serial(r: bytes) -> bytes:
    return b"\2" + hashlib.sha256(b"serial" + r).digest()


def _32(number: int) -> bytes:
    return number.to_bytes(32, "big")
