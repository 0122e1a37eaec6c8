"""Seal and open blobs: 16,384 bytes of payload to 16,433 bytes the server sees.

    E (33) || ChaCha20-Poly1305(key, nonce 0, payload, aad = tag || pubkey) (16,400)
    key = HKDF-SHA256(ECDH(e, pubkey), salt = tag, info = E || pubkey)

Invariant: an ephemeral e seals one payload and is forgotten, which is what makes the zero
nonce safe; a retry must resend the sealed bytes, never seal again. The tag says what the
payload is, so that no blob can be read as one of another kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import Enum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hpkvfs.errors import CorruptBlob
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.group import SigningKey
from hpkvfs.types import BLOB_SIZE, PAYLOAD_SIZE, BlobId, BlobRef
from hpkvfs.volume.keys import VaultKeys

_NONCE = bytes(12)
_POINT = 33


class Kind(Enum):
    """What a payload is; the value is the domain tag of its key."""

    NODE = b"hpkvfs/node/v1"
    EXTENT = b"hpkvfs/extent/v1"
    ANCHOR = b"hpkvfs/anchor/v1"
    PAGE = b"hpkvfs/page/v1"
    TABLE = b"hpkvfs/snapshots/v1"


class Sealer:
    """Seals and opens the blobs of one vault."""

    def __init__(self, keys: VaultKeys, rng: Callable[[int], bytes]) -> None:
        self._keys = keys
        self._rng = rng

    def seal(self, blob_id: BlobId, kind: Kind, payload: bytes) -> tuple[BlobRef, bytes]:
        """Seal a 16,384-byte payload under the id's key: its reference and 16,433 bytes."""
        if len(payload) != PAYLOAD_SIZE:
            raise ValueError(f"a payload has {PAYLOAD_SIZE} bytes, not {len(payload)}")
        public = self._keys.signer(blob_id).public
        ephemeral = SigningKey(self._rng(32))
        key = _key(ephemeral.shared(public), kind, ephemeral.public, public)
        sealed = ChaCha20Poly1305(key).encrypt(_NONCE, payload, kind.value + public)
        blob = ephemeral.public + sealed
        return self.reference(blob_id, blob), blob

    @staticmethod
    def reference(blob_id: BlobId, blob: bytes) -> BlobRef:
        """The reference of a sealed blob."""
        return BlobRef(blob_id, hashlib.sha256(blob).digest())

    def open(self, ref: BlobRef, kind: Kind, blob: bytes) -> bytes:
        """The payload; CorruptBlob when the bytes are not what the reference promised."""
        if hashlib.sha256(blob).digest() != ref.digest:
            raise CorruptBlob(f"{ref!r} was altered: its digest differs")
        return self.open_unreferenced(ref.id, kind, blob)

    def open_unreferenced(self, blob_id: BlobId, kind: Kind, blob: bytes) -> bytes:
        """As open, where no digest is known (an anchor found by its number)."""
        if len(blob) != BLOB_SIZE:
            raise CorruptBlob(f"{BlobRef(blob_id, b'')!r} has {len(blob)} bytes")
        signer = self._keys.signer(blob_id)
        point = blob[:_POINT]
        try:
            key = _key(signer.shared(point), kind, point, signer.public)
            aad = kind.value + signer.public
            return ChaCha20Poly1305(key).decrypt(_NONCE, blob[_POINT:], aad)
        except (InvalidTag, ProtocolError, ValueError):
            raise CorruptBlob(f"{BlobRef(blob_id, b'')!r} does not open") from None


def _key(shared: bytes, kind: Kind, point: bytes, public: bytes) -> bytes:
    hkdf = HKDF(hashes.SHA256(), length=32, salt=kind.value, info=point + public)
    return hkdf.derive(shared)
