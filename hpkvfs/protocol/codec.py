"""Frames: the one shape of everything that crosses the wire.

    frame = magic (4) || version (u16) || length (u32) || body (length bytes) || zeros

Every request is REQUEST_SIZE bytes and every reply REPLY_SIZE, refusals included, so that a
length never tells what was asked or answered. A body is one msgpack array. Only one encoding
of a message is accepted (shortest forms, no trailing bytes, padding all zero): a request is
recognised by its hash, so it must not have two spellings. Anything else raises Malformed.

PROTOCOL.md has the layout byte by byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import msgpack

from hpkvfs.protocol.errors import Malformed

T = TypeVar("T")

VERSION: Final = 1
HEADER: Final = struct.Struct(">4sHI")

# A relay cell of Tor carries 498 bytes of data: requests fill 38 cells and replies 35.
CELL_DATA: Final = 498
REQUEST_SIZE: Final = 38 * CELL_DATA
REPLY_SIZE: Final = 35 * CELL_DATA


@dataclass(frozen=True, slots=True)
class Envelope:
    """One direction of the wire: its magic, and the size of each of its frames in bytes."""

    magic: bytes
    size: int

    @property
    def room(self) -> int:
        """The longest body that fits, in bytes."""
        return self.size - HEADER.size

    def wrap(self, body: bytes) -> bytes:
        """The frame around a body; ValueError if it does not fit."""
        if len(body) > self.room:
            raise ValueError(f"a body of {len(body)} bytes does not fit a frame of {self.size}")
        return (HEADER.pack(self.magic, VERSION, len(body)) + body).ljust(self.size, b"\0")

    def unwrap(self, frame: bytes) -> bytes:
        """Inverse of wrap; Malformed for any other bytes."""
        if len(frame) != self.size:
            raise Malformed(f"a frame of {len(frame)} bytes, not {self.size}")
        magic, version, length = HEADER.unpack_from(frame)
        if magic != self.magic:
            raise Malformed("not a frame of this protocol and direction")
        if version != VERSION:
            raise Malformed(f"a frame of version {version}; this program speaks {VERSION}")
        end = HEADER.size + length
        if length > self.room or frame.count(0, end) != self.size - end:
            raise Malformed("the padding of a frame is not zero")
        return frame[HEADER.size : end]


REQUEST: Final = Envelope(b"hpkq", REQUEST_SIZE)
REPLY: Final = Envelope(b"hpkr", REPLY_SIZE)


MOST_ELEMENTS: Final = 256
"""Of any array. msgpack makes room for as many as a header announces before it has read one: frames
of nested headers would take up gigabytes."""


def pack(values: Sequence[object]) -> bytes:
    """The canonical msgpack of nested sequences of int, bytes and None."""
    packed: bytes = msgpack.packb(values)
    return packed


def unpack(body: bytes) -> object:
    """Inverse of pack; Malformed unless packing the result gives the very same bytes."""
    try:
        value: object = msgpack.unpackb(
            body, max_array_len=MOST_ELEMENTS, max_map_len=0, max_str_len=0, max_ext_len=0
        )
        canonical = msgpack.packb(value) == body
    except (ValueError, TypeError, OverflowError) as error:
        raise Malformed("a body is not msgpack") from error
    if not canonical:
        raise Malformed("a body is not in its canonical form")
    return value


# Readers: each takes an unpacked value and returns it typed, or raises Malformed.
Reader: TypeAlias = Callable[[object], T]


def octets(least: int, most: int | None = None) -> Reader[bytes]:
    """Bytes of a length in [least, most]; exactly `least` when `most` is not given."""
    longest = least if most is None else most

    def read(value: object) -> bytes:
        if not isinstance(value, bytes) or not least <= len(value) <= longest:
            raise Malformed(f"a field is not {least} to {longest} bytes")
        return value

    return read


def integer(least: int, most: int) -> Reader[int]:
    """An int in [least, most]; bool is not an int."""

    def read(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise Malformed(f"a field is not an integer from {least} to {most}")
        return value

    return read


def optional(reader: Reader[T]) -> Reader[T | None]:
    """nil, or what the reader accepts."""

    def read(value: object) -> T | None:
        return None if value is None else reader(value)

    return read


def array(reader: Reader[T], least: int, most: int) -> Reader[tuple[T, ...]]:
    """From `least` to `most` elements, each accepted by the reader."""

    def read(value: object) -> tuple[T, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise Malformed(f"a field is not an array of {least} to {most} elements")
        return tuple(map(reader, value))

    return read


def fields(*readers: Reader[object]) -> Reader[tuple[Any, ...]]:
    """An array of exactly these elements, each of the type that its reader returns."""

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(readers):
            raise Malformed(f"a field is not an array of {len(readers)} elements")
        return tuple(reader(element) for reader, element in zip(readers, value, strict=True))

    return read
