"""Soundness, equation by equation: a prover who lies about one thing only is refused.

Each cheat below knows every secret that an honest client knows and proves with the honest
prover; what it claims violates exactly the equation that its name mentions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest

from hpkvfs.protocol import credential, digits, proofs
from hpkvfs.protocol.credential import (
    AMOUNT_LIMIT,
    Credential,
    Issuer,
    Mac,
    Requested,
    Statement,
    parse,
)
from hpkvfs.protocol.errors import BadIssuance, BadProof
from hpkvfs.protocol.group import (
    GG,
    GS,
    ORDER,
    Point,
    encode_scalar,
    from_text,
    multiexp,
    multiply,
)
from hpkvfs.protocol.proofs import Row, Shown, Vector, attribute_row
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.transcript import Transcript
from tests.protocol.parties import Stream, issuer, parameters, purse, settle, statement

Show = tuple[Shown, Vector]
Request = tuple[Requested, Vector]

ABOUT = statement(Operation.REISSUE)
AMOUNTS = (900, 100)
ELSEWHERE = from_text("elsewhere")


def honest_shows() -> list[Show]:
    return [credential._show(held, Stream(f"show {held.amount}")) for held in purse()]


def honest_requests(amounts: tuple[int, int] = AMOUNTS) -> list[Request]:
    table = parameters().table
    return [
        credential._request(table, a, Stream(f"request {a} {i}")) for i, a in enumerate(amounts)
    ]


def judge(shows: list[Show], requests: list[Request], about: Statement = ABOUT) -> None:
    """What the issuer says of a proof about these points and witnesses."""
    encoded = credential._prove(parameters(), about, shows, requests, Stream("nonces"))
    issuer().verify(about, parse(encoded, len(shows)))


def put(vector: Vector, place: int, by: int) -> Vector:
    place %= len(vector)
    return (*vector[:place], (vector[place] + by) % ORDER, *vector[place + 1 :])


def test_the_honest_prover_is_believed() -> None:
    judge(honest_shows(), honest_requests())


# Show. Columns of its vector: z z0 t a r.


def forged_mac(place: int) -> Show:
    """Z: the credential's V was made without the key."""
    held = Credential(1_000, 5, 6, from_text("U"), ELSEWHERE)
    return credential._show(held, Stream("forged"))


def another_key(place: int) -> Show:
    """Z: the MAC is good, but under another issuer's key."""
    other = Issuer.generate(Stream("another issuer"))
    about = statement(Operation.ISSUE, delta=1_000)
    draft = credential.prepare(other.parameters, about, (), (1_000, 0), Stream("a"))
    request = parse(draft.request, 0)
    held, _ = draft.finish(other.parameters, other.issue(about, request))
    return credential._show(held, Stream("b"))


def raised_amount(place: int) -> Show:
    """Ca (and so Z): a credential is shown as one of 500 more."""
    held = purse()[place]
    return credential._show(replace(held, amount=held.amount + 500), Stream("c"))


def false_amount(place: int) -> Show:
    """Ca alone: the points are honest, the amount proven about them is not."""
    shown, vector = honest_shows()[place]
    return shown, put(vector, 3, 500)


def false_r(place: int) -> Show:
    """Ca alone: the serial fits another r, with which the credential could be spent twice."""
    shown, vector = honest_shows()[place]
    return shown._replace(serial=multiexp(((GS, vector[4] + 1),))), put(vector, 4, 1)


def false_serial(place: int) -> Show:
    """S alone: a fresh serial for a credential that was spent."""
    shown, vector = honest_shows()[place]
    return shown._replace(serial=multiexp(((GS, vector[4] + 1),))), vector


def false_t(place: int) -> Show:
    """Cx1 alone: t is not the one under Cx1."""
    shown, vector = honest_shows()[place]
    return shown, put(vector, 2, 1)


def false_z0(place: int) -> Show:
    """Cx1 alone: z0 is not -t z."""
    shown, vector = honest_shows()[place]
    return shown, put(vector, 1, 1)


