"""Paid requests over Tor, each on a circuit of its own, on a private network: `tools/bench tor`.

A bare echo service of the same sizes on the same network in the same run shows what the network
alone costs; look-ups and inserts are real: proof, journal, an hpkvd with its ledger, as it is by
default. What bounds it is CPU: six tor processes, the client and the server share this machine,
and the paid requests add the proofs of both sides.

Others may use the machine too. So echo, inserts and look-ups take turns, some requests each, and a
ratio is the median of the ratios within each round; the long run is judged by its halves, without
what comes before the first window; and both by CPU as well (`_cpu_ms_`, `cpu_growth`), which who
else is there changes little.
"""

from __future__ import annotations

import os
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
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
PER_ROUND = 80
PER_ROUND_ALONE = 25
PAUSE = 0.02
"""Seconds between an answer and the next request where the warm pool is judged: a client makes
proofs and journals them meanwhile. Back to back, the pool is judged by how fast it refills."""
LONG_RUN = 2_000
WINDOW = 200
PATIENCE = 60.0
PARTIES = ("client", "server", "tors")
TICKS = os.sysconf("SC_CLK_TCK")


def run(as_json: bool) -> dict[str, object]:
    """Figures; the goals are in issue "Every request over its own Tor circuit": ratios of at least
    0.6, flatness about 1, warm_speedup of at least 1.7."""
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
    bare, cold = _circuits(network, onion), _circuits(network, onion, warm=False)
    async with bare.running():
        await bare.probe()
        async with cold.running():
            await cold.probe()
            figures = {"warm_speedup": await _warm_speedup(bare, cold, tell)}
        async with _store(network, server, base) as store:
            kinds: dict[str, Once] = {"echo": partial(_ask, bare), **_paid(store)}
            for at_once in AT_ONCE:
                figures |= await _in_turns(kinds, at_once, network, server, tell)
            figures |= await _long_run(kinds["lookup"], network, server, tell)
    return {
        "p50_ms_1": figures["lookup_p50_ms_1"],
        "p95_ms_1": figures["lookup_p95_ms_1"],
        **figures,
    }


async def _ask(way: Circuits, _: int) -> None:
    await exchange(way, bytes(REQUEST_SIZE), PATIENCE)


@asynccontextmanager
async def _store(network: Network, server: OnionServer, base: Path) -> AsyncIterator[RemoteStore]:
    journal = Journal(base / "wallet", secrets.token_bytes(32), secrets.token_bytes)
    way = _circuits(network, server.onion)
    async with way.running():
        store = RemoteStore(journal, way, secrets.token_bytes, max_in_flight=32, patience=PATIENCE)
        await store.redeem(server.voucher(TOKENS))
        await store.prime()
        yield store
    journal.close()


def _paid(store: RemoteStore) -> dict[str, Once]:
    """Inserts under new keys, and look-ups of what they stored."""
    keys: list[bytes] = []

    async def insert(_: int) -> None:
        key = new_key().public
        await store.insert(key, secrets.token_bytes(BLOB_SIZE), b"")
        keys.append(key)

    async def look_up(number: int) -> None:
        assert await store.look_up(keys[number % len(keys)]) is not None

    return {"insert": insert, "lookup": look_up}


async def _warm_speedup(warm: Circuits, cold: Circuits, tell: Callable[[str], None]) -> float:
    """How much sooner an answer comes, one at a time, with connections made ahead."""
    latencies: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for is_warm, way in ((False, cold), (True, warm)):
            done = await _timed(partial(_ask, way), PER_ROUND_ALONE, 1, PAUSE)
            latencies[is_warm] += _latencies(done)
    for is_warm, name in ((False, "echo, no warm pool"), (True, "echo")):
        _tell_latencies(name, 1, latencies[is_warm], tell)
    return round(statistics.median(latencies[False]) / statistics.median(latencies[True]), 2)


