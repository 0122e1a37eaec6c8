"""Turns at the processor: first come, first served, with looks at the network in between."""

from __future__ import annotations

from itertools import groupby

import trio
import trio.testing

from hpkvd.turns import CROWD, Turns


class _Looks(trio.abc.Instrument):
    """Counts the loop's looks at the network."""

    count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


async def _rounds(turns: Turns, count: int) -> list[int]:
    """Of so many that come together: how many are done between two looks, each time."""
    served: list[tuple[int, int]] = []
    looks = _Looks()

    async def work(number: int) -> None:
        async with turns:
            served.append((number, looks.count))

    trio.lowlevel.add_instrument(looks)
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(work, number)
    trio.lowlevel.remove_instrument(looks)
    assert sorted(number for number, _ in served) == list(range(count))
    return [len(list(group)) for _, group in groupby(served, key=lambda one: one[1])]


async def test_a_few_that_come_together_are_done_one_at_a_time() -> None:
    assert await _rounds(Turns(), 5) == [1] * 5


async def test_nobody_waits_in_a_crowd() -> None:
    rounds = await _rounds(Turns(), 1 + CROWD + 20)
    assert rounds == [20, 1, CROWD] or rounds == [21, CROWD], rounds
    assert await _rounds(Turns(), 1 + CROWD - 1) == [1] * CROWD  # the negative control


async def test_a_crowd_is_counted_and_a_few_are_not() -> None:
    turns = Turns()
    counted: list[int] = []

    async def work() -> None:
        async with turns:
            counted.append(turns.crowd)

    async with trio.open_nursery() as nursery:
        for _ in range(CROWD + 1):
            nursery.start_soon(work)
    assert sorted(set(counted)) == [0, CROWD, CROWD + 1]


async def test_who_fails_or_is_cancelled_takes_nobodys_turn() -> None:
    turns = Turns()
    order: list[str] = []

    async def work(name: str, scope: trio.CancelScope, *, fails: bool = False) -> None:
        with scope:
            async with turns:
                order.append(name)
                if fails:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()

    gone = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        await turns.__aenter__()
        nursery.start_soon(work, "gives up waiting", gone)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: work("fails", trio.CancelScope(), fails=True))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(work, "next", trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        gone.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await turns.__aexit__(None, None, None)
    assert order == ["fails", "next"]
    assert await _rounds(turns, 1) == [1]
