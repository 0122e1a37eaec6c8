"""A client with a tor of its own: a request, tor dies, another request; then what it was.
`python -m tests.tor.owner BASE ONION`, run where the network's TCP is."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from pathlib import Path

import trio

from hpkvfs.address import Address
from hpkvfs.net.circuits import Circuits, TorSettings
from hpkvfs.net.transport import exchange
from hpkvfs.protocol.codec import REQUEST_SIZE

PHASES: list[str] = []


async def main(base: str, onion: str) -> None:
    settings = TorSettings.parse("own", Path(base), None, PHASES.append)
    way = Circuits(Address.parse(onion), settings, secrets.token_bytes)
    async with way.running():
        await way.probe()
        told = way.describe()
        sizes = [len(await exchange(way, bytes(REQUEST_SIZE), 60))]
        assert way._tor is not None and way._tor.owned_pid is not None
        first = way._tor.owned_pid
        os.kill(first, signal.SIGKILL)
        while way._tor.is_up:
            await trio.sleep(0.01)
        with trio.fail_after(60):
            while not way._tor.is_up:
                await trio.sleep(0.05)
        sizes.append(len(await exchange(way, bytes(REQUEST_SIZE), 60)))
        again = way._tor.owned_pid not in (None, first)
    print(json.dumps({"phases": PHASES, "told": told, "sizes": sizes, "again": again}))


if __name__ == "__main__":
    _, base, onion = sys.argv
    trio.run(main, base, onion)
