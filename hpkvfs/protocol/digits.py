"""The range proof: an amount is a number of four digits in base 256.

An issuer's table holds a MAC of every digit, D_d = (y+d)^-1 G. A client blinds the MACs of
its digits, V_j = v_j D_{d_j}, and proves y V_j = v_j G - d_j V_j, which the issuer checks
with y itself (Camenisch, Chaabouni, shelat, ASIACRYPT 2008, in the keyed, pairing-free form
of Arfaoui et al., PETS 2015). V_j is uniform whatever the digit is.

Invariants. V_j is finite (a Point always is): infinity would prove any digit. A client uses
a table only after verify(): an entry that is not what it should be tells the digit.

To replace this range proof, replace this module. The rest knows only: POINTS blinded points
and LENGTH scalars per amount, hide() which makes both, value() which is the linear form of
the scalars that equals the amount, rows() for the prover, and DigitKey.recompute().
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from hpkvfs.protocol.errors import BadIssuance, Malformed
from hpkvfs.protocol.group import (
    ORDER,
    POINT_SIZE,
    SCALAR_SIZE,
    G,
    Infinity,
    Point,
    Rng,
    decode_points,
    decode_scalar,
    encode_points,
    encode_scalar,
    generator_multiple,
    multiexp,
    multiply,
    multiply_secret,
    random_scalar,
    split,
)
from hpkvfs.protocol.proofs import Row, Vector
from hpkvfs.protocol.transcript import Transcript

RADIX: Final = 256
DIGITS: Final = 4
AMOUNT_LIMIT: Final = RADIX**DIGITS
POINTS: Final = DIGITS
LENGTH: Final = 2 * DIGITS
TABLE_SIZE: Final = RADIX * POINT_SIZE + 2 * SCALAR_SIZE

_WEIGHT_SIZE: Final = 16


def hide(table: DigitTable, amount: int, rng: Rng) -> tuple[tuple[Point, ...], Vector]:
    """The points V_0..V_3 of an amount and the witness (v_0..v_3, d_0..d_3).

    The most significant digit comes first. The table must have been verified.
    """
    digits = tuple(amount.to_bytes(DIGITS, "big"))
    blinds = tuple(random_scalar(rng) for _ in digits)
    pairs = zip(digits, blinds, strict=True)
    return tuple(multiply(table.entries[d], v) for d, v in pairs), blinds + digits


def value(vector: Vector) -> int:
    """sum 256^(3-j) d_j modulo n: linear, and the last scalar's coefficient is 1."""
    total = 0
    for digit in vector[DIGITS:]:
        total = total * RADIX + digit
    return total % ORDER


def rows(points: Sequence[Point], vector: Vector) -> tuple[Row, ...]:
    """For the images y V_j, which only the issuer knows; j = 0..3.

    witness    v_j  d_j
    y V_j = [  G    -V_j ]
    """
    triples = zip(points, vector[:DIGITS], vector[DIGITS:], strict=True)
    return tuple(((G, v), (point, -d)) for point, v, d in triples)


class DigitTable:
    """An issuer's public table D_0..D_255, with the proof that one y made all of it."""

    __slots__ = ("_challenge", "_response", "_verified", "encoded", "entries")

    def __init__(self, entries: Sequence[Point], challenge: int, response: int) -> None:
        self.entries: Final = tuple(entries)
        self._challenge = challenge
        self._response = response
        self._verified = False
        proof = encode_scalar(challenge) + encode_scalar(response)
        self.encoded: Final = encode_points(self.entries) + proof
        """8,512 bytes: the points in order, then challenge and response."""

    @classmethod
    def decode(cls, encoded: bytes) -> DigitTable:
        """From TABLE_SIZE bytes; Malformed if they are not points and scalars."""
        if len(encoded) != TABLE_SIZE:
            raise Malformed(f"a digit table has {TABLE_SIZE} bytes, not {len(encoded)}")
        proof = RADIX * POINT_SIZE
        entries = decode_points(encoded[:proof])
        challenge, response = map(decode_scalar, split(encoded[proof:], SCALAR_SIZE))
        return cls(entries, challenge, response)

    def verify(self) -> None:
        """Check every entry (about 7 ms the first time, then nothing); BadIssuance if not so."""
        if not self._verified:
            try:
                commitments = self._recompute()
            except Infinity as error:
                raise BadIssuance("the digit table's proof is degenerate") from error
            if _table_challenge(self.entries, commitments) != self._challenge:
                raise BadIssuance("the digit table was not made with one key")
            self._verified = True

    def _recompute(self) -> tuple[Point, Point]:
        """s D_0 - e G and s P - e Q, where G = y D_0 and Q = y P (see _weights)."""
        e, s = self._challenge, self._response
        weights = _weights(self.entries)
        terms = [
            (entry, weight * (s + e * d))
            for d, (entry, weight) in enumerate(zip(self.entries[1:], weights, strict=True), 1)
        ]
        first = multiexp(((self.entries[0], s), (G, -e)))
        return first, multiexp((*terms, (G, -e * sum(weights))))


def _weights(entries: Sequence[Point]) -> list[int]:
    """128-bit weights rho_1..rho_255 from the table itself.

    They fold the claims y D_d = G - d D_d, d = 1..255, into one: y P = Q with
    P = sum rho_d D_d and Q = sum rho_d (G - d D_d). D_0 fixes y before the weights exist.
    """
    transcript = Transcript("hpkv/digit-table/v1")
    transcript.append("table", encode_points(entries))
    stream = hashlib.shake_256(transcript.digest()).digest((RADIX - 1) * _WEIGHT_SIZE)
    return [int.from_bytes(piece, "big") for piece in split(stream, _WEIGHT_SIZE)]


def _table_challenge(entries: Sequence[Point], commitments: tuple[Point, Point]) -> int:
    transcript = Transcript("hpkv/digit-table/v1")
    transcript.append("table", encode_points(entries))
    transcript.append("commitments", encode_points(commitments))
    return transcript.challenge()


class DigitKey:
    """The issuer's y; it has no repr."""

    __slots__ = ("_y",)

    def __init__(self, y: int) -> None:
        self._y = y

    def table(self, nonce: int) -> DigitTable:
        """The public table and its proof; about 20 ms. `nonce` must be secret and y's own."""
        y = self._y
        entries = [generator_multiple(pow(y + d, -1, ORDER)) for d in range(RADIX)]
        combined = multiexp(zip(entries[1:], _weights(entries), strict=True))
        commitments = multiply_secret(entries[0], nonce), multiply_secret(combined, nonce)
        challenge = _table_challenge(entries, commitments)
        return DigitTable(entries, challenge, (nonce + challenge * y) % ORDER)

    def recompute(self, points: Sequence[Point], vector: Vector, challenge: int) -> list[Point]:
        """s_v G - (s_d + e y) V_j: what the prover's rows() must have committed to."""
        triples = zip(points, vector[:DIGITS], vector[DIGITS:], strict=True)
        masked = challenge * self._y
        return [
            multiexp(((G, v),), multiply_secret(point, -(d + masked))) for point, v, d in triples
        ]
