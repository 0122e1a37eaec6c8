"""Credentials as clients and issuers use them: honest rounds, tampering, replay, encodings."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol import credential
from hpkvfs.protocol.credential import (
    AMOUNT_LIMIT,
    Credential,
    Draft,
    Issuer,
    IssuerParameters,
    Statement,
    parse,
    prepare,
    request_size,
)
from hpkvfs.protocol.digits import DigitKey
from hpkvfs.protocol.errors import BadIssuance, BadProof, Malformed
from hpkvfs.protocol.group import (
    ORDER,
    Point,
    encode_scalar,
    from_text,
    generator_multiple,
    multiexp,
)
from hpkvfs.protocol.proofs import Shown, attribute_row
from hpkvfs.protocol.tariff import Operation
from tests.examples import examples
from tests.protocol.parties import (
    VOUCHER,
    Stream,
    buy,
    epoch,
    issuer,
    parameters,
    purse,
    settle,
    statement,
)
from tests.protocol.test_group import NO_POINTS
from tests.protocol.vectors import exchange, frozen

ABOUT = statement(Operation.INSERT, b"key and digest")
POINTS, RESPONSES = 20, 27
amounts = st.sampled_from([0, 1, 255, 256, AMOUNT_LIMIT - 1]) | st.integers(0, AMOUNT_LIMIT - 1)


def insertion(seed: str = "insertion") -> tuple[Draft, bytes, bytes]:
    """A draft that pays 10 of 1,000, its request, and the reply."""
    draft, request, reply = settle(ABOUT, purse(), (500, 490), Stream(seed))
    return draft, request.encoded, reply


def scalar_at(encoded: bytes, start: int) -> int:
    return int.from_bytes(encoded[start : start + 32], "big")


def patch(encoded: bytes, start: int, piece: bytes) -> bytes:
    return encoded[:start] + piece + encoded[start + len(piece) :]


def verify(request: bytes, about: Statement = ABOUT, presented: int = 2) -> None:
    issuer().verify(about, parse(request, presented))


# Honest rounds.


@given(amounts, st.integers(0, AMOUNT_LIMIT - 1))
@examples(8)
def test_a_voucher_buys_exactly_its_amount(total: int, part: int) -> None:
    part = min(part, total)
    held = buy((part, total - part), f"voucher {total} {part}")
    assert [c.amount for c in held] == [part, total - part]


@pytest.mark.parametrize("operation", [Operation.LOOK_UP, Operation.INSERT, Operation.DELETE])
def test_an_operation_costs_its_tariff(operation: Operation) -> None:
    about = statement(operation, b"context")
    after = VOUCHER + about.delta
    draft, _, reply = settle(about, purse(), (after, 0), Stream("tariff"))
    issued = draft.finish(parameters(), reply)
    assert [c.amount for c in issued] == [after, 0]


def test_what_was_issued_can_be_presented_in_turn() -> None:
    held = purse()
    for turn in range(3):
        half = (held[0].amount + held[1].amount - 10) // 2
        rest = held[0].amount + held[1].amount - 10 - half
        draft, _, reply = settle(ABOUT, held, (half, rest), Stream(f"turn {turn}"))
        held = draft.finish(parameters(), reply)
    assert sum(c.amount for c in held) == VOUCHER - 30


def test_credentials_are_shown_alike_from_memory_and_out_of_the_journal() -> None:
    draft, _, reply = insertion()
    held = draft.finish(parameters(), reply)
    read = [Credential.decode(one.encode()) for one in held]
    revived = Draft.decode(draft.encode()).finish(parameters(), reply)
    requests = {
        settle(ABOUT, x, (980, 0), Stream("alike"))[1].encoded for x in (held, read, revived)
    }
    assert len(requests) == 1


def test_null_credentials_are_free_and_worth_nothing() -> None:
    about = statement(Operation.REISSUE)
    draft, request, reply = settle(about, (), (0, 0), Stream("null"))
    assert request.serials == ()
    assert [c.amount for c in draft.finish(parameters(), reply)] == [0, 0]


def test_the_largest_amount_passes() -> None:
    largest = AMOUNT_LIMIT - 1
    rich = buy((largest, 0), "largest")
    draft, _, reply = settle(statement(Operation.REISSUE), rich, (0, largest), Stream("l"))
    assert draft.finish(parameters(), reply)[1].amount == largest


def test_sizes_are_those_documented() -> None:
    _, request, reply = insertion()
    assert (len(request), request_size(2), request_size(0), len(reply)) == (1_556, 1_556, 906, 388)


# What the client refuses to begin.


@pytest.mark.parametrize(
    "wanted", [(500, 491), (500, 489), (-1, 991), (AMOUNT_LIMIT, 0), (991, -1), (0, 0)]
)
def test_amounts_that_do_not_balance_are_not_prepared(wanted: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"balance|amounts"):
        prepare(parameters(), ABOUT, purse(), wanted, Stream("x"))


@pytest.mark.parametrize(
    ("operation", "count"),
    [
        (Operation.ISSUE, 2),
        (Operation.REISSUE, 1),
        (Operation.INSERT, 0),
        (Operation.LOOK_UP, 1),
        (Operation.DELETE, 0),
        (Operation.PARAMETERS, 0),
    ],
)
def test_each_operation_presents_its_number_of_credentials(
    operation: Operation, count: int
) -> None:
    held = purse()[:count]
    total = sum(c.amount for c in held)
    about = replace(ABOUT, operation=operation, delta=0)
    with pytest.raises(ValueError, match="present"):
        prepare(parameters(), about, held, (total, 0), Stream("x"))


def test_a_deletion_without_credentials_would_print_money() -> None:
    """A client that skips its own check is refused by the issuer's."""
    requests = [credential._request(parameters().table, a, Stream(f"{a}")) for a in (8, 0)]
    about = statement(Operation.DELETE)
    encoded = credential._prove(parameters(), about, [], requests, Stream("n"))
    with pytest.raises(BadProof, match="present"):
        verify(encoded, about, 0)


