"""Waiting for the kernel's next request without going through trio's scheduler each time.

pyfuse3 asks trio for a lock, then for its descriptor to be readable, once per request. That is
three turns of trio's loop and two changes to its epoll set, which cost more than most of our
answers do. A program that has just been answered usually asks again within microseconds; so
after each answer the descriptor is polled for a moment, and only when nothing comes does the
task wait as trio would have it. pyfuse3 lets its event loop be replaced (that is how it runs
under asyncio); `Trio` here is trio, but for these two calls and the end of the second.

It is polled awake. A program that makes one request after another takes turns with us, and if
both sleep in turn, each request wakes two processors; in a virtual machine that takes longer than
most answers (docs/performance.md). The processor is offered to others all the while.

Invariant: nobody starves. After HOLD seconds without a turn of trio's loop one is taken. The
polling ends after LINGER or when somebody else wants the processor, and does not begin while an
answer waits for something (a disk, the network), or when it was in vain MISSES times in a row,
until a request comes that soon again.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import trio

HOLD: Final = 0.002
LINGER: Final = 0.000_2
MISSES: Final = 8
ELSEWHERE: Final = 0.000_5
"""Seconds; who gives the processor away for longer is not alone on it."""


class Pending:
    """`with pending:` around what an answer waits for."""

    def __init__(self) -> None:
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def __enter__(self) -> None:
        self._count += 1

    def __exit__(self, *args: object) -> None:
        self._count -= 1


class Lock:
    """As trio.Lock, but taking it when it is free is no checkpoint, and letting go no hand-over.

    The task that answers keeps reading as long as its answers need no waiting; when one does,
    the next task, which letting go has woken, finds the lock free.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: deque[trio.lowlevel.Task] = deque()

    async def __aenter__(self) -> None:
        while self._held:
            await self._wait()
        self._held = True

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def __aexit__(self, *args: object) -> None:
        self._held = False
        if self._waiting:
            trio.lowlevel.reschedule(self._waiting.popleft())


class _LowLevel:
    """trio.lowlevel, with another wait_readable."""

    def __init__(self, settle: Callable[[], None], pending: Pending) -> None:
        self._last_turn = 0.0
        self._misses = 0
        self._closing = False
        self._settle = settle
        self._pending = pending

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    def notify_closing(self, fd: int) -> None:
        """As trio's, and for one who does not wait there just now."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)

    async def wait_readable(self, fd: int) -> None:
        """Return when there is something to read; ClosedResourceError when it is closed."""
        self._settle()
        start = time.monotonic()
        polled = self._misses < MISSES and not self._pending
        if polled and await self._poll(fd, start):
            self._misses = 0
            return
        if self._closing:
            raise trio.ClosedResourceError("closed while it was polled")
        await trio.lowlevel.wait_readable(fd)
        self._last_turn = time.monotonic()
        if self._last_turn - start < LINGER:
            self._misses = 0
        elif polled:
            self._misses += 1

    async def _poll(self, fd: int, now: float) -> bool:
        """Whether something came in time."""
        end = now + LINGER
        while now < end:
            if now - self._last_turn >= HOLD:
                await trio.lowlevel.checkpoint()
                self._last_turn = now = time.monotonic()
            if select.select((fd,), (), (), 0)[0]:
                return True
            os.sched_yield()
            before, now = now, time.monotonic()
            if now - before >= ELSEWHERE:
                return False
        return False


class Trio:
    """What pyfuse3 uses of trio; `settle` is called each time before it waits for a request."""

    Lock = Lock

    def __init__(self, pending: Pending, settle: Callable[[], None] = lambda: None) -> None:
        self.lowlevel = _LowLevel(settle, pending)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)
