"""secp256k1: the only importer of coincurve, whose libsecp256k1 is called through cffi directly.

Invariants. A `Point` is never infinity, nor is it ever built from bytes that libsecp256k1
does not accept; a sum or product that would be infinity raises `Infinity`. Scalars are plain
ints modulo ORDER. Two ways to multiply exist, and the name says which one runs:

    multiply, multiexp               time may depend on the scalar: responses, challenges
    multiply_secret, multiexp_secret constant time (secp256k1_ecdh): issuer secrets and nonces

Fixed generators are `FixedBase`s: a table of 32 x 256 multiples, built when first used (about
20 ms), turns a product into 32 additions. All fixed products of one sum share one call.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from sys import byteorder
from threading import Lock
from typing import Any, Final

from coincurve._libsecp256k1 import ffi as _ffi  # untyped: nothing of it leaves this module
from coincurve._libsecp256k1 import lib as _lib
from coincurve.context import GLOBAL_CONTEXT

from hpkvfs.protocol.errors import Malformed

ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
FIELD: Final = 2**256 - 2**32 - 977
POINT_SIZE: Final = 33
SCALAR_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64

Rng = Callable[[int], bytes]

# A cube root of unity modulo ORDER: with it (x, y) -> (beta x, y) multiplies by LAMBDA.
LAMBDA: Final = 0x5363AD4CC05C30E0A5261C028812645A122E22EA20816678DF02967C1B23BD72

_CONTEXT: Final[Any] = GLOBAL_CONTEXT.ctx
_COMPRESSED: Final[Any] = _lib.SECP256K1_EC_COMPRESSED
_UNCOMPRESSED: Final[Any] = _lib.SECP256K1_EC_UNCOMPRESSED
_COMB_OFFSETS: Final = (2**256 - 1 - ORDER, 2**256 - 1)  # of even scalars, of odd ones
_ZERO: Final = bytes(SCALAR_SIZE)
_BUILDING: Final = Lock()
_POINTER: Final = int(_ffi.sizeof("void *"))
_SECOND: Final = 1 if byteorder == "little" else _POINTER - 2  # byte of a pointer
_RAW_SIZE: Final = int(_ffi.sizeof("secp256k1_pubkey"))
# Types and functions are looked up once, not by name for each of the dozens of points in a proof.
_new: Final[Any] = _ffi.new
_combine: Final[Any] = _lib.secp256k1_ec_pubkey_combine
_ecdh: Final[Any] = _lib.secp256k1_ecdh
_parse: Final[Any] = _lib.secp256k1_ec_pubkey_parse
_serialize: Final[Any] = _lib.secp256k1_ec_pubkey_serialize
_tweak_mul: Final[Any] = _lib.secp256k1_ec_pubkey_tweak_mul
_KEY: Final[Any] = _ffi.typeof("secp256k1_pubkey *")
_KEYS: Final[Any] = _ffi.typeof("secp256k1_pubkey *[]")
_BYTES: Final[Any] = _ffi.typeof("unsigned char []")
_SIZE: Final[Any] = _ffi.typeof("size_t *")
_NULL: Final[Any] = _ffi.NULL
_memmove: Final[Any] = _ffi.memmove
_buffer: Final[Any] = _ffi.buffer
_from_buffer: Final[Any] = _ffi.from_buffer
_WHOLE: Final = b"\4" + bytes(64)  # SEC 1 uncompressed: 04 || x || y

_HUGE_PAGE: Final = 2**21
_ROW: Final = _HUGE_PAGE // 32
_INTERLEAVED: Final = 256 // _RAW_SIZE
_ROOM: Final[list[tuple[object, int]]] = []


def encode_scalar(scalar: int) -> bytes:
    """32 bytes, big-endian; the scalar must already be reduced."""
    return scalar.to_bytes(SCALAR_SIZE, "big")


def decode_scalar(encoded: bytes) -> int:
    """From 32 bytes; Malformed unless canonical (below ORDER). Zero is allowed."""
    if len(encoded) != SCALAR_SIZE:
        raise Malformed(f"a scalar has {SCALAR_SIZE} bytes, not {len(encoded)}")
    scalar = int.from_bytes(encoded, "big")
    if scalar >= ORDER:
        raise Malformed("a scalar is not reduced")
    return scalar


def decode_scalars(encoded: bytes) -> list[int]:
    """From 32 bytes each; Malformed if one is not canonical."""
    if len(encoded) % SCALAR_SIZE:
        raise Malformed(f"scalars of {len(encoded)} bytes")
    starts = range(0, len(encoded), SCALAR_SIZE)
    scalars = [int.from_bytes(encoded[i : i + SCALAR_SIZE], "big") for i in starts]
    if max(scalars, default=0) >= ORDER:
        raise Malformed("a scalar is not reduced")
    return scalars


def decode_nonzero(encoded: bytes) -> int:
    """As decode_scalar, but zero is Malformed too."""
    scalar = decode_scalar(encoded)
    if scalar == 0:
        raise Malformed("a scalar is zero where that is forbidden")
    return scalar


def split(encoded: bytes, size: int) -> list[bytes]:
    """Consecutive pieces of `size` bytes; the last is shorter if the length does not fit."""
    return [encoded[i : i + size] for i in range(0, len(encoded), size)]


def wide_scalar(uniform: bytes) -> int:
    """A scalar in 1..n-1 from at least 48 uniform bytes: bias below 2^-127."""
    return int.from_bytes(uniform, "big") % (ORDER - 1) + 1


def short_scalar(uniform: bytes) -> int:
    """a + b LAMBDA from 16 bytes, a and b of 8 each: one of 2^128 scalars, all different.

    libsecp256k1 splits a scalar into two halves in just this way, so that one with short halves
    takes half the doublings (challenges in this form: Halo, eprint 2019/1021, section 6.2).
    a + b LAMBDA = 0 mod n only if n divides a^2 - ab + b^2, which is less than n here unless
    a = b = 0: therefore no two are equal, and each has an inverse but zero.
    """
    a, b = int.from_bytes(uniform[:8], "big"), int.from_bytes(uniform[8:16], "big")
    return (a + b * LAMBDA) % ORDER


def random_scalar(rng: Rng) -> int:
    """A uniform scalar in 1..n-1."""
    return wide_scalar(rng(48))


class Infinity(ArithmeticError):
    """A sum or product is the point at infinity; only a dishonest input makes it so."""


class Point:
    """A finite point of secp256k1; immutable."""

    __slots__ = ("_raw",)

    def __init__(self, raw: Any) -> None:
        """Of a libsecp256k1 key that is known to be valid; others use decode()."""
        self._raw = raw

    @classmethod
    def decode(cls, encoded: bytes) -> Point:
        """From 33 compressed bytes; Malformed unless they are a finite point of the curve."""
        if len(encoded) != POINT_SIZE:
            raise Malformed(f"a point has {POINT_SIZE} bytes, not {len(encoded)}")
        raw = _new(_KEY)
        if not _parse(_CONTEXT, raw, bytes(encoded), POINT_SIZE):
            raise Malformed("not a point of secp256k1")
        return cls(raw)

    def encode(self) -> bytes:
        """33 bytes, compressed (SEC 1)."""
        return encode_points((self,))

    def encode_whole(self) -> bytes:
        """65 bytes, uncompressed (SEC 1)."""
        out, size = _new(_BYTES, 65), _new(_SIZE, 65)
        _serialize(_CONTEXT, out, size, self._raw, _UNCOMPRESSED)
        return bytes(_ffi.buffer(out))

    def __neg__(self) -> Point:
        raw = _new(_KEY, self._raw[0])
        _lib.secp256k1_ec_pubkey_negate(_CONTEXT, raw)
        return Point(raw)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self.encode() == other.encode()

    def __hash__(self) -> int:
        return hash(self.encode())

    def __repr__(self) -> str:
        return f"Point({self.encode().hex()})"


def encode_points(points: Iterable[Point]) -> bytes:
    """Their encodings, one after the other."""
    keys = [point._raw for point in points]
    out = _new(_BYTES, POINT_SIZE * len(keys))
    size = _new(_SIZE, POINT_SIZE)
    for place, key in enumerate(keys):
        start = out + POINT_SIZE * place
        _serialize(_CONTEXT, start, size, key, _COMPRESSED)
    encoded: bytes = _ffi.buffer(out)[:]
    return encoded


def decode_points(encoded: bytes) -> list[Point]:
    """Inverse of encode_points; Malformed if one is not a point."""
    if len(encoded) % POINT_SIZE:
        raise Malformed(f"points of {len(encoded)} bytes")
    points, bytes_of = [], _ffi.from_buffer(_BYTES, encoded)
    for start in range(0, len(encoded), POINT_SIZE):
        raw = _new(_KEY)
        if not _parse(_CONTEXT, raw, bytes_of + start, POINT_SIZE):
            raise Malformed("not a point of secp256k1")
        points.append(Point(raw))
    return points


class FixedBase:
    """A generator with its comb: row i holds the odd multiples -255..255 of 256^i P.

    A scalar s, or s - n if s is even, becomes u = (s + 2^256 - 1) / 2, whose bytes b select
    2b - 255: never zero, so that each product is exactly 32 additions, whatever the scalar.
    Entry b of row i is 2^16 i + 2^8 b bytes behind the first, so that b is a byte of its address.
    """

    __slots__ = ("_owner", "_rows", "point")

    def __init__(self, point: Point) -> None:
        self.point: Final = point
        self._owner: object = None
        self._rows = b""

    def addresses(self, scalar: int) -> bytearray:
        """Where the 32 table entries are whose sum is scalar * point, as native pointers."""
        places = bytearray(self._rows or self._build())
        scalar %= ORDER
        recoded = (scalar + _COMB_OFFSETS[scalar & 1]) >> 1
        places[_SECOND::_POINTER] = recoded.to_bytes(32, "little")
        return places

    def _build(self) -> bytes:
        """Make the table once: a second one would free the first under another thread's feet."""
        with _BUILDING:
            if not self._rows:
                self._owner, first = _room()
                _fill(first, self.point)
                rows = range(first, first + _HUGE_PAGE, _ROW)
                self._rows = b"".join(row.to_bytes(_POINTER, byteorder) for row in rows)
        return self._rows


