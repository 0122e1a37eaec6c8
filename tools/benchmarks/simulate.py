"""Ten thousand simulated lives of a client and its server; docs/testing.md says what they are.

Every seed is independent, so the processors share them. One seed in REAL_EVERY pays with real
credentials, the others with cheap stand-ins behind the same interface. One in RIVALS_EVERY is two
writers and a follower of one vault instead. A failure is named by what plays it again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter

from tests.simulation.points import Point
from tests.simulation.rivals import Rivals
from tests.simulation.world import Outcome, World
from tests.simulation.world import run as play

SEEDS = int(os.environ.get("HPKV_SEEDS", "10000"))
FIRST = int(os.environ.get("HPKV_FIRST_SEED", "0"))
REAL_EVERY = 50
RIVALS_EVERY = 20
SHOWN = 10


def run(as_json: bool) -> dict[str, object]:
    """Seeds, failures, seconds, and how often a side died."""
    start, seeds = time.perf_counter(), range(FIRST, FIRST + SEEDS)
    failed: list[Outcome] = []
    struck: Counter[Point] = Counter()
    with multiprocessing.Pool(initializer=_quiet) as pool:
        for count, outcome in enumerate(pool.imap_unordered(_play, seeds, 8), 1):
            struck += outcome.struck
            if outcome.failure:
                failed.append(outcome)
                if not as_json:
                    print(_told(outcome))
            if not as_json and count % 500 == 0:
                print(f"{count:,} of {SEEDS:,} seeds, {len(failed)} failed")
    seconds = time.perf_counter() - start
    return {
        "seeds": SEEDS,
        "failures": len(failed),
        "seconds": round(seconds, 1),
        "seeds_per_second": round(SEEDS / seconds, 2),
        "real_seeds": sum(map(_is_real, seeds)),
        "rival_seeds": sum(map(_is_rivals, seeds)),
        "deaths": struck.total(),
        "points_died_at": sum(1 for point in Point if struck[point]),
        "points": len(Point),
        "failed": "; ".join(map(_told, failed[:SHOWN])),
    }


def _play(seed: int) -> Outcome:
    return play(seed, real=_is_real(seed), plays=Rivals if _is_rivals(seed) else World)


def _is_real(seed: int) -> bool:
    return seed % REAL_EVERY == 0


def _is_rivals(seed: int) -> bool:
    return seed % RIVALS_EVERY == RIVALS_EVERY // 2 + 1


def _told(outcome: Outcome) -> str:
    seed = outcome.seed
    options = " --real" * _is_real(seed) + " --rivals" * _is_rivals(seed)
    return f"tools/simulate {seed}{options}: {outcome.failure}"


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
