"""A client with a tor of its own: one request, then what it was. `python -m tests.tor.owner
BASE ONION`, run where the network's TCP is."""

from __future__ import annotations

import json
import secrets
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
        size = len(await exchange(way, bytes(REQUEST_SIZE), 60))
    print(json.dumps({"phases": PHASES, "told": told, "size": size}))


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
