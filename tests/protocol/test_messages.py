"""Requests and replies: one size, one spelling, and a proof that covers all of a request."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol import codec, messages
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import (
    OUTCOMES,
    DeleteRequest,
    Done,
    Entry,
    Fact,
    InsertRequest,
    IssueRequest,
    LookUpRequest,
    Method,
    Offer,
    Offers,
    OffersRequest,
    OpenEntryRequest,
    Outcome,
    Parameters,
    ParametersRequest,
    Payment,
    PayRequest,
    Reason,
    Refused,
    ReissueRequest,
    Reply,
    Request,
    Spent,
    StoredFact,
    StoreEntryRequest,
    decode_reply,
    decode_request,
    delete_digest,
)
from hpkvfs.protocol.tariff import HOURS_LIMIT, Operation, Tariff
from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


digests = exactly(32)
keys = st.builds(lambda sign, x: sign + x, st.sampled_from([b"\2", b"\3"]), digests)
entries = st.integers(0, 255).map(lambda byte: bytes([byte]) * ENTRY_SIZE)
counters = st.integers(1, messages.MAX_COUNTER)
blobs = st.integers(0, 255).map(lambda byte: bytes([byte]) * BLOB_SIZE)
credentials = st.integers(1, messages.MAX_CREDENTIALS).map(lambda size: b"c" * size)
issued = st.integers(1, messages.MAX_ISSUED).map(lambda size: b"i" * size)
deltas = st.integers(-messages.MAX_DELTA, messages.MAX_DELTA)

methods = st.sampled_from(Method)
amounts = st.integers(1, messages.MAX_DELTA)
offers = st.builds(
    Offer,
    methods,
    amounts,
    amounts,
    amounts,
    st.lists(st.binary(min_size=1, max_size=50), max_size=3).map(tuple),
)

paid: st.SearchStrategy[Any] = st.one_of(
    st.builds(IssueRequest, digests, exactly(20), st.integers(1, messages.MAX_DELTA), credentials),
    st.builds(ReissueRequest, digests, st.sampled_from([0, 2]), st.none(), credentials),
    st.builds(ReissueRequest, st.just(b"o" * 32), st.just(2), digests, credentials),
    st.builds(LookUpRequest, digests, keys, credentials),
    st.builds(InsertRequest, digests, keys, blobs, credentials),
    st.builds(DeleteRequest, digests, keys, digests, exactly(64), credentials),
    st.builds(StoreEntryRequest, digests, keys, counters, entries, exactly(64), credentials),
)
requests: st.SearchStrategy[Any] = (
    st.builds(ParametersRequest, st.none() | digests)
    | st.builds(OpenEntryRequest, keys, digests, exactly(64))
    | st.builds(OffersRequest)
    | st.builds(PayRequest, methods, digests, amounts, st.binary(max_size=200))
    | paid
)

facts = st.sampled_from(
    [(operation, outcome) for operation, outcomes in OUTCOMES.items() for outcome in outcomes]
).flatmap(lambda pair: st.builds(Fact, st.just(pair[0]), st.just(pair[1]), deltas))
replies: st.SearchStrategy[Any] = st.one_of(
    st.builds(Refused, st.sampled_from(Reason)),
    st.builds(
        Parameters,
        st.integers(1, messages.MAX_PARAMETERS).map(bytes),
        st.lists(digests, min_size=1, max_size=5).map(tuple),
        digests,
        exactly(64),
    ),
    st.builds(Done, facts, issued, st.none()),
    st.builds(Done, st.just(Fact(Operation.LOOK_UP, Outcome.FOUND, -1)), issued, blobs),
    st.builds(
        Entry, counters, digests, st.none() | entries, st.none() | st.integers(0, HOURS_LIMIT + 1)
    ),
    st.builds(Offers, st.lists(offers, max_size=3).map(tuple)),
    st.builds(
        Payment,
        st.integers(0, 1),
        amounts,
        st.integers(0, messages.MAX_SATS),
        st.binary(max_size=300),
        st.integers(0, messages.MAX_SECONDS),
    ),
    st.builds(
        Spent,
        st.lists(st.builds(StoredFact, digests, facts, issued), min_size=1, max_size=2).map(tuple),
    ),
)


@given(request=requests)
def test_a_request_is_read_as_it_was_written_at_the_one_size(request: Request) -> None:
    frame = request.encode()
    assert len(frame) == codec.REQUEST_SIZE
    assert decode_request(frame) == request


@given(reply=replies)
def test_a_reply_is_read_as_it_was_written_at_the_one_size(reply: Reply) -> None:
    frame = reply.encode()
    assert len(frame) == codec.REPLY_SIZE
    assert decode_reply(frame) == reply


def test_the_largest_of_each_fit() -> None:
    key, digest, blob = b"\2" + bytes(32), bytes(32), bytes(BLOB_SIZE)
    most, reply = b"c" * messages.MAX_CREDENTIALS, b"i" * messages.MAX_ISSUED
    fact = Fact(Operation.LOOK_UP, Outcome.FOUND, -messages.MAX_DELTA)
    InsertRequest(digest, key, blob, most).encode()
    Done(fact, reply, blob).encode()
    Spent((StoredFact(digest, fact, reply),) * 2).encode()
    PayRequest(Method.CASHU, digest, messages.MAX_DELTA, bytes(messages.MAX_PROOF)).encode()
    places = (bytes(messages.MAX_PLACE),) * messages.MAX_PLACES
    Offers((Offer(Method.CASHU, 1, 1, 1, places), Offer(Method.LIGHTNING, 1, 1, 1))).encode()
    Payment(1, 1, messages.MAX_SATS, bytes(messages.MAX_INVOICE), messages.MAX_SECONDS).encode()
    epochs = (digest,) * messages.MAX_EPOCHS
    Parameters(bytes(messages.MAX_PARAMETERS), epochs, digest, bytes(64)).encode()


@given(request=requests, data=st.data())
def test_a_changed_byte_is_refused_or_another_request(request: Request, data: Any) -> None:
    frame = bytearray(request.encode())
    place = data.draw(st.integers(0, min(len(request.body()) + 12, 200)))
    frame[place] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_request(bytes(frame))
    except Malformed:
        return
    assert changed != request
    assert changed.fingerprint != request.fingerprint


@given(frame=exactly(200))
def test_noise_is_refused(frame: bytes) -> None:
    for body in (frame, frame[:10]):
        with pytest.raises(Malformed):
            decode_request(codec.REQUEST.wrap(body))
        with pytest.raises(Malformed):
            decode_reply(codec.REPLY.wrap(b"\x92" + body))


def key_request(**changes: object) -> bytes:
    values = {"kind": 3, "epoch": bytes(32), "key": b"\2" + bytes(32), "credentials": b"c"}
    return codec.REQUEST.wrap(codec.pack(list((values | changes).values())))


def test_the_request_that_the_next_test_breaks_is_sound() -> None:
    assert decode_request(key_request()).operation is Operation.LOOK_UP


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 6},
        {"kind": 7},
        {"kind": 8},
        {"kind": 255},
        {"kind": -1},
        {"kind": True},
        {"kind": None},
        {"kind": b"\3"},
        {"epoch": None},
        {"epoch": bytes(31)},
        {"key": b"\4" + bytes(32)},
        {"key": b"\2" + bytes(64)},
        {"credentials": b""},
        {"credentials": b"c" * (messages.MAX_CREDENTIALS + 1)},
        {"credentials": 1},
        {"extra": None},
    ],
)
def test_a_request_with_one_wrong_field_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(Malformed):
        decode_request(key_request(**changes))


@pytest.mark.parametrize("presented", [1, 3, -1, True, None, 4])
def test_one_credential_alone_is_never_presented(presented: object) -> None:
    body = codec.pack([2, bytes(32), presented, b"c"])
    with pytest.raises(Malformed):
        decode_request(codec.REQUEST.wrap(body))


@pytest.mark.parametrize("amount", [0, -1, 2**32, True, None])
def test_a_voucher_is_worth_at_least_one_token(amount: object) -> None:
    body = codec.pack([1, bytes(32), bytes(20), amount, b"c"])
    with pytest.raises(Malformed):
        decode_request(codec.REQUEST.wrap(body))


@pytest.mark.parametrize(
    "body",
    [
        [],
        [4],
        [5],
        [0],
        [0, 2],
        [0, 0, 0],
        [0, 27, 0],
        [0, 2, -1],
        [0, 2, 3_601],
        [4, 0, bytes(32), None, None],
        [4, 1, bytes(31), None, None],
        [4, 1, bytes(32), bytes(1_023), None],
        [4, 1, bytes(32), None, -1],
        [4, 1, bytes(32), None],
        [0, 1, 1, 1],
        [1, b"", [bytes(32)], bytes(32), bytes(64)],
        [1, b"p", [], bytes(32), bytes(64)],
        [1, b"p", [bytes(31)], bytes(32), bytes(64)],
        [1, b"p", [bytes(32)], bytes(31), bytes(64)],
        [1, b"p", [bytes(32)], bytes(32), bytes(63)],
        [1, b"p", [bytes(32)]],
        [2, [3, 5, -1], b"i", None],  # a look-up that came to an insertion
        [2, [0, 1, 0], b"i", None],
        [2, [3, 3, 2**32], b"i", None],
        [2, [3, 3, -1], b"", None],
        [2, [3, 3, -1], b"i", b"short"],
        [2, [4, 5, -10], b"i", bytes(BLOB_SIZE)],  # an insertion that found a blob
        [3, []],
        [3, [[bytes(32), [3, 3, -1], b"i"]] * 3],
        [3, [[bytes(32), [3, 3, -1]]]],
    ],
)
def test_an_impossible_reply_is_refused(body: list[object]) -> None:
    with pytest.raises(Malformed):
        decode_reply(codec.REPLY.wrap(codec.pack(body)))


@given(request=paid)
def test_an_unfinished_request_cannot_be_sent(request: Any) -> None:
    with pytest.raises(ValueError, match="not complete"):
        replace(request, credentials=b"").encode()


@given(first=paid, second=paid)
def test_the_proof_covers_every_field_but_itself(first: Any, second: Any) -> None:
    """Statements are equal only when all is, but for the proof and the deletion's signature."""
    tariff = Tariff()

    def covered(request: Any) -> list[object]:
        ignored = {"credentials", "signature", "presented"}
        names = [one.name for one in fields(request) if one.name not in ignored]
        return [request.operation, *(getattr(request, name) for name in names)]

    same = first.statement(tariff) == second.statement(tariff)
    assert same == (covered(first) == covered(second))


