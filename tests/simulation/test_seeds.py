"""Many seeds, all well; each the same whenever and wherever it is played."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.points import Point
from tests.simulation.world import run

SEEDS = 500
AT_ONCE = 25
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_seeds(first: int) -> None:
    """Nothing that was promised is lost, whatever the weather and whoever dies."""
    outcomes = [run(seed) for seed in range(first, first + AT_ONCE)]
    assert {one.seed: one.failure for one in outcomes if one.failure} == {}


@pytest.mark.parametrize("seed", [1_000, 1_001])
def test_seeds_with_real_credentials(seed: int) -> None:
    assert run(seed, real=True).failure == ""


@pytest.mark.parametrize("point", Point, ids=lambda point: point.name)
def test_each_point_is_reached_and_died_at(point: Point) -> None:
    """Within few seeds; and what was there before the death is there after it."""
    for seed in range(2_000, 2_040):
        outcome = run(seed, at=point)
        assert outcome.failure == ""
        if outcome.struck[point]:
            return
    pytest.fail("no seed got there")


def trace(seed: int, hash_seed: str) -> str:
    """All that a process of its own says happens."""
    command = [sys.executable, "-m", "tests.simulation", str(seed), "--trace"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}",
        "PYTHONHASHSEED": hash_seed,
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_seed_is_the_same_in_every_process() -> None:
    """Every byte that is sent, and when, and every death: so a failure can be played again."""
    seeds = (11, 12, 13)
    traces = [trace(seed, hash_seed) for seed in seeds for hash_seed in ("1", "2")]
    assert traces[0::2] == traces[1::2]
    assert all(" sent " in one for one in traces)
    assert len(set(traces)) == len(seeds)
