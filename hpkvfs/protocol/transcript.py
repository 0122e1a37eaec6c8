"""What a challenge covers: labelled, length-prefixed fields, hashed with SHA-512.

    field = u8 length of label || label || u32 big-endian length of data || data

The first field is the domain, under the label "domain". Because every field says its length,
two different sequences of fields never hash the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Final

from hpkvfs.protocol.group import short_scalar, split

_DATA: Final = struct.Struct(">I")
_SHORT: Final = 16


@lru_cache(maxsize=64)
def _name(label: str) -> bytes:
    name = label.encode("ascii")
    return bytes([len(name)]) + name


class Transcript:
    """An append-only record of one proof; what is derived from it may be asked any time."""

    __slots__ = ("_hash",)

    def __init__(self, domain: str) -> None:
        self._hash = hashlib.sha512()
        self.append("domain", domain.encode())

    def append(self, label: str, data: bytes) -> None:
        """Add a field; the label has at most 255 ASCII bytes."""
        self._hash.update(_name(label) + _DATA.pack(len(data)) + data)

    def digest(self) -> bytes:
        """SHA-512 of all fields so far: 64 bytes."""
        return self._hash.digest()

    def weights(self) -> tuple[int, ...]:
        """Four short scalars, each from 16 bytes of digest()."""
        return tuple(map(short_scalar, split(self.digest(), _SHORT)))

    def challenge(self) -> int:
        """The first of weights(): one of 2^128 scalars that are cheap to multiply by."""
        return short_scalar(self.digest()[:_SHORT])
