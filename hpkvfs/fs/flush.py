"""Local durability: any number of fsyncs share one flush of the redo log.

Whoever asks while a flush is under way waits for it, and then for one more that all who waited
share, since theirs may have come too late for the first. Whoever asks when nothing changed
since the last flush is answered at once.

A flush has a thread, so that a slow disk holds nobody else up. But two changes of threads take
longer than a fast disk does: while each of the last flushes took less than PROMPT, the next one
is made on the spot.

Invariant: `sync` returns only when all that was appended before the call is on the disk, or in
a published generation. After a flush failed nobody knows what the disk has (a second try would
succeed and mean nothing), so every sync fails until a generation has been published.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from hpkvfs import threads
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.stack import fail

log = logging.getLogger(__name__)

PROMPT: Final = 0.001
"""Seconds that nobody minds: less than one proof takes."""
LOOKED_AT: Final = 8


class GroupFlush:
    """Flushes one filesystem's redo log."""

    def __init__(self, fs: Filesystem, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds since some time."""
        self._fs = fs
        self._clock = clock
        self._took: deque[float] = deque(maxlen=LOOKED_AT)
        self._flushed = -1  # an earlier process may have left something
        self._failed = False
        self._lock = trio.Lock()

    async def sync(self) -> None:
        """Return when all changes so far survive a crash; OSError (EIO) when they may not."""
        wanted = self._fs.position
        if self._flushed >= wanted and not self._failed:
            return
        if self._is_prompt and not self._lock.locked() and not self._failed:
            with self._flushing() as flush:
                flush()
            return
        async with self._lock:
            if self._failed:
                raise fail(errno.EIO)
            if self._flushed < wanted:
                with self._flushing() as flush:
                    await threads.in_thread(flush)

    @property
    def _is_prompt(self) -> bool:
        return len(self._took) == LOOKED_AT and max(self._took) < PROMPT

    @contextmanager
    def _flushing(self) -> Iterator[Callable[[], None]]:
        """What flushes all until now, to be called inside."""
        position, sync = self._fs.position, self._fs.syncer()

        def flush() -> None:
            start = self._clock()
            sync()
            self._took.append(self._clock() - start)

        try:
            yield flush
        except OSError as error:
            log.error("the redo log cannot be written to the disk: %s", error.strerror)
            self._failed = True
            raise
        self._flushed = position

    def published(self) -> None:
        """All that was in a log file when it failed is in a generation now."""
        self._failed = False
