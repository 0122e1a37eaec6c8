"""Two writers, a follower, snapshots and collection; and the planted bugs that this finds."""

from __future__ import annotations

import pytest

from tests.simulation.rival_mutations import RIVAL_MUTATIONS
from tests.simulation.rivals import Rivals
from tests.simulation.world import run

SEEDS = 12

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def test_of_two_writers_one_publishes_and_nothing_of_either_is_lost() -> None:
    """Also the negative control of the planted bugs: without one, these seeds are well."""
    outcomes = [run(seed, plays=Rivals) for seed in range(SEEDS)]
    assert {one.seed: one.failure for one in outcomes if one.failure} == {}


@pytest.mark.parametrize("name", RIVAL_MUTATIONS)
def test_a_planted_bug_is_found(name: str) -> None:
    assert any(
        run(seed, plays=Rivals, mutation=RIVAL_MUTATIONS[name]).failure for seed in range(SEEDS)
    )


def test_a_seed_is_the_same_again() -> None:
    assert run(3, plays=Rivals).trace == run(3, plays=Rivals).trace != run(4, plays=Rivals).trace
