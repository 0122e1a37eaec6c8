"""How much a Lightning invoice is for, and until when, as it says itself (BOLT 11).

    ln || network || amount and multiplier || 1 || timestamp (7) || fields || signature and checksum
    field = type (1) || length (2) || data                                    (104)         (6)

Behind the last 1 each character is five bits (bech32), and the numbers in brackets count these.
Nothing else of an invoice is looked at: whoever pays it has a wallet that checks the rest.
"""

from __future__ import annotations

import re
from typing import Final

from hpkvfs.protocol.errors import Malformed

_ALPHABET: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_TEXT: Final = re.compile(
    rf"ln(?:bc|tb|bcrt|tbs|sb)([1-9][0-9]{{0,11}})([munp]?)1([{_ALPHABET}]{{20,4000}})", re.ASCII
)
# Thousandths of a satoshi, in tenths: a picobitcoin is a tenth of one.
_TENTHS: Final = {"": 10**12, "m": 10**9, "u": 10**6, "n": 10**3, "p": 1}
_TIMESTAMP, _HEADING, _END = 7, 3, 104 + 6
_EXPIRY: Final = "x"
_DEFAULT_SECONDS: Final = 3_600


def millisats(invoice: str) -> int:
    """The amount in thousandths of a satoshi; Malformed if it has none or is no invoice."""
    amount, multiplier, _ = _parts(invoice)
    tenths = int(amount) * _TENTHS[multiplier]
    if tenths % 10:
        raise Malformed("an amount finer than a thousandth of a satoshi")
    return tenths // 10


def expires(invoice: str) -> int:
    """From when on nobody pays it, in seconds since 1970; Malformed."""
    *_, data = _parts(invoice)
    rest, seconds = data[_TIMESTAMP:-_END], _DEFAULT_SECONDS
    if len(data) < _TIMESTAMP + _END:
        raise Malformed("a Lightning invoice that is too short")
    while rest:
        end = _HEADING + _number(rest[1:_HEADING])
        if end > len(rest) or len(rest) < _HEADING:
            raise Malformed("a Lightning invoice that is cut off")
        if rest[0] == _EXPIRY:
            seconds = _number(rest[_HEADING:end])
        rest = rest[end:]
    return _number(data[:_TIMESTAMP]) + seconds


def _parts(invoice: str) -> tuple[str, str, str]:
    match = _TEXT.fullmatch(invoice.lower())
    if match is None:
        raise Malformed("not a Lightning invoice with an amount")
    return match[1], match[2], match[3]


def _number(characters: str) -> int:
    value = 0
    for character in characters:
        value = 32 * value + _ALPHABET.index(character)
    return value
