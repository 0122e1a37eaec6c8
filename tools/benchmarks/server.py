"""Paid requests a second: one and two workers, on SQLite and on PostgreSQL.

Half insert, half look up; each has a proof and a connection of its own, and a durable commit. They
are made before the clock starts. Each worker has as much to do, with 128 in flight for each: two
that share them have half as many in a commit, which is dearer. Clients and PostgreSQL come through
Unix sockets, and PostgreSQL has as many buffers as it has by itself.

A server of each kind has a ledger of its own, and they take turns at the same requests. A ratio is
the median of those within the turns; a rate told is the upper quartile, since others on the machine
can only take away. One worker is kept on the first core, with the crowd and PostgreSQL on the
others; two are kept on two cores, with crowd and PostgreSQL on both if there are no more. In a
third kind, `shared`, one worker has one core together with all that: what two do on two cores is
then twice the machine and twice the work.

Figures, of `--json`:

    rps_ENGINE_WORKERS    requests a second, by the clock
    core_ENGINE_WORKERS   requests for each second of the workers' CPU (the database's apart)
    scaling_ENGINE        rps of two workers over one; on two cores both workers have to share
                          theirs with crowd and database, which the one did not
    scaling_machine_ENGINE   rps of two workers on two cores over one worker on one, crowd and
                          database on the same cores both times
    scaling_cpu_ENGINE    the same if nothing else ran on the machine: by core_, which is what a
                          second worker costs the first one
    p50_ms_64, p99_ms_64  of an answer, two workers, SQLite, 64 in flight in all
    share_*               of a worker's CPU for a request (SQLite): proofs, codec and ledger, each
                          alone in turn with the whole; the rest is loop, sockets, kernel
    *_ms, *_s, *_bytes    constants of `hpkvd plan`
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import trio

from hpkvd import measure
from hpkvd.ledger import Read, Transaction, urls
from hpkvd.ledger.postgresql_rows import PostgresqlRows
from hpkvfs.protocol.credential import parse
from hpkvfs.protocol.messages import decode_request
from tests.server import ledgers
from tests.server.postgres import Cluster
from tests.server.support import ServerProcess
from tools.benchmarks.crowd import (
    IN_FLIGHT,
    Load,
    Result,
    children,
    cpu_seconds,
    make_load,
    pin,
    played,
    serving,
)

TURNS = 8
TURN = 1_500  # requests, at each server
ROUNDS = 3
PART = 400  # requests in each round of the shares
SATURATED = 128  # requests in flight for each worker: half of what it takes before it is busy
TRANSACTIONS = 2_000
ENGINES = ("sqlite", "postgres")
LATENCY = "64"


def run(as_json: bool) -> dict[str, object]:
    """Measure; the figures."""

    def tell(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(Cluster("-cshared_buffers=128MB"))
        cluster.make()
        cluster.start()
        tell(f"making {TURNS * TURN} requests")
        bench = _Bench(home, cluster, make_load(home, TURNS * TURN))
        kinds = [(engine, kind) for engine in ENGINES for kind in ("shared", "1", "2")]
        with ExitStack() as servers:
            for kind in (*kinds, ("sqlite", LATENCY)):
                servers.enter_context(bench.server(*kind))
            for turn in range(TURNS):
                for line in bench.turn(turn):
                    tell(f"turn {turn + 1}: {line}")
        return bench.figures() | bench.shares() | bench.constants()


class _Bench:
    def __init__(self, home: Path, cluster: Cluster, load: Load) -> None:
        self._home = home
        self._cluster = cluster
        self._load = load
        self._ledgers = 0
        self._servers: dict[tuple[str, str], ServerProcess] = {}
        self._results: defaultdict[str, list[Result]] = defaultdict(list)
        self._database: list[float] = []
        self._shares: defaultdict[str, list[float]] = defaultdict(list)
        self._cores = sorted(os.sched_getaffinity(0))

    @contextmanager
    def server(self, engine: str, kind: str) -> Iterator[None]:
        """Meanwhile there is one of this kind, on a fresh ledger.

        `shared`: one worker, on the same core as all that it needs. LATENCY: two, with IN_FLIGHT.
        """
        url, workers = self._fresh(engine), 1 if kind in ("shared", "1") else 2
        with serving(self._home, self._load, url, workers, self._cores) as server:
            self._servers[engine, kind] = server
            yield
            del self._servers[engine, kind]

    def turn(self, number: int) -> Iterator[str]:
        """Some of the requests at each server, one after the other; a line about each."""
        frames = self._load.frames[number * TURN : (number + 1) * TURN]
        for (engine, kind), server in self._servers.items():
            with self._others_on(self._beside(kind)):
                before = cpu_seconds(self._cluster.pid)
                result = played(server, frames, _in_flight(kind))
                database = cpu_seconds(self._cluster.pid) - before
            self._results[f"{engine}_{kind}"].append(result)
            if engine == "postgres":
                self._database.append(1000 * database / result.requests)
            yield (
                f"{engine}_{kind}: {result.rate:.0f} requests/s, {result.per_core:.0f} for each"
                f" second of CPU; the crowd took {result.client / result.seconds:.0%} of a core"
            )

    def _beside(self, kind: str) -> list[int]:
        """The cores that crowd and PostgreSQL have."""
        first, others = self._cores[:1], self._cores[1:]
        return {"shared": first, "1": others or first}.get(kind, self._cores)

    @contextmanager
    def _others_on(self, cores: list[int]) -> Iterator[None]:
        """Meanwhile crowd and PostgreSQL, new connections too, have these cores."""
        self._pin_database(cores)
        os.sched_setaffinity(0, cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, self._cores)
            self._pin_database(self._cores)

    def _pin_database(self, cores: list[int]) -> None:
        for pid in (self._cluster.pid, *children(self._cluster.pid)):
            with suppress(OSError):  # a connection's process that has ended by now
                pin(pid, set(cores))

    def figures(self) -> dict[str, object]:
        """Rates, scaling, latency."""
        found: dict[str, object] = {}
        patient = self._results.pop(f"sqlite_{LATENCY}")
        for name, results in self._results.items():
            found[f"rps_{name}"] = round(_upper([one.rate for one in results]))
            found[f"core_{name}"] = round(_upper([one.per_core for one in results]))
        for engine in ENGINES:
            shared, one, two = (self._results[f"{engine}_{kind}"] for kind in ("shared", "1", "2"))
            found |= {
                f"scaling_{engine}": _ratio(two, one, lambda run: run.rate),
                f"scaling_machine_{engine}": _ratio(two, shared, lambda run: run.rate),
                f"scaling_cpu_{engine}": _ratio(two, one, lambda run: run.per_core, 2),
            }
        best = max(patient, key=lambda run: run.rate)
        hundredths = statistics.quantiles(best.latencies, n=100)
        found["p50_ms_64"] = round(1000 * hundredths[49], 1)
        found["p99_ms_64"] = round(1000 * hundredths[98], 1)
        return found

    def shares(self) -> dict[str, object]:
        """Proofs, codec, ledger and the whole of a request on SQLite, in turn; the best rounds."""
        with serving(self._home, self._load, self._fresh("sqlite"), 1) as server:
            for start in range(0, ROUNDS * PART, PART):
                part = self._load.frames[start : start + PART]
                codec = _each(decode_request, part)
                self._shares["codec"].append(2 * codec)  # and as much again to encode the reply
                self._shares["proofs"].append(_each(self._prove, part) - codec)
                self._shares["ledger"].append(ledger_alone(self._fresh("sqlite"), PART)[0])
                self._shares["whole"].append(played(server, part).server / len(part))
        best = {name: min(values) for name, values in self._shares.items()}
        whole = best.pop("whole")
        best["rest"] = whole - sum(best.values())
        found: dict[str, object] = {
            f"share_{name}": round(one / whole, 3) for name, one in best.items()
        }
        return found | {f"{name}_ms": round(1000 * one, 3) for name, one in best.items()}

    def _prove(self, frame: bytes) -> None:
        request, issuer = decode_request(frame), self._load.epoch.issuer
        statement = request.statement(self._load.epoch.tariff)  # type: ignore[union-attr]
        credentials = parse(request.credentials, 2)  # type: ignore[union-attr]
        issuer.verify(statement, credentials)
        issuer.issue(statement, credentials)

    def constants(self) -> dict[str, object]:
        """Those of plan.Constants that take a server or PostgreSQL to measure."""
        proof, whole = min(self._shares["proofs"]), min(self._shares["whole"])
        one, other = (
            max(result.per_core for result in self._results[f"{engine}_1"]) for engine in ENGINES
        )
        found = {
            "sqlite_rest_ms": 1000 * (whole - proof),
            "postgresql_rest_ms": 1000 * (whole - proof + 1 / other - 1 / one),
            "postgresql_database_ms": min(self._database),
        }
        for engine, url in (("sqlite", "sqlite"), ("postgresql", "postgres")):
            rates = [ledger_alone(self._fresh(url), TRANSACTIONS)[1] for _ in range(ROUNDS)]
            found[f"{engine}_transactions_s"] = max(rates)
        before = self._log_position()
        ledger_alone(self._fresh("postgres"), TRANSACTIONS, inserts=1.0)
        found["log_bytes"] = (self._log_position() - before) / TRANSACTIONS
        with closing(PostgresqlRows(self._fresh("postgres"))) as rows:
            query = "SELECT pg_database_size(current_database())"
            sizes = measure.disk(rows, lambda: int(rows.one(query)[0]), measure.proofs()[1])
        found |= {f"postgresql_{name}": size for name, size in sizes.items()}
        return {name: round(value, 2) for name, value in found.items()}

    def _log_position(self) -> int:
        query = "SELECT (pg_current_wal_lsn() - '0/0')::bigint"
        return int(self._cluster.execute(query)[0][0])

    def _fresh(self, engine: str) -> str:
        """The URL of an empty ledger."""
        self._ledgers += 1
        file = f"sqlite://{self._home}/{self._ledgers}.sqlite"
        url = file if engine == "sqlite" else self._cluster.new_url(socket=True)
        urls.create(url)
        return url


def _in_flight(kind: str) -> int:
    return {LATENCY: IN_FLIGHT, "2": 2 * SATURATED}.get(kind, SATURATED)


def _upper(values: Sequence[float]) -> float:
    """The quartile."""
    return statistics.quantiles(values, n=4)[2]


def _ratio(
    these: Sequence[Result],
    those: Sequence[Result],
    what: Callable[[Result], float],
    times: int = 1,
) -> float:
    """The median over the rounds."""
    pairs = zip(these, those, strict=True)
    return round(times * statistics.median(what(one) / what(other) for one, other in pairs), 2)


def _each(work: Callable[[bytes], object], frames: Sequence[bytes]) -> float:
    """Seconds of CPU for each frame."""
    start = time.process_time()
    for frame in frames:
        work(frame)
    return (time.process_time() - start) / len(frames)


def ledger_alone(url: str, count: int, inserts: float = 0.5) -> tuple[float, float]:
    """Of transactions as the handler has them, IN_FLIGHT at a time, without proofs or sockets:
    seconds of our CPU for each, and how many a second."""
    stored = round(count * inserts)
    changes = [
        ledgers.transaction(f"{i}", ledgers.insert(f"{i}"), f"s{i}", f"t{i}") for i in range(stored)
    ]
    reads = [
        ledgers.transaction(f"r{i}", Read(ledgers.key(f"{i}")), f"u{i}", f"v{i}")
        for i in range(count - stored)
    ]

    async def measure() -> tuple[float, float]:
        async with ledgers.opened(url) as ledger:
            await ledgers.fund(ledger)
            limit = trio.CapacityLimiter(IN_FLIGHT)

            async def apply(one: Transaction) -> None:
                async with limit:
                    await ledger.foresee(one.fingerprint, one.serials, one.change)
                    await ledger.apply(one)

            cpu, clock = time.process_time(), time.perf_counter()
            for group in (changes, reads):
                async with trio.open_nursery() as nursery:
                    for one in group:
                        nursery.start_soon(apply, one)
            return time.process_time() - cpu, time.perf_counter() - clock

    seconds, elapsed = trio.run(measure)
    return seconds / count, count / elapsed