def test_one_credential_is_not_presented_twice() -> None:
    rich = purse()[0]
    with pytest.raises(ValueError, match="twice"):
        prepare(parameters(), ABOUT, (rich, rich), (1_000, 990), Stream("x"))


# Tampering on the way.


@pytest.mark.parametrize(
    "about",
    [
        replace(ABOUT, epoch=bytes(32)),
        replace(ABOUT, operation=Operation.DELETE),
        replace(ABOUT, context=b"another key and digest"),
        replace(ABOUT, context=b""),
        replace(ABOUT, delta=-9),
        replace(ABOUT, delta=8),
        replace(ABOUT, delta=0),
    ],
    ids=["epoch", "operation", "context", "no context", "price", "refund", "free"],
)
def test_a_proof_holds_for_its_statement_only(about: Statement) -> None:
    _, request, _ = insertion()
    verify(request)
    with pytest.raises(BadProof):
        verify(request, about)


@pytest.mark.parametrize("place", range(POINTS))
def test_every_point_matters(place: int) -> None:
    _, request, _ = insertion()
    with pytest.raises(BadProof):
        verify(patch(request, 33 * place, from_text("another point").encode()))


@pytest.mark.parametrize("place", range(POINTS))
def test_every_sign_matters(place: int) -> None:
    _, request, _ = insertion()
    with pytest.raises(BadProof):
        verify(patch(request, 33 * place, bytes([request[33 * place] ^ 1])))


@pytest.mark.parametrize("place", range(RESPONSES + 1))
def test_every_scalar_matters(place: int) -> None:
    _, request, _ = insertion()
    start = 33 * POINTS + 32 * place
    for scalar in ((scalar_at(request, start) + 1) % ORDER, ORDER - scalar_at(request, start), 1):
        with pytest.raises(BadProof):
            verify(patch(request, start, encode_scalar(scalar)))


