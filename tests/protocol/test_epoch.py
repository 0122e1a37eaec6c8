"""Tariffs and epochs: parameters that all clients see alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol.epoch import EPOCH_SIZE, NO_EPOCH, EpochParameters
from hpkvfs.protocol.errors import BadIssuance, Malformed
from hpkvfs.protocol.group import from_text, tagged_hash
from hpkvfs.protocol.tariff import HOURS_LIMIT, Operation, Tariff, least_entry_price
from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE
from tests.examples import examples
from tests.protocol.parties import TARIFF, epoch, issuer

U31 = st.integers(0, 2**31 - 1)


@st.composite
def tariffs(draw: st.DrawFn) -> Tariff:
    insert = draw(st.integers(1, 2**31 - 1))
    entry = draw(st.integers(least_entry_price(insert), 2**31 - 1))
    hours = draw(st.integers(1, HOURS_LIMIT))
    return Tariff(draw(U31), insert, draw(st.integers(0, insert - 1)), entry, hours)


def patch(start: int, piece: bytes) -> bytes:
    encoded = epoch().encode()
    return encoded[:start] + piece + encoded[start + len(piece) :]


@pytest.mark.parametrize(
    "prices", [(1, 10, 10), (1, 10, 11), (1, 0, 0), (-1, 10, 8), (1, 10, -1), (2**31, 10, 8)]
)
def test_tariffs_that_print_money_do_not_exist(prices: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        Tariff(*prices)


@pytest.mark.parametrize("insert", [1, 10, 16, 1_000, 2**31 - 1])
def test_a_byte_of_an_entry_costs_ten_times_that_of_a_blob(insert: int) -> None:
    least = least_entry_price(insert)
    assert least * BLOB_SIZE >= 10 * insert * ENTRY_SIZE > (least - 1) * BLOB_SIZE
    Tariff(1, insert, 0, least)
    with pytest.raises(ValueError, match="breakglass"):
        Tariff(1, insert, 0, least - 1)


@pytest.mark.parametrize("hours", [0, -1, HOURS_LIMIT + 1])
def test_a_timer_runs_for_an_hour_to_a_year(hours: int) -> None:
    with pytest.raises(ValueError, match="hours"):
        Tariff(entry_hours=hours)


def test_deltas() -> None:
    tariff = Tariff(1, 10, 8, 12)
    assert tariff.delta(Operation.STORE_ENTRY) == -12
    assert tariff.delta(Operation.LOOK_UP) == -1
    assert tariff.delta(Operation.INSERT) == -10
    assert tariff.delta(Operation.DELETE) == 8
    assert tariff.delta(Operation.REISSUE) == 0
    for operation in (Operation.ISSUE, Operation.PARAMETERS, Operation.OPEN_ENTRY):
        with pytest.raises(ValueError):
            tariff.delta(operation)


@given(tariffs(), st.integers(0, 2**32 - 1), st.binary(min_size=32, max_size=32))
@examples(20)
def test_parameters_survive_their_encoding(tariff: Tariff, number: int, previous: bytes) -> None:
    made = EpochParameters(number, tariff, issuer().parameters, previous)
    decoded = EpochParameters.decode(made.encode())
    assert decoded == made
    assert decoded.digest == made.digest
    assert len(made.encode()) == EPOCH_SIZE < 9_000


def test_the_digest_is_documented() -> None:
    assert epoch().digest == tagged_hash("hpkv/epoch/v1", epoch().encode())


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (0, b"X"),
        (4, b"\0"),
        (4, b"\2"),
        (13, bytes(4)),
        (17, (10).to_bytes(4, "big")),
        (9, b"\x80\0\0\0"),
        (21, (6).to_bytes(4, "big")),
        (25, bytes(2)),
        (59, bytes(33)),
        (92, bytes(33)),
        (125, bytes(33)),
        (EPOCH_SIZE - 32, b"\xff" * 32),
    ],
)
def test_malformed_parameters_are_refused(start: int, piece: bytes) -> None:
    with pytest.raises(Malformed):
        EpochParameters.decode(patch(start, piece))


def test_other_lengths_are_refused() -> None:
    for wrong in (b"", epoch().encode()[:-1], epoch().encode() + b"\0"):
        with pytest.raises(Malformed):
            EpochParameters.decode(wrong)


@pytest.mark.parametrize("number", [-1, 2**32])
def test_numbers_out_of_range_are_refused(number: int) -> None:
    with pytest.raises(ValueError):
        EpochParameters(number, TARIFF, issuer().parameters, NO_EPOCH)


def test_a_predecessor_is_a_digest() -> None:
    with pytest.raises(ValueError):
        EpochParameters(0, TARIFF, issuer().parameters, bytes(31))


@pytest.mark.parametrize("start", [5, 9, 16, 24, 26, 27, 40])
def test_every_field_is_in_the_digest(start: int) -> None:
    changed = EpochParameters.decode(patch(start, bytes([epoch().encode()[start] ^ 1])))
    assert changed.digest != epoch().digest


def test_verify_checks_the_table() -> None:
    EpochParameters.decode(epoch().encode()).verify()
    false = EpochParameters.decode(patch(125 + 33 * 40, from_text("a tag").encode()))
    with pytest.raises(BadIssuance):
        false.verify()


def test_epochs_form_a_chain() -> None:
    older = epoch()
    newer = EpochParameters(1, TARIFF, issuer().parameters, older.digest)
    assert newer.follows(older)
    assert not older.follows(newer)
    assert not EpochParameters(2, TARIFF, issuer().parameters, older.digest).follows(older)
    assert not EpochParameters(1, TARIFF, issuer().parameters, NO_EPOCH).follows(older)
