"""For all tests: how the examples of properties are found, and who runs which tests when.

Examples are the same in every run, and none fails for being slow, so that a run fails for what was
changed. `--hypothesis-profile explore` draws new ones, many more (docs/testing.md).

A file's tests may share a server, a mount or a network, so a worker runs a file whole, unless its
tests share nothing (APART). What takes long begins (tools/test keeps this order), or some of it
would run alone at the end.
"""

from __future__ import annotations

import signal
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

SLOWNESS: Final = (HealthCheck.too_slow,)

settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=SLOWNESS, print_blob=True
)
settings.register_profile(
    "explore", max_examples=2_000, deadline=None, suppress_health_check=SLOWNESS, print_blob=True
)
settings.load_profile("same")

FIRST: Final = (
    "tor", "world", "tools", "mounted", "payments", "server", "net", "simulation", "adversary",
)  # fmt: skip
APART: Final = {
    "tests/mounted/test_life.py",
    "tests/mounted/test_programs.py",
    "tests/mounted/test_snapshots.py",
    "tests/mounted/test_two_clients.py",
    "tests/mounted/test_writeback.py",
    "tests/simulation/test_mutations.py",
    "tests/simulation/test_rivals.py",
    "tests/simulation/test_seeds.py",
    "tests/world/test_kill.py",
}


def pytest_configure() -> None:
    """Have interrupts heeded by what tests start, also in the background of a shell, which has
    them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms of FIRST first, in its order; otherwise as they were."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    room = item.path.parent.name
    return FIRST.index(room) if room in FIRST else len(FIRST)


class Dealer(LoadFileScheduling):
    """Deals files to workers, but those of APART test by test."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in APART else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Dealer | None:
    """With --dist loadfile, deal as Dealer does."""
    return Dealer(config, log) if config.getoption("dist") == "loadfile" else None
