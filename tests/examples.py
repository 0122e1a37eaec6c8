"""How many examples a property is tried with: the same in every run, unless one explores.

`tools/test` plays the examples that follow from the test's source, so that what it says depends on
the change and not on luck. The profile `explore` (conftest.py) draws others, many more of them.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings

USUAL = 100


def examples(count: int, **more: Any) -> settings:
    """So many in every run, in proportion more under a profile of more; and further settings."""
    return settings(max_examples=count * settings().max_examples // USUAL, **more)
