"""Every key of a vault, from its words (FORMAT.md, "Keys").

    words + passphrase --BIP39--> seed (64 B) --HMAC--> root (32 B) --HMAC(label)--> the rest

Nothing here is stored; whoever holds the root can derive everything below it and nothing
above it, so local state keeps the root and never the words.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from functools import lru_cache

from mnemonic import Mnemonic

from hpkvfs.errors import UserError
from hpkvfs.protocol.group import SigningKey
from hpkvfs.types import ANCHOR_BIT, BlobId

_WORDS = Mnemonic("english")
_U64 = struct.Struct(">Q")


def make_words(count: int, rng: Callable[[int], bytes]) -> str:
    """A new BIP39 mnemonic of 12 or 24 words (128 or 256 bits from `rng`)."""
    if count not in (12, 24):
        raise UserError(f"a vault has 12 or 24 words, not {count}")
    return str(_WORDS.to_mnemonic(rng(count * 4 // 3)))


def check_words(text: str) -> str:
    """The words in canonical form; UserError naming the first thing wrong with them."""
    words = text.lower().split()
    if len(words) not in (12, 24):
        raise UserError(
            f"expected 12 or 24 words, found {len(words)}", "write them separated by spaces"
        )
    for place, word in enumerate(words, 1):
        if word not in _WORDS.wordlist:
            raise UserError(
                f"word {place} is not one of the BIP39 words", "compare it with your paper"
            )
    if not _WORDS.check(" ".join(words)):
        raise UserError(
            "the words' checksum does not match",
            "a word is wrong or two are swapped; compare them with your paper",
        )
    return " ".join(words)


class VaultKeys:
    """The vault's root key and what derives from it; has no repr of secrets."""

    def __init__(self, root: bytes) -> None:
        if len(root) != 32:
            raise ValueError("a vault root key has 32 bytes")
        self._root = root
        self._signer = lru_cache(maxsize=8192)(self._derive_signer)

    @classmethod
    def from_words(cls, words: str, passphrase: str = "") -> VaultKeys:
        """From a mnemonic (checked) and the optional BIP39 passphrase."""
        seed = Mnemonic.to_seed(check_words(words), passphrase)
        return cls(hmac.digest(seed, b"hpkvfs/root/v1", hashlib.sha256))

    @property
    def root(self) -> bytes:
        """32 bytes: all of the vault's secrecy. Only the sealed key file may hold it."""
        return self._root

    def secret(self, label: str) -> bytes:
        """A 32-byte symmetric key for one local purpose ("cache", "redo", "wallet", ...)."""
        return hmac.digest(self._root, b"local/" + label.encode(), hashlib.sha256)

    def sealing(self, tag: bytes) -> bytes:
        """32 secret bytes that go into the key of every blob of one kind (volume/blob.py)."""
        return hmac.digest(self._root, b"seal/" + tag, hashlib.sha256)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that tell two vaults apart and reveal nothing about either."""
        return self.secret("fingerprint")[:16]

    def signer(self, blob_id: BlobId) -> SigningKey:
        """The key pair under which the blob or anchor of this id is stored."""
        return self._signer(blob_id)

    def entry_signer(self, epoch: bytes) -> SigningKey:
        """The key pair of the breakglass entry of an epoch, given by its digest (32 bytes).

        One for each epoch, so that entries cannot be told to be one vault's.
        """
        return SigningKey(hmac.digest(self._root, b"breakglass" + epoch, hashlib.sha256))

    def _derive_signer(self, blob_id: BlobId) -> SigningKey:
        label = b"anchor" if blob_id & ANCHOR_BIT else b"blob"
        number = _U64.pack(blob_id & (ANCHOR_BIT - 1))
        return SigningKey(hmac.digest(self._root, label + number, hashlib.sha256))
