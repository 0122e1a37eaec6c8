"""What is in a breakglass entry, before and after it is sealed (FORMAT.md, "Breakglass entry").

    entry    = nonce (12) || ChaCha20-Poly1305(key, nonce, contents, AAD = tag || epoch)
    contents = u16 length || msgpack || zeros

An entry has one size, and its bytes look random, whatever is in it. The key belongs to the
vault and the nonce is random: a vault makes one entry in an epoch, or a few.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from hpkvfs.errors import CorruptBlob, NewerFormat
from hpkvfs.protocol import codec
from hpkvfs.protocol.credential import Credential
from hpkvfs.protocol.errors import Malformed
from hpkvfs.types import ENTRY_SIZE, Generation

VERSION: Final = 1
MOST_CREDENTIALS: Final = 7
_TAG: Final = b"hpkvfs/breakglass/v1"
_NONCE: Final = 12
_CONTENTS: Final = ENTRY_SIZE - _NONCE - 16
_LENGTH: Final = 2


@dataclass(frozen=True, slots=True)
class Contents:
    """Credentials of one epoch that nobody spent, and a generation that exists.

    The newest one is that or a later one. None: no generation was known.
    """

    generation: Generation | None
    credentials: tuple[Credential, ...] = field(repr=False)

    @property
    def amount(self) -> int:
        """Tokens in it."""
        return sum(one.amount for one in self.credentials)


def digest(entry: bytes) -> bytes:
    """The 32 bytes by which an entry is named when it is opened: SHA-256."""
    return hashlib.sha256(entry).digest()


def seal(contents: Contents, key: bytes, epoch: bytes, rng: Callable[[int], bytes]) -> bytes:
    """An entry of ENTRY_SIZE bytes; `key` has 32 bytes, `epoch` is the digest of the tokens'."""
    if len(contents.credentials) > MOST_CREDENTIALS:
        raise ValueError(f"{len(contents.credentials)} credentials do not fit an entry")
    credentials = [one.encode() for one in contents.credentials]
    body = codec.pack([VERSION, contents.generation, credentials])
    plain = (len(body).to_bytes(_LENGTH, "big") + body).ljust(_CONTENTS, b"\0")
    nonce = rng(_NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, _TAG + epoch)


def unseal(entry: bytes, key: bytes, epoch: bytes) -> Contents:
    """Inverse of seal; CorruptBlob if it was not sealed with this key for this epoch."""
    try:
        plain = ChaCha20Poly1305(key).decrypt(entry[:_NONCE], entry[_NONCE:], _TAG + epoch)
        end = _LENGTH + int.from_bytes(plain[:_LENGTH], "big")
        version, *fields = _array(codec.unpack(plain[_LENGTH:end]))
    except (InvalidTag, Malformed, ValueError) as error:
        raise CorruptBlob("the breakglass entry is damaged", _VOUCHER) from error
    if version != VERSION:
        raise NewerFormat(
            f"the breakglass entry has format {version}, newer than this hpkvfs knows",
            "install a newer hpkvfs",
        )
    try:
        generation, credentials = fields
        return Contents(generation, tuple(map(Credential.decode, credentials)))
    except (Malformed, ValueError, TypeError) as error:
        raise CorruptBlob("the breakglass entry is damaged", _VOUCHER) from error


_VOUCHER: Final = "recover with a voucher: --voucher-file"


def _array(value: object) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Malformed("not an array")
    return value
