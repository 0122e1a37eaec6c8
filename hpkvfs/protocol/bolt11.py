"""How much a Lightning invoice is for, as its human-readable part says (BOLT 11).

    ln || network || amount and multiplier || 1 || data (bech32)

Nothing else of an invoice is looked at: whoever pays it has a wallet that checks the rest.
"""

from __future__ import annotations

import re
from typing import Final

from hpkvfs.protocol.errors import Malformed

_TEXT: Final = re.compile(
    r"ln(?:bc|tb|bcrt|tbs|sb)([1-9][0-9]{0,11})([munp]?)1[02-9ac-hj-np-z]{20,4000}", re.ASCII
)
# Thousandths of a satoshi, in tenths: a picobitcoin is a tenth of one.
_TENTHS: Final = {"": 10**12, "m": 10**9, "u": 10**6, "n": 10**3, "p": 1}


def millisats(invoice: str) -> int:
    """The amount in thousandths of a satoshi; Malformed if it has none or is no invoice."""
    match = _TEXT.fullmatch(invoice.lower())
    if match is None:
        raise Malformed("not a Lightning invoice with an amount")
    tenths = int(match[1]) * _TENTHS[match[2]]
    if tenths % 10:
        raise Malformed("an amount finer than a thousandth of a satoshi")
    return tenths // 10
