"""The range proof's table: every entry is checked, once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol.credential import IssuerParameters, prepare
from hpkvfs.protocol.digits import AMOUNT_LIMIT, TABLE_SIZE, DigitKey, DigitTable, hide, value
from hpkvfs.protocol.errors import BadIssuance, Malformed
from hpkvfs.protocol.group import (
    ORDER,
    encode_points,
    encode_scalar,
    from_text,
    generator_multiple,
    multiply,
)
from hpkvfs.protocol.tariff import Operation
from tests.protocol.parties import Stream, issuer, parameters, statement

ENTRIES = 256 * 33


def altered(start: int, piece: bytes) -> DigitTable:
    encoded = issuer().parameters.table.encoded
    return DigitTable.decode(encoded[:start] + piece + encoded[start + len(piece) :])


def test_an_honest_table_is_believed() -> None:
    DigitTable.decode(issuer().parameters.table.encoded).verify()


@pytest.mark.parametrize("digit", [0, 1, 2, 127, 254, 255])
def test_one_false_entry_is_refused(digit: int) -> None:
    with pytest.raises(BadIssuance):
        altered(33 * digit, from_text("a tag").encode()).verify()


def test_an_entry_of_another_key_is_refused() -> None:
    """The subtle one: D_9 is a proper MAC, under y + 1."""
    with pytest.raises(BadIssuance):
        altered(33 * 9, issuer().parameters.table.entries[10].encode()).verify()


def test_two_entries_exchanged_are_refused() -> None:
    a, b = (issuer().parameters.table.entries[d].encode() for d in (65, 66))
    with pytest.raises(BadIssuance):
        altered(33 * 65, b + a).verify()


def test_a_table_with_its_first_entry_from_another_key_is_refused() -> None:
    other = DigitKey(99).table(7).entries[0].encode()
    with pytest.raises(BadIssuance):
        altered(0, other).verify()


@pytest.mark.parametrize("place", [0, 1], ids=["challenge", "response"])
@pytest.mark.parametrize("scalar", [0, 1, ORDER - 1])
def test_a_false_proof_is_refused(place: int, scalar: int) -> None:
    with pytest.raises(BadIssuance):
        altered(ENTRIES + 32 * place, encode_scalar(scalar)).verify()


@pytest.mark.parametrize("start", [0, 33 * 255])
def test_infinity_in_a_table_is_malformed(start: int) -> None:
    with pytest.raises(Malformed):
        altered(start, bytes(33))


def test_other_malformed_tables() -> None:
    encoded = issuer().parameters.table.encoded
    assert len(encoded) == TABLE_SIZE
    for wrong in (b"", encoded[:-1], encoded + b"\0", encoded[:-32] + ORDER.to_bytes(32, "big")):
        with pytest.raises(Malformed):
            DigitTable.decode(wrong)


def test_nothing_is_proven_to_an_issuer_with_a_false_table() -> None:
    """Before a digit could leak: prepare() itself makes the check."""
    table = altered(33 * 200, from_text("a tag").encode())
    false = IssuerParameters(issuer().parameters.cw, issuer().parameters.i.point, table)
    about = statement(Operation.REISSUE)
    with pytest.raises(BadIssuance):
        prepare(false, about, (), (0, 0), Stream("x"))


def test_degenerate_parameters_are_malformed() -> None:
    """I = GV, with which the proof of issuance would say nothing about x0, x1 and ya."""
    encoded = encode_points((issuer().parameters.cw, from_text("GV")))
    with pytest.raises(Malformed):
        IssuerParameters.decode(encoded + issuer().parameters.table.encoded)


@given(st.integers(0, AMOUNT_LIMIT - 1))
def test_digits_add_up_to_the_amount(amount: int) -> None:
    points, witness = hide(parameters().table, amount, Stream("hide"))
    blinds, base256 = witness[:4], witness[4:]
    assert value(witness) == amount and bytes(base256) == amount.to_bytes(4, "big")
    entries = parameters().table.entries
    assert [multiply(entries[d], v) for d, v in zip(base256, blinds, strict=True)] == list(points)


@pytest.mark.parametrize("amount", [-1, AMOUNT_LIMIT])
def test_what_is_no_amount_cannot_be_hidden(amount: int) -> None:
    with pytest.raises(OverflowError):
        hide(parameters().table, amount, Stream("hide"))


def test_entries_are_macs_of_their_digits() -> None:
    y = issuer()._y
    for d in (0, 1, 128, 255):
        assert multiply(parameters().table.entries[d], y + d) == generator_multiple(1)
