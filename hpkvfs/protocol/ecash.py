"""Cashu ecash: what a wallet has to compute, and the text in which a token is handed over.

The protocol is that of the NUTs (https://github.com/cashubtc/nuts): NUT-00 for the blind
signatures ("BDHKE") and the tokens V3 and V4, NUT-12 for the proof (DLEQ) that a mint signed with
the key it published. `tests/vectors/cashu.json` has the NUTs' own test vectors. The PyPI package
`cashu` is a mint and a wallet with a web framework, a database layer and pins of its own: what is
needed of it here is this page, on the group that is here anyway.

    wallet                            mint (key k, K = kG)
    Y = hash_to_curve(secret)
    B' = Y + rG              ------>
                             <------  C' = kB', and a proof of log_G K = log_B' C'
    C = C' - rK = kY                  (secret, C) is money until the mint has seen the secret
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import cbor2

from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import (
    POINT_SIZE,
    Infinity,
    Point,
    add,
    decode_nonzero,
    generator_multiple,
    multiply,
    multiply_secret,
    tagged_hash,
    wide_scalar,
)
from hpkvfs.protocol.voucher import SECRET_SIZE

TOKEN_LIMIT: Final = 16_384
"""The longest token text, in bytes, that fits a request."""
PROOFS_LIMIT: Final = 256
SAT: Final = "sat"
_AMOUNT_LIMIT: Final = 2**63
_TEXT_LIMIT: Final = 1_024
_V3: Final = "cashuA"
_V4: Final = "cashuB"
_URI: Final = "cashu:"


@dataclass(frozen=True, slots=True)
class Proof:
    """One coin: `keyset` is the hexadecimal id of the keys that signed it, C a compressed point.

    `witness` is what a spending condition (NUT-10) asks for; None for a plain coin. In a token
    the keyset's id may be shortened to its first 8 bytes.
    """

    amount: int
    keyset: str
    secret: str = field(repr=False)
    signature: bytes = field(repr=False)
    witness: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Token:
    """Coins of one mint, as they are handed from one person to another."""

    mint: str
    unit: str
    proofs: tuple[Proof, ...]

    @property
    def amount(self) -> int:
        """The sum of its coins, in its unit."""
        return sum(proof.amount for proof in self.proofs)

    @classmethod
    def decode(cls, text: str, limit: int = TOKEN_LIMIT) -> Token:
        """From either spelling, V3 or V4; Malformed for anything else, or coins of two mints."""
        text = text.strip().removeprefix(_URI)
        if len(text) > limit:
            raise Malformed(f"a token of more than {limit} characters")
        kind, payload = text[:6], text[6:]
        if kind not in (_V3, _V4):
            raise Malformed("a Cashu token begins with cashuA or cashuB")
        try:
            raw = base64.b64decode(payload + "=" * (-len(payload) % 4), altchars=b"-_")
            token = _v4(_cbor(raw)) if kind == _V4 else _v3(json.loads(raw))
        except Malformed:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise Malformed("a Cashu token that cannot be read") from error
        return token

    def encode(self) -> str:
        """As V4, the shorter one."""
        keysets: dict[str, list[dict[str, Any]]] = {}
        for one in self.proofs:
            row: dict[str, Any] = {"a": one.amount, "s": one.secret, "c": one.signature}
            if one.witness is not None:
                row["w"] = one.witness
            keysets.setdefault(one.keyset, []).append(row)
        rows = [{"i": bytes.fromhex(keyset), "p": proofs} for keyset, proofs in keysets.items()]
        raw = cbor2.dumps({"t": rows, "m": self.mint, "u": self.unit})
        return _V4 + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    @property
    def voucher_secret(self) -> bytes:
        """The secret of the voucher that this token buys: the same for the same coins.

        So whoever has the token, and nothing else any more, still gets what it bought.
        """
        coins = sorted(f"{one.secret}\n{one.signature.hex()}" for one in self.proofs)
        return tagged_hash("hpkv/cashu/v1", "\n".join(coins).encode())[:SECRET_SIZE]


def _cbor(raw: bytes) -> Any:
    stream = io.BytesIO(raw)
    try:
        value = cbor2.load(stream)
    except (cbor2.CBORDecodeError, OverflowError, MemoryError) as error:
        raise Malformed("a Cashu token that is no CBOR") from error
    if stream.read(1):
        raise Malformed("a Cashu token with something after it")
    return value


def _v3(form: Any) -> Token:
    mints = form["token"]
    if not isinstance(mints, list) or len({_text(one["mint"]) for one in mints}) != 1:
        raise Malformed("a token of several mints; hand them over one by one")
    proofs = [
        _proof(one["amount"], one["id"], one["secret"], _hex(one["C"]), one.get("witness"))
        for part in mints
        for one in part["proofs"]
    ]
    return _token(mints[0]["mint"], form.get("unit") or SAT, proofs)


def _v4(form: Any) -> Token:
    proofs = [
        _proof(one["a"], _octets(part["i"]).hex(), one["s"], _octets(one["c"]), one.get("w"))
        for part in form["t"]
        for one in part["p"]
    ]
    return _token(form["m"], form["u"], proofs)


def _token(mint: Any, unit: Any, proofs: list[Proof]) -> Token:
    if not 1 <= len(proofs) <= PROOFS_LIMIT:
        raise Malformed(f"a token has from 1 to {PROOFS_LIMIT} coins")
    if len({one.secret for one in proofs}) != len(proofs):
        raise Malformed("a token that has the same coin twice")
    return Token(_text(mint), _text(unit), tuple(proofs))


def _proof(amount: Any, keyset: Any, secret: Any, signature: bytes, witness: Any) -> Proof:
    if type(amount) is not int or not 0 < amount < _AMOUNT_LIMIT:
        raise Malformed("a coin of no amount")
    _hex(_text(keyset))
    if len(signature) != POINT_SIZE or signature[0] not in (2, 3):
        raise Malformed("a coin whose signature is no point")  # the mint will look closer
    return Proof(
        amount, keyset, _text(secret), signature, None if witness is None else _text(witness)
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT_LIMIT or not value.isprintable():
        raise Malformed("a token with a field that is no text")
    return value


def _hex(value: Any) -> bytes:
    try:
        return bytes.fromhex(_text(value))
    except ValueError as error:
        raise Malformed("a token with a field that is not hexadecimal") from error


def _octets(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise Malformed("a token with a field that is no bytes")
    return value


# Blind signatures (NUT-00) and the proof that they are honest (NUT-12).


def hash_to_curve(message: bytes) -> Point:
    """NUT-00's point of a message, whose discrete logarithm nobody knows."""
    seed = hashlib.sha256(b"Secp256k1_HashToCurve_Cashu_" + message).digest()
    for counter in range(2**16):
        x = hashlib.sha256(seed + counter.to_bytes(4, "little")).digest()
        try:
            return Point.decode(b"\2" + x)
        except Malformed:
            continue
    raise AssertionError("2^16 hashes that are no point of the curve")


