"""Paid requests over Tor, each on a circuit of its own, on a private network: `tools/bench tor`.

A bare echo service of the same sizes on the same network in the same run shows what the network
alone costs; look-ups and inserts are real: proof, journal, an hpkvd with its ledger. What bounds
it is CPU: six tor processes, the client and the server share this machine, and the paid requests
add the proofs of both sides. `CPU` lines say how much of it each takes. Look at ratios.
"""

from __future__ import annotations

import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import trio

from hpkvfs.address import Address
from hpkvfs.net.circuits import Circuits, TorSettings
from hpkvfs.net.store import RemoteStore
from hpkvfs.net.transport import exchange
from hpkvfs.protocol.codec import REQUEST_SIZE
from hpkvfs.types import BLOB_SIZE
from hpkvfs.wallet.journal import Journal
from tests.server.support import new_key
from tests.tor.network import Network, private_network
from tests.tor.parties import OnionServer, echo

Once: TypeAlias = Callable[[int], Awaitable[object]]
Times = list[tuple[float, float]]
"""Beginning and end of each request, in order of ends."""

TOKENS = 1_000_000
AT_ONCE = (1, 8, 16, 32)
ROUNDS = 5
PAUSE = 0.02
"""Seconds between an answer and the next request where the warm pool is judged: a client makes
proofs and journals them meanwhile. Back to back, the pool is judged by how fast it refills."""
LONG_RUN = 2_000
WINDOW = 200
PATIENCE = 60.0
TICKS = os.sysconf("SC_CLK_TCK")


def run(as_json: bool) -> dict[str, object]:
    """Figures; the goals are in issue "Every request over its own Tor circuit"."""
    tell = (lambda text: None) if as_json else print
    with tempfile.TemporaryDirectory(prefix="bench-tor-") as base, private_network() as network:
        server = OnionServer(network, Path(base, "server"))
        try:
            with echo(network) as onion:
                return trio.run(_measure, network, server, onion, Path(base), tell)
        finally:
            server.stop()


def _circuits(network: Network, onion: str, *, warm: bool = True) -> Circuits:
    settings = TorSettings(network.control("client"), Path("/nonexistent"))
    return Circuits(Address.parse(onion), settings, secrets.token_bytes, warm=warm)


async def _measure(
    network: Network, server: OnionServer, onion: str, base: Path, tell: Callable[[str], None]
) -> dict[str, object]:
    figures: dict[str, object] = {}

    async def ask(way: Circuits, _: int) -> None:
        await exchange(way, bytes(REQUEST_SIZE), PATIENCE)

    bare, cold = _circuits(network, onion), _circuits(network, onion, warm=False)
    async with bare.running(), cold.running():
        await bare.probe()
        await cold.probe()
        without, with_pool = Times(), Times()
        for _ in range(ROUNDS):  # in turns, since others use this machine as well
            without += await _timed(
                "echo, no warm pool", lambda i: ask(cold, i), 25, 1, tell, PAUSE
            )
            with_pool += await _timed("echo", lambda i: ask(bare, i), 25, 1, tell, PAUSE)
        await _timed("echo, back to back", lambda i: ask(bare, i), 100, 1, tell)
        figures["echo_rps_16"] = _rps(await _timed("echo", lambda i: ask(bare, i), 400, 16, tell))
        figures |= await _paid(network, server, base, tell)
        long = await _timed("echo", lambda i: ask(bare, i), LONG_RUN, 16, tell)
    figures["rps_first_200"] = _rps(long[:WINDOW])
    figures["rps_last_200"] = _rps(long[-WINDOW:])
    figures["warm_speedup"] = round(
        statistics.median(_latencies(without)) / statistics.median(_latencies(with_pool)), 2
    )
    return figures


async def _paid(
    network: Network, server: OnionServer, base: Path, tell: Callable[[str], None]
) -> dict[str, object]:
    figures: dict[str, object] = {}
    journal = Journal(base / "wallet", secrets.token_bytes(32), secrets.token_bytes)
    way = _circuits(network, server.onion)
    async with way.running():
        store = RemoteStore(journal, way, secrets.token_bytes, max_in_flight=32, patience=PATIENCE)
        await store.redeem(server.voucher(TOKENS))
        await store.prime()
        keys = [new_key().public for _ in range(200 * len(AT_ONCE))]

        async def insert(number: int) -> None:
            await store.insert(keys[number], secrets.token_bytes(BLOB_SIZE), b"")

        async def look_up(number: int) -> None:
            await store.look_up(keys[number])

        for name, once in (("insert", insert), ("lookup", look_up)):
            start = 0
            for at_once in AT_ONCE:
                count = 60 if at_once == 1 else 200
                first, before = start, _cpu(network, server)

                async def shifted(i: int, once: Once = once, first: int = first) -> None:
                    await once(first + i)

                done = await _timed(name, shifted, count, at_once, tell)
                _tell_cpu(before, _cpu(network, server), count, tell)
                start += count
                if at_once == 16:
                    figures[f"{name}_rps_16"] = _rps(done)
                if at_once == 1 and name == "lookup":
                    latencies = sorted(_latencies(done))
                    figures["p50_ms_1"] = round(1000 * statistics.median(latencies), 1)
                    figures["p95_ms_1"] = round(1000 * latencies[len(latencies) * 95 // 100], 1)
    journal.close()
    return figures


async def _timed(
    name: str,
    once: Once,
    count: int,
    at_once: int,
    tell: Callable[[str], None],
    pause: float = 0,
) -> Times:
    left, done = iter(range(count)), list[tuple[float, float]]()

    async def asker() -> None:
        for number in left:
            begin = time.perf_counter()
            await once(number)
            done.append((begin, time.perf_counter()))
            await trio.sleep(pause)

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(asker)
    latencies = sorted(_latencies(done))
    tell(
        f"{name:<20}{at_once:>3} in flight {_rps(done):>7.1f} requests/s,"
        f" median {1000 * statistics.median(latencies):6.1f} ms,"
        f" p95 {1000 * latencies[count * 95 // 100]:6.1f} ms"
    )
    return done


def _latencies(times: Times) -> list[float]:
    return [end - begin for begin, end in times]


def _rps(times: Times) -> float:
    """Requests a second, from the first one's beginning to the last one's end."""
    begin = min(begin for begin, _ in times)
    return round(len(times) / (max(end for _, end in times) - begin), 1)


def _cpu(network: Network, server: OnionServer) -> dict[str, float]:
    tors = [process.pid for process in network.processes.values()]
    serving = [server.process.pid, *_children(server.process.pid)]
    parties = {"client": [os.getpid()], "server": serving, "tors": tors}
    return {name: sum(map(_seconds, pids)) for name, pids in parties.items()}


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / TICKS


def _tell_cpu(
    before: dict[str, float], after: dict[str, float], count: int, tell: Callable[[str], None]
) -> None:
    each = ", ".join(f"{name} {1000 * (after[name] - before[name]) / count:.1f}" for name in after)
    tell(f"{'':<20}CPU in ms a request: {each}")
