"""A short form of `tools/bench soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fs.model import Thing
from tests.mounted.soak import Difference, Held, Soak


def test_a_short_life(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=3, life=2)
    try:
        soak.run(iter(range(1)))
    finally:
        soak.discard()
    assert soak.counts["lives"] == 1 and soak.counts["generation"] > 0


@pytest.mark.parametrize(
    ("found", "possible"),
    [
        (b"a" * 8_192, True),
        (b"b" * 4_096 + b"a" * 4_096, True),
        (b"a" * 4_096 + b"b" * 4_096, True),
        (b"c" * 100 + b"b" * 3_996 + b"a" * 4_096, True),
        (b"c" * 100 + b"a" * 8_092, False),  # the last write, without the one before
        (b"b" * 100 + b"a" * 8_092, False),  # half a page of a write
        (b"a" * 4_096, False),  # shorter than it was
        (b"a" * 9_000, False),  # longer than it ever was
    ],
)
def test_what_a_file_that_was_open_may_be_like(found: bytes, possible: bool) -> None:
    """The oracle's own controls."""
    thing = Thing(0o100644)
    held = Held(b"file", thing, safe=b"a" * 8_192, since=[(0, b"b" * 8_192), (0, b"c" * 100)])
    if possible:
        held.adopt(found)
        assert thing.data == found and held.safe == found
    else:
        with pytest.raises(Difference):
            held.adopt(found)