@given(request=paid)
def test_the_delta_is_the_operations(request: Any) -> None:
    tariff = Tariff(look_up=3, insert=70, refund=50, entry=45)
    expected = {
        Operation.REISSUE: 0,
        Operation.LOOK_UP: -3,
        Operation.INSERT: -70,
        Operation.DELETE: 50,
        Operation.STORE_ENTRY: -45,
    }
    delta = request.statement(tariff).delta
    assert delta == expected.get(request.operation, getattr(request, "amount", None))


def test_the_fingerprint_is_the_hash_of_the_body() -> None:
    request = LookUpRequest(bytes(32), b"\2" + bytes(32), b"credentials")
    body = b"\x94\x03\xc4\x20" + bytes(32) + b"\xc4\x21\x02" + bytes(32) + b"\xc4\x0bcredentials"
    assert request.body() == body
    assert request.encode() == b"hpkq\0\1\0\0\0\x54" + body + bytes(codec.REQUEST_SIZE - 94)
    assert request.fingerprint == hashlib.sha256(body).digest()


def test_a_deletion_signs_key_blob_and_credential_request() -> None:
    tag = hashlib.sha256(b"hpkv/delete/v1").digest()
    key, digest = b"\3" + b"k" * 32, b"d" * 32
    covered = key + digest + hashlib.sha256(b"request").digest()
    assert delete_digest(key, digest, b"request") == hashlib.sha256(tag + tag + covered).digest()
    assert DeleteRequest(bytes(32), key, digest, b"", b"request").signed == delete_digest(
        key, digest, b"request"
    )


def test_storing_an_entry_signs_key_value_counter_and_credential_request() -> None:
    tag = hashlib.sha256(b"hpkv/entry/store/v1").digest()
    key, value = b"\3" + b"k" * 32, b"v" * ENTRY_SIZE
    covered = key + hashlib.sha256(value).digest() + bytes(7) + b"\5"
    covered += hashlib.sha256(b"request").digest()
    request = StoreEntryRequest(bytes(32), key, 5, value, b"", b"request")
    assert request.signed == hashlib.sha256(tag + tag + covered).digest()


def test_opening_an_entry_signs_which_one() -> None:
    tag = hashlib.sha256(b"hpkv/entry/open/v1").digest()
    key, entry = b"\3" + b"k" * 32, b"d" * 32
    assert OpenEntryRequest(key, entry).signed == hashlib.sha256(tag + tag + key + entry).digest()


@given(request=paid)
def test_no_secret_is_shown(request: Any) -> None:
    shown = repr(request)
    for name in ("voucher", "credentials", "blob", "value"):
        assert f"{name}=" not in shown
