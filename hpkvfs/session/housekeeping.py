"""What goes over whole generations: collection of the dead, and checks.

Invariants:
  - only what is dead in a published generation is deleted, in an order and at moments drawn at
    random; and it stays on the list of what is removed until a generation is published without it;
  - while the dead list is read, nothing that is dead only in a later generation is collected.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hpkvfs.fs.publisher import Publisher
from hpkvfs.net.store import RemoteStore
from hpkvfs.volume import fsck
from hpkvfs.volume.gc import CHUNKS, LEAST_CHUNK, Collected, collect, read_list
from hpkvfs.volume.volume import Volume

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Housekeeping:
    """Collects and checks one vault."""

    def __init__(
        self,
        volume: Volume,
        store: RemoteStore,
        publisher: Publisher,
        publish: Callable[[], Awaitable[None]],
        rng: Callable[[int], bytes],
    ) -> None:
        self._volume = volume
        self._store = store
        self._publisher = publisher
        self._publish = publish
        self._rng = rng
        self._listing = trio.Lock()
        self._collecting: trio.CancelScope | None = None

    async def gc(self, progress: Progress, spread: float) -> Collected:
        """Publish, delete every dead blob for its refund, publish that.

        spread: seconds over which the deletions are strewn at random. Of two collections at a
        time the later takes over what the earlier has left.
        """
        if self._collecting is not None:
            self._collecting.cancel()
        result = Collected()
        with trio.CancelScope() as self._collecting:
            scope = self._collecting
            try:
                await self._collect(result, progress, spread)
            finally:
                self._publisher.removed |= result.gone
                if self._collecting is scope:
                    self._collecting = None
        if scope.cancelled_caught:
            log.info("a later collection took over")
        elif self._publisher.removed:
            await self._publish()
        return result

    async def _collect(self, result: Collected, progress: Progress, spread: float) -> None:
        """Every dead blob of the newest generation, the list written anew now and then."""
        async with self._listing:
            await self._publish()
            entries, _ = await read_list(self._volume, self._volume.dead)
        entries = [entry for entry in entries if entry.ref not in self._publisher.removed]
        self._shuffle(entries)
        times = sorted(int.from_bytes(self._rng(7), "big") / 2**56 * spread for _ in entries)
        size = max(LEAST_CHUNK, -(-len(entries) // CHUNKS)) if spread else len(entries)
        start = trio.current_time()
        for at in range(0, len(entries), size or 1):
            chunk = list(zip(entries, times, strict=True))[at : at + size]
            await collect(self._volume, chunk, start, result, progress, len(entries))
            self._publisher.removed |= result.gone

    def collectable(self) -> int:
        """Blobs that a collection would delete, as far as published."""
        return max(0, self._volume.dead.count - len(self._publisher.removed))

    async def fsck(
        self, *, extents: bool, progress: Progress, max_tokens: int | None
    ) -> fsck.Report:
        """Publish, then check the published generation and the books."""
        async with self._listing:
            await self._publish()
            price = self._store.tariff.look_up
            limit = None if max_tokens is None or not price else max_tokens // price
            report = await fsck.fsck(
                self._volume, extents=extents, progress=progress, limit=limit, shuffle=self._shuffle
            )
        if not self._store.conservation.holds:
            report.problems.append(f"the tokens do not add up: {self._store.conservation}")
        return report

    def _shuffle(self, entries: list[Any]) -> None:
        entries.sort(key=lambda _: self._rng(16))
