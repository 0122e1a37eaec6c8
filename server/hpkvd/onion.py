"""The server's onion service: published at a tor, found or started, for as long as it serves.

The service's key is the server's identity, so its address says who may sign its parameters.
hpkvfs/tor keeps tor up, or waits for it, and publishes the service again whenever it comes back;
what is here asks for the first publication until it succeeds, with pauses that grow.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from hpkvd import log
from hpkvfs import tor
from hpkvfs.protocol.identity import Identity
from hpkvfs.tor import Endpoint, Limits, Onion, Tor, TorError

PORT: Final = 7387
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Service:
    """Which tor publishes it (see tor.parse_where), where an owned one keeps its state and what
    else it is told (see tor.further_settings), and what bounds who comes."""

    where: Endpoint | str
    data: Path
    limits: Limits
    more: str = ""


async def publish(
    service: Service,
    identity: Identity,
    listening: socket.socket,
    announce: Callable[[str], None],
) -> None:
    """Keep it published until cancelled; `announce` is told `....onion:PORT` once it first is."""
    onion = Onion(PORT, _target(listening), identity.expanded(), service.limits)
    async with tor.running(service.where, service.data, more=service.more, tell=_tell) as running:
        announce(f"{await _published(running, onion)}:{PORT}")
        await trio.sleep_forever()


async def _published(running: Tor, onion: Onion) -> str:
    pause = FIRST_PAUSE
    while True:
        try:
            return await running.publish(onion)
        except TorError as error:
            hint = f"; {error.hint}" if error.hint else ""
            log.tell(f"the onion service is not published yet: {error.message}{hint}")
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _tell(phase: str) -> None:
    log.tell(f"tor: {phase}")


def _target(listening: socket.socket) -> str:
    """Where tor connects to; on this machine."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port, *_ = listening.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
