"""What a challenge covers: labelled, length-prefixed fields, hashed with SHA-512.

    field = u8 length of label || label || u32 big-endian length of data || data

The first field is the domain, under the label "domain". Because every field says its length,
two different sequences of fields never hash the same bytes.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

from hpkvfs.protocol.group import ORDER

_DATA: Final = struct.Struct(">I")


class Transcript:
    """An append-only record of one proof; digest() and challenge() may be asked any time."""

    __slots__ = ("_hash",)

    def __init__(self, domain: str) -> None:
        self._hash = hashlib.sha512()
        self.append("domain", domain.encode())

    def append(self, label: str, data: bytes) -> None:
        """Add a field; the label has at most 255 ASCII bytes."""
        name = label.encode("ascii")
        self._hash.update(bytes([len(name)]) + name + _DATA.pack(len(data)) + data)

    def digest(self) -> bytes:
        """SHA-512 of all fields so far: 64 bytes."""
        return self._hash.digest()

    def challenge(self) -> int:
        """digest() as a big-endian integer modulo the group's order: bias below 2^-255."""
        return int.from_bytes(self._hash.digest(), "big") % ORDER
