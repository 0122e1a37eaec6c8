"""The policy of automatic snapshots, with time passed in."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from hpkvfs import keep
from hpkvfs.errors import UserError
from hpkvfs.types import BlobId, Generation
from hpkvfs.volume.snapshots import Snapshot

HOUR = 3_600 * 10**9
START = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp()) * 10**9


def snapshot(name: str, time: int) -> Snapshot:
    return Snapshot(name, Generation(time // HOUR), time, b"writer00", None, BlobId(0), 0, 0, 0)


def live(policy: keep.Policy, hours: float, step: float, kept: list[Snapshot]) -> None:
    """What a mount does: looks now and then, makes one if it is due, lets go of the rest."""
    for tick in range(int(hours / step)):
        now = START + int(tick * step * HOUR)
        if keep.is_due(policy, kept, now):
            kept.append(snapshot(keep.name_at(now), now))
        gone = set(keep.superfluous(policy, kept))
        kept[:] = [s for s in kept if s.name not in gone]


def ages(kept: list[Snapshot], now: int) -> list[int]:
    return sorted((now - s.time) // HOUR for s in kept)


def test_ten_days_of_hourly_24_and_daily_7() -> None:
    kept = [snapshot("mine", START - 1_000 * HOUR), snapshot("auto", START)]
    live(keep.parse("hourly=24,daily=7"), 240, 0.25, kept)
    now = START + 239 * HOUR
    automatic = keep.automatic(kept)
    assert [s.name for s in kept[:2]] == ["mine", "auto"], "names of people are not touched"
    # of each of the last 24 hours, and the last of each of the seven days (today's is the newest)
    assert ages(automatic, now) == [*range(24), *range(24, 24 * 7, 24)]


def test_a_machine_that_is_mostly_off_keeps_the_last_days_there_are() -> None:
    policy, kept = keep.parse("daily=3"), list[Snapshot]()
    for day in (0, 1, 20, 40, 41, 90):
        now = START + day * 24 * HOUR
        assert keep.is_due(policy, kept, now)
        kept.append(snapshot(keep.name_at(now), now))
        assert not keep.is_due(policy, kept, now + HOUR)
        gone = keep.superfluous(policy, kept)
        kept = [s for s in kept if s.name not in gone]
    assert [(s.time - START) // (24 * HOUR) for s in kept] == [40, 41, 90]


def test_a_clock_that_was_set_back_makes_none_go_that_would_stay() -> None:
    policy = keep.parse("hourly=2")
    kept = [snapshot(keep.name_at(START + n * HOUR), START + n * HOUR) for n in (0, 1)]
    assert keep.superfluous(policy, kept) == []
    assert keep.is_due(policy, kept, START - 5 * HOUR)


def test_without_rules_nothing_is_made_and_nothing_goes() -> None:
    kept = [snapshot(keep.name_at(START + n * HOUR), START + n * HOUR) for n in range(5)]
    assert not keep.is_due((), kept, START + 99 * HOUR)
    assert keep.superfluous((), kept) == []


@pytest.mark.parametrize(
    "text", ["", "hourly", "hourly=0", "hourly=1,hourly=2", "often=3", "daily=-1"]
)
def test_what_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="can't keep snapshots"):
        keep.parse(text)
