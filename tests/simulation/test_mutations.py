"""The simulator finds bugs: each planted one, within a bounded number of seeds.

The negative control is test_seeds.py: without a mutation all of these seeds are well.
"""

from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.test_seeds import SEEDS
from tests.simulation.world import run

BOUND = 200

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(name: str) -> None:
    assert BOUND <= SEEDS
    assert any(run(seed, mutation=name).failure for seed in range(BOUND))


def test_they_are_many() -> None:
    assert len(MUTATIONS) >= 8
