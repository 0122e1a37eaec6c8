"""How much may wait to be published: by the room for it here, and by the tokens to pay with.

Invariants:
  - what was accepted can be published: before anything is, it is priced (`room`), and what waits is
    bounded (`admit`);
  - whoever has to wait waits only while something is being published; ENOSPC otherwise.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Final

import trio

from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.publisher import Publisher
from hpkvfs.fs.stack import fail
from hpkvfs.net.store import RemoteStore
from hpkvfs.session.options import Options
from hpkvfs.types import PAYLOAD_SIZE

log = logging.getLogger(__name__)

RESERVED_BLOBS: Final = 16
ROOMY_BLOBS: Final = 1_024
WAITING_IN_MEMORY: Final = 0.25


class Admission:
    """Lets changes in."""

    def __init__(
        self,
        fs: Filesystem,
        store: RemoteStore,
        publisher: Publisher,
        options: Options,
        hurry: Callable[[], None],
        why_stuck: Callable[[], str | None],
    ) -> None:
        """`hurry`: have something published now; `why_stuck`: why that is in vain at the moment,
        None if it is not."""
        self._fs = fs
        self._store = store
        self._publisher = publisher
        self._options = options
        self._hurry = hurry
        self._why_stuck = why_stuck
        self._roomy_until, self._roomy_since = 0, 0.0
        self._said_full = False
        self._tried = trio.Event()

    # By room.

    def is_crowded(self, size: int) -> bool:
        """Whether `admit` has anything to do."""
        return self._is_past(0.5, size)

    async def admit(self, size: int) -> None:
        """Wait while too much is not published; ENOSPC when it can't be."""
        if self._is_past(0.5, size):
            self._hurry()
        while self._fs.dirty and self._is_past(1, size):
            why = self._why_stuck()
            if why is not None:
                self._say_it_is_full(why)
                raise fail(errno.ENOSPC)
            self._hurry()
            await self._tried.wait()

    def _is_past(self, part: float, size: int) -> bool:
        """Whether, with `size` bytes more, this part of what may wait is waiting."""
        return (
            self._fs.logged + size > self._options.log_limit * part
            or self._fs.in_memory + size > self._options.memory * part * WAITING_IN_MEMORY
        )

    def published(self) -> None:
        """All that waited when this began is published."""
        self._said_full = False

    def tried(self) -> None:
        """An attempt to publish has ended, well or not: whoever waits looks again."""
        self._tried.set()
        self._tried = trio.Event()

    def _say_it_is_full(self, why: str) -> None:
        """Once, until something is published again."""
        if not self._said_full:
            log.error("the local log is full and nothing can be published: %s", why)
        self._said_full = True

    # By tokens.

    def room(self, size: int) -> None:
        """ENOSPC when the tokens do not pay for what is dirty and `size` bytes more.

        Adding up the wallet for each operation would cost more than most operations: what was
        free then is taken to be free until a quarter of it may have been used.
        """
        dirty = self._fs.dirty
        if dirty + size <= self._roomy_until and time.monotonic() < self._roomy_since + 1.0:
            return
        free = self._affordable() - self._needed(dirty + size)
        if free < 0:
            self._roomy_until = 0
            raise fail(errno.ENOSPC)
        self._roomy_since = time.monotonic()
        self._roomy_until = dirty + free // 4 * PAYLOAD_SIZE if free > ROOMY_BLOBS else 0

    def space(self) -> tuple[int, int]:
        """(blocks in use, blocks that the tokens can still store)."""
        totals = self._fs.totals()
        used = -(-totals.bytes // PAYLOAD_SIZE)
        return used, max(0, self._affordable() - self._needed(totals.dirty))

    def _needed(self, dirty: int) -> int:
        """Blobs that publishing so many dirty bytes may still take, from above."""
        return dirty * 17 // 16 // PAYLOAD_SIZE + 4 - self._publisher.stored_now

    def _affordable(self) -> int:
        return self._store.balance.total // self._store.tariff.insert - RESERVED_BLOBS
