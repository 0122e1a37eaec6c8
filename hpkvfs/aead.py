"""Which cipher seals what stays on this machine: the one that this processor is quick at. A leaf.

Both are authenticated, with keys of 32 bytes and nonces of 12 (RFC 8439; NIST SP 800-38D). What
is sealed says with which, since a disk may be put into another machine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

Cipher: TypeAlias = AESGCM | ChaCha20Poly1305
CIPHERS: Final[tuple[type[Cipher], ...]] = (ChaCha20Poly1305, AESGCM)
"""By the number that stands for each in a file: AES-256-GCM is 1."""


@cache
def has_aes() -> bool:
    """Whether this processor has instructions for AES: GCM then takes a quarter of the time."""
    try:
        return b"aes" in Path("/proc/cpuinfo").read_bytes().split()
    except OSError:
        return False
