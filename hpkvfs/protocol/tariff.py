"""What each operation costs.

The issuer computes the delta of a request from its operation, never from a number that the
request carries: a delta the client may choose mints credentials without limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

PRICE_LIMIT = 2**31


class Operation(IntEnum):
    """What a request asks for; the value is the byte on the wire. 6 and 7 are reserved."""

    PARAMETERS = 0
    ISSUE = 1
    REISSUE = 2
    LOOK_UP = 3
    INSERT = 4
    DELETE = 5


@dataclass(frozen=True, slots=True)
class Tariff:
    """Prices of an epoch, in tokens: 0 <= refund < insert, and all below 2^31.

    A refund as large as the price would make storage a free loan.
    """

    look_up: int = 1
    insert: int = 10
    refund: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.look_up < PRICE_LIMIT:
            raise ValueError(f"a look-up cannot cost {self.look_up}")
        if not 0 <= self.refund < self.insert < PRICE_LIMIT:
            raise ValueError(f"a refund of {self.refund} does not fit a price of {self.insert}")

    def delta(self, operation: Operation) -> int:
        """Tokens the operation adds to what was presented; negative for a price.

        ValueError for operations without a fixed amount: ISSUE takes its amount from the
        voucher, PARAMETERS concerns no credentials.
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
            case _:
                raise ValueError(f"{operation.name} has no fixed amount")
