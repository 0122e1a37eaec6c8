"""Group commit: who shares a batch, and that nobody waits for somebody who does not come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
import trio.testing

from hpkvd.ledger.group import BATCH, PATIENCE_SECONDS, Group


class _Batches:
    """Performs jobs, and keeps which came together."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    async def perform(self, jobs: Sequence[int]) -> Sequence[int]:
        self.seen.append(list(jobs))
        return [-job for job in jobs]


@asynccontextmanager
async def _submitted(*behind: int) -> AsyncIterator[_Batches]:
    """Jobs 0, 1, 2, ... one after the other, each telling how many are on their way."""
    batches = _Batches()
    group: Group[int, int] = Group(batches.perform)
    answers: dict[int, int] = {}

    async def submit(job: int, behind: int) -> None:
        answers[job] = await group.submit(job, behind)

    async with group.serving(), trio.open_nursery() as nursery:
        await trio.testing.wait_all_tasks_blocked()
        for job, count in enumerate(behind):
            nursery.start_soon(submit, job, count)
            await trio.testing.wait_all_tasks_blocked()
        yield batches
    assert answers == {job: -job for job in range(len(behind))}


async def test_a_batch_waits_until_half_of_a_crowd_is_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with _submitted(5, 4, 3, 2) as batches:
        assert batches.seen == [[0, 1, 2]]
    async with _submitted(0, 0, 0) as batches:  # the negative control
        assert batches.seen == [[0], [1], [2]]


async def test_a_batch_waits_for_no_more_than_it_can_hold(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with _submitted(*[10 * BATCH] * BATCH) as batches:
        assert batches.seen == [list(range(BATCH))]


async def test_who_is_expected_and_fails_on_the_way_delays_the_others_for_a_moment(
    autojump_clock: trio.testing.MockClock,
) -> None:
    start = trio.current_time()
    async with _submitted(9, 8) as batches:
        assert batches.seen == []
        await trio.sleep(PATIENCE_SECONDS / 2)
        assert batches.seen == []
        await trio.sleep(PATIENCE_SECONDS)
        assert batches.seen == [[0, 1]]
    assert trio.current_time() - start < 2 * PATIENCE_SECONDS


async def test_what_waits_for_others_is_performed_when_it_is_to_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    batches = _Batches()
    group: Group[int, int] = Group(batches.perform)
    start = trio.current_time()
    async with trio.open_nursery() as nursery, group.serving():
        nursery.start_soon(group.submit, 7, 9)
        await trio.testing.wait_all_tasks_blocked()
    assert batches.seen == [[7]]
    assert trio.current_time() == start
