"""The scheme once more, from docs/credentials.md alone: slow, in plain Python, with no library.

It shares no code with hpkvfs.protocol, so that the frozen exchange being valid here means that
the document, and not only the implementation, says how it is made.
"""

from __future__ import annotations

import hashlib
from functools import cache

import pytest

from tests.protocol.parties import epoch, next_epoch, parameters
from tests.protocol.vectors import frozen

P = 2**256 - 2**32 - 977
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
LAMBDA = 0x5363AD4CC05C30E0A5261C028812645A122E22EA20816678DF02967C1B23BD72
Affine = tuple[int, int] | None
G = (
    0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798,
    0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8,
)


def add(a: Affine, b: Affine) -> Affine:
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = 3 * a[0] * a[0] * pow(2 * a[1], -1, P)
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def mul(k: int, a: Affine) -> Affine:
    total: Affine = None
    for bit in bin(k % N)[2:]:
        total = add(total, total)
        if bit == "1":
            total = add(total, a)
    return total


def lin(*terms: tuple[int, Affine]) -> Affine:
    total: Affine = None
    for k, a in terms:
        total = add(total, mul(k, a))
    return total


def enc(a: Affine) -> bytes:
    assert a is not None
    return bytes([2 + a[1] % 2]) + a[0].to_bytes(32, "big")


