"""A server's identity: the ed25519 key (RFC 8032) that is also its onion address.

What it signs begins with a domain of ours and a zero byte, so that one signature never means
two things; docs/credentials.md argues why a key that tor uses as well may sign here.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hpkvfs.protocol.errors import Malformed

IDENTITY_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64


class Identity:
    """The private half, from its 32-byte seed; has no repr."""

    __slots__ = ("_key", "_seed", "public")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != IDENTITY_SIZE:
            raise Malformed(f"an identity has {IDENTITY_SIZE} bytes, not {len(seed)}")
        self._seed = seed
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public: Final = self._key.public_key().public_bytes_raw()
        """32 bytes: what an onion address encodes."""

    def sign(self, domain: str, message: bytes) -> bytes:
        """64 bytes, over domain || 0 || message."""
        return self._key.sign(_signed(domain, message))

    def expanded(self) -> bytes:
        """64 secret bytes: the clamped scalar and the nonce prefix, as tor keeps them."""
        expanded = bytearray(hashlib.sha512(self._seed).digest())
        expanded[0] &= 248
        expanded[31] = expanded[31] & 63 | 64
        return bytes(expanded)


def verify(identity: bytes, domain: str, message: bytes, signature: bytes) -> bool:
    """Whether the identity (32 bytes) signed this; False for bytes that are no identity."""
    try:
        key = Ed25519PublicKey.from_public_bytes(identity)
        key.verify(signature, _signed(domain, message))
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed(domain: str, message: bytes) -> bytes:
    return domain.encode("ascii") + b"\0" + message
