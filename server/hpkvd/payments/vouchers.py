"""Vouchers: made by the operator, sold in whatever way he likes, redeemed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hpkvd.ledger import Desk
from hpkvfs.protocol.voucher import Voucher

MAX_COUNT: Final = 10_000


def make(desk: Desk, amount: int, count: int, rng: Callable[[int], bytes]) -> list[Voucher]:
    """New vouchers, redeemable on return; ValueError for amounts no voucher has."""
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"make from 1 to {MAX_COUNT} vouchers at a time")
    vouchers = [Voucher.generate(amount, rng) for _ in range(count)]
    desk.add_vouchers(vouchers)
    return vouchers
