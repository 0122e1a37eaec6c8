"""Frames and canonical msgpack: one spelling of everything, one size each way."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.protocol import codec
from hpkvfs.protocol.codec import HEADER, REPLY, REQUEST, Envelope
from hpkvfs.protocol.errors import Malformed

ENVELOPES = [REQUEST, REPLY]
values = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20),
    max_leaves=20,
)


def test_the_sizes_are_those_of_the_protocol() -> None:
    assert (codec.REQUEST_SIZE, codec.REPLY_SIZE) == (18_924, 17_430)


@pytest.mark.parametrize("envelope", ENVELOPES)
@given(body=st.binary(max_size=400))
def test_a_frame_gives_back_its_body(envelope: Envelope, body: bytes) -> None:
    frame = envelope.wrap(body)
    assert len(frame) == envelope.size
    assert envelope.unwrap(frame) == body


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_a_body_may_fill_a_frame_but_no_more(envelope: Envelope) -> None:
    full = b"x" * envelope.room
    assert envelope.unwrap(envelope.wrap(full)) == full
    with pytest.raises(ValueError, match="does not fit"):
        envelope.wrap(full + b"x")


@given(
    body=st.binary(max_size=60), place=st.integers(0, codec.REQUEST_SIZE - 1), bit=st.integers(0, 7)
)
def test_a_flipped_bit_outside_the_body_is_refused(body: bytes, place: int, bit: int) -> None:
    frame = bytearray(REQUEST.wrap(body))
    frame[place] ^= 1 << bit
    inside = HEADER.size <= place < HEADER.size + len(body)
    if inside:
        assert REQUEST.unwrap(bytes(frame)) != body
    elif not 6 <= place < HEADER.size:
        with pytest.raises(Malformed):
            REQUEST.unwrap(bytes(frame))


def peak_of_decoding(body: bytes) -> int:
    """Bytes of memory at most."""
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            codec.unpack(body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_headers_that_announce_much_take_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays in arrays, each said to have thousands of elements, in a frame that has none."""
    announced = (b"\xdc" + (9_000).to_bytes(2, "big")) * 500
    body = announced.ljust(REQUEST.room, b"\0")
    assert peak_of_decoding(body) < 2**20
    monkeypatch.setattr(codec, "MOST_ELEMENTS", len(body))  # the negative control
    assert peak_of_decoding(body) > 30 * 2**20


def test_a_length_that_takes_in_padding_is_another_body() -> None:
    frame = bytearray(REQUEST.wrap(b"body"))
    frame[HEADER.size - 1] += 1
    assert REQUEST.unwrap(bytes(frame)) == b"body\0"


@pytest.mark.parametrize("length", [codec.REQUEST_SIZE, 2**31, 2**32 - 1])
def test_a_length_beyond_the_frame_is_refused(length: int) -> None:
    frame = HEADER.pack(b"hpkq", 1, length).ljust(codec.REQUEST_SIZE, b"\0")
    with pytest.raises(Malformed):
        REQUEST.unwrap(frame)


@pytest.mark.parametrize(
    "size", [0, 1, HEADER.size, codec.REQUEST_SIZE - 1, codec.REQUEST_SIZE + 1]
)
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(Malformed):
        REQUEST.unwrap(bytes(size))


def test_a_reply_is_no_request_nor_a_frame_of_another_version() -> None:
    body = codec.pack([0])
    with pytest.raises(Malformed):
        REPLY.unwrap(REQUEST.wrap(body)[: codec.REPLY_SIZE])
    newer = HEADER.pack(b"hpkr", 2, 0).ljust(codec.REPLY_SIZE, b"\0")
    with pytest.raises(Malformed, match="version 2"):
        REPLY.unwrap(newer)


@given(value=values)
def test_what_is_packed_unpacks(value: object) -> None:
    assert codec.unpack(codec.pack([value])) == [value]


@given(body=st.binary(max_size=64))
def test_whatever_unpacks_has_no_other_spelling(body: bytes) -> None:
    try:
        value = codec.unpack(body)
    except Malformed:
        return
    assert isinstance(value, int | float | bytes | list | type(None) | str | dict | bool)
    assert codec.pack(value) == body  # type: ignore[arg-type]  # pack takes any value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x91",  # an array cut short
        b"\x91\x01\x00",  # a byte too many
        b"\x91\xcc\x01",  # 1 as a u8
        b"\x91\xd0\x01",  # 1 as an i8
        b"\x91\xcf\x00\x00\x00\x00\x00\x00\x00\x01",
        b"\x91\xc5\x00\x01x",  # a short bin with a u16 length
        b"\xdc\x00\x01\x01",  # a short array with a u16 length
        b"\x91\xa1x",  # a string
        b"\x91\x81\x01\x02",  # a map
        b"\x91\xd4\x01\x00",  # an extension
        b"\x91\xc1",  # never used
        b"\x91" * 2000 + b"\x01",  # nesting without end
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\x91\xc6\xff\xff\xff\xff",
    ],
)
def test_other_spellings_and_types_are_refused(body: bytes) -> None:
    with pytest.raises(Malformed):
        codec.unpack(body)


@pytest.mark.parametrize(
    ("reader", "good", "bad"),
    [
        (codec.octets(2), [b"ab"], [b"a", b"abc", "ab", None, 2, [b"ab"]]),
        (codec.octets(1, 2), [b"a", b"ab"], [b"", b"abc"]),
        (codec.integer(-1, 2), [-1, 0, 2], [-2, 3, True, 1.0, None, b"1"]),
        (codec.optional(codec.integer(0, 1)), [None, 0], [2, b""]),
        (codec.array(codec.integer(0, 9), 1, 2), [[1], [1, 2]], [[], [1, 2, 3], [b""], None]),
        (codec.fields(codec.integer(0, 9), codec.octets(1)), [[1, b"x"]], [[1], [b"x", 1], 1]),
    ],
)
def test_a_reader_takes_what_it_says(
    reader: codec.Reader[object], good: list[object], bad: list[object]
) -> None:
    for value in good:
        read = reader(value)
        assert (list(read) if isinstance(read, tuple) else read) == value
    for value in bad:
        with pytest.raises(Malformed):
            reader(value)
