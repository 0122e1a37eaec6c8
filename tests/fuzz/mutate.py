"""Changes of valid encodings, by bytes and by structure, all drawn from one source of chance."""

from __future__ import annotations

import random
from typing import Any

import msgpack

from tests.fuzz.decoders import Decoder

EXTREMES: list[Any] = [
    0, 1, -1, 127, 128, 255, 256, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -(2**63),
    b"", b"\0", b"x" * 31, b"x" * 33, None, True, False, 0.5, "text", [], [[]], {}, [None] * 20,
]  # fmt: skip


def mutated(decoder: Decoder, chance: random.Random) -> bytes:
    """A sample of the decoder after a few changes."""
    raw = chance.choice(decoder.samples)
    if decoder.wrap is not None and decoder.unwrap is not None and chance.random() < 0.5:
        raw = _by_structure(decoder, raw, chance)
    if decoder.wrap is None or chance.random() < 0.5:
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            raw = _by_bytes(raw, chance.choice(decoder.samples), chance)
    return raw


def _by_bytes(raw: bytes, other: bytes, chance: random.Random) -> bytes:
    at, end = sorted(chance.randint(0, len(raw)) for _ in range(2))
    match chance.randrange(8):
        case 0 if raw:
            at = chance.randrange(len(raw))
            return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
        case 1:
            return raw[:at]
        case 2:
            return raw + chance.randbytes(chance.choice([1, 4, 100]))
        case 3:  # splice
            return raw[:at] + other[at:]
        case 4:
            return raw[:at] + raw[end:]
        case 5:
            return raw[:end] + raw[at:end] + raw[end:]
        case 6:
            return raw[:at] + chance.randbytes(end - at) + raw[end:]
        case _:  # near the beginning, where lengths and kinds are
            at = min(len(raw), chance.randrange(40))
            byte = chance.choice([0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xDC, 0xFF])
            return raw[:at] + bytes([byte]) + raw[at + 1 :]


def _by_structure(decoder: Decoder, raw: bytes, chance: random.Random) -> bytes:
    assert decoder.wrap is not None and decoder.unwrap is not None
    value = msgpack.unpackb(decoder.unwrap(raw), raw=False, strict_map_key=False)
    for _ in range(chance.choice([1, 1, 2])):
        value = _changed(value, chance)
    try:
        return decoder.wrap(msgpack.packb(value))
    except (ValueError, OverflowError):
        return raw


def _changed(value: Any, chance: random.Random) -> Any:
    """One node of the tree replaced, dropped, doubled or moved."""
    if not isinstance(value, list) or not value or chance.random() < 0.05:
        return _another(value, chance)
    value = list(value)
    at = chance.randrange(len(value))
    match chance.randrange(8):
        case 0:
            del value[at]
        case 1:
            value.insert(at, value[chance.randrange(len(value))])
        case 2:
            other = chance.randrange(len(value))
            value[at], value[other] = value[other], value[at]
        case _:
            value[at] = _changed(value[at], chance)
    return value


def _another(value: Any, chance: random.Random) -> Any:
    if isinstance(value, bytes) and value and chance.random() < 0.5:
        return _by_bytes(value, value, chance)
    if type(value) is int and chance.random() < 0.5:
        return value + chance.choice([-1, 1, 2**8, -(2**8)])
    return chance.choice(EXTREMES)