def test_the_two_halves_of_a_request_are_not_interchangeable() -> None:
    _, request, _ = insertion()
    shown, wanted = request[:330], request[330:660]
    for swapped in (
        shown[165:] + shown[:165] + request[330:],
        shown + wanted[165:] + wanted[:165] + request[660:],
    ):
        with pytest.raises(BadProof):
            verify(swapped)


def test_the_parts_of_two_requests_do_not_mix() -> None:
    _, first, _ = insertion("first")
    _, second, _ = insertion("second")
    with pytest.raises(BadProof):
        verify(first[:330] + second[330:])
    with pytest.raises(BadProof):
        verify(first[:660] + second[660:])


def test_the_number_presented_is_part_of_the_proof() -> None:
    """Cutting both shows out of a request leaves one that presents none, and is refused."""
    about = statement(Operation.REISSUE)
    draft, _, _ = settle(about, purse(), (1_000, 0), Stream("cut"))
    cut = draft.request[330:660] + draft.request[660:692] + draft.request[692 + 320 :]
    with pytest.raises(BadProof):
        verify(cut, about, 0)


def test_a_request_is_for_one_issuer() -> None:
    other = Issuer.generate(Stream("other issuer"))
    _, request, _ = insertion()
    with pytest.raises(BadProof):
        other.verify(ABOUT, parse(request, 2))


