"""Credentials, attempts and wallets, made up: the wallet's states need no issuer."""

from __future__ import annotations

import hashlib
from itertools import count

from hpkvfs.protocol.credential import Credential
from hpkvfs.protocol.group import generator_multiple
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Attempt

EPOCH = b"e" * 32
POINT = generator_multiple(7)
_numbers = count(1)


def credential(amount: int) -> Credential:
    """One of this amount, unlike every other."""
    return Credential(amount, next(_numbers), next(_numbers), POINT, POINT)


def attempt(operation: Operation, delta: int, body: bytes = b"") -> Attempt:
    """One that is unlike every other."""
    fingerprint = hashlib.sha256(str(next(_numbers)).encode()).digest()
    return Attempt(operation, delta, fingerprint, b"secrets", body)
