"""Vouchers: what an operator hands to a customer, who exchanges it once for credentials.

    hpkv1-<amount>-<32 characters of base32>

The characters are the secret, 160 bits. A server keeps only their hash, so that nobody who
reads its disk can redeem a voucher.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hpkvfs.protocol.credential import AMOUNT_LIMIT

SECRET_SIZE: Final = 20
_TEXT: Final = re.compile(r"hpkv1-([1-9][0-9]{0,9})-([a-z2-7]{32})", re.ASCII)


def voucher_digest(secret: bytes) -> bytes:
    """The 32 bytes under which a server knows a voucher."""
    return hashlib.sha256(b"hpkv/voucher/v1" + secret).digest()


@dataclass(frozen=True, slots=True)
class Voucher:
    """An amount in tokens, 1 <= amount < 2^32, and the 20-byte secret that is worth it."""

    amount: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.amount < AMOUNT_LIMIT:
            raise ValueError(f"a voucher cannot be worth {self.amount}")
        if len(self.secret) != SECRET_SIZE:
            raise ValueError(f"a voucher's secret has {SECRET_SIZE} bytes")

    @classmethod
    def generate(cls, amount: int, rng: Callable[[int], bytes]) -> Voucher:
        """A new voucher; ValueError when no voucher can be worth this amount."""
        return cls(amount, rng(SECRET_SIZE))

    @classmethod
    def parse(cls, text: str) -> Voucher:
        """Inverse of str, forgiving case and surrounding spaces; ValueError for other text."""
        match = _TEXT.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError("a voucher reads hpkv1-<amount>-<32 letters and digits>")
        return cls(int(match[1]), base64.b32decode(match[2].upper()))

    @property
    def digest(self) -> bytes:
        """The 32 bytes under which a server knows this voucher."""
        return voucher_digest(self.secret)

    def __str__(self) -> str:
        """The text to hand out. It is the money: print it only to its owner."""
        return f"hpkv1-{self.amount}-{base64.b32encode(self.secret).decode().lower()}"
