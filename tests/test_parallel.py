"""parallel.each: bounded, complete, and quiet after a failure."""

from __future__ import annotations

import pytest
import trio

from hpkvfs.parallel import Scatter, each


async def test_every_item_once_and_never_too_many_at_a_time() -> None:
    done: list[int] = []
    running = most = 0

    async def work(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(0)
        running -= 1
        done.append(item)

    await each(range(50), work, 4)
    assert sorted(done) == list(range(50))
    assert most == 4


async def test_after_a_failure_nothing_starts_and_what_runs_is_finished() -> None:
    started: list[int] = []
    finished: list[int] = []

    async def work(item: int) -> None:
        started.append(item)
        await trio.sleep(0.01 * item)
        if item == 1:
            raise ValueError("one")
        finished.append(item)

    with pytest.raises(ValueError, match="one"):
        await each(range(1, 50), work, 3)
    assert sorted(started) == [1, 2, 3]
    assert finished == [2, 3]


async def test_nothing_to_do() -> None:
    await each([], trio.sleep, 3)


async def test_scattered_beginnings_are_in_the_order_and_at_the_moments_drawn(
    autojump_clock: trio.testing.MockClock,
) -> None:
    drawn, begun = iter([0.75, 0.25, 0.5]), list[tuple[str, float]]()

    async def work(item: str) -> None:
        begun.append((item, trio.current_time()))

    start = trio.current_time()
    await Scatter(lambda: next(drawn), 100.0).each("abc", work, 2)
    assert [(item, round(at - start)) for item, at in begun] == [("b", 25), ("c", 50), ("a", 75)]


async def test_after_a_failure_nobody_waits_for_his_moment(
    autojump_clock: trio.testing.MockClock,
) -> None:
    drawn, begun = iter([0.1, 0.8, 0.9]), list[str]()

    async def work(item: str) -> None:
        begun.append(item)
        raise ValueError(item)

    start = trio.current_time()
    with pytest.raises(ValueError, match="a"):
        await Scatter(lambda: next(drawn), 100.0).each("abc", work, 3)
    assert begun == ["a"]
    assert trio.current_time() - start < 20
