"""Local durability: any number of fsyncs share one flush of the redo log.

Whoever asks while a flush is under way waits for it, and then for one more that all who waited
share, since theirs may have come too late for the first. Whoever asks when nothing changed
since the last flush is answered at once.

Invariant: `sync` returns only when all that was appended before the call is on the disk, or in
a published generation. After a flush failed nobody knows what the disk has (a second try would
succeed and mean nothing), so every sync fails until a generation has been published.
"""

from __future__ import annotations

import errno
import logging

import trio

from hpkvfs import threads
from hpkvfs.fs.filesystem import Filesystem, fail

log = logging.getLogger(__name__)


class GroupFlush:
    """Flushes one filesystem's redo log."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._flushed = -1  # an earlier process may have left something
        self._failed = False
        self._lock = trio.Lock()

    async def sync(self) -> None:
        """Return when all changes so far survive a crash; OSError (EIO) when they may not."""
        wanted = self._fs.position
        if self._flushed >= wanted and not self._failed:
            return
        async with self._lock:
            if self._failed:
                raise fail(errno.EIO)
            if self._flushed < wanted:
                await self._flush()

    async def _flush(self) -> None:
        position, flush = self._fs.position, self._fs.syncer()
        try:
            await threads.in_thread(flush)
        except OSError as error:
            log.error("the redo log cannot be written to the disk: %s", error.strerror)
            self._failed = True
            raise
        self._flushed = position

    def published(self) -> None:
        """All that was in a log file when it failed is in a generation now."""
        self._failed = False
