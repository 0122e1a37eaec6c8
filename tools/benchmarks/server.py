"""How many paid requests a second one server process performs.

    PYTHONPATH=.:server python tools/benchmarks/server.py [--requests N] [--connections N]

Every request is real: a proof of its own, a connection of its own over loopback, a durable
commit. Requests are made before the clock starts; the server runs in a process of its own, so
its seconds of CPU are told apart from the client's.
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from hpkvd import config, epochs, identity
from hpkvd.epochs import Epoch
from hpkvfs.protocol.codec import REPLY_SIZE
from hpkvfs.protocol.credential import Credential, Statement, parse, prepare
from hpkvfs.protocol.messages import Done, decode_reply
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from tests.server.support import Purse, ServerProcess, hpkvd, new_blob, new_key

WORTH = 100
TICKS = os.sysconf("SC_CLK_TCK")


def mint(epoch: Epoch, count: int) -> list[Credential]:
    """Credentials of WORTH each, made with the issuer's key: quicker than buying them."""
    digest, parameters = epoch.parameters.digest, epoch.parameters.issuer
    minted: list[Credential] = []
    while len(minted) < count:
        statement = Statement(digest, Operation.ISSUE, b"", 2 * WORTH)
        draft = prepare(parameters, statement, (), (WORTH, WORTH), secrets.token_bytes)
        minted += draft.finish(parameters, epoch.issuer.issue(statement, parse(draft.request, 0)))
    return minted


async def load(address: tuple[str, int], frames: list[bytes], connections: int) -> float:
    """Send every frame, so many at a time; the seconds it took."""
    waiting = iter(frames)

    async def client() -> None:
        for frame in waiting:
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(frame)
                reply = b""
                while len(reply) < REPLY_SIZE and (part := await stream.receive_some(65536)):
                    reply += part
            assert isinstance(decode_reply(reply), Done)

    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(client)
    return time.perf_counter() - start


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def measure(server: ServerProcess, name: str, frames: list[bytes], connections: int) -> None:
    """Print one line of results."""
    before = cpu_seconds(server.process.pid)
    seconds = trio.run(load, server.address, frames, connections)
    cpu = cpu_seconds(server.process.pid) - before
    print(
        f"{name:<8} {len(frames) / seconds:6.0f} requests/s, {len(frames) / cpu:6.0f} per second"
        f" of the server's CPU ({cpu / len(frames) * 1000:.2f} ms each)"
    )


def main() -> None:
    """Measure insertions, look-ups and deletions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=500, help="of each kind")
    parser.add_argument("--connections", type=int, default=16, help="at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "data")
        assert hpkvd("init", data=data).returncode == 0
        made = hpkvd("voucher", "--amount", str(2**31), data=data)
        known = identity.load(data / config.IDENTITY)
        epoch = epochs.load(data / config.EPOCHS, known).newest
        purse = Purse(epoch.parameters)
        with ServerProcess(data) as server:
            server.ask(purse.redeem(Voucher.parse(made.stdout)).frame)
            keys = [new_key() for _ in range(options.requests)]
            inserts = []
            digests = []
            for key in keys:
                purse.held = mint(epoch, 2)
                inserts.append(purse.insert(key.public, new_blob()))
                digests.append(inserts[-1].request.digest)
            purchases: dict[str, Callable[[int], bytes]] = {
                "insert": lambda i: inserts[i].frame,
                "look-up": lambda i: purse.look_up(keys[i].public).frame,
                "delete": lambda i: purse.delete(keys[i], digests[i]).frame,
            }
            for name, purchase in purchases.items():
                frames = []
                for index in range(options.requests):
                    purse.held = mint(epoch, 2)
                    frames.append(purchase(index))
                measure(server, name, frames, options.connections)


if __name__ == "__main__":
    main()
