"""What systemd and a service agree on: sockets it was started with, and telling it how things are.

The protocols are sd_listen_fds(3) and sd_notify(3): environment variables and datagrams, which
is all that is used of systemd. Outside it everything here does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Final

FIRST_FD: Final = 3


def notify(*states: str) -> None:
    """Tell the service manager, if there is one: READY=1, STOPPING=1, WATCHDOG=1, STATUS=..."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, suppress(OSError):
        manager.connect(address)
        manager.send("\n".join(states).encode())


def take_sockets(environment: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets we were started with; told once, and not to our children.

    OSError, ValueError: what was passed are none.
    """
    count, pid = environment.pop("LISTEN_FDS", "0"), environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=FIRST_FD + number) for number in range(int(count))]
    for one in sockets:
        one.set_inheritable(False)
    if not all(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for one in sockets):
        for one in sockets:
            one.close()
        raise ValueError("a socket that does not listen")
    return sockets


def watchdog_seconds() -> float | None:
    """How often WATCHDOG=1 is due: half of the time after which we would be killed."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC")
    return int(microseconds) / 2e6 if microseconds else None