def moved_cx1(place: int) -> Show:
    """Cx1 and Z: U and tU do not belong together."""
    shown, vector = honest_shows()[place]
    return shown._replace(cx1=multiexp((), shown.cx1, ELSEWHERE)), vector


def moved_cx0(place: int) -> Show:
    """Cx0 enters Z and Cx1."""
    shown, vector = honest_shows()[place]
    return shown._replace(cx0=multiexp((), shown.cx0, ELSEWHERE)), vector


def moved_cv(place: int) -> Show:
    """Z alone: CV is not the blinded V."""
    shown, vector = honest_shows()[place]
    return shown._replace(cv=multiexp((), shown.cv, ELSEWHERE)), vector


SHOWS: list[Callable[[int], Show]] = [
    forged_mac,
    another_key,
    raised_amount,
    false_amount,
    false_r,
    false_serial,
    false_t,
    false_z0,
    moved_cx1,
    moved_cx0,
    moved_cv,
]


@pytest.mark.parametrize("cheat", SHOWS, ids=lambda cheat: cheat.__name__)
@pytest.mark.parametrize("place", [0, 1])
def test_a_false_show_is_refused(cheat: Callable[[int], Show], place: int) -> None:
    shows = honest_shows()
    shows[place] = cheat(place)
    amount = sum(vector[3] for _, vector in shows)
    with pytest.raises(BadProof):
        judge(shows, honest_requests((amount, 0)))


def apart(shows: list[Show], field: str) -> list[Show]:
    """Two lies that cancel out: a point of one show is moved by what the other's is moved back."""
    (first, x), (second, y) = shows
    moved = multiexp((), getattr(first, field), ELSEWHERE)
    back = multiexp((), getattr(second, field), -ELSEWHERE)
    return [(first._replace(**{field: moved}), x), (second._replace(**{field: back}), y)]


@pytest.mark.parametrize("field", ["cv", "serial"])
def test_false_shows_do_not_make_up_for_each_other(field: str) -> None:
    """Why the folded row has weights; with 1 instead, this would be believed."""
    shows = apart(honest_shows(), field)
    with pytest.raises(BadProof):
        judge(shows, honest_requests())


@pytest.mark.parametrize("field", ["cv", "serial"])
def test_without_weights_they_would(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credential, "Weights", lambda *_: proofs.Weights(1, 1, 1, 1))
    judge(apart(honest_shows(), field), honest_requests())


# Request. Columns of its vector: r v_0..v_3 d_0..d_3.


def false_attribute() -> Request:
    """M alone: the commitment is to one token more than its digits say."""
    requested, vector = honest_requests()[0]
    return requested._replace(m=multiexp(((GG, 1),), requested.m)), vector


def false_digit() -> Request:
    """T_j and nothing else: digits and M say 901, the MACs say 900."""
    requested, vector = false_attribute()
    return requested, put(vector, -1, 1)


def negative_digit() -> Request:
    """T_j: a digit of -1, for which the table has no MAC."""
    (_, points), vector = honest_requests((0, 0))[0]
    minus = put(vector, -1, -1)
    return Requested(multiexp(attribute_row(-1, vector[0])), points), minus


def oversized_digit() -> Request:
    """T_j: a digit of 256."""
    (_, points), vector = honest_requests((255, 0))[0]
    larger = put(vector, -1, 1)
    return Requested(multiexp(attribute_row(256, vector[0])), points), larger


def unblinded_nothing() -> Request:
    """T_j: a point without any MAC in it, v_j = 0."""
    (m, points), vector = honest_requests()[0]
    return Requested(m, (ELSEWHERE, *points[1:])), put(vector, 1, -vector[1])


def borrowed_digit() -> Request:
    """T_j: V_j blinds the MAC of another digit."""
    (m, points), vector = honest_requests()[0]
    borrowed = multiply(parameters().table.entries[77], vector[4])
    return Requested(m, (*points[:3], borrowed)), vector


REQUESTS: list[Callable[[], Request]] = [
    false_attribute,
    false_digit,
    negative_digit,
    oversized_digit,
    unblinded_nothing,
    borrowed_digit,
]


