"""Ports of loopback that are a test's own from when they are chosen until its process ends.

One that was free a moment ago may be another's now: the kernel gives it to whoever connects, and
another worker may find it free too. So those that the kernel gives away are not taken, and each
taken one is marked by an abstract Unix socket of its number, which is as a port is: one for each
network namespace, and gone with its process.
"""

from __future__ import annotations

import random
import socket
from typing import Final

RANGE: Final = range(10_000, 32_768)  # ip(7): Linux connects from ports above

_marks: Final[list[socket.socket]] = []


def own_port() -> int:
    """A port to listen on, now or later, once or again and again."""
    chance = random.SystemRandom()  # the other is seeded, alike in every worker
    while True:
        port = chance.choice(RANGE)
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0hpkvfs test port {port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            mark.close()
            continue
        _marks.append(mark)
        return port
