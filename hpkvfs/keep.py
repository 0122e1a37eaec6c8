"""Which automatic snapshots to make and which to delete: `hourly=24,daily=7,weekly=4`.

A rule keeps the newest automatic snapshot of each of the last N hours (days, ...) that have
one; what no rule keeps goes. A new one is due when the current hour (day, ...) of the finest
rule has none yet. All in UTC, so that a snapshot's hour is the same wherever its vault is.
Only names that begin with PREFIX are automatic: no other is ever deleted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from hpkvfs.errors import UserError
from hpkvfs.volume.snapshots import Snapshot

PREFIX = "auto-"
_UNITS = {
    "hourly": "%Y-%m-%dT%H",
    "daily": "%Y-%m-%d",
    "weekly": "%G-W%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}
_NS = 10**9


class Rule(NamedTuple):
    """Keep the newest of each of the last `number` units that have one."""

    unit: str
    number: int

    def bucket(self, time: int) -> str:
        """The unit that a time (ns since 1970) is in."""
        return datetime.fromtimestamp(time / _NS, UTC).strftime(_UNITS[self.unit])


Policy = tuple[Rule, ...]


def parse(text: str) -> Policy:
    """Rules, finest first; UserError when it is no policy."""
    rules: dict[str, Rule] = {}
    for part in text.split(","):
        found = re.fullmatch(r"(\w+)=(\d{1,4})", part.strip())
        if found is None or found[1] not in _UNITS or found[1] in rules or not int(found[2]):
            raise UserError(
                f"can't keep snapshots by {text!r}",
                f"write for example hourly=24,daily=7; there are {', '.join(_UNITS)}",
            )
        rules[found[1]] = Rule(found[1], int(found[2]))
    return tuple(rules[unit] for unit in _UNITS if unit in rules)


def name_at(time: int) -> str:
    """What an automatic snapshot made at a time (ns since 1970) is called."""
    return PREFIX + timestamp(time)


def timestamp(time: int) -> str:
    """A time (ns since 1970) as people and file names want it."""
    return datetime.fromtimestamp(time // _NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_due(policy: Policy, snapshots: Iterable[Snapshot], now: int) -> bool:
    """Whether it is time for a new one."""
    times = [snapshot.time for snapshot in automatic(snapshots)]
    return bool(policy) and (not times or policy[0].bucket(max(times)) != policy[0].bucket(now))


def superfluous(policy: Policy, snapshots: Iterable[Snapshot]) -> list[str]:
    """Names of the automatic snapshots that no rule keeps; none without rules."""
    newest_first = sorted(automatic(snapshots), key=lambda s: (s.time, s.generation), reverse=True)
    kept: set[str] = set()
    for rule in policy:
        buckets: dict[str, str] = {}
        for snapshot in newest_first:
            buckets.setdefault(rule.bucket(snapshot.time), snapshot.name)
        kept |= set(list(buckets.values())[: rule.number])
    return [s.name for s in newest_first if policy and s.name not in kept]


def automatic(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Those that a policy made."""
    return [snapshot for snapshot in snapshots if snapshot.name.startswith(PREFIX)]