async def _in_turns(
    kinds: dict[str, Once],
    at_once: int,
    network: Network,
    server: OnionServer,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """All kinds of requests, a round of each in turn: rates, latencies, CPU."""
    count = PER_ROUND_ALONE if at_once == 1 else PER_ROUND
    rates, latencies, used = ({name: [] for name in kinds} for _ in range(3))  # type: ignore[var-annotated]
    for _ in range(ROUNDS):
        for name, once in kinds.items():
            before = _cpu(network, server)
            done = await _timed(once, count, at_once)
            used[name].append(_less(_cpu(network, server), before))
            rates[name].append(_rps(done))
            latencies[name] += _latencies(done)
    figures: dict[str, float] = {}
    for name in kinds:
        rate = statistics.median(rates[name])
        median, p95 = _tell_latencies(name, at_once, latencies[name], tell, rate)
        each = {who: 1000 * sum(one[who] for one in used[name]) / count / ROUNDS for who in PARTIES}
        tell(f"{'':<20}CPU in ms a request: {', '.join(f'{w} {each[w]:.1f}' for w in each)}")
        figures |= {f"{name}_rps_{at_once}": round(rate, 1), f"{name}_p50_ms_{at_once}": median}
        figures |= {f"{name}_p95_ms_{at_once}": p95}
        if at_once == 16:
            figures[f"{name}_cpu_ms_16"] = round(sum(each.values()), 1)
            ratios = [a / b for a, b in zip(rates[name], rates["echo"], strict=True)]
            figures |= {} if name == "echo" else {f"{name}_ratio_16": _round(ratios)}
    return figures


def _round(ratios: list[float]) -> float:
    return round(statistics.median(ratios), 2)


async def _long_run(
    once: Once, network: Network, server: OnionServer, tell: Callable[[str], None]
) -> dict[str, float]:
    """Whether the last of many requests are as quick as the first, in windows of some."""
    ends, used = list[float](), list[float]()

    def note(finished: int) -> None:
        if finished % WINDOW == 0:
            ends.append(time.perf_counter())
            used.append(sum(_cpu(network, server).values()))

    await _timed(once, WINDOW + LONG_RUN, 16, finished=note)
    rates = [WINDOW / (after - before) for before, after in pairwise(ends)]
    work = [after - before for before, after in pairwise(used)]
    tell(f"{LONG_RUN} look-ups, requests/s in each {WINDOW}: {' '.join(f'{r:.0f}' for r in rates)}")
    half = len(rates) // 2
    return {
        "rps_first_200": round(rates[0], 1),
        "rps_last_200": round(rates[-1], 1),
        "flatness": round(statistics.median(rates[half:]) / statistics.median(rates[:half]), 2),
        "cpu_growth": round(sum(work[half:]) / sum(work[:half]), 2),
    }


async def _timed(
    once: Once,
    count: int,
    at_once: int,
    pause: float = 0,
    finished: Callable[[int], None] = lambda count: None,
) -> Times:
    left, done = iter(range(count)), list[tuple[float, float]]()

    async def asker() -> None:
        for number in left:
            begin = time.perf_counter()
            await once(number)
            done.append((begin, time.perf_counter()))
            finished(len(done))
            await trio.sleep(pause)

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(asker)
    return done


def _tell_latencies(
    name: str,
    at_once: int,
    latencies: list[float],
    tell: Callable[[str], None],
    rate: float | None = None,
) -> tuple[float, float]:
    """Median and 95th percentile, in ms."""
    ordered = sorted(latencies)
    median = round(1000 * statistics.median(ordered), 1)
    p95 = round(1000 * ordered[len(ordered) * 95 // 100], 1)
    rps = f"{rate:7.1f} requests/s," if rate is not None else ""
    tell(f"{name:<20}{at_once:>3} in flight {rps:<19} median {median:6.1f} ms, p95 {p95:6.1f} ms")
    return median, p95


def _latencies(times: Times) -> list[float]:
    return [end - begin for begin, end in times]


def _rps(times: Times) -> float:
    """Requests a second, from the first one's beginning to the last one's end."""
    begin = min(begin for begin, _ in times)
    return round(len(times) / (max(end for _, end in times) - begin), 1)


def _cpu(network: Network, server: OnionServer) -> dict[str, float]:
    """Seconds that each of PARTIES has used; the echo service's own, some 0.3 ms, is not there."""
    tors = [process.pid for process in network.processes.values()]
    serving = [server.process.pid, *_children(server.process.pid)]
    pids = dict(zip(PARTIES, ([os.getpid()], serving, tors), strict=True))
    return {name: sum(map(_seconds, pids[name])) for name in PARTIES}


def _less(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / TICKS
