"""fsync: on the spot on a disk that is prompt, in a thread on one that is not, and never a lie."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import cast

import pytest
import trio

from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.flush import LOOKED_AT, PROMPT, GroupFlush

pytestmark = pytest.mark.trio


class Disk:
    """A filesystem's log on a disk that takes its time, by a clock of its own."""

    def __init__(self) -> None:
        self.position = 0
        self.safe = 0
        self.seconds = PROMPT / 2
        self.broken = False
        self.threads: list[threading.Thread] = []
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def syncer(self) -> Callable[[], None]:
        position = self.position

        def sync() -> None:
            self.threads.append(threading.current_thread())
            if self.broken:
                raise OSError(errno.EIO, "Input/output error")
            self._now += self.seconds
            self.safe = max(self.safe, position)

        return sync

    def flush(self) -> GroupFlush:
        return GroupFlush(cast(Filesystem, self), self.clock)

    async def change(self, flush: GroupFlush, times: int = 1) -> None:
        for _ in range(times):
            self.position += 1
            await flush.sync()
            assert self.safe == self.position

    def on_the_spot(self) -> bool:
        return self.threads[-1] is threading.current_thread()


async def test_a_prompt_disk_is_written_on_the_spot() -> None:
    disk = Disk()
    flush = disk.flush()
    await disk.change(flush, LOOKED_AT)
    assert not any(one is threading.current_thread() for one in disk.threads)
    await disk.change(flush)
    assert disk.on_the_spot()


async def test_one_slow_flush_and_the_next_ones_hold_nobody_up() -> None:
    disk = Disk()
    flush = disk.flush()
    await disk.change(flush, LOOKED_AT)
    disk.seconds = 2 * PROMPT
    await disk.change(flush)
    assert disk.on_the_spot()  # nobody could know
    disk.seconds = PROMPT / 2
    for _ in range(LOOKED_AT - 1):
        await disk.change(flush)
        assert not disk.on_the_spot()


async def test_what_is_safe_is_not_flushed_again() -> None:
    disk = Disk()
    flush = disk.flush()
    await disk.change(flush, LOOKED_AT + 1)
    flushes = len(disk.threads)
    await flush.sync()
    assert len(disk.threads) == flushes


@pytest.mark.parametrize("before", [0, LOOKED_AT])
async def test_after_a_failed_flush_every_sync_fails_until_a_generation_is_published(
    before: int,
) -> None:
    disk = Disk()
    flush = disk.flush()
    await disk.change(flush, before)
    disk.broken, disk.position = True, disk.position + 1
    with pytest.raises(OSError, match="Input/output"):
        await flush.sync()
    assert disk.on_the_spot() == bool(before)
    disk.broken = False
    with pytest.raises(OSError, match="Input/output"):
        await flush.sync()
    flush.published()
    await flush.sync()
    assert disk.safe == disk.position


async def test_those_who_wait_share_one_flush() -> None:
    disk = Disk()
    flush = disk.flush()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            disk.position += 1
            nursery.start_soon(flush.sync)
    assert disk.safe == disk.position
    assert len(disk.threads) < 20