@given(st.integers(0, 1_556 * 8 - 1))
@examples(60)
def test_no_bit_of_a_request_can_change(bit: int) -> None:
    _, request, _ = insertion()
    flipped = patch(request, bit // 8, bytes([request[bit // 8] ^ 1 << bit % 8]))
    with pytest.raises((Malformed, BadProof)):
        verify(flipped)


@given(st.integers(0, 388 * 8 - 1))
@examples(60)
def test_no_bit_of_a_reply_can_change(bit: int) -> None:
    draft, _, reply = insertion()
    flipped = patch(reply, bit // 8, bytes([reply[bit // 8] ^ 1 << bit % 8]))
    with pytest.raises((Malformed, BadIssuance)):
        draft.finish(parameters(), flipped)


# Replies.


def test_a_request_repeated_is_answered_by_the_same_bytes() -> None:
    _, request, reply = insertion()
    restarted = Issuer.from_bytes(issuer().to_bytes())
    assert issuer().issue(ABOUT, parse(request, 2)) == reply
    assert restarted.issue(ABOUT, parse(request, 2)) == reply


def test_nonces_are_never_used_for_two_challenges() -> None:
    """Were they, (s1 - s2) / (e1 - e2) would be the key."""
    _, request, _ = insertion()
    parsed = parse(request, 2)
    first = issuer().issue(ABOUT, parsed)
    for other in (replace(ABOUT, context=b"!"), replace(ABOUT, delta=-9)):
        second = issuer().issue(other, parsed)
        e = scalar_at(first, 196) - scalar_at(second, 196)
        leaked = [
            (scalar_at(first, i) - scalar_at(second, i)) * pow(e, -1, ORDER) % ORDER
            for i in range(228, 388, 32)
        ]
        assert not set(leaked) & set(issuer()._key)
        assert scalar_at(first, 0) != scalar_at(second, 0)


def test_a_reply_answers_one_request() -> None:
    first, _, _ = insertion("first")
    _, _, reply = insertion("second")
    with pytest.raises(BadIssuance):
        first.finish(parameters(), reply)


def test_a_reply_answers_one_statement() -> None:
    draft, request, _ = insertion()
    reply = issuer().issue(replace(ABOUT, context=b"another"), parse(request, 2))
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply)


def test_a_draft_survives_a_restart() -> None:
    draft, _, reply = insertion()
    revived = Draft.decode(draft.encode())
    assert revived.request == b""
    assert revived.finish(parameters(), reply) == draft.finish(parameters(), reply)


@pytest.mark.parametrize("change", range(3), ids=["amount", "r", "binding"])
def test_a_draft_that_was_tampered_with_finishes_nothing(change: int) -> None:
    draft, _, reply = insertion()
    place = (35, 60, 3)[change]
    secret = draft.encode()
    altered = patch(secret, place, bytes([secret[place] ^ 1]))
    with pytest.raises(BadIssuance):
        Draft.decode(altered).finish(parameters(), reply)


# Encodings.


def test_a_request_of_the_wrong_length_is_malformed() -> None:
    _, request, _ = insertion()
    for wrong in (b"", request[:-1], request + b"\0", request[:906]):
        with pytest.raises(Malformed):
            parse(wrong, 2)
    for presented in (0, 1, 3, -1):
        with pytest.raises(Malformed):
            parse(request, presented)


@pytest.mark.parametrize("place", range(POINTS))
@pytest.mark.parametrize("encoded", [e for e in NO_POINTS.values() if len(e) == 33])
def test_a_point_that_is_none_is_malformed(place: int, encoded: bytes) -> None:
    """At each place: V_j at infinity would prove any digit, M at infinity hides nothing."""
    _, request, _ = insertion()
    with pytest.raises(Malformed):
        parse(patch(request, 33 * place, encoded), 2)


@pytest.mark.parametrize("place", range(RESPONSES + 1))
def test_a_scalar_that_is_not_reduced_is_malformed(place: int) -> None:
    _, request, _ = insertion()
    start = 33 * POINTS + 32 * place
    for value in (ORDER, 2**256 - 1):
        with pytest.raises(Malformed):
            parse(patch(request, start, value.to_bytes(32, "big")), 2)


def test_a_challenge_of_zero_is_malformed() -> None:
    _, request, _ = insertion()
    with pytest.raises(Malformed):
        parse(patch(request, 33 * POINTS, bytes(32)), 2)


def test_a_serial_repeated_is_malformed() -> None:
    _, request, _ = insertion()
    with pytest.raises(Malformed, match="twice"):
        parse(patch(request, 297, request[132:165]), 2)


def test_a_commitment_repeated_is_malformed() -> None:
    _, request, _ = insertion()
    with pytest.raises(Malformed, match="twice"):
        parse(patch(request, 495, request[330:363]), 2)


def test_serials_are_those_of_the_credentials() -> None:
    _, first, _ = insertion("first")
    _, second, _ = insertion("second")
    serials = parse(first, 2).serials
    assert serials == parse(second, 2).serials
    assert len(set(serials)) == 2 and all(len(serial) == 33 for serial in serials)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (0, bytes(32)),
        (98, bytes(32)),
        (0, ORDER.to_bytes(32, "big")),
        (32, bytes(33)),
        (65, bytes(33)),
        (130, NO_POINTS["not on the curve"]),
        (163, NO_POINTS["not on the curve"]),
        (196, bytes(32)),
        (196, ORDER.to_bytes(32, "big")),
        (356, ORDER.to_bytes(32, "big")),
    ],
    ids=[
        *("t 0", "t 0 again", "t = n", "U inf", "V inf", "U off curve", "V off curve"),
        *("e 0", "e = n", "s = n"),
    ],
)
def test_a_malformed_reply_is_refused(start: int, piece: bytes) -> None:
    draft, _, reply = insertion()
    with pytest.raises(Malformed):
        draft.finish(parameters(), patch(reply, start, piece))


def test_a_reply_that_repeats_t_or_has_the_wrong_length_is_refused() -> None:
    draft, _, reply = insertion()
    for wrong in (patch(reply, 98, reply[:32]), b"", reply[:-1], reply + b"\0"):
        with pytest.raises(Malformed):
            draft.finish(parameters(), wrong)


scalars = st.integers(1, ORDER - 1)


