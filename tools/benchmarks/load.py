"""Minutes of load while things die: a worker every few seconds by kill -9, the database once.

Customers (tests/server/customers.py) insert, delete, repeat what was not answered, and now and then
show credentials again that they have spent. Every KILL_SECONDS the younger of two workers is
killed, so that the other grows as old as the run and its memory can be watched. Half-way through
the database is killed: PostgreSQL with all its processes, to be started again after a second; on
SQLite, where the server is the database, the whole server.

Figures, of `--json`: requests answered, kills, `lost` (acknowledged and not there, or answered
otherwise when asked again; tokens missing) and `doubled` (credentials accepted twice), both of
which must be 0: the run ends with an error if they are not. memory_*: MiB resident of the elder
worker and of the parent a minute (a tenth of a short run) after a start, and at its end.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.server.customers import KEPT, Crowd, workers
from tests.server.postgres import Cluster
from tests.server.support import ServerProcess, hpkvd, until

MINUTES = 10.0
KILL_SECONDS = 5.0
CUSTOMERS = 4
CHEATS = 10
AMOUNT = 100_000_000
PAGE = os.sysconf("SC_PAGE_SIZE")
ENGINES = ("sqlite", "postgres")


def run(as_json: bool, engine: str = "", minutes: float = MINUTES) -> dict[str, object]:
    """Measure; the figures."""
    figures: dict[str, object] = {"minutes": minutes}
    for name in ENGINES if not engine else (engine,):
        found = _run(name, 60 * minutes, (lambda _: None) if as_json else _tell)
        figures |= {f"{key}_{name}": value for key, value in found.items()}
    return figures


def _tell(text: str) -> None:
    print(text, flush=True)


def _run(engine: str, seconds: float, tell: Callable[[str], None]) -> dict[str, object]:
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "data"
        cluster = None
        if engine == "postgres":
            cluster = stack.enter_context(Cluster())
            cluster.make()
            cluster.start()
            os.environ["HPKVD_LEDGER"] = cluster.new_url()
        made = hpkvd("init", data=data)
        os.environ.pop("HPKVD_LEDGER", None)
        if made.returncode != 0:
            raise RuntimeError(made.stderr)
        server = stack.enter_context(ServerProcess(data, workers=2))
        soak = _Soak(server, cluster, seconds, tell)
        with Crowd(server, CUSTOMERS, AMOUNT, CHEATS) as crowd:
            soak.run(crowd)
        crowd.check(sample=KEPT)  # AssertionError: something was lost, or accepted twice
        books = hpkvd("check", data=data, timeout=300)
        if books.returncode != 0:
            raise RuntimeError(books.stdout + books.stderr)
        return {
            "requests": crowd.answered,
            "per_second": round(crowd.answered / seconds, 1),
            "workers_killed": soak.killed,
            "database_killed": 1,
            "shown_twice": sum(one.caught for one in crowd.customers),
            "lost": 0,
            "doubled": 0,
            **soak.memory,
        }


class _Soak:
    def __init__(
        self,
        server: ServerProcess,
        cluster: Cluster | None,
        seconds: float,
        tell: Callable[[str], None],
    ) -> None:
        self._server = server
        self._cluster = cluster
        self._seconds = seconds
        self._tell = tell
        self.killed = 0
        self.memory: dict[str, object] = {}

    def run(self, crowd: Crowd) -> None:
        """Both halves, with the database's death between them."""
        self._half(crowd, "first")
        self._tell("killing the database")
        if self._cluster is None:
            doomed = workers(self._server)
            self._server.kill()
            for pid in doomed:
                _kill(pid)
            self._server.restart()
        else:
            self._cluster.kill()
            time.sleep(1)
            self._cluster.start()
        self._half(crowd, "second")

    def _half(self, crowd: Crowd, name: str) -> None:
        start = time.monotonic()
        end, warm = start + self._seconds / 2, start + min(60.0, self._seconds / 10)
        elder = min(workers(self._server))
        begun: tuple[float, float] | None = None
        while (now := time.monotonic()) < end:
            time.sleep(max(0.0, min(KILL_SECONDS, end - now)))
            alive = workers(self._server) - {elder}
            if alive:
                _kill(max(alive))
                self.killed += 1
                until(partial(self._replaced, alive | {elder}), 60)
            crowd.served(1, 60)
            if begun is None and time.monotonic() >= warm:
                begun = _resident(elder), _resident(self._server.process.pid)
            self._tell(
                f"{crowd.answered} requests, {self.killed} workers killed, elder worker"
                f" {_resident(elder):.1f} MiB, parent {_resident(self._server.process.pid):.1f} MiB"
            )
        ended = _resident(elder), _resident(self._server.process.pid)
        for place, who in enumerate(("worker", "parent")):
            first = ended[place] if begun is None else begun[place]
            self.memory[f"memory_{who}_{name}_half"] = f"{first:.1f} -> {ended[place]:.1f}"

    def _replaced(self, old: set[int]) -> bool:
        return bool(workers(self._server) - old)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 2**20