@pytest.mark.parametrize("cheat", REQUESTS, ids=lambda cheat: cheat.__name__)
@pytest.mark.parametrize("place", [0, 1])
def test_a_false_request_is_refused(cheat: Callable[[], Request], place: int) -> None:
    requested, vector = cheat()
    claimed = digits.value(vector[1:])
    requests = honest_requests((0, 0))
    requests[place] = requested, vector
    about = statement(Operation.ISSUE, delta=claimed if claimed < AMOUNT_LIMIT else -1)
    with pytest.raises(BadProof):
        judge([], requests, about)


@pytest.mark.parametrize("place", range(4))
def test_every_digit_of_both_amounts_is_checked(place: int) -> None:
    for which in (0, 1):
        requests = honest_requests((0, 0))
        (_, points), vector = requests[which]
        lie = put(vector, 5 + place, 1)
        m = multiexp(attribute_row(256 ** (3 - place), vector[0]))
        requests[which] = Requested(m, points), lie
        with pytest.raises(BadProof):
            judge([], requests, statement(Operation.ISSUE, delta=256 ** (3 - place)))


def test_false_commitments_do_not_make_up_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One M is to a token more than its digits say, the other to one less."""
    (first, x), (second, y) = honest_requests()
    more = first._replace(m=multiexp(((GG, 1),), first.m))
    less = second._replace(m=multiexp(((GG, -1),), second.m))
    with pytest.raises(BadProof):
        judge(honest_shows(), [(more, x), (less, y)])
    monkeypatch.setattr(credential, "Weights", lambda *_: proofs.Weights(1, 1, 1, 1))
    judge(honest_shows(), [(more, x), (less, y)])


# Balance.


@pytest.mark.parametrize("amounts", [(900, 101), (1_000, 1), (900, 99), (0, 0), (2**32 - 1, 0)])
def test_amounts_that_do_not_balance_are_refused(amounts: tuple[int, int]) -> None:
    with pytest.raises(BadProof):
        judge(honest_shows(), honest_requests(amounts))


def test_the_balance_is_one_of_integers_not_modulo_the_order() -> None:
    """-1 + 1,001 = 1,000: the books balance, but -1 is no amount."""
    _, positive = honest_requests((0, 1_001))
    with pytest.raises(BadProof):
        judge(honest_shows(), [negative_digit(), positive])


def test_a_price_cannot_be_paid_by_an_empty_purse() -> None:
    (shown, vector), _ = honest_shows()
    null = purse()[1]
    shows = [credential._show(null, Stream("null")), credential._show(null, Stream("too"))]
    about = statement(Operation.LOOK_UP)
    encoded = credential._prove(
        parameters(), about, [shows[0], (shown, vector)], honest_requests((1_000, 0)), Stream("n")
    )
    with pytest.raises(BadProof):
        issuer().verify(about, parse(encoded, 2))


# Issuance. The issuer's vector: w w' x0 x1 ya.


class Mint(Issuer):
    """Uses another key than the one it published, as an issuer would that tags users."""

    def __init__(self, key: Vector) -> None:
        super().__init__(key, 7, b"p" * 32)
        object.__setattr__(self, "parameters", issuer().parameters)


class ForgetfulMint(Mint):
    """An issuer whose proofs are about the right key and whose MACs are not."""

    def _mac(self, c: proofs.Issued, m: Point) -> Mac:
        return super()._mac(c, m)._replace(V=ELSEWHERE)


class ApartMint(Mint):
    """Its two MACs are marked, one by a point and the other by that point's negative."""

    marks: Sequence[Point] = (ELSEWHERE, -ELSEWHERE)

    def _mac(self, c: proofs.Issued, m: Point) -> Mac:
        mac, (mark, *self.marks) = super()._mac(c, m), self.marks
        return mac._replace(V=multiexp((), mac.V, mark))


def reply_of(mint: Issuer) -> tuple[credential.Draft, bytes]:
    draft, request, _ = settle(ABOUT, purse(), AMOUNTS, Stream("reply"))
    return draft, mint.issue(ABOUT, request)


