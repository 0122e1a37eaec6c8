"""Sigma proofs of linear statements, and the three statements of the protocol.

A statement is a matrix of bases applied to a vector of scalars: one point per row. A proof
that one vector x maps to given images Y (Maurer 2009, of which Schnorr's is the smallest):

    prover    commits to M(k) for random nonces k; the challenge e hashes everything so far;
              answers s = k + e x
    verifier  recomputes M(s) - e Y, which must hash to the same e

The same matrix is therefore applied to nonces and to responses; the functions below build
its rows for either. An image never follows from what a prover sends alone when that would
let it choose the statement: Z is computed by the issuer from its own key.

Vectors are flat tuples of scalars in the order of the matrices' headings.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    FixedBase,
    Point,
    Term,
    add,
    multiexp,
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
    return [add(*(_product(products, term) for term in row)) for row in rows]


def _product(products: dict[Term, Point], term: Term) -> Point:
    if term not in products:
        products[term] = multiply_secret(*term)
    return products[term]


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


def show_rows(i: FixedBase, shown: Shown, vector: Vector) -> tuple[Row, ...]:
    """For the images of show_images(); each witness is one column.

    witness    z    z0=-tz  t    a    r
    Z    =  [  I    .       .    .    .  ]
    Cx1  =  [  Gx1  Gx0     Cx0  .    .  ]
    Ca   =  [  Ga   .       .    Gg   Gh ]
    S    =  [  .    .       .    .    Gs ]
    """
    z, z0, t, a, r = vector
    return (
        ((i, z),),
        ((GX1, z), (GX0, z0), (shown.cx0, t)),
        ((GA, z), (GG, a), (GH, r)),
        ((GS, r),),
    )


def show_images(shown: Shown, z: Point) -> tuple[Point, ...]:
    """The left-hand sides of show_rows(); Z is the issuer's to compute."""
    return z, shown.cx1, shown.ca, shown.serial


# Request: a commitment to an amount, whose range is another module's to prove.


def attribute_row(amount: int, r: int) -> Row:
    """M = [ Gg Gh ] over (a, r): the attribute of a credential."""
    return (GG, amount), (GH, r)


# Issuance: the issuer used the key it published.

ISSUANCE_LENGTH: Final = 5


class Issued(NamedTuple):
    """A MAC and what it is on; `u` is U(t)."""

    t: int
    u: Point
    m: Point


def issuance_rows(credentials: Iterable[Issued], vector: Vector) -> tuple[Row, ...]:
    """For the images V of each credential, then GV-I and Cw; each witness is one column.

    witness    w    w'   x0   x1    ya
    V     = [  Gw   .    U    tU    M  ]
    GV-I  = [  .    .    Gx0  Gx1   Ga ]
    Cw    = [  Gw   Gwp  .    .     .  ]
    """
    w, wp, x0, x1, ya = vector
    return (
        *(((GW, w), (c.u, (x0 + x1 * c.t) % ORDER), (c.m, ya)) for c in credentials),
        ((GX0, x0), (GX1, x1), (GA, ya)),
        ((GW, w), (GWP, wp)),
    )
