"""The group: known generators, agreeing multiplications, and no point that is none."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol import group
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import (
    FIELD,
    LAMBDA,
    ORDER,
    FixedBase,
    G,
    Infinity,
    Point,
    SigningKey,
    add,
    decode_nonzero,
    decode_points,
    decode_scalar,
    decode_scalars,
    encode_scalar,
    from_text,
    generator_multiple,
    multiexp,
    multiexp_secret,
    multiply,
    multiply_secret,
    short_scalar,
    tagged_hash,
    verify_signature,
    wide_scalar,
)
from tests.examples import examples
from tests.protocol.vectors import frozen

EDGES = (1, 2, 3, 255, 256, ORDER // 2, ORDER // 2 + 1, ORDER - 2, ORDER - 1)
nonzero = st.sampled_from(EDGES) | st.integers(1, ORDER - 1)
BASE = FixedBase(from_text("a base of the tests"))

NO_POINTS = {
    "infinity": bytes(33),
    "infinity with a sign": b"\x02" + bytes(32),
    "not on the curve": b"\x02" + (5).to_bytes(32, "big"),
    "x not reduced": b"\x02" + (FIELD + 1).to_bytes(32, "big"),
    "uncompressed": b"\x04" + G.point.encode()[1:],
    "hybrid": b"\x06" + G.point.encode()[1:],
    "short": G.point.encode()[:-1],
    "long": G.point.encode() + b"\0",
    "empty": b"",
}


@pytest.mark.parametrize(("name", "encoded"), frozen()["generators"].items())
def test_generators_are_those_of_the_reference_implementation(name: str, encoded: str) -> None:
    assert from_text(name).encode().hex() == encoded


def test_the_named_generators_come_from_their_names() -> None:
    named = {
        "Gw": group.GW,
        "Gwp": group.GWP,
        "Gx0": group.GX0,
        "Gx1": group.GX1,
        "GV": group.GV,
        "Gg": group.GG,
        "Gh": group.GH,
        "Ga": group.GA,
        "Gs": group.GS,
    }
    assert all(base.point == from_text(name) for name, base in named.items())
    assert len({base.point for base in (G, *named.values())}) == len(named) + 1


@pytest.mark.parametrize("encoded", NO_POINTS.values(), ids=NO_POINTS.keys())
def test_what_is_no_finite_point_is_refused(encoded: bytes) -> None:
    with pytest.raises(Malformed):
        Point.decode(encoded)


@given(nonzero)
def test_points_survive_their_encoding(scalar: int) -> None:
    point = generator_multiple(scalar)
    assert Point.decode(point.encode()) == point
    negative = -point
    assert -negative == point != negative


@given(st.binary(max_size=40))
def test_decoding_bytes_gives_a_point_of_just_these_bytes_or_malformed(encoded: bytes) -> None:
    try:
        point = Point.decode(encoded)
    except Malformed:
        return
    assert point.encode() == encoded


@given(nonzero)
@examples(40)
def test_every_way_to_multiply_agrees(scalar: int) -> None:
    expected = multiply(BASE.point, scalar)
    assert multiexp(((BASE, scalar),)) == expected
    assert multiexp(((BASE.point, scalar),)) == expected
    assert multiply_secret(BASE, scalar) == expected
    assert multiply_secret(BASE.point, scalar - ORDER) == expected
    assert generator_multiple(scalar) == multiexp(((G, scalar),)) == multiply(G.point, scalar)


@given(nonzero, nonzero, nonzero)
@examples(40)
def test_sums_of_products_distribute(a: int, b: int, c: int) -> None:
    point = multiply(BASE.point, c)
    terms = ((BASE, a), (point, b), (BASE.point, 0))
    total = (a + b * c) % ORDER
    if total:
        assert multiexp(terms) == multiply(BASE.point, total)
        assert multiexp_secret(terms[:2]) == multiply(BASE.point, total)
    else:
        with pytest.raises(Infinity):
            multiexp(terms)


def test_infinity_is_never_a_result() -> None:
    point = BASE.point
    attempts: list[Callable[[], Point]] = [
        lambda: add(point, -point),
        lambda: add(),
        lambda: multiply(point, 0),
        lambda: multiply(point, ORDER),
        lambda: multiply_secret(point, 0),
        lambda: generator_multiple(0),
        lambda: multiexp(((BASE, 0),)),
        lambda: multiexp(((point, 0),)),
        lambda: multiexp(()),
        lambda: multiexp(((BASE, 7), (point, ORDER - 7))),
    ]
    for attempt in attempts:
        with pytest.raises(Infinity):
            attempt()


def test_threads_may_share_a_base_that_is_not_built_yet() -> None:
    fresh = FixedBase(BASE.point)
    results: list[Point] = []
    threads = [
        threading.Thread(target=lambda: results.append(multiexp(((fresh, 7),)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [multiply(BASE.point, 7)] * 4


def test_lambda_is_the_curves_endomorphism() -> None:
    """What makes multiplying by a short scalar cheap, and short scalars differ."""
    assert (LAMBDA**2 + LAMBDA + 1) % ORDER == 0
    beta = int(multiply(G.point, LAMBDA).encode()[1:].hex(), 16)
    beta = beta * pow(int(G.point.encode()[1:].hex(), 16), -1, FIELD) % FIELD
    assert beta != 1 and pow(beta, 3, FIELD) == 1


short = st.sampled_from([bytes(16), b"\0" * 15 + b"\1", b"\xff" * 16]) | st.binary(
    min_size=16, max_size=16
)


@given(short, short)
def test_differences_of_short_scalars_have_inverses(one: bytes, other: bytes) -> None:
    """Extracting a witness from two challenges divides by their difference."""
    assert (short_scalar(one) == short_scalar(other)) == (one == other)
    assert (short_scalar(one) == 0) == (one == bytes(16))


@given(st.integers(0, ORDER - 1))
def test_scalars_survive_their_encoding(scalar: int) -> None:
    assert decode_scalar(encode_scalar(scalar)) == scalar
    assert decode_scalars(encode_scalar(scalar) * 3) == [scalar] * 3


@pytest.mark.parametrize("value", [ORDER, ORDER + 1, 2**256 - 1])
def test_scalars_that_are_not_reduced_are_refused(value: int) -> None:
    with pytest.raises(Malformed):
        decode_scalar(value.to_bytes(32, "big"))
    with pytest.raises(Malformed):
        decode_scalars(bytes(32) + value.to_bytes(32, "big"))


@pytest.mark.parametrize("encoded", [b"", bytes(31), bytes(33)])
def test_scalars_of_the_wrong_length_are_refused(encoded: bytes) -> None:
    with pytest.raises(Malformed):
        decode_scalar(encoded)


@pytest.mark.parametrize("size", [1, 31, 63])
def test_scalars_and_points_that_are_cut_off_are_refused(size: int) -> None:
    with pytest.raises(Malformed):
        decode_scalars(bytes(size))
    with pytest.raises(Malformed):
        decode_points((2 * G.point.encode())[:size])


def test_tables_that_share_a_page_do_not_disturb_one_another() -> None:
    bases = [FixedBase(from_text(f"neighbour {number}")) for number in range(5)]
    for scalar in (1, 2, ORDER - 1, 2**255 + 12_345):
        for base in bases:
            assert multiexp(((base, scalar),)) == multiply(base.point, scalar)


def test_zero_is_refused_where_it_is_forbidden() -> None:
    assert decode_scalar(bytes(32)) == 0
    with pytest.raises(Malformed):
        decode_nonzero(bytes(32))


@given(st.binary(min_size=48, max_size=64))
def test_wide_scalars_are_never_zero(uniform: bytes) -> None:
    assert 1 <= wide_scalar(uniform) < ORDER


def test_a_tagged_hash_is_that_of_bip340() -> None:
    tag = hashlib.sha256(b"hpkv/test").digest()
    assert tagged_hash("hpkv/test", b"data") == hashlib.sha256(tag + tag + b"data").digest()


def test_signatures_are_those_of_bip340() -> None:
    vector = frozen()["bip340"]
    key = SigningKey(bytes.fromhex(vector["secret"]))
    assert key.public[1:].hex() == vector["public"]
    assert key.sign(bytes.fromhex(vector["message"])).hex() == vector["signature"]


def test_a_signature_holds_for_its_key_and_digest_only() -> None:
    key, other, digest = SigningKey(b"k" * 32), SigningKey(b"o" * 32), b"d" * 32
    signature = key.sign(digest)
    assert verify_signature(key.public, digest, signature)
    assert not verify_signature(other.public, digest, signature)
    assert not verify_signature(key.public, b"e" * 32, signature)
    assert not verify_signature(key.public, digest, bytes(64))
    assert not verify_signature(key.public, digest, signature[:-1])
    assert not verify_signature(key.public, digest[:-1], signature)
    assert not verify_signature(bytes(33), digest, signature)
    assert not verify_signature(key.public[:-1], digest, signature)


def test_two_keys_agree_on_a_secret() -> None:
    mine, yours = SigningKey(b"m" * 32), SigningKey(b"y" * 32)
    product = multiply(Point.decode(yours.public), int.from_bytes(b"m" * 32, "big"))
    assert mine.shared(yours.public) == yours.shared(mine.public)
    assert mine.shared(yours.public) == hashlib.sha256(product.encode()).digest()
    with pytest.raises(Malformed):
        mine.shared(bytes(33))


@pytest.mark.parametrize("secret", [bytes(32), encode_scalar(ORDER), b"", b"k" * 31, b"k" * 33])
def test_what_is_no_private_key_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError):
        SigningKey(secret)


def test_a_private_key_does_not_show_itself() -> None:
    assert "6b6b" not in repr(SigningKey(b"k" * 32)) and "kk" not in repr(SigningKey(b"k" * 32))


CYCLES = """
import gc
from hpkvfs.protocol.group import G, FixedBase, multiexp, multiply

class Holder:
    pass

gc.set_threshold(50)
for number in range(2, 40):
    holder = Holder()
    holder.self, holder.base = holder, FixedBase(multiply(G.point, number))
    multiexp([(holder.base, 3)])
    [Holder() for _ in range(200)]
gc.collect()
print("alive")
"""


def test_tables_in_cycles_can_be_collected() -> None:
    """In a process of its own, which a table that cffi owned would crash."""
    done = subprocess.run([sys.executable, "-c", CYCLES], capture_output=True, text=True)
    assert done.stdout == "alive\n", done.stderr
