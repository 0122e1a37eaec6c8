"""Group commit: what arrives while one batch is under way shares the next.

    submit() x n -> queue -> perform(up to BATCH jobs), once at a time -> wake n callers

A job that was submitted is performed also when its caller is cancelled, and before `serving`
ends. A batch that fails fails as a whole, and every caller in it is told so.

A batch costs as much as a few more jobs in it, so where a crowd is on its way, it waits until half
of it is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import trio

from hpkvd.ledger import LedgerError

BATCH: Final = 64
PATIENCE_SECONDS: Final = 0.05  # for those behind: they may fail on the way

J = TypeVar("J")
R = TypeVar("R")


@dataclass(slots=True)
class _Waiting(Generic[J, R]):
    job: J
    caller: trio.lowlevel.Task | None  # None: it waits no more
    result: R | LedgerError | None = None

    def abandon(self, _: object) -> trio.lowlevel.Abort:
        """The caller was cancelled; what it asked for happens all the same."""
        self.caller = None
        return trio.lowlevel.Abort.SUCCEEDED


class Group(Generic[J, R]):
    """`perform` gets a batch and returns as many results, in order; it may raise LedgerError.

    `idle`, if given, is called when there is nothing to do: whether it did something.
    """

    def __init__(
        self,
        perform: Callable[[Sequence[J]], Awaitable[Sequence[R]]],
        idle: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._perform = perform
        self._idle = idle
        self._queue: deque[_Waiting[J, R]] = deque()
        self._wake = trio.Event()
        self._behind = 0

    async def submit(self, job: J, behind: int = 0) -> R:
        """The result of a job, once its batch is done. `behind`: so many are on their way too."""
        waiting: _Waiting[J, R] = _Waiting(job, trio.lowlevel.current_task())
        self._queue.append(waiting)
        self._behind = behind
        if self._ripe or len(self._queue) == 1:
            self._wake.set()
        await trio.lowlevel.wait_task_rescheduled(waiting.abandon)
        if isinstance(waiting.result, LedgerError):
            raise waiting.result
        return waiting.result  # type: ignore[return-value]  # R may include None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Perform what is submitted; what was, is performed before this ends."""
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, stopping)
            try:
                yield
            finally:
                stopping.set()
                self._wake.set()

    async def _run(self, stopping: trio.Event) -> None:
        with trio.CancelScope(shield=True):
            while self._queue or not stopping.is_set():
                if self._queue:
                    await self._gathered(stopping)
                    await self._next_batch()
                elif self._idle is None or not await self._idle():
                    await self._woken(stopping)

    @property
    def _ripe(self) -> bool:
        return len(self._queue) >= min(self._behind, BATCH)

    async def _gathered(self, stopping: trio.Event) -> None:
        if self._ripe:
            return
        with trio.move_on_after(PATIENCE_SECONDS):
            while not (self._ripe or stopping.is_set()):
                self._wake = trio.Event()
                await self._wake.wait()

    async def _woken(self, stopping: trio.Event) -> None:
        self._wake = trio.Event()
        if not self._queue and not stopping.is_set():  # something may have come while we idled
            await self._wake.wait()

    async def _next_batch(self) -> None:
        batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        results: Sequence[R | LedgerError]
        try:
            results = await self._perform([waiting.job for waiting in batch])
        except LedgerError as error:
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            waiting.result = result
            if waiting.caller is not None:
                trio.lowlevel.reschedule(waiting.caller)
