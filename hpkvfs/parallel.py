"""Doing the same to many things at a time. A leaf: imports nothing of ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import trio

T = TypeVar("T")


async def each(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """Await work(item) for every item, at most `at_once` at a time.

    After a failure nothing more is started; what is under way comes to its end, since half a
    paid request would be left to be resolved. Then the first failure is raised, bare.
    """
    left, failures = iter(items), list[Exception]()

    async def worker() -> None:
        for item in left:
            try:
                await work(item)
            except Exception as error:
                failures.append(error)
            if failures:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(worker)
    if failures:
        raise failures[0]


@dataclass(frozen=True, slots=True)
class Scatter:
    """Does things in an order, and at moments, drawn at random, so that these tell nothing.

    uniform: draws from [0, 1); seconds: over which the beginnings are spread.
    """

    uniform: Callable[[], float]
    seconds: float = 0.0

    async def each(
        self, items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int
    ) -> None:
        """As `each`; after a failure nobody waits for his moment any more."""
        start, failed = trio.current_time(), trio.Event()

        async def in_time(drawn: tuple[float, T]) -> None:
            moment, item = drawn
            with trio.move_on_at(start + moment * self.seconds):
                await failed.wait()
            if failed.is_set():
                return
            try:
                await work(item)
            except BaseException:
                failed.set()
                raise

        drawn = [(self.uniform(), item) for item in items]
        drawn.sort(key=lambda one: one[0])
        await each(drawn, in_time, at_once)


IN_ORDER = Scatter(lambda: 0.0)
"""As given and at once: for tests that want to be repeated exactly."""