@given(amounts, scalars, scalars, scalars)
def test_credentials_survive_their_encoding(amount: int, r: int, t: int, v: int) -> None:
    held = Credential(amount, r, t, from_text("U"), generator_multiple(v))
    assert len(held.encode()) == 134
    assert Credential.decode(held.encode()) == held


@pytest.mark.parametrize("start", [4, 36])
def test_a_credential_without_secrets_is_malformed(start: int) -> None:
    encoded = purse()[0].encode()
    for piece in (bytes(32), ORDER.to_bytes(32, "big")):
        with pytest.raises(Malformed):
            Credential.decode(patch(encoded, start, piece))
    with pytest.raises(Malformed):
        Credential.decode(patch(encoded, 68, bytes(33)))
    with pytest.raises(Malformed):
        Credential.decode(patch(encoded, 101, bytes(33)))


@pytest.mark.parametrize("decode", [Credential, Draft, Issuer, IssuerParameters])
def test_other_lengths_are_malformed(decode: type) -> None:
    read = getattr(decode, "decode", None) or decode.from_bytes  # type: ignore[attr-defined]
    for length in (0, 1, 133, 135, 103, 105, 223, 225, 8_577, 8_579):
        with pytest.raises(Malformed):
            read(b"\x01" * length)


def test_an_issuer_key_with_zero_is_malformed() -> None:
    encoded = issuer().to_bytes()
    assert len(encoded) == 224
    for place in range(6):
        for piece in (bytes(32), ORDER.to_bytes(32, "big")):
            with pytest.raises(Malformed):
                Issuer.from_bytes(patch(encoded, 32 * place, piece))


def test_an_issuer_restarted_has_the_same_parameters() -> None:
    assert Issuer.from_bytes(issuer().to_bytes()).parameters == issuer().parameters


@given(st.binary(max_size=20), st.integers(-(2**62) + 1, 2**62 - 1))
def test_statements_bind_all_they_say(context: bytes, delta: int) -> None:
    about = replace(ABOUT, context=context, delta=delta)
    if about != ABOUT:
        assert about.binding(2, b"request") != ABOUT.binding(2, b"request")
    assert about.binding(2, b"request") != about.binding(0, b"request")
    assert about.binding(2, b"request") != about.binding(2, b"requesu")


@pytest.mark.parametrize("delta", [2**62, -(2**62), 2**63, -(2**64)])
def test_a_delta_out_of_range_is_no_statement(delta: int) -> None:
    with pytest.raises(Malformed):
        Statement(bytes(32), Operation.ISSUE, b"", delta)


def test_an_epoch_that_is_no_digest_is_no_statement() -> None:
    with pytest.raises(Malformed):
        Statement(bytes(31), Operation.ISSUE, b"", 0)


def test_secrets_have_no_repr() -> None:
    draft, _, _ = insertion()
    held, key = purse()[0], issuer()._key
    text = " ".join(map(repr, (held, draft, issuer(), issuer()._digit_key)))
    for secret in (held.amount, held.r, held.t, held.V.encode().hex(), *key, issuer()._y):
        assert str(secret) not in text
        assert not isinstance(secret, int) or f"{secret:x}" not in text


# Known answers.


def test_known_answers_of_a_small_key() -> None:
    known = frozen()["key"]
    published = Issuer(known["secret"], known["y"], bytes(32)).parameters
    assert published.cw.encode().hex() == known["Cw"]
    assert published.i.point.encode().hex() == known["I"]
    entries = DigitKey(known["y"]).table(1).entries
    assert [e.encode().hex() for e in entries[:2]] == [known["D_0"], known["D_1"]]
    held = Credential(known["amount"], known["r"], 1, from_text("any U"), from_text("any V"))
    shown, vector = credential._show(held, lambda count: (known["z"] - 1).to_bytes(count, "big"))
    assert vector[0] == known["z"]
    assert shown.ca.encode().hex() == known["Ca"]
    assert shown.serial.encode().hex() == known["S"]
    attribute = multiexp(attribute_row(known["amount"], known["r"]))
    assert attribute.encode().hex() == known["M"]