@dataclass(frozen=True, slots=True)
class Output:
    """A coin to be signed: its secret and blinding factor are ours, B' is the mint's to see."""

    amount: int
    keyset: str
    secret: str = field(repr=False)
    blinding: int = field(repr=False)

    @property
    def blinded(self) -> Point:
        """B' = Y + rG."""
        return add(hash_to_curve(self.secret.encode()), generator_multiple(self.blinding))

    def unblind(self, key: Point, signed: Signed) -> Proof:
        """The coin, once the mint has proved that it signed with this key; Malformed if not."""
        if not signed.is_honest(key, self.blinded):
            raise Malformed("a signature that the mint's key did not make")
        point = add(signed.point, -multiply_secret(key, self.blinding))
        return Proof(self.amount, self.keyset, self.secret, point.encode())


@dataclass(frozen=True, slots=True)
class Signed:
    """A mint's answer for one output: C', and the proof (e, s) of NUT-12."""

    point: Point
    e: int
    s: int

    @classmethod
    def decode(cls, point: str, e: str, s: str) -> Signed:
        """From the hexadecimal texts of a reply; Malformed."""
        try:
            scalars = [decode_nonzero(binascii.unhexlify(one)) for one in (e, s)]
            return cls(Point.decode(binascii.unhexlify(point)), *scalars)
        except ValueError as error:
            raise Malformed("a mint's signature that is not hexadecimal") from error

    def is_honest(self, key: Point, blinded: Point) -> bool:
        """Whether e = H(sG - eK, sB' - eC', K, C'): K and C' have one logarithm, over G and B'."""
        try:
            first = add(generator_multiple(self.s), -multiply(key, self.e))
            second = add(multiply(blinded, self.s), -multiply(self.point, self.e))
        except Infinity:
            return False
        return self.e.to_bytes(32, "big") == dleq_challenge(first, second, key, self.point)


def dleq_challenge(*points: Point) -> bytes:
    """NUT-12's hash: of the uncompressed points' hexadecimal text."""
    return hashlib.sha256("".join(one.encode_whole().hex() for one in points).encode()).digest()


def outputs(amounts: Iterable[int], keyset: str, seed: bytes) -> list[Output]:
    """Outputs of these amounts out of 32 secret bytes, the same ones each time.

    With the seed persisted before a mint hears of them, they are found again (NUT-09) after a
    crash. Secrets are 32 bytes in hexadecimal, as NUT-00 recommends.
    """
    made = []
    for place, amount in enumerate(amounts):
        label = b"hpkv/cashu/output/v1" + seed + place.to_bytes(4, "big")
        uniform = hashlib.shake_256(label).digest(80)
        made.append(Output(amount, keyset, uniform[:32].hex(), wide_scalar(uniform[32:])))
    return made


def powers(total: int) -> list[int]:
    """The powers of two that make a total, smallest first (NUT-00's amounts)."""
    return [1 << bit for bit in range(total.bit_length()) if total >> bit & 1]
