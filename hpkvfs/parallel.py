"""Doing the same to many things at a time. A leaf: imports nothing of ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
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