def test_an_exchange_is_byte_for_byte_the_frozen_one() -> None:
    assert exchange() == frozen()["exchange"]


# Unlinkability: what a test can say of it.


def test_showing_a_credential_repeats_nothing_but_its_serial() -> None:
    first, second = (parse(insertion(seed)[1], 2) for seed in ("first", "second"))
    shown = zip(first.shown, second.shown, strict=True)
    for names in zip(Shown._fields, *zip(*shown, strict=True), strict=False):
        field, one, other = names
        assert (one == other) == (field == "serial")


def test_issuing_and_showing_have_no_bytes_in_common() -> None:
    about = statement(Operation.ISSUE, b"voucher", VOUCHER)
    draft, bought, reply = settle(about, (), (VOUCHER, 0), Stream("purse"))
    held = draft.finish(parameters(), reply)
    assert held == purse()
    _, shown, answer = insertion()
    seen = {piece for text in (bought.encoded, reply) for piece in windows(text)}
    assert not seen & {piece for text in (shown, answer) for piece in windows(text)}


def windows(text: bytes) -> set[bytes]:
    return {text[i : i + 8] for i in range(len(text) - 7)}


def test_amounts_do_not_show_in_sizes_or_in_the_use_of_randomness() -> None:
    about = statement(Operation.REISSUE)
    drawn = []
    for wanted in ((0, 1_000), (1_000, 0), (255, 745), (256, 744)):
        stream = Stream("same")
        draft = prepare(parameters(), about, purse(), wanted, stream)
        drawn.append((tuple(stream.drawn), len(draft.request)))
    assert len(set(drawn)) == 1


def test_responses_are_spread_evenly_whatever_the_amounts() -> None:
    """Leading bytes of 40 proofs per amount: chi-square over 16 bins, 15 degrees of freedom."""
    about = statement(Operation.REISSUE)
    for wanted in ((1_000, 0), (333, 667)):
        bins = Counter[int]()
        for turn in range(40):
            request = prepare(parameters(), about, purse(), wanted, Stream(f"even {turn}")).request
            bins.update(request[692 + 32 * i] >> 4 for i in range(RESPONSES))
        expected = 40 * RESPONSES / 16
        assert sum((bins[i] - expected) ** 2 / expected for i in range(16)) < 45


def test_every_digit_explains_every_blinded_point() -> None:
    """V_j = v_j D_d has a v_j for each d: the points carry no information about the amount."""
    y, point = issuer()._y, 123_456_789
    blinds = {point * (y + d) % ORDER for d in range(256)}
    assert len(blinds) == 256
    entries = parameters().table.entries
    target = generator_multiple(point)
    for d in (0, 1, 255):
        assert multiexp(((entries[d], point * (y + d)),)) == target


def test_a_repeated_rng_does_not_repeat_nonces() -> None:
    """The same randomness under two statements: s1 - s2 over e1 - e2 must not be a secret."""
    first, second = (
        prepare(parameters(), about, purse(), (500, 490), Stream("cloned")).request
        for about in (ABOUT, replace(ABOUT, context=b"another"))
    )
    inverse = pow(scalar_at(first, 660) - scalar_at(second, 660), -1, ORDER)
    leaked = {
        (scalar_at(first, i) - scalar_at(second, i)) * inverse % ORDER
        for i in range(692, len(first), 32)
    }
    secrets = {x for c in purse() for x in (c.amount, c.r, c.t)}
    assert not leaked & secrets and len(leaked) == RESPONSES


def test_parameters_are_values() -> None:
    assert epoch().issuer == parameters() and hash(epoch().issuer) == hash(parameters())
    assert parameters() != Issuer.generate(Stream("other")).parameters
    assert isinstance(parameters().cw, Point)
