"""A client that asks once, as another user.
`python -m tests.tor.visitor SOCKET ONION UID GROUP...`

It is started as root and becomes that user, of these groups (numbers), when all is imported: the
user need not be able to read this directory. It prints the size of the answer, or the error.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

import stem.control  # noqa: F401  # else imported only when needed, and then out of reach
import trio

from hpkvfs.address import Address
from hpkvfs.errors import Unreachable
from hpkvfs.net.circuits import Circuits, TorSettings
from hpkvfs.net.transport import exchange
from hpkvfs.protocol.codec import REQUEST_SIZE


async def main(where: str, onion: str) -> None:
    settings = TorSettings.parse(where, Path("/nonexistent"), None, lambda phase: None)
    way = Circuits(Address.parse(onion), settings, secrets.token_bytes)
    async with way.running():
        try:
            said = {"size": len(await exchange(way, bytes(REQUEST_SIZE), 60))}
        except Unreachable as error:
            said = {"message": error.message, "hint": error.hint}  # type: ignore[dict-item]
    print(json.dumps(said))


if __name__ == "__main__":
    where, onion, user, *groups = sys.argv[1:]
    if os.geteuid() == 0:
        os.setgroups([int(group) for group in groups])
        os.setgid(int(user))
        os.setuid(int(user))
    trio.run(main, where, onion)
