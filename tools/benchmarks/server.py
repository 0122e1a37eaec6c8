"""Paid requests a second: one and two workers, on SQLite and on PostgreSQL.

Half insert, half look up; each has a proof and a connection of its own, and a durable commit. They
are made before the clock starts. Runs of all kinds take turns, on fresh ledgers, and a figure is
that of the best round, because others on the machine can only take away. One worker is kept on the
first core, with the crowd and PostgreSQL on the others; two are kept on two cores, with crowd and
PostgreSQL on both if there are no more. In a third kind, `shared`, one worker has one core together
with all that: what two do on two cores is then twice the machine and twice the work.

Figures, of `--json`:

    rps_ENGINE_WORKERS    requests a second, by the clock, 64 in flight
    core_ENGINE_WORKERS   requests for each second of the workers' CPU (the database's apart)
    scaling_ENGINE        rps of two workers over one; on two cores the second worker has to share
                          its core with crowd and database, which the one did not
    scaling_machine_ENGINE   rps of two workers on two cores over one worker on one, crowd and
                          database on the same cores both times
    scaling_cpu_ENGINE    the same if nothing else ran on the machine: by core_, which is what a
                          second worker costs the first one
    p50_ms_64, p99_ms_64  of an answer, two workers, SQLite
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

REQUESTS = 2_000
ROUNDS = 3
PART = 400  # of the requests, in each round of the shares
TRANSACTIONS = 2_000
ENGINES = ("sqlite", "postgres")


def run(as_json: bool) -> dict[str, object]:
    """Measure; the figures."""

    def tell(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(Cluster())
        cluster.make()
        cluster.start()
        tell(f"making {REQUESTS} requests")
        load = make_load(home, REQUESTS)
        bench = _Bench(home, cluster, load)
        kinds = [(engine, kind) for kind in ("shared", "1", "2") for engine in ENGINES]
        for number in range(ROUNDS):
            for engine, kind in kinds:
                tell(f"round {number + 1}: {bench.play(engine, kind)}")
        return bench.figures() | bench.shares() | bench.constants()


class _Bench:
    def __init__(self, home: Path, cluster: Cluster, load: Load) -> None:
        self._home = home
        self._cluster = cluster
        self._load = load
        self._ledgers = 0
        self._results: defaultdict[str, list[Result]] = defaultdict(list)
        self._database: list[float] = []
        self._shares: defaultdict[str, list[float]] = defaultdict(list)
        self._cores = sorted(os.sched_getaffinity(0))

    def play(self, engine: str, kind: str) -> str:
        """One run on a fresh ledger, with so many workers; a line about it.

        `shared`: one, on the same core as all that it needs.
        """
        own, workers = self._cores, 2 if kind == "2" else 1
        crowd = {"shared": own[:1], "1": own[1:] or own, "2": own}[kind]
        with self._kept_on(own[:1] if kind == "shared" else own, crowd):
            before = cpu_seconds(self._cluster.pid)
            with serving(self._home, self._load, self._fresh(engine), workers, own) as server:
                result = played(server, self._load.frames)
            database = cpu_seconds(self._cluster.pid) - before
        self._results[f"{engine}_{kind}"].append(result)
        if engine == "postgres":
            self._database.append(1000 * database / result.requests)
        return (
            f"{engine}_{kind}: {result.rate:.0f} requests/s, {result.per_core:.0f} for each"
            f" second of CPU; the crowd took {result.client / result.seconds:.0%} of a core"
        )

    @contextmanager
    def _kept_on(self, database: list[int], crowd: list[int]) -> Iterator[None]:
        """Meanwhile PostgreSQL, new connections too, has these cores and we have those."""
        self._pin_database(database)
        os.sched_setaffinity(0, crowd)
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
        for name, results in self._results.items():
            found[f"rps_{name}"] = round(max(one.rate for one in results))
            found[f"core_{name}"] = round(max(one.per_core for one in results))
        for engine in ENGINES:
            ones, twos = self._results[f"{engine}_1"], self._results[f"{engine}_2"]
            clock = max(one.rate for one in twos) / max(one.rate for one in ones)
            cpu = 2 * max(one.per_core for one in twos) / max(one.per_core for one in ones)
            found |= {f"scaling_{engine}": round(clock, 2), f"scaling_cpu_{engine}": round(cpu, 2)}
            shared = max(one.rate for one in self._results[f"{engine}_shared"])
            machine = max(one.rate for one in twos) / shared
            found[f"scaling_machine_{engine}"] = round(machine, 2)
        best = max(self._results["sqlite_2"], key=lambda one: one.rate)
        hundredths = statistics.quantiles(best.latencies, n=100)
        found["p50_ms_64"] = round(1000 * hundredths[49], 1)
        found["p99_ms_64"] = round(1000 * hundredths[98], 1)
        return found

    def shares(self) -> dict[str, object]:
        """Proofs, codec, ledger and the whole of a request on SQLite, in turn; the best rounds."""
        with serving(self._home, self._load, self._fresh("sqlite"), 1) as server:
            for start in range(0, len(self._load.frames), PART):
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
        url = file if engine == "sqlite" else self._cluster.new_url()
        urls.create(url)
        return url


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
