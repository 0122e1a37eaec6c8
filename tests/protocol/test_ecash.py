"""Cashu ecash against the NUTs' own test vectors, and tokens that are none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol.ecash import (
    Output,
    Proof,
    Signed,
    Token,
    dleq_challenge,
    hash_to_curve,
    outputs,
    powers,
)
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import Point, add, generator_multiple, multiply

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "cashu.json").read_text()
)


def point(text: str) -> Point:
    return Point.decode(bytes.fromhex(text))


@pytest.mark.parametrize("message, expected", VECTORS["hash_to_curve"])
def test_a_message_becomes_its_point(message: str, expected: str) -> None:
    assert hash_to_curve(bytes.fromhex(message)) == point(expected)


@pytest.mark.parametrize("secret, blinding, expected", VECTORS["blinded"])
def test_a_secret_is_blinded(secret: str, blinding: str, expected: str) -> None:
    """The vectors' secrets are bytes; ours are text, whose bytes go in."""
    factor = int(blinding, 16)
    assert add(hash_to_curve(bytes.fromhex(secret)), generator_multiple(factor)) == point(expected)


def test_the_challenge_is_of_uncompressed_hexadecimal() -> None:
    vector = VECTORS["challenge"]
    assert dleq_challenge(*map(point, vector["points"])).hex() == vector["hash"]


@pytest.mark.parametrize("vector", VECTORS["signed"])
def test_an_honest_signature_is_told_from_others(vector: dict[str, str]) -> None:
    signed = Signed.decode(vector["signature"], vector["e"], vector["s"])
    key, blinded = point(vector["key"]), point(vector["blinded"])
    assert signed.is_honest(key, blinded)
    assert not signed.is_honest(hash_to_curve(b"another key"), blinded)
    assert not signed.is_honest(key, hash_to_curve(b"another output"))
    assert not Signed(signed.point, signed.e, signed.s + 1).is_honest(key, blinded)
    assert not Signed(hash_to_curve(b"forged"), signed.e, signed.s).is_honest(key, blinded)


def test_a_coin_is_unblinded() -> None:
    """From the vector's coin the mint's answer follows: C' = C + rK."""
    vector = VECTORS["coin"]
    key, blinding = point(vector["key"]), int(vector["r"], 16)
    answer = add(point(vector["C"]), multiply(key, blinding)).encode().hex()
    output = Output(1, "00882760bfa2eb41", vector["secret"], blinding)
    coin = output.unblind(key, Signed.decode(answer, vector["e"], vector["s"]))
    assert coin == Proof(1, output.keyset, vector["secret"], bytes.fromhex(vector["C"]))
    with pytest.raises(Malformed, match="did not make"):
        output.unblind(hash_to_curve(b"key"), Signed.decode(answer, vector["e"], vector["s"]))


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_tokens_of_both_versions_are_read(version: str) -> None:
    vector = VECTORS[version]
    token = Token.decode(vector["text"])
    coins = [(one.amount, one.keyset, one.secret, one.signature.hex()) for one in token.proofs]
    assert (token.mint, token.unit) == (vector["mint"], "sat")
    assert coins == [tuple(one) for one in vector["coins"]]
    assert Token.decode(f" cashu:{vector['text']}\n") == token
    assert Token.decode(token.encode()) == token


def test_the_same_coins_buy_the_same_voucher_however_they_are_written() -> None:
    token = Token.decode(VECTORS["v4"]["text"])
    again = Token(token.mint, token.unit, token.proofs[::-1])
    assert again.voucher_secret == token.voucher_secret
    assert Token.decode(again.encode()).voucher_secret == token.voucher_secret
    fewer = Token(token.mint, token.unit, token.proofs[1:])
    assert fewer.voucher_secret != token.voucher_secret


def v3(form: object) -> str:
    return "cashuA" + base64.urlsafe_b64encode(json.dumps(form).encode()).decode()


def v4(form: object) -> str:
    return "cashuB" + base64.urlsafe_b64encode(cbor2.dumps(form)).decode()


GOOD = {"amount": 1, "id": "00ad", "secret": "s", "C": hash_to_curve(b"C").encode().hex()}


def of(*proofs: object, mint: object = "https://mint", **more: object) -> dict[str, object]:
    return {"token": [{"mint": mint, "proofs": list(proofs)}], **more}


def test_the_plainest_token_is_one() -> None:
    assert Token.decode(v3(of(GOOD))).amount == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cashuA",
        "cashuB!!!",
        "cassh" + VECTORS["v3"]["text"],
        VECTORS["v3"]["text"][6:],
        VECTORS["v4"]["text"][:-30],
        v4({}),
        v4([1]),
        v4({"m": "m", "u": "sat", "t": []}),
        v4({"m": "m", "u": "sat", "t": [{"i": "text", "p": [{"a": 1, "s": "s", "c": b""}]}]}),
        v3(of()),
        v3(of(GOOD, GOOD)),
        v3(of(GOOD, mint=7)),
        v3(of(GOOD | {"amount": 0})),
        v3(of(GOOD | {"amount": True})),
        v3(of(GOOD | {"amount": 1.5})),
        v3(of(GOOD | {"id": "no hex"})),
        v3(of(GOOD | {"C": "04" + "00" * 32})),
        v3(of(GOOD | {"secret": "\x1b[2J"})),
        v3({"token": [{"mint": "a", "proofs": [GOOD]}, {"mint": "b", "proofs": [GOOD]}]}),
        v3(of(*(GOOD | {"secret": str(n)} for n in range(257)))),
        "cashuA" + "A" * 20_000,
    ],
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        Token.decode(text)


@given(total=st.integers(1, 2**40))
def test_amounts_are_powers_of_two_that_add_up(total: int) -> None:
    assert sum(powers(total)) == total
    assert all(one & (one - 1) == 0 for one in powers(total))
    assert len(set(powers(total))) == len(powers(total))


def test_outputs_follow_from_the_seed_and_from_nothing_else() -> None:
    first = outputs([1, 2, 4], "00", b"s" * 32)
    assert outputs([1, 2, 4], "00", b"s" * 32) == first
    secrets = {one.secret for seed in (b"s", b"t") for one in outputs([1, 2], "00", seed * 32)}
    assert len(secrets) == 4
    assert "secret" not in repr(first[0]) and str(first[0].blinding) not in repr(first[0])