@pytest.mark.parametrize("place", range(5), ids=["w", "w'", "x0", "x1", "ya"])
def test_credentials_of_another_key_are_refused(place: int) -> None:
    draft, reply = reply_of(Mint(put(issuer()._key, place, 1)))
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply)


def test_macs_that_the_proof_is_not_about_are_refused() -> None:
    draft, reply = reply_of(ForgetfulMint(issuer()._key))
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply)


def test_marks_do_not_make_up_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would if both MACs had the weight 1/2."""
    draft, reply = reply_of(ApartMint(issuer()._key))
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply)
    half = pow(2, -1, ORDER)
    monkeypatch.setattr(Transcript, "weights", lambda self: (half,) * 4)
    draft, reply = reply_of(ApartMint(issuer()._key))
    draft.finish(parameters(), reply)


def test_the_published_key_is_believed() -> None:
    """The control of the tests above: a mint whose MAC key is the right one."""
    draft, reply = reply_of(Mint(issuer()._key))
    assert sum(c.amount for c in draft.finish(parameters(), reply)) == 1_000


def test_exchanged_macs_are_refused() -> None:
    draft, reply = reply_of(issuer())
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply[98:196] + reply[:98] + reply[196:])


@pytest.mark.parametrize("place", range(6), ids=["e", "w", "w'", "x0", "x1", "ya"])
def test_every_scalar_of_an_issuance_proof_matters(place: int) -> None:
    draft, reply = reply_of(issuer())
    start = 196 + 32 * place
    scalar = (int.from_bytes(reply[start : start + 32], "big") + 1) % ORDER
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply[:start] + encode_scalar(scalar) + reply[start + 32 :])


# Fiat-Shamir: the challenge covers what is proven, not only the commitments. With a weaker
# hash, an image could be computed from challenge and responses, and these would be believed.


def after_the_challenge(image: Point, challenge: int, weight: int) -> Point:
    """The image for which a commitment that was moved by ELSEWHERE is right."""
    return multiexp(((ELSEWHERE, -pow(challenge * weight, -1, ORDER)),), image)


def test_a_serial_cannot_be_chosen_after_the_challenge(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(rows: Iterable[Row]) -> list[Point]:
        first, *others = proofs.commit(rows)
        return [multiexp((), first, ELSEWHERE), *others]

    monkeypatch.setattr(credential, "commit", moved)
    encoded = credential._prove(
        parameters(), ABOUT, honest_shows(), honest_requests(), Stream("nonces")
    )
    parsed = parse(encoded, 2)
    weights = credential._request_transcript(ABOUT, parameters(), 2, parsed.points).weights()
    weight = proofs.Weights(*weights).serial
    serial = after_the_challenge(parsed.shown[0].serial, parsed.challenge, weight).encode()
    with pytest.raises(BadProof):
        issuer().verify(ABOUT, parse(encoded[:132] + serial + encoded[165:], 2))


def test_a_mac_cannot_be_chosen_after_the_challenge(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(rows: Iterable[Row]) -> list[Point]:
        first, *others = proofs.commit_secret(rows)
        return [multiexp((), first, ELSEWHERE), *others]

    monkeypatch.setattr(credential, "commit_secret", moved)
    draft, reply = reply_of(Mint(issuer()._key))
    challenge = int.from_bytes(reply[196:228], "big")
    macs, _, _ = credential._parse_reply(reply)
    encoded = reply[: credential._MACS_SIZE]
    transcript = credential._issuance_transcript(parameters(), draft._binding, encoded)
    mac = after_the_challenge(macs[0].V, challenge, transcript.weights()[0]).encode()
    with pytest.raises(BadIssuance):
        draft.finish(parameters(), reply[:65] + mac + reply[98:])


def test_a_challenge_covers_issuer_and_number_presented() -> None:
    other = Issuer.generate(Stream("another issuer")).parameters
    points = bytes(660)
    digests = {
        credential._request_transcript(ABOUT, key, presented, points).digest()
        for key in (parameters(), other)
        for presented in (0, 2)
    }
    assert len(digests) == 4