def root(x: int) -> int | None:
    square = (x**3 + 7) % P
    y = pow(square, (P + 1) // 4, P)
    return y if y * y % P == square else None


def dec(raw: bytes) -> Affine:
    x = int.from_bytes(raw[1:], "big")
    y = root(x)
    assert y is not None
    return x, y if y % 2 == raw[0] - 2 else P - y


def chain(seed: bytes) -> tuple[int, int]:
    """x, and the root that is a quadratic residue."""
    x = hashlib.sha256(seed).digest()
    while (y := root(int.from_bytes(x, "big"))) is None:
        x = hashlib.sha256(x).digest()
    return int.from_bytes(x, "big"), y


@cache
def gen(name: str) -> Affine:
    return chain(name.encode())


def framed(label: str, data: bytes) -> bytes:
    return bytes([len(label)]) + label.encode() + len(data).to_bytes(4, "big") + data


def transcript(domain: str, *fields: tuple[str, bytes]) -> bytes:
    text = framed("domain", domain.encode()) + b"".join(framed(*field) for field in fields)
    return hashlib.sha512(text).digest()


def num(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def short(raw: bytes) -> int:
    return (num(raw[:8]) + num(raw[8:]) * LAMBDA) % N


def weights_of(digest: bytes) -> list[int]:
    return [short(piece) for piece in cut(digest, 16)]


def cut(raw: bytes, size: int) -> list[bytes]:
    return [raw[i : i + size] for i in range(0, len(raw), size)]


class Known:
    """The frozen exchange, taken apart as the document says."""

    def __init__(self) -> None:
        text = frozen()["exchange"]
        key = bytes.fromhex(text["issuer"])
        self.w, self.wp, self.x0, self.x1, self.ya, self.y = map(num, cut(key[:192], 32))
        self.prf_key = key[192:]
        self.request = bytes.fromhex(text["request"])
        self.reply = bytes.fromhex(text["reply"])
        self.issued = [bytes.fromhex(c) for c in text["issued"].split()]
        self.presented = [bytes.fromhex(c) for c in text["presented"].split()]
        self.delta = -10
        self.statement = (
            ("epoch", bytes.fromhex(text["epoch_digest"])),
            ("operation", b"\4"),
            ("context", bytes.fromhex(text["context"])),
            ("delta", self.delta.to_bytes(8, "big", signed=True)),
        )
        self.cw = lin((self.w, gen("Gw")), (self.wp, gen("Gwp")))
        self.i = lin(
            (1, gen("GV")), (-self.x0, gen("Gx0")), (-self.x1, gen("Gx1")), (-self.ya, gen("Ga"))
        )
        self.issuer = transcript("hpkv/issuer/v1", ("parameters", parameters().encoded))[:32]

    def prf(self, label: str, data: bytes, count: int) -> list[int]:
        message = self.prf_key + bytes([len(label)]) + label.encode() + data
        stream = hashlib.shake_256(message).digest(48 * count)
        return [num(piece) % (N - 1) + 1 for piece in cut(stream, 48)]

    def binding(self) -> bytes:
        fields = (*self.statement, ("presented", b"\2"), ("request", self.request))
        return transcript("hpkv/binding/v1", *fields)[:32]

    def mac(self, t: int, u: Affine, m: Affine) -> Affine:
        return lin((self.w, gen("Gw")), (self.x0 + self.x1 * t, u), (self.ya, m))


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


def test_parameters_are_as_documented(known: Known) -> None:
    encoded = parameters().encoded
    assert encoded[:66] == enc(known.cw) + enc(known.i)
    for d in (0, 1, 255):
        entry = mul(pow(known.y + d, -1, N), G)
        assert encoded[66 + 33 * d : 99 + 33 * d] == enc(entry)
    tag = hashlib.sha256(b"hpkv/epoch/v1").digest()
    header = b"hpke\1" + b"".join(v.to_bytes(4, "big") for v in (0, 1, 10, 8, 10))
    header += (72).to_bytes(2, "big") + bytes(32)
    assert known.statement[0][1] == hashlib.sha256(tag + tag + header + encoded).digest()
    assert epoch().encode() == header + encoded


def test_the_table_is_proven_as_documented(known: Known) -> None:
    """With y at hand, s = k + e y, where k is the documented nonce."""
    encoded = parameters().encoded[66:]
    table, e, s = encoded[:8448], num(encoded[8448:8480]), num(encoded[8480:])
    domain = "hpkv/digit-table/v1"
    rho = [
        num(piece)
        for piece in cut(
            hashlib.shake_256(transcript(domain, ("table", table))).digest(255 * 16), 16
        )
    ]
    (k,) = known.prf("table", known.y.to_bytes(32, "big"), 1)
    p = sum(r * pow(known.y + d, -1, N) for d, r in enumerate(rho, 1))
    commitments = enc(mul(k, dec(table[:33]))) + enc(mul(k * p, G))
    assert e == short(transcript(domain, ("table", table), ("commitments", commitments))[:16])
    assert s == (k + e * known.y) % N


def test_the_credentials_presented_are_as_documented(known: Known) -> None:
    for place, raw in enumerate(known.presented):
        a, r, t, u = num(raw[:4]), num(raw[4:36]), num(raw[36:68]), dec(raw[68:101])
        assert raw[101:] == enc(known.mac(t, u, lin((a, gen("Gg")), (r, gen("Gh")))))
        assert enc(mul(r, gen("Gs"))) == known.request[165 * place + 132 : 165 * place + 165]


Fields = tuple[tuple[str, bytes], ...]


def check_request(known: Known, request: bytes, statement: Fields, into: Fields, y: int) -> None:
    """The challenge is that of what the responses come to, with digits made with y."""
    delta = int.from_bytes(statement[-1][1], "big", signed=True)
    points = [dec(raw) for raw in cut(request[:660], 33)]
    e, *x = map(num, cut(request[660:], 32))
    x.append(0)
    outs = [sum(256 ** (3 - j) * x[10 + 9 * i + 5 + j] for j in range(4)) for i in (0, 1)]
    x[27] = (x[3] + x[8] + e * delta - sum(outs)) % N
    fields = (("issuer", known.issuer), *into, ("presented", b"\2"), ("points", request[:660]))
    pz, ps1, ps2, pm = weights_of(transcript("hpkv/request/v1", *statement, *fields))
    owned, commitments = [], b""
    for i in (0, 1):
        ca, cx0, cx1, cv, serial = points[5 * i : 5 * i + 5]
        z, z0, t, a, r = x[5 * i : 5 * i + 5]
        big_z = lin(
            (1, cv), (-known.w, gen("Gw")), (-known.x0, cx0), (-known.x1, cx1), (-known.ya, ca)
        )
        owned += [(z * (1, pz)[i], known.i), (-e * (1, pz)[i], big_z)]
        owned += [(r * (ps1, ps2)[i], gen("Gs")), (-e * (ps1, ps2)[i], serial)]
        commitments += enc(lin((z, gen("Gx1")), (z0, gen("Gx0")), (t, cx0), (-e, cx1)))
        commitments += enc(lin((z, gen("Ga")), (a, gen("Gg")), (r, gen("Gh")), (-e, ca)))
    attributes, digits = [], b""
    for i in (0, 1):
        m, *vs = points[10 + 5 * i : 15 + 5 * i]
        r, *both = x[10 + 9 * i : 19 + 9 * i]
        a = sum(256 ** (3 - j) * both[4 + j] for j in range(4))
        attributes += [(s * (1, pm)[i], b) for s, b in ((a, gen("Gg")), (r, gen("Gh")), (-e, m))]
        for j in range(4):
            digits += enc(lin((both[j], G), (-both[4 + j] - e * y, vs[j])))
    commitments = enc(lin(*owned)) + commitments + enc(lin(*attributes)) + digits
    digest = transcript("hpkv/request/v1", *statement, *fields, ("commitments", commitments))
    assert e == short(digest[:16])


def test_the_request_is_as_documented(known: Known) -> None:
    check_request(known, known.request, known.statement, (), known.y)


def test_a_move_between_epochs_is_as_documented(known: Known) -> None:
    """What is presented is checked with one key, the digits and the reply with the other."""
    move = frozen()["move"]
    request, reply = bytes.fromhex(move["request"]), bytes.fromhex(move["reply"])
    w, _, x0, x1, ya, y = map(num, cut(bytes.fromhex(move["issuer"])[:192], 32))
    into = transcript("hpkv/issuer/v1", ("parameters", next_epoch().issuer.encoded))[:32]
    statement = (
        known.statement[0],
        ("operation", b"\2"),
        ("context", bytes.fromhex(move["epoch_digest"])),
        ("delta", bytes(8)),
    )
    check_request(known, request, statement, (("into", into),), y)
    for i, raw in enumerate(map(bytes.fromhex, move["issued"].split())):
        m = dec(request[330 + 165 * i : 363 + 165 * i])
        t, u = num(raw[36:68]), dec(raw[68:101])
        assert raw[101:] == enc(lin((w, gen("Gw")), (x0 + x1 * t, u), (ya, m)))
        assert raw[36:] == reply[98 * i : 98 * i + 98]


def test_the_reply_is_as_documented(known: Known) -> None:
    binding = known.binding()
    ms = [dec(known.request[330 + 165 * i : 363 + 165 * i]) for i in (0, 1)]
    drawn = known.prf("macs", binding, 4)
    ts, us = drawn[::2], [mul(u, G) for u in drawn[1::2]]
    macs = b"".join(
        t.to_bytes(32, "big") + enc(u) + enc(known.mac(t, u, m))
        for t, u, m in zip(ts, us, ms, strict=True)
    )
    fields = [("issuer", known.issuer), ("request", binding), ("macs", macs)]
    seed = transcript("hpkv/issuance/v1", *fields)
    w, wp, x0, x1, ya = k = known.prf("nonce", seed, 5)
    p = weights_of(seed)[0]
    mixed = [(w, gen("Gw"))]
    for share, t, u, m in zip((p, 1 - p), ts, us, ms, strict=True):
        mixed += [(share * (x0 + x1 * t), u), (share * ya, m)]
    commitments = enc(lin(*mixed))
    commitments += enc(lin((x0, gen("Gx0")), (x1, gen("Gx1")), (ya, gen("Ga"))))
    commitments += enc(lin((w, gen("Gw")), (wp, gen("Gwp"))))
    challenge = transcript("hpkv/issuance/v1", *fields, ("commitments", commitments))
    e = short(challenge[:16])
    key = known.w, known.wp, known.x0, known.x1, known.ya
    s = [(nonce + e * x) % N for nonce, x in zip(k, key, strict=True)]
    assert known.reply == macs + b"".join(v.to_bytes(32, "big") for v in (e, *s))


def test_the_credentials_issued_are_as_documented(known: Known) -> None:
    for place, raw in enumerate(known.issued):
        a, r, t, u = num(raw[:4]), num(raw[4:36]), num(raw[36:68]), dec(raw[68:101])
        m = lin((a, gen("Gg")), (r, gen("Gh")))
        assert a == 495
        assert enc(m) == known.request[330 + 165 * place : 363 + 165 * place]
        assert raw[101:] == enc(known.mac(t, u, m))
        assert raw[36:] == known.reply[98 * place : 98 * place + 98]
    draft = bytes.fromhex(frozen()["exchange"]["draft"])
    assert draft == known.binding() + b"".join(raw[:36] for raw in known.issued)
