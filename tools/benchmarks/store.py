"""Paid requests a second from one client, end to end, against a real server on loopback.

    rps_1, rps_4, rps_16   half inserts, half look-ups, so many in flight; at least 350 at 16
    cpu_ms, server_cpu_ms  of either process for each request, at 16 in flight: what the machine's
                           other work and its disk change least

Three rounds; a figure is that of the best, because others on the machine can only take away.
Every request is what a mounted vault makes: a proof, a journalled pending, a connection of its
own, a durable commit at the server, a checked reply. Client and server share this machine.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from hpkvfs.net.store import RemoteStore
from hpkvfs.net.transport import TcpDialer
from hpkvfs.protocol.group import SigningKey
from hpkvfs.types import BLOB_SIZE
from hpkvfs.wallet.journal import Journal
from tools.benchmarks.local import Server, local_server

TOKENS: Final = 1_000_000
WARM_UP: Final = 100
ROUNDS: Final = 3
REQUESTS: Final = {1: 200, 4: 400, 16: 1_000}


def run(as_json: bool) -> dict[str, object]:
    """The figures; tells of its progress unless `as_json`."""
    with (
        tempfile.TemporaryDirectory(prefix="hpkvfs-store-") as directory,
        local_server(Path(directory) / "server") as server,
    ):
        return trio.run(_measure, Path(directory), server, _silent if as_json else _tell)


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _silent(message: str) -> None:
    pass


async def _measure(
    directory: Path, server: Server, tell: Callable[[str], None]
) -> dict[str, object]:
    journal = Journal(directory / "wallet", secrets.token_bytes(32), secrets.token_bytes)
    try:
        dialer = TcpDialer(server.host, server.port)
        store = RemoteStore(journal, dialer, secrets.token_bytes)
        await store.redeem(server.voucher(TOKENS))
        await store.prime()
        await _load(store, server, WARM_UP, 16)
        figures: dict[str, object] = {}
        for in_flight, requests in REQUESTS.items():
            rounds: list[tuple[float, float, float]] = []
            for number in range(ROUNDS):
                tell(f"{requests} requests, {in_flight} in flight, round {number + 1}")
                rounds.append(await _load(store, server, requests, in_flight))
            seconds, cpu, server_cpu = map(min, zip(*rounds, strict=True))
            figures[f"rps_{in_flight}"] = round(requests / seconds, 1)
            figures["cpu_ms"] = round(1_000 * cpu / requests, 2)
            figures["server_cpu_ms"] = round(1_000 * server_cpu / requests, 2)
        if not store.conservation.holds:
            raise RuntimeError("tokens were lost or made")
        return figures
    finally:
        journal.close()


async def _load(
    store: RemoteStore, server: Server, requests: int, in_flight: int
) -> tuple[float, float, float]:
    """Seconds, seconds of this process's CPU, and of the server's, that so many requests take."""
    blob = secrets.token_bytes(BLOB_SIZE)
    keys = [SigningKey(secrets.token_bytes(32)).public for _ in range(requests // 2)]
    work = iter([(key, inserts) for key in keys for inserts in (True, False)])
    wall, cpu, server_cpu = time.perf_counter(), time.process_time(), server.cpu
    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(_worker, store, blob, work)
    return time.perf_counter() - wall, time.process_time() - cpu, server.cpu - server_cpu


async def _worker(store: RemoteStore, blob: bytes, work: Iterator[tuple[bytes, bool]]) -> None:
    for key, inserts in work:
        if inserts:
            await store.insert(key, blob, key)
        else:
            await store.look_up(key)
