"""What a process that has secrets in its memory does first."""

from __future__ import annotations

import ctypes
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4


def guard_memory() -> None:
    """No core dumps, and no debuggers of this user's other programs (prctl(2)).

    For good, but not for programs that are run from here: each has to do it for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
