"""Whatever the bytes, a decoder returns or raises what it says, and reads one encoding only."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import check, decoders
from tests.fuzz.mutate import mutated

SLOW = {"journals", "ledgers", "caches", "epoch parameters", "issuer parameters", "epochs on disk"}
VERY_SLOW = {"issuers"}


@pytest.mark.parametrize("name", decoders())
def test_valid_encodings(name: str) -> None:
    decoder = decoders()[name]
    assert all(check(decoder, sample) for sample in decoder.samples)


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
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=300), seed=st.integers(0, 2**32))
def test_any_bytes(name: str, raw: bytes, seed: int) -> None:
    """Noise, and changes that Hypothesis can make smaller."""
    decoder = decoders()[name]
    check(decoder, raw)
    check(decoder, mutated(decoder, random.Random(seed)))
