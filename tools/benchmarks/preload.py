"""Whether a full ledger is slower: 10 million serials and 1 million blobs preloaded, or none.

Two servers, one on an empty ledger and one on a preloaded one, are sent the same requests in turn,
some hundred at a time; the figures are of the medians over the turns. The rows are made by SQL, in
the order of their keys, and of the sizes that real ones have, but for the blobs, which are of
BLOB bytes (so 1 million fit on this disk; a blob is a row of the same table under the same index).

Figures, of `--json`: seconds_ENGINE and gib_ENGINE of the preloading; rps_ENGINE_empty and
rps_ENGINE_full by the clock, core_... for each second of a worker's CPU; fall_ENGINE, the share
by which the rate falls (below 0.15), and fall_cpu_ENGINE.
"""

from __future__ import annotations

import secrets
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

import psycopg

from hpkvd.ledger import urls
from tests.server.postgres import Cluster
from tools.benchmarks.crowd import Load, Result, make_load, played, serving

SERIALS = 10_000_000
BLOBS = 1_000_000
BLOB = 1_024
ISSUED = 388
REQUESTS = 2_400
TURN = 300
CHUNK = 100_000


def run(as_json: bool, engine: str = "", scale: float = 1.0) -> dict[str, object]:
    """Measure; the figures. `engine`: that one alone; `scale`: of the rows that are preloaded."""

    def tell(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    figures: dict[str, object] = {}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tell(f"making {REQUESTS} requests")
        load = make_load(home, REQUESTS)
        if engine in ("", "sqlite"):
            empty, full = (f"sqlite://{home}/{name}.sqlite" for name in ("empty", "full"))
            urls.create(full)
            start = time.perf_counter()
            fill_sqlite(home / "full.sqlite", scale)
            figures["seconds_sqlite"] = round(time.perf_counter() - start)
            figures["gib_sqlite"] = round((home / "full.sqlite").stat().st_size / 2**30, 2)
            tell(f"SQLite: filled in {figures['seconds_sqlite']} s")
            urls.create(empty)
            figures |= _compared(home, load, "sqlite", empty, full, tell)
            (home / "full.sqlite").unlink()
        if engine in ("", "postgres"):
            cluster = stack.enter_context(Cluster("-cshared_buffers=256MB", "-cmax_wal_size=2GB"))
            cluster.make()
            cluster.start()
            empty, full = cluster.new_url(), cluster.new_url()
            urls.create(full)
            start = time.perf_counter()
            fill_postgresql(full, scale)
            size = cluster.execute("SELECT pg_database_size(current_database())")[0][0]
            figures["seconds_postgres"] = round(time.perf_counter() - start)
            figures["gib_postgres"] = round(size / 2**30, 2)
            tell(f"PostgreSQL: filled in {figures['seconds_postgres']} s")
            urls.create(empty)
            figures |= _compared(home, load, "postgres", empty, full, tell)
    return figures


def _compared(
    home: Path, load: Load, engine: str, empty: str, full: str, tell: Callable[[str], None]
) -> dict[str, object]:
    """The same requests, in turn at both."""
    results: dict[str, list[Result]] = {"empty": [], "full": []}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(home, load, url, 1))
            for name, url in (("empty", empty), ("full", full))
        }
        frames = load.frames
        for turn in range(0, len(frames), TURN):
            for name, server in servers.items():
                results[name].append(played(server, frames[turn : turn + TURN]))
            tell(f"{engine}: " + ", ".join(f"{n} {r[-1].rate:.0f}/s" for n, r in results.items()))
    found: dict[str, object] = {}
    for name, turns in results.items():
        found[f"rps_{engine}_{name}"] = round(statistics.median(one.rate for one in turns))
        found[f"core_{engine}_{name}"] = round(statistics.median(one.per_core for one in turns))
    pairs = list(zip(results["empty"], results["full"], strict=True))
    clock = statistics.median(full.rate / empty.rate for empty, full in pairs)
    cpu = statistics.median(full.per_core / empty.per_core for empty, full in pairs)
    return found | {
        f"fall_{engine}": round(1 - clock, 3),
        f"fall_cpu_{engine}": round(1 - cpu, 3),
    }


def _keys(count: int, size: int) -> Iterator[bytes]:
    """Keys in order, as evenly spread as hashes are."""
    step = 2**40 // count
    for number in range(count):
        yield (number * step).to_bytes(5, "big") + secrets.token_bytes(size - 5)


def fill_sqlite(path: Path, scale: float = 1.0) -> None:
    """Rows as those of requests that were performed, in the books too."""
    serials, blobs = round(SERIALS * scale), round(BLOBS * scale)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -262144")

        def put(statement: str, rows: Iterator[tuple[object, ...]]) -> None:
            while chunk := list(islice(rows, CHUNK)):
                connection.execute("BEGIN")
                connection.executemany(statement, chunk)
                connection.execute("COMMIT")

        token = secrets.token_bytes
        put(
            "INSERT INTO request VALUES (?, 1, 2, 2, 0, ?)",
            ((key, token(ISSUED)) for key in _keys(serials // 2, 32)),
        )
        put(
            "INSERT INTO serial VALUES (?, ?)",
            ((b"\2" + key, token(32)) for key in _keys(serials, 32)),
        )
        put(
            "INSERT INTO blob VALUES (random(), ?, ?, ?)",
            ((b"\2" + key, token(32), token(BLOB)) for key in _keys(blobs, 32)),
        )
        connection.execute(
            "UPDATE books SET requests = ?, serials = ?, blobs = ?", (serials // 2, serials, blobs)
        )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def fill_postgresql(url: str, scale: float = 1.0) -> None:
    """The same; the database makes the rows."""
    serials, blobs = round(SERIALS * scale), round(BLOBS * scale)

    def key(count: int) -> str:
        number = f"(i * {2**56 // count})"
        return f"decode(lpad(to_hex({number}), 14, '0'), 'hex') || substr(sha256(int8send(i)), 8)"

    def series(count: int) -> str:
        return f"FROM generate_series(0::bigint, {count - 1}) AS i"

    def octets(size: int) -> str:
        """As many as this, and none the same; hashes of hashes, which do not compress."""
        parts = [f"sha256(int8send(i * 1000 + {n}))" for n in range(-(-size // 32))]
        return f"substr({' || '.join(parts)}, 1, {size})"

    with psycopg.connect(url, autocommit=True) as connection:
        for statement in (
            "SET synchronous_commit = off",
            f"INSERT INTO request SELECT {key(serials // 2)}, 1, 2, 2, 0, {octets(ISSUED)}"
            f" {series(serials // 2)}",
            rf"INSERT INTO serial SELECT '\x02'::bytea || {key(serials)}, {octets(32)}"
            f" {series(serials)}",
            rf"INSERT INTO blob SELECT '\x02'::bytea || {key(blobs)}, {octets(32)}, {octets(BLOB)}"
            f" {series(blobs)}",
            f"UPDATE books SET requests = {serials // 2}, serials = {serials}, blobs = {blobs}",
            "VACUUM ANALYZE",
        ):
            connection.execute(statement.encode())