Base = Point | FixedBase
Term = tuple[Base, int]


def _room() -> tuple[object, int]:
    """The address of a table's first entry, and who keeps it: in a huge page where there are any.

    A product reads 32 entries from anywhere in its table. With small pages, finding where those
    are in memory is a sixth of its time. Four tables fill a page, entry by entry in turn.

    It is the address that is kept, and no object of cffi's: when those of from_buffer are in a
    cycle, collecting them makes the process crash.
    """
    if not _ROOM:
        pages = mmap.mmap(-1, 2 * _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):
            pages.madvise(mmap.MADV_HUGEPAGE)
        start = int(_ffi.cast("uintptr_t", _ffi.from_buffer(pages)))
        first = start + -start % _HUGE_PAGE
        _ROOM.extend((pages, first + _RAW_SIZE * place) for place in range(_INTERLEAVED))
    return _ROOM.pop()


def _fill(first: int, base: Point) -> None:
    """Write a table."""
    table = _ffi.cast(_KEY, first)
    for row in range(32):
        base = _fill_row(table + row * _ROW // _RAW_SIZE, base)


def _fill_row(row: Any, base: Point) -> Point:
    """Write (2b - 255) base for b = 0..255; return 256 base."""
    entries = [row + _INTERLEAVED * b for b in range(256)]
    twice = add(base, base)
    entries[128][0] = base._raw[0]
    for b in range(129, 256):
        _combine(_CONTEXT, entries[b], [entries[b - 1], twice._raw], 2)
    for b in range(128):
        entries[b][0] = entries[255 - b][0]
        _lib.secp256k1_ec_pubkey_negate(_CONTEXT, entries[b])
    last = Point(_new(_KEY, entries[255][0]))
    return add(last, base)


def _sum(keys: Any) -> Point:
    """Of an array or list of pointers to keys, whose owners the caller keeps alive."""
    count = len(keys)
    if not count:  # libsecp256k1 would abort the process
        raise Infinity("an empty sum")
    raw = _new(_KEY)
    if not _combine(_CONTEXT, raw, keys, count):
        raise Infinity("the sum is the point at infinity")
    return Point(raw)


def add(*points: Point) -> Point:
    """The sum of points; Infinity when it is."""
    return _sum([point._raw for point in points])


def multiply(point: Point, scalar: int) -> Point:
    """scalar * point in variable time; Infinity for scalar 0 mod n."""
    return Point(_product(point._raw, scalar))


def _product(key: Any, scalar: int) -> Any:
    raw = _new(_KEY, key[0])
    if not _tweak_mul(_CONTEXT, raw, (scalar % ORDER).to_bytes(SCALAR_SIZE, "big")):
        raise Infinity("a product with zero")
    return raw


def multiexp(terms: Iterable[Term], *points: Point) -> Point:
    """Sum of base * scalar, plus `points`, in variable time; Infinity when it is."""
    keys, fixed = [point._raw for point in points], bytearray()
    for base, scalar in terms:
        if isinstance(base, FixedBase):
            fixed += base.addresses(scalar)
        elif scalar % ORDER:
            keys.append(_product(base._raw, scalar))
    if not fixed:
        return _sum(keys)
    if keys:
        fixed += _buffer(_new(_KEYS, keys))
    return _sum(_from_buffer(_KEYS, fixed))


@_ffi.callback("int(unsigned char *, unsigned char *, unsigned char *, void *)")  # type: ignore[untyped-decorator]  # cffi has no types
def _coordinates(output: Any, x: Any, y: Any, _data: Any) -> int:
    """An ECDH "hash" that keeps the point: x || y."""
    _memmove(output, x, 32)
    _memmove(output + 32, y, 32)
    return 1


def multiply_secret(base: Base, scalar: int) -> Point:
    """scalar * base in constant time; Infinity for scalar 0 mod n."""
    if base is G:
        return generator_multiple(scalar)  # twice as fast
    point = base.point if isinstance(base, FixedBase) else base
    encoded = (scalar % ORDER).to_bytes(SCALAR_SIZE, "big")
    if encoded == _ZERO:
        raise Infinity("a product with zero")
    whole = _new(_BYTES, _WHOLE)
    if not _ecdh(_CONTEXT, whole + 1, point._raw, encoded, _coordinates, _NULL):
        raise RuntimeError("a product was interrupted")  # never the other side's fault
    raw = _new(_KEY)
    _parse(_CONTEXT, raw, whole, len(_WHOLE))
    return Point(raw)


def multiexp_secret(terms: Iterable[Term], *points: Point) -> Point:
    """Sum of base * scalar, plus `points`, in constant time; Infinity when it is."""
    return add(*points, *(multiply_secret(base, scalar) for base, scalar in terms))


def generator_multiple(scalar: int) -> Point:
    """scalar * G in constant time (libsecp256k1's blinded table); Infinity for 0 mod n."""
    raw = _new(_KEY)
    encoded = (scalar % ORDER).to_bytes(SCALAR_SIZE, "big")
    if not _lib.secp256k1_ec_pubkey_create(_CONTEXT, raw, encoded):
        raise Infinity("a product with zero")
    return Point(raw)


# Points from text: nobody knows their discrete logarithms.


def _square_root(square: int) -> int | None:
    root = pow(square, (FIELD + 1) // 4, FIELD)
    return root if root * root % FIELD == square else None


def from_text(text: str) -> Point:
    """The generator of a name, as WabiSabi's reference implementation makes it.

    x <- SHA256(text), then x <- SHA256(x) until x is on the curve; y is the root that is
    itself a quadratic residue, which a power (p+1)/4 always is since p = 3 mod 4.
    """
    x = hashlib.sha256(text.encode()).digest()
    while True:
        value = int.from_bytes(x, "big")
        root = _square_root((pow(value, 3, FIELD) + 7) % FIELD) if value < FIELD else None
        if root is not None:
            return Point.decode(bytes([2 + root % 2]) + x)
        x = hashlib.sha256(x).digest()


G: Final = FixedBase(generator_multiple(1))
GW: Final = FixedBase(from_text("Gw"))
GWP: Final = FixedBase(from_text("Gwp"))
GX0: Final = FixedBase(from_text("Gx0"))
GX1: Final = FixedBase(from_text("Gx1"))
GV: Final = FixedBase(from_text("GV"))
GG: Final = FixedBase(from_text("Gg"))
GH: Final = FixedBase(from_text("Gh"))
GA: Final = FixedBase(from_text("Ga"))
GS: Final = FixedBase(from_text("Gs"))


# Keys of blobs: BIP340 signatures and ECDH.


@lru_cache(maxsize=32)
def _tag_prefix(tag: str) -> bytes:
    return hashlib.sha256(tag.encode()).digest() * 2


def tagged_hash(tag: str, data: bytes) -> bytes:
    """BIP340's SHA256(SHA256(tag) || SHA256(tag) || data): 32 bytes."""
    return hashlib.sha256(_tag_prefix(tag) + data).digest()


class SigningKey:
    """A secp256k1 private key that signs (BIP340) and agrees on secrets; it has no repr."""

    __slots__ = ("_keypair", "_secret", "public")

    def __init__(self, secret: bytes) -> None:
        """Of 32 bytes; ValueError if they are 0 or at least the group's order."""
        self._secret = bytes(secret)
        self._keypair = _new("secp256k1_keypair *")
        if len(secret) != SCALAR_SIZE or not _lib.secp256k1_keypair_create(
            _CONTEXT, self._keypair, self._secret
        ):
            raise ValueError("not a private key of secp256k1")
        raw = _new(_KEY)
        _lib.secp256k1_keypair_pub(_CONTEXT, raw, self._keypair)
        self.public: Final = Point(raw).encode()
        """33 bytes, compressed: the storage key of a blob."""

    def sign(self, digest: bytes) -> bytes:
        """64-byte BIP340 signature of a 32-byte digest; deterministic (auxiliary 0)."""
        if len(digest) != 32:
            raise ValueError(f"a digest has 32 bytes, not {len(digest)}")
        signature = _new("unsigned char [64]")
        if not _lib.secp256k1_schnorrsig_sign32(
            _CONTEXT, signature, bytes(digest), self._keypair, _ffi.NULL
        ):
            raise ValueError("libsecp256k1 refused to sign")
        return bytes(_ffi.buffer(signature))

    def shared(self, public: bytes) -> bytes:
        """32-byte ECDH secret with a 33-byte public key, SHA-256 of the compressed point.

        Constant time; Malformed for an invalid key. a.shared(b.public) == b.shared(a.public).
        """
        other = Point.decode(public)
        out = _new("unsigned char [32]")
        if not _ecdh(_CONTEXT, out, other._raw, self._secret, _ffi.NULL, _ffi.NULL):
            raise ValueError("libsecp256k1 refused to agree on a secret")
        return bytes(_ffi.buffer(out))


def verify_signature(public: bytes, digest: bytes, signature: bytes) -> bool:
    """Whether the BIP340 signature holds for this 33-byte key and 32-byte digest.

    BIP340 keys are x-only: a signature also holds for the key with the other sign, whose
    private key is the same but for sign. Sign digests that cover the whole key.
    Anything malformed is False.
    """
    if len(digest) != 32 or len(signature) != SIGNATURE_SIZE:
        return False
    try:
        key = Point.decode(public)
    except Malformed:
        return False
    x_only = _new("secp256k1_xonly_pubkey *")
    _lib.secp256k1_xonly_pubkey_from_pubkey(_CONTEXT, x_only, _ffi.NULL, key._raw)
    return bool(
        _lib.secp256k1_schnorrsig_verify(_CONTEXT, bytes(signature), bytes(digest), 32, x_only)
    )
