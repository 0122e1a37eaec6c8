"""Nodes: what was encoded is decoded, and nothing else is."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.tree.node import (
    CAPACITY,
    CHILD_WEIGHT,
    MAX_KEY,
    MAX_LEVEL,
    MAX_VALUE,
    CorruptNode,
    Node,
    weigh,
    weigh_each,
)
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef

REF = BlobRef(BlobId(7), b"\x07" * 32)
keys = st.binary(max_size=MAX_KEY)
items = st.dictionaries(keys, st.binary(max_size=300), min_size=1, max_size=20)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    level = draw(st.integers(0, MAX_LEVEL))
    found = sorted(draw(items).items())
    values = [REF.encode() if level else value for _, value in found]
    return Node(level, tuple(key for key, _ in found), tuple(values))


def frame(body: bytes, magic: bytes = b"hpkn", version: int = 1, used: int | None = None) -> bytes:
    used = len(body) if used is None else used
    return (struct.pack(">4sHH", magic, version, used) + body).ljust(PAYLOAD_SIZE, b"\0")


def packed(*parts: Any) -> bytes:
    return frame(msgpack.packb(list(parts)))


LEAF = Node(0, (b"a", b"b"), (b"one", b"two"))


@given(nodes())
def test_decode_inverts_encode(node: Node) -> None:
    payload = node.encode()
    assert len(payload) == PAYLOAD_SIZE
    assert Node.decode(payload) == node
    assert not any(payload[node.size :])
    assert payload[node.size - 1 : node.size] == node.values[-1][-1:] or not node.values[-1]


def test_layout_is_as_in_format_md() -> None:
    body = bytes.fromhex("93 00 92 c401 61 c401 62 92 c403 6f6e65 c403 74776f")
    payload = b"hpkn" + b"\x00\x01" + b"\x00\x14" + body + bytes(PAYLOAD_SIZE - 8 - 20)
    assert len(body) == 0x14
    assert LEAF.encode() == payload
    assert Node.decode(payload) == LEAF


@given(nodes(), st.data())
def test_an_altered_payload_is_refused_or_is_exactly_another_node(
    node: Node, data: st.DataObject
) -> None:
    """What decodes is canonical: no two payloads are the same node."""
    payload = bytearray(node.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, node.size + 3))
        payload[where] ^= data.draw(st.integers(1, 255))
    try:
        other = Node.decode(bytes(payload))
    except CorruptNode:
        return
    assert other.encode() == payload


@given(st.binary(max_size=64))
def test_any_bytes_in_a_good_frame_are_refused_or_canonical(body: bytes) -> None:
    try:
        node = Node.decode(frame(body))
    except CorruptNode:
        return
    assert node.encode() == frame(body)


def test_every_bit_of_header_structure_and_padding_counts() -> None:
    good = LEAF.encode()
    text = {good.index(item) + i for item in (b"one", b"two") for i in range(3)}
    text |= {good.index(b"\xc4\x01a") + 2, good.index(b"\xc4\x01b") + 2}
    for where in [*range(LEAF.size + 2), PAYLOAD_SIZE - 1]:
        for bit in range(8):
            bad = bytearray(good)
            bad[where] ^= 1 << bit
            if where in text:
                continue
            with pytest.raises(CorruptNode):
                Node.decode(bytes(bad))


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 20, PAYLOAD_SIZE - 1, PAYLOAD_SIZE + 1])
def test_another_length_is_refused(cut: int) -> None:
    with pytest.raises(CorruptNode, match="16384 bytes"):
        Node.decode(LEAF.encode().ljust(cut, b"\0")[:cut])


def good_body() -> bytes:
    return LEAF.encode()[8 : LEAF.size]


BAD = {
    "magic": frame(good_body(), magic=b"hpkm"),
    "version 0": frame(good_body(), version=0),
    "version 2": frame(good_body(), version=2),
    "used too small": frame(good_body(), used=len(good_body()) - 1),
    "used too large": frame(good_body(), used=len(good_body()) + 1),
    "used beyond the payload": frame(good_body(), used=PAYLOAD_SIZE - 7),
    "used nothing": frame(b""),
    "padding": frame(good_body())[:-1] + b"\1",
    "trailing object": frame(good_body() + b"\xc0"),
    "not an array": packed(0)[:8] + b"\xc0" + bytes(PAYLOAD_SIZE - 9),
    "two parts": packed(0, [b"a"]),
    "four parts": packed(0, [b"a"], [b"1"], 0),
    "a map": frame(msgpack.packb({0: 0})),
    "level is true": packed(True, [b"a"], [REF.encode()]),
    "level is a float": packed(0.0, [b"a"], [b"1"]),
    "level is negative": packed(-1, [b"a"], [b"1"]),
    "level is nil": packed(None, [b"a"], [b"1"]),
    "level is too high": packed(MAX_LEVEL + 1, [b"a"], [REF.encode()]),
    "keys is bytes": packed(0, b"a", [b"1"]),
    "values is nil": packed(0, [b"a"], None),
    "no items": packed(0, [], []),
    "a value short": packed(0, [b"a", b"b"], [b"1"]),
    "a key short": packed(0, [b"a"], [b"1", b"2"]),
    "unsorted": packed(0, [b"b", b"a"], [b"1", b"2"]),
    "duplicate": packed(0, [b"a", b"a"], [b"1", b"2"]),
    "a key is text": packed(0, ["a"], [b"1"]),
    "an empty text key": packed(0, [""], [b"1"]),
    "a value is text": packed(0, [b"a"], ["1"]),
    "a value is a number": packed(0, [b"a"], [1]),
    "a value is an extension": packed(0, [b"a"], [msgpack.ExtType(1, b"x")]),
    "a timestamp": packed(0, [b"a"], [msgpack.Timestamp(1)]),
    "key too long": packed(0, [b"k" * (MAX_KEY + 1)], [b"1"]),
    "value too long": packed(0, [b"a"], [b"v" * (MAX_VALUE + 1)]),
    "inner value short": packed(1, [b"a"], [b"r" * 39]),
    "inner value long": packed(1, [b"a", b"b"], [b"r" * 40, b"r" * 41]),
    "level in two bytes": frame(bytes.fromhex("93 cc00 91 c40161 91 c40131")),
    "key length in two bytes": frame(bytes.fromhex("93 00 91 c5000161 91 c40131")),
    "array length in two bytes": frame(bytes.fromhex("93 00 dc0001 c40161 91 c40131")),
    "outer array length in two bytes": frame(bytes.fromhex("dc0003 00 91 c40161 91 c40131")),
    "deep nesting": frame(b"\x91" * 4_000 + b"\x00"),
    "huge array announced": frame(bytes.fromhex("93 00 ddffffffff c40161")),
    "body cut short": frame(good_body()[:-1]),
}


@pytest.mark.parametrize("payload", BAD.values(), ids=BAD.keys())
def test_malformed_payloads_are_refused_in_a_sentence(payload: bytes) -> None:
    assert len(payload) == PAYLOAD_SIZE
    with pytest.raises(CorruptNode) as caught:
        Node.decode(payload)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 100


def test_the_control_of_the_above_is_accepted() -> None:
    assert Node.decode(packed(0, [b"a"], [b"1"])) == Node(0, (b"a",), (b"1",))
    assert Node.decode(packed(1, [b"a"], [REF.encode()])).child(0) == REF


def test_two_items_of_the_largest_size_fit_and_three_do_not() -> None:
    largest = [bytes([n]) * MAX_KEY for n in range(3)]
    value = bytes(MAX_VALUE)
    assert 2 * weigh(largest[:1], [value]) <= CAPACITY
    pair = Node(0, tuple(largest[:2]), (value, value))
    assert Node.decode(pair.encode()) == pair
    with pytest.raises(CorruptNode, match="do not fit"):
        Node(0, tuple(largest), (value,) * 3)


@given(st.integers(15, 17), st.integers(0, 600))
def test_a_node_of_just_the_capacity_is_stored_and_one_byte_more_is_not(
    count: int, short: int
) -> None:
    """The room left for array headers suffices on either side of 16 entries."""
    names = tuple(bytes([n]) for n in range(count))
    values = [bytes(900)] * (count - 2) + [bytes(300 + short)]
    values.append(bytes(CAPACITY - weigh(names, [*values, bytes(256)]) + 256))
    full = Node(0, names, tuple(values))
    assert full.weight == CAPACITY
    assert Node.decode(full.encode()) == full
    with pytest.raises(CorruptNode):
        Node(0, names, (*values[:-1], values[-1] + b"x"))


@given(items)
def test_the_weight_is_what_encoding_adds(found: dict[bytes, bytes]) -> None:
    names, values = tuple(sorted(found)), tuple(found.values())
    node = Node(0, names, values)
    assert node.weight == weigh(names, values) == sum(weigh_each(names, values))
    body = len(msgpack.packb([0, list(names), list(values)]))
    assert node.size == 8 + body <= 8 + 8 + node.weight


def test_an_entry_of_an_inner_node_weighs_what_is_said() -> None:
    node = Node(1, (b"abc",), (REF.encode(),))
    assert node.weight == 3 + CHILD_WEIGHT
