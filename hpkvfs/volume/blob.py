"""Seal and open blobs: 16,384 bytes of payload to 16,433 bytes the server sees.

    E (33) || ChaCha20-Poly1305(key, nonce 0, payload, aad = tag || pubkey) (16,400)
    key = HKDF-SHA256(ECDH(e, pubkey), salt = the vault's secret for the tag, info = E || pubkey)

ECDH alone would let whoever knows a storage key, and so the server, seal a blob for it: its owner
would take an anchor that he finds under its number, where no digest says what is to be there, for
one of his own. The salt is as secret as the root key, so that what opens was sealed by the vault.

A blob that was opened, or sealed here, is kept as its payload with E and key beside it (Opened):
from these the very same blob can be made again, byte by byte, without ECDH and without e.

Invariant: an ephemeral e seals one payload and is forgotten, which is what makes the zero
nonce safe; a retry must resend the sealed bytes, never seal again. The tag says what the
payload is, so that no blob can be read as one of another kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hpkvfs.errors import CorruptBlob
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.group import SigningKey
from hpkvfs.types import BLOB_SIZE, OPENED_SIZE, PAYLOAD_SIZE, BlobId, BlobRef
from hpkvfs.volume.keys import VaultKeys

_NONCE = bytes(12)
_POINT = 33
_KEY = 32
_PAYLOAD_AT = 1 + _POINT + _KEY


class Kind(Enum):
    """What a payload is; the value is the domain tag of its key."""

    NODE = b"hpkvfs/node/v1"
    EXTENT = b"hpkvfs/extent/v1"
    ANCHOR = b"hpkvfs/anchor/v1"
    PAGE = b"hpkvfs/page/v1"
    TABLE = b"hpkvfs/snapshots/v1"


CODES: Final = {kind: bytes([code]) for code, kind in enumerate(Kind)}
"""The first byte of an opened blob."""
_KINDS = list(Kind)


@dataclass(frozen=True, slots=True)
class Opened:
    """A payload (16,384 bytes), and the point (33) and key (32) that seal it as it was sealed."""

    kind: Kind
    point: bytes
    key: bytes = field(repr=False)
    payload: bytes = field(repr=False)

    def encode(self) -> bytes:
        """16,450 secret bytes: u8 kind, point, key, payload."""
        return b"".join((CODES[self.kind], self.point, self.key, self.payload))

    @classmethod
    def decode(cls, raw: bytes) -> Opened:
        """Inverse of encode; ValueError for another length or kind."""
        if len(raw) != OPENED_SIZE or raw[0] >= len(_KINDS):
            raise ValueError("not an opened blob")
        point, key = raw[1 : 1 + _POINT], raw[1 + _POINT : _PAYLOAD_AT]
        return cls(_KINDS[raw[0]], point, key, raw[_PAYLOAD_AT:])


class Sealer:
    """Seals and opens the blobs of one vault."""

    def __init__(self, keys: VaultKeys, rng: Callable[[int], bytes]) -> None:
        self._keys = keys
        self._rng = rng
        self._salts = {kind: keys.sealing(kind.value) for kind in Kind}

    def seal(self, blob_id: BlobId, kind: Kind, payload: bytes) -> tuple[BlobRef, bytes]:
        """Seal a 16,384-byte payload under the id's key: its reference and 16,433 bytes."""
        return self.make(blob_id, kind, payload)[:2]

    def make(self, blob_id: BlobId, kind: Kind, payload: bytes) -> tuple[BlobRef, bytes, Opened]:
        """As seal, with what to keep of it."""
        if len(payload) != PAYLOAD_SIZE:
            raise ValueError(f"a payload has {PAYLOAD_SIZE} bytes, not {len(payload)}")
        public = self._keys.signer(blob_id).public
        ephemeral = SigningKey(self._rng(32))
        key = self._key(ephemeral.shared(public), kind, ephemeral.public, public)
        opened = Opened(kind, ephemeral.public, key, payload)
        blob = _seal(opened, public)
        return self.reference(blob_id, blob), blob, opened

    def again(self, blob_id: BlobId, opened: Opened) -> bytes:
        """The very blob that this was opened from, or was kept of when it was sealed."""
        return _seal(opened, self._keys.signer(blob_id).public)

    @staticmethod
    def reference(blob_id: BlobId, blob: bytes) -> BlobRef:
        """The reference of a sealed blob."""
        return BlobRef(blob_id, hashlib.sha256(blob).digest())

    def open(self, ref: BlobRef, kind: Kind, blob: bytes) -> bytes:
        """The payload; CorruptBlob when the bytes are not what the reference promised."""
        return self.unseal(ref, kind, blob).payload

    def unseal(self, ref: BlobRef, kind: Kind, blob: bytes) -> Opened:
        """As open, with what makes the blob again."""
        if hashlib.sha256(blob).digest() != ref.digest:
            raise CorruptBlob(f"{ref!r} was altered: its digest differs")
        return self._unseal(ref.id, kind, blob)

    def open_unreferenced(self, blob_id: BlobId, kind: Kind, blob: bytes) -> bytes:
        """As open, where no digest is known (an anchor found by its number)."""
        return self._unseal(blob_id, kind, blob).payload

    def is_ours(self, blob_id: BlobId, blob: bytes) -> bool:
        """Whether this vault sealed it for this id, as a blob of whatever kind."""
        for kind in Kind:
            with suppress(CorruptBlob):
                self._unseal(blob_id, kind, blob)
                return True
        return False

    def _unseal(self, blob_id: BlobId, kind: Kind, blob: bytes) -> Opened:
        if len(blob) != BLOB_SIZE:
            raise CorruptBlob(f"{BlobRef(blob_id, b'')!r} has {len(blob)} bytes")
        signer = self._keys.signer(blob_id)
        point = blob[:_POINT]
        try:
            key = self._key(signer.shared(point), kind, point, signer.public)
            aad = kind.value + signer.public
            payload = ChaCha20Poly1305(key).decrypt(_NONCE, blob[_POINT:], aad)
        except (InvalidTag, ProtocolError, ValueError):
            raise CorruptBlob(f"{BlobRef(blob_id, b'')!r} does not open") from None
        return Opened(kind, point, key, payload)

    def _key(self, shared: bytes, kind: Kind, point: bytes, public: bytes) -> bytes:
        hkdf = HKDF(hashes.SHA256(), length=32, salt=self._salts[kind], info=point + public)
        return hkdf.derive(shared)


def _seal(opened: Opened, public: bytes) -> bytes:
    aad = opened.kind.value + public
    return opened.point + ChaCha20Poly1305(opened.key).encrypt(_NONCE, opened.payload, aad)
