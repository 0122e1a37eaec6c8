"""What each operation costs.

The issuer computes the delta of a request from its operation, never from a number that the
request carries: a delta the client may choose mints credentials without limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE

PRICE_LIMIT: Final = 2**31
DEARER: Final = 10
"""How many times dearer a byte of a breakglass entry is than one of a blob, at least."""
HOURS_LIMIT: Final = 366 * 24


class Operation(IntEnum):
    """What a request asks for; the value is the byte on the wire."""

    PARAMETERS = 0
    ISSUE = 1
    REISSUE = 2
    LOOK_UP = 3
    INSERT = 4
    DELETE = 5
    STORE_ENTRY = 6
    OPEN_ENTRY = 7
    OFFERS = 8
    PAY = 9


@dataclass(frozen=True, slots=True)
class Tariff:
    """Prices of an epoch, in tokens: 0 <= refund < insert, and all below 2^31.

    A refund as large as the price would make storage a free loan. `entry` is the price of a
    breakglass entry, whose bytes are DEARER than a blob's, so that nobody keeps files there;
    `entry_hours`, 1 to 8,784, is how long an entry can be opened after it was first opened.
    """

    look_up: int = 1
    insert: int = 10
    refund: int = 8
    entry: int = 10
    entry_hours: int = 72

    def __post_init__(self) -> None:
        if not 0 <= self.look_up < PRICE_LIMIT:
            raise ValueError(f"a look-up cannot cost {self.look_up}")
        if not 0 <= self.refund < self.insert < PRICE_LIMIT:
            raise ValueError(f"a refund of {self.refund} does not fit a price of {self.insert}")
        least = least_entry_price(self.insert)
        if not least <= self.entry < PRICE_LIMIT:
            raise ValueError(f"a breakglass entry cannot cost {self.entry}, less than {least}")
        if not 1 <= self.entry_hours <= HOURS_LIMIT:
            raise ValueError(f"a breakglass entry cannot stay open {self.entry_hours} hours")

    def delta(self, operation: Operation) -> int:
        """Tokens the operation adds to what was presented; negative for a price.

        ValueError for operations without a fixed amount: ISSUE takes its amount from the
        voucher; PARAMETERS, OPEN_ENTRY, OFFERS and PAY concern no credentials.
        """
        match operation:
            case Operation.REISSUE:
                return 0
            case Operation.LOOK_UP:
                return -self.look_up
            case Operation.INSERT:
                return -self.insert
            case Operation.DELETE:
                return self.refund
            case Operation.STORE_ENTRY:
                return -self.entry
            case _:
                raise ValueError(f"{operation.name} has no fixed amount")


def least_entry_price(insert: int) -> int:
    """The least price of a breakglass entry where storing a blob costs `insert`."""
    return -(-DEARER * insert * ENTRY_SIZE // BLOB_SIZE)
