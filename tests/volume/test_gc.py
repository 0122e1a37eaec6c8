"""When a collection deletes: at the times that were drawn, with time of our own."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hpkvfs.types import Signer
from hpkvfs.volume import gc
from tests.doubles import MemoryStore
from tests.fs.harness import Machine

HOURS = 6 * 3_600.0


class Watched(MemoryStore):
    """Notes when each deletion comes."""

    times: list[float]

    async def delete(self, signer: Signer, digest: bytes, memo: bytes) -> None:
        self.times.append(trio.current_time())
        await super().delete(signer, digest, memo)


@pytest.mark.parametrize("spread", [0.0, HOURS])
async def test_deletions_come_at_their_times(
    tmp_path: Path, autojump_clock: MockClock, spread: float
) -> None:
    store = Watched()
    store.times = []
    client = Machine(tmp_path, store).boot()
    ino = client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    client.fs.write(ino, 0, bytes(range(256)) * 64 * 40)
    await client.publish()
    client.fs.unlink(1, b"file")
    await client.publish()
    entries, _ = await gc.read_list(client.volume, client.volume.dead)
    times = [spread * number / len(entries) for number in range(len(entries))]
    start, result = trio.current_time(), gc.Collected()
    timed = list(zip(entries, times, strict=True))
    await gc.collect(client.volume, timed, start, result, lambda done, total: None, len(entries))
    assert len(result.deleted) == len(entries) > 40
    assert [at - start for at in store.times] == pytest.approx(times)
    client.publisher.removed |= result.gone
    await client.publish()
    assert (await client.check()).problems == []
    client.close()
