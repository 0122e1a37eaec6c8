"""For all tests: which files begin, and no example of a property fails for being slow.

A file's tests share a server, a mount or a network, so a worker runs a file whole. Those that
take longest begin (tools/test keeps this order), or one of them would run alone at the end.
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

LONGEST: Final = ("tor", "mounted", "simulation", "world", "tools")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms of LONGEST first, in its order; otherwise as they were."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    room = item.path.parent.name
    return LONGEST.index(room) if room in LONGEST else len(LONGEST)
