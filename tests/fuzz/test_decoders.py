"""Whatever the bytes, a decoder returns or raises what it says, and reads one encoding only."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.examples import examples
from tests.fuzz.decoders import check, decoders
from tests.fuzz.mutate import mutated

NOTE = decoders()["notes of breakglass"].samples[0]
JOURNAL = decoders()["journals"].samples[0].replace(b"TABLE", b"TAB\xccE", 1)
LEDGER = decoders()["ledgers"].samples[0].replace(b"TABLE", b"TAB\xccE", 1)


def _with(raw: bytes, at: int, field: bytes) -> bytes:
    """Another encoding in the place of one byte."""
    at %= len(raw)
    return raw[:at] + field + raw[at + 1 :]


INODE = b"\x9a\xcd\x81\xa4\x01\0\0M" + 3 * (b"\xcf\x0d\xe0\xb6\xb3\xa7d\0\0") + b"\0\0"
SIZE, RDEV, PARENT = 7, -2, -1

# What was once taken, or might be: another spelling, or what no encoder can have been given.
REFUSED = {
    "an int longer than it need be": ("inodes", _with(INODE, RDEV, b"\xcd\0\0")),
    "a negative parent": ("inodes", _with(INODE, PARENT, b"\xff")),
    "a negative size": ("inodes", _with(INODE, SIZE, b"\xff")),
    "a size past 2^63": ("inodes", _with(INODE, SIZE, b"\xcf\x80" + bytes(7))),
    "a device number of 33 bits": ("inodes", _with(INODE, RDEV, b"\xcf\0\0\0\1\0\0\0\0")),
    "a bool for an int": ("inodes", _with(INODE, PARENT, b"\xc3")),
    "an array longer than it need be": ("inodes", b"\xdc\0\x0a" + INODE[1:]),
    "a name longer than it need be": ("directory entries", b"\x93\x04\x08\xc5\0\1a"),
    "no name": ("directory entries", b"\x93\x04\x08\xc4\0"),
    "an entry for no inode": ("directory entries", b"\x93\0\x08\xc4\1a"),
    "an entry of no type": ("directory entries", b"\x93\x04\x10\xc4\1a"),
    "an attribute longer than it need be": ("attributes", b"\x92\xc4\1a\xc5\0\1b"),
    "an attribute with no name": ("attributes", b"\x92\xc4\0\xc4\1b"),
    "a note longer than it need be": ("notes of breakglass", b"\xdc\0\x08" + NOTE[1:]),
    "a journal whose schema is not text": ("journals", JOURNAL),
    "a ledger whose schema is not text": ("ledgers", LEDGER),
}

SLOW = {"journals", "ledgers", "caches", "epoch parameters", "issuer parameters", "epochs on disk"}
VERY_SLOW = {"issuers"}


@pytest.mark.parametrize("name", decoders())
def test_valid_encodings(name: str) -> None:
    decoder = decoders()[name]
    assert all(check(decoder, sample) for sample in decoder.samples)


@pytest.mark.parametrize("what", REFUSED)
def test_other_spellings_are_refused(what: str) -> None:
    name, raw = REFUSED[what]
    assert not check(decoders()[name], raw)


def test_the_refused_are_refused_for_what_is_wrong_with_them() -> None:
    assert check(decoders()["inodes"], INODE)


@pytest.mark.parametrize("name", decoders())
def test_changed_encodings(name: str) -> None:
    """Bits flipped, ends cut, pieces spliced, fields of other types and sizes."""
    decoder = decoders()[name]
    count = 15 if name in VERY_SLOW else 80 if name in SLOW else 500
    chance = random.Random(f"changed {name}")
    for _ in range(count):
        raw = mutated(decoder, chance)
        try:
            check(decoder, raw)
        except Exception as error:
            raise AssertionError(f"{name} of {raw[:200].hex()}...: {error!r}") from error


@pytest.mark.parametrize("name", sorted(set(decoders()) - SLOW - VERY_SLOW))
@examples(40, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=300), seed=st.integers(0, 2**32))
def test_any_bytes(name: str, raw: bytes, seed: int) -> None:
    """Noise, and changes that Hypothesis can make smaller."""
    decoder = decoders()[name]
    check(decoder, raw)
    check(decoder, mutated(decoder, random.Random(seed)))
