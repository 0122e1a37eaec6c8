"""Ten thousand simulated lives of a client and its server; docs/testing.md says what they are.

Every seed is independent, so the processors share them. One seed in REAL_EVERY pays with real
credentials, the others with cheap stand-ins behind the same interface.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter

from tests.simulation.points import Point
from tests.simulation.world import Outcome
from tests.simulation.world import run as play

SEEDS = int(os.environ.get("HPKV_SEEDS", "10000"))
REAL_EVERY = 50
SHOWN = 10


def run(as_json: bool) -> dict[str, object]:
    """Seeds, failures, seconds, and how often a side died."""
    start = time.perf_counter()
    failed: list[Outcome] = []
    struck: Counter[Point] = Counter()
    with multiprocessing.Pool(initializer=_quiet) as pool:
        for count, outcome in enumerate(pool.imap_unordered(_play, range(SEEDS), 8), 1):
            struck += outcome.struck
            if outcome.failure:
                failed.append(outcome)
            if not as_json and count % 500 == 0:
                print(f"{count:,} of {SEEDS:,} seeds, {len(failed)} failed")
    seconds = time.perf_counter() - start
    return {
        "seeds": SEEDS,
        "failures": len(failed),
        "seconds": round(seconds, 1),
        "seeds_per_second": round(SEEDS / seconds, 2),
        "real_seeds": len(range(0, SEEDS, REAL_EVERY)),
        "deaths": struck.total(),
        "points_died_at": sum(1 for point in Point if struck[point]),
        "points": len(Point),
        "failed": "; ".join(f"{one.seed}: {one.failure}" for one in failed[:SHOWN]),
    }


def _play(seed: int) -> Outcome:
    return play(seed, real=seed % REAL_EVERY == 0)


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
