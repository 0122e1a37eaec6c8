"""Counts for the operator, made so coarse that they tell little of anybody.

Every count is rounded down to a multiple of COARSE when it is shown: whoever reads the page, or
seizes the database that scrapes it, cannot see one publication of a few blobs come and go.
Nothing is counted by key, epoch, address or time of day. docs/operator.md says what each leaks.

One Meter is in each process that answers. Its snapshot, a dict of plain numbers, travels to the
parent, which adds the snapshots up: a Board. Counts only grow; those of workers that ended stay.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from hpkvfs.protocol.messages import Done, Refused, Reply

COARSE: Final = 100
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

HELP: Final = {
    "hpkvd_requests_total": "Requests answered, by operation or kind of reply.",
    "hpkvd_refused_total": "Requests refused, by reason.",
    "hpkvd_answer_seconds": "From the last byte of a request to the reply.",
    "hpkvd_work_seconds_total": "Seconds of computing, by kind.",
    "hpkvd_workers": "Processes that answer.",
    "hpkvd_workers_died_total": "Processes that ended without being asked to.",
}

Snapshot = dict[str, float]


@dataclass(slots=True)
class Meter:
    """What one process counted since it started."""

    values: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def answered(self, reply: Reply, seconds: float) -> None:
        """A request got this reply, so long after its last byte."""
        self.values[_series(reply)] += 1
        place = bisect_left(BUCKETS, seconds)
        bound = f"{BUCKETS[place]:g}" if place < len(BUCKETS) else "+Inf"
        self.values[f'hpkvd_answer_seconds_bucket{{le="{bound}"}}'] += 1
        self.values["hpkvd_answer_seconds_sum"] += seconds

    def worked(self, kind: str, seconds: float) -> None:
        """So long was spent on computing of this kind."""
        self.values[f'hpkvd_work_seconds_total{{kind="{kind}"}}'] += seconds

    def snapshot(self) -> Snapshot:
        """All of it, exact."""
        return dict(self.values)


class Board:
    """The sum over all workers, past and present."""

    def __init__(self) -> None:
        self._ended: Counter[str] = Counter()
        self._latest: dict[int, Snapshot] = {}
        self.died = 0

    def update(self, worker: int, snapshot: Mapping[str, float]) -> None:
        """The newest counts of a worker that lives."""
        self._latest[worker] = dict(snapshot)

    def retire(self, worker: int) -> None:
        """It has ended: what it counted stays."""
        self._ended.update(self._latest.pop(worker, {}))

    def total(self) -> Snapshot:
        """The sums, exact."""
        total = Counter(self._ended)
        for snapshot in self._latest.values():
            total.update(snapshot)
        return dict(total)

    def page(self, gauges: Mapping[str, float]) -> str:
        """The text that Prometheus scrapes (exposition format 0.0.4), rounded down."""
        exact = self.total()
        counts = {name: _rounded(name, value) for name, value in exact.items()}
        shown = {**_histogram(counts), **gauges, "hpkvd_workers_died_total": self.died}
        return "\n".join(_lines(shown)) + "\n"


def _series(reply: Reply) -> str:
    match reply:
        case Refused(reason):
            return f'hpkvd_refused_total{{reason="{reason.name.lower()}"}}'
        case Done(fact):
            operation = fact.operation.name.lower()
        case _:
            operation = type(reply).__name__.lower()
    return f'hpkvd_requests_total{{operation="{operation}"}}'


def _rounded(name: str, value: float) -> float:
    if name.startswith(("hpkvd_work_seconds_total", "hpkvd_answer_seconds_sum")):
        return round(value)
    return value // COARSE * COARSE


def _histogram(counts: Snapshot) -> Snapshot:
    """Buckets that include the smaller ones, as Prometheus wants them."""
    prefix, running = "hpkvd_answer_seconds_bucket", 0.0
    shown = {name: value for name, value in counts.items() if not name.startswith(prefix)}
    for bound in [*(f"{one:g}" for one in BUCKETS), "+Inf"]:
        name = f'{prefix}{{le="{bound}"}}'
        running += counts.get(name, 0)
        shown[name] = running
    shown["hpkvd_answer_seconds_count"] = running
    shown.setdefault("hpkvd_answer_seconds_sum", 0)
    return shown


def _lines(shown: Mapping[str, float]) -> Iterable[str]:
    explained = set()
    for name in sorted(shown, key=_order):
        family = re.sub("_(bucket|sum|count)$", "", name.partition("{")[0])
        if family not in explained:
            explained.add(family)
            kind = "histogram" if family == "hpkvd_answer_seconds" else "gauge"
            kind = "counter" if family.endswith("_total") else kind
            yield f"# HELP {family} {HELP.get(family, 'See docs/operator.md.')}"
            yield f"# TYPE {family} {kind}"
        yield f"{name} {shown[name]:g}" if shown[name] < 1e6 else f"{name} {int(shown[name])}"


def _order(name: str) -> tuple[str, float, str]:
    family, _, label = name.partition("{")
    bound = label.partition('le="')[2].partition('"')[0]
    return family, float(bound) if bound else 0.0, name
