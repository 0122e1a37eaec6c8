"""One node of the tree: sorted keys with a value each, in one blob's payload (FORMAT.md, "Node").

Invariant: a Node that exists is one that may be stored. It has an item, its keys ascend
strictly, every size is within its limit and the whole fits into a payload; making any other
raises CorruptNode. encode and decode are inverse, and a payload that encode would not have
written, byte for byte, is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from operator import lt

import msgpack

from hpkvfs.types import PAYLOAD_SIZE, REF_SIZE, BlobRef

MAGIC = b"hpkn"
VERSION = 1
MAX_KEY = 64
MAX_VALUE = 8_000
MAX_LEVEL = 15

_HEADER = struct.Struct(">4sHH")
# An array of three, the level, and two arrays of at most 65,535 elements.
_FRAME = 1 + 1 + 3 + 3
CAPACITY = PAYLOAD_SIZE - _HEADER.size - _FRAME
"""The most that a node's items may weigh, in bytes; two items of the largest size fit."""

ITEM_OVERHEAD = 2 + 2
"""Bytes by which the encoding of a key and its value is longer than they are."""

_LONG = 256
"""The encoding of a value this long has one byte more."""

CHILD_WEIGHT = ITEM_OVERHEAD + REF_SIZE
"""What an entry of an inner node weighs besides its key."""

_ZEROS = bytes(PAYLOAD_SIZE)
_pack = msgpack.Packer(use_bin_type=True).pack


class CorruptNode(ValueError):
    """These bytes, or these items, are no node, or not the node that its parent describes."""


@dataclass(frozen=True, slots=True)
class Node:
    """A leaf (level 0: values are items) or inner node (values are 40-byte BlobRefs).

    The key of an inner node's entry is the first key of the child it names.
    """

    level: int
    keys: tuple[bytes, ...]
    values: tuple[bytes, ...]
    weight: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_shape(self.level, self.keys, self.values)
        object.__setattr__(self, "weight", weigh(self.keys, self.values))
        if self.weight > CAPACITY:
            raise CorruptNode(f"items of {self.weight} bytes do not fit into a node")

    def child(self, index: int) -> BlobRef:
        """The reference in entry `index` of an inner node."""
        return BlobRef.decode(self.values[index])

    def encode(self) -> bytes:
        """The payload: 16,384 bytes."""
        body: bytes = _pack((self.level, self.keys, self.values))
        return (_HEADER.pack(MAGIC, VERSION, len(body)) + body).ljust(PAYLOAD_SIZE, b"\0")

    @classmethod
    def decode(cls, payload: bytes) -> Node:
        """Inverse of encode; CorruptNode unless encode would have written just this."""
        if len(payload) != PAYLOAD_SIZE:
            raise CorruptNode(f"a node has {PAYLOAD_SIZE} bytes, not {len(payload)}")
        magic, version, used = _HEADER.unpack_from(payload)
        if magic != MAGIC:
            raise CorruptNode("this payload is no tree node")
        if version != VERSION:
            raise CorruptNode(f"node format {version} is not known to this version")
        end = _HEADER.size + used
        if end > PAYLOAD_SIZE or payload[end:] != _ZEROS[end:]:
            raise CorruptNode("the padding of a node is not zero")
        node = cls(*_unpack(payload[_HEADER.size : end]))
        # Every other encoding of the same items is longer than the canonical one.
        if node._body_size != used:
            raise CorruptNode("a node is not encoded canonically")
        return node

    @property
    def size(self) -> int:
        """Bytes of the payload that are not padding."""
        return _HEADER.size + self._body_size

    @property
    def _body_size(self) -> int:
        return 2 + 2 * _array_header(len(self.keys)) + self.weight


def weigh(keys: Collection[bytes], values: Iterable[bytes]) -> int:
    """Bytes that these items take in a node's payload."""
    sizes = list(map(len, values))
    long = sum(size >= _LONG for size in sizes) if max(sizes, default=0) >= _LONG else 0
    return sum(map(len, keys)) + sum(sizes) + ITEM_OVERHEAD * len(sizes) + long


def weigh_each(keys: Iterable[bytes], values: Iterable[bytes]) -> list[int]:
    """Bytes that each of these items takes in a node's payload."""
    sizes = zip(map(len, keys), map(len, values), strict=True)
    return [key + value + ITEM_OVERHEAD + (value >= _LONG) for key, value in sizes]


def _array_header(count: int) -> int:
    return 1 if count < 16 else 3


def _check_shape(level: int, keys: tuple[bytes, ...], values: tuple[bytes, ...]) -> None:
    if type(level) is not int or not 0 <= level <= MAX_LEVEL:
        raise CorruptNode("a node's level is out of range")
    if not keys or len(keys) != len(values):
        raise CorruptNode("a node needs as many values as keys, and at least one")
    if set(map(type, keys)) != {bytes} or set(map(type, values)) != {bytes}:
        raise CorruptNode("a node's keys and values are byte strings")
    if not all(map(lt, keys, islice(keys, 1, None))):
        raise CorruptNode("a node's keys do not ascend")
    if max(map(len, keys)) > MAX_KEY or max(map(len, values)) > MAX_VALUE:
        raise CorruptNode("a node's key or value is too long")
    if level and set(map(len, values)) != {REF_SIZE}:
        raise CorruptNode(f"an inner node's values have {REF_SIZE} bytes")


def _unpack(body: bytes) -> tuple[int, tuple[bytes, ...], tuple[bytes, ...]]:
    try:
        parts = msgpack.unpackb(
            body,
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_bin_len=MAX_VALUE,
            max_str_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException):
        raise CorruptNode("a node's body is damaged") from None
    if type(parts) is not tuple or len(parts) != 3:
        raise CorruptNode("a node's body has three parts")
    level, keys, values = parts
    if type(keys) is not tuple or type(values) is not tuple:
        raise CorruptNode("a node's keys and values are arrays")
    return level, keys, values
