"""The simulator finds bugs: each planted one, within a bounded number of seeds.

The negative control is test_seeds.py: without a mutation all of these seeds are well.
"""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.test_seeds import SEEDS
from tests.simulation.world import run

BOUND = 200

FOUND_LAST = (0, 2, 1, 7, 17, 3, 21, 10, 23, 47, 84, 124, 136)
"""Seeds that found one when all were tried last; first, to spare the time of those between."""

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(name: str) -> None:
    assert BOUND <= SEEDS
    seeds = dict.fromkeys((*FOUND_LAST, *range(BOUND)))
    assert max(seeds) < BOUND
    assert any(run(seed, mutation=name).failure for seed in seeds)


def test_they_are_many() -> None:
    assert len(MUTATIONS) >= 8
