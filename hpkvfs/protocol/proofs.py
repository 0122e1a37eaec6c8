"""Sigma proofs of linear statements, and the three statements of the protocol.

A statement is a matrix of bases applied to a vector of scalars: one point per row. A proof
that one vector x maps to given images Y (Maurer 2009, of which Schnorr's is the smallest):

    prover    commits to M(k) for random nonces k; the challenge e hashes everything so far;
              answers s = k + e x
    verifier  recomputes M(s) - e Y, which must hash to the same e

The same matrix is therefore applied to nonces and to responses; the functions below build
its rows for either. An image never follows from what a prover sends alone when that would
let it choose the statement: Z is computed by the issuer from its own key.

Folding. Rows whose part of the vector is fixed by other rows already can be proven as one, their
sum weighted by a hash of all the points: what does not hold for each holds for the sum under one
weight in 2^128. docs/credentials.md says which rows those are, and why not others.

Vectors are flat tuples of scalars in the order of the matrices' headings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from hpkvfs.protocol.group import (
    GA,
    GG,
    GH,
    GS,
    GW,
    GWP,
    GX0,
    GX1,
    ORDER,
    Base,
    FixedBase,
    Point,
    Term,
    add,
    multiexp,
    multiply,
    multiply_secret,
)

Row = tuple[Term, ...]
Vector = tuple[int, ...]


def commit(rows: Iterable[Row]) -> list[Point]:
    """M(k): the prover's commitments, in variable time."""
    return [multiexp(row) for row in rows]


def commit_secret(rows: Iterable[Row]) -> list[Point]:
    """M(k) in constant time, each distinct product once."""
    products: dict[Term, Point] = {}
    return [add(*(_product(products, *term) for term in _collected(row))) for row in rows]


def _collected(row: Row) -> Iterable[Term]:
    """The same sum, with each fixed base in it once."""
    scalars: dict[FixedBase, int] = {}
    for base, scalar in row:
        if isinstance(base, FixedBase):
            scalars[base] = (scalars.get(base, 0) + scalar) % ORDER
    return *scalars.items(), *(term for term in row if not isinstance(term[0], FixedBase))


def _product(products: dict[Term, Point], base: Base, scalar: int) -> Point:
    """Only generators occur twice; and to compare points is to encode them."""
    if not isinstance(base, FixedBase):
        return multiply_secret(base, scalar)
    product = products.get((base, scalar))
    if product is None:
        product = products[base, scalar] = multiply_secret(base, scalar)
    return product


def recompute(rows: Iterable[Row], images: Iterable[Point], challenge: int) -> list[Point]:
    """M(s) - e Y: what the prover must have committed to; Infinity for some false proofs."""
    pairs = zip(rows, images, strict=True)
    return [multiexp((*row, (image, -challenge))) for row, image in pairs]


def respond(nonces: Iterable[int], secrets: Iterable[int], challenge: int) -> Vector:
    """s = k + e x."""
    pairs = zip(nonces, secrets, strict=True)
    return tuple((nonce + challenge * secret) % ORDER for nonce, secret in pairs)


# Show: a credential is presented under fresh blinding.

SHOW_LENGTH: Final = 5


class Shown(NamedTuple):
    """What of a presented credential the issuer sees."""

    ca: Point
    cx0: Point
    cx1: Point
    cv: Point
    serial: Point


def show_rows(shown: Shown, vector: Vector) -> tuple[Row, ...]:
    """For the images of show_images(); each witness is one column.

    witness    z    z0=-tz  t    a    r
    Cx1  =  [  Gx1  Gx0     Cx0  .    .  ]
    Ca   =  [  Ga   .       .    Gg   Gh ]
    """
    z, z0, t, a, r = vector
    return ((GX1, z), (GX0, z0), (shown.cx0, t)), ((GA, z), (GG, a), (GH, r))


def show_images(shown: Shown) -> tuple[Point, ...]:
    """The left-hand sides of show_rows()."""
    return shown.cx1, shown.ca


class Weights(NamedTuple):
    """What folds rows; 1 stands before the first of each kind."""

    z: int
    serial: int
    serial2: int
    m: int


def ownership_row(i: FixedBase, shows: Sequence[Vector], weights: Weights) -> Row:
    """Two MACs and two serials in one; Ca fixes z and r. Z is the issuer's to compute.

    witness                           z1  z2   r1    r2
    Z1 + pz Z2 + ps S1 + ps2 S2  =  [ I   pz I ps Gs ps2 Gs ]
    """
    (z1, *_, r1), (z2, *_, r2) = shows
    return (i, z1 + weights.z * z2), (GS, weights.serial * r1 + weights.serial2 * r2)


# Request: commitments to amounts, whose ranges are another module's to prove.


def attribute_row(amount: int, r: int) -> Row:
    """M = [ Gg Gh ] over (a, r): the attribute of a credential."""
    return (GG, amount), (GH, r)


def fold(first: Point, second: Point, weight: int) -> Point:
    """first + weight second."""
    return add(first, multiply(second, weight))


def mix(first: Point, second: Point, weight: int) -> Point:
    """weight first + (1 - weight) second; Infinity if they are equal."""
    return add(multiply(add(first, -second), weight), second)


# Issuance: the issuer used the key it published.

ISSUANCE_LENGTH: Final = 5


class Issued(NamedTuple):
    """What a MAC is made with; U is u times a base: its logarithm, or U itself and 1."""

    t: int
    base: Base
    u: int


def issuance_rows(
    issued: tuple[Issued, Issued], attribute: Row, weight: int, vector: Vector
) -> tuple[Row, ...]:
    """For the images V, mixed from both credentials by a weight, GV-I and Cw.

    Each witness is one column; U, tU and M are mixed as V is. `attribute` is the mixed M, in
    terms of whatever points the caller knows it.

    witness    w    w'   x0   x1    ya
    V     = [  Gw   .    U    tU    M  ]
    GV-I  = [  .    .    Gx0  Gx1   Ga ]
    Cw    = [  Gw   Gwp  .    .     .  ]
    """
    w, wp, x0, x1, ya = vector
    shares = zip(issued, (weight, 1 - weight), strict=True)
    return (
        (
            (GW, w),
            *((one.base, share * one.u * (x0 + x1 * one.t) % ORDER) for one, share in shares),
            *((base, ya * scalar % ORDER) for base, scalar in attribute),
        ),
        ((GX0, x0), (GX1, x1), (GA, ya)),
        ((GW, w), (GWP, wp)),
    )
