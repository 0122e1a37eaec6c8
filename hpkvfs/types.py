"""Names every room shares. A leaf: imports nothing of ours.

A blob's id says which key it lives under: ids below ANCHOR_BIT are nodes, extents and
list pages, numbered from one counter per vault in order of birth; an id with ANCHOR_BIT
set is the anchor of the generation in its low 63 bits.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, NewType, Protocol

PAYLOAD_SIZE = 16_384
BLOB_SIZE = PAYLOAD_SIZE + 33 + 16
OPENED_SIZE = PAYLOAD_SIZE + 1 + 33 + 32
ENTRY_SIZE = 1_024
REF_SIZE = 40
ANCHOR_BIT = 1 << 63

BlobId = NewType("BlobId", int)
Generation = NewType("Generation", int)

_ID = struct.Struct(">Q")
_REF = struct.Struct(">Q32s")


class BlobRef(NamedTuple):
    """Where a blob is and what it must be: u64 id and SHA-256 of the whole ciphertext."""

    id: BlobId
    digest: bytes

    def encode(self) -> bytes:
        """40 bytes: id big-endian, then the digest."""
        return _ID.pack(self.id) + self.digest

    @classmethod
    def decode(cls, raw: bytes) -> BlobRef:
        """Inverse of encode; ValueError unless exactly 40 bytes."""
        if len(raw) != REF_SIZE:
            raise ValueError(f"a blob reference has {REF_SIZE} bytes, not {len(raw)}")
        return tuple.__new__(cls, _REF.unpack(raw))  # half the time of calling cls

    def __repr__(self) -> str:
        return f"BlobRef({self.id & (ANCHOR_BIT - 1)}{'a' if self.id & ANCHOR_BIT else ''})"


def anchor_id(generation: Generation) -> BlobId:
    """The id under which the anchor of this generation is stored."""
    return BlobId(generation | ANCHOR_BIT)


class Missing(Exception):
    """A read needs blobs that are not in memory: load `refs`, then run it again."""

    def __init__(self, refs: tuple[BlobRef, ...]) -> None:
        super().__init__(refs)
        self.refs = refs


class Signer(Protocol):
    """The private half of a storage key; it never leaves the object."""

    @property
    def public(self) -> bytes:
        """33-byte compressed secp256k1 point: the storage key."""
        ...

    def sign(self, digest: bytes) -> bytes:
        """64-byte BIP340 signature of a 32-byte digest."""
        ...


class BlobStore(Protocol):
    """What the volume needs of a server; every call is paid and may raise errors.StoreError."""

    async def insert(self, key: bytes, blob: bytes, memo: bytes) -> None:
        """Store a 16,433-byte blob under a new key; KeyExists if the key is taken.

        `memo` is journalled with the payment and handed back by recovery after a crash.
        """
        ...

    async def look_up(self, key: bytes) -> bytes | None:
        """The blob, or None when the key is absent. The bytes are not verified here."""
        ...

    async def delete(self, signer: Signer, digest: bytes, memo: bytes) -> None:
        """Delete the blob with this SHA-256 for a refund; KeyAbsent if it is not there."""
        ...
