"""Another writer's blob in the way of a publication: nothing that ours stored is forgotten."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest

from hpkvfs.errors import Unreachable
from hpkvfs.fs.publisher import INSERTS_AT_ONCE
from hpkvfs.parallel import Scatter
from hpkvfs.types import BLOB_SIZE, BlobRef
from tests.fs.harness import Client, Machine

SIZE = 1_000_000


async def collided(machine: Machine) -> tuple[Client, bytes]:
    """A publication of many blobs in any order. The replies to the first insertions were lost;
    another's blob is in the place of one of these. Its key."""
    client, store = machine.boot(), machine.store
    client.publisher._scatter = Scatter(random.Random(1).random)
    await client.publish()
    ino = client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    client.fs.write(ino, 0, bytes(range(250)) * (SIZE // 250))
    before, store.lose_next = len(store.outcomes), INSERTS_AT_ONCE
    with pytest.raises(Unreachable):
        await client.publish()
    assert store.lose_next == 0
    taken = store.outcomes.pop(before)
    key = client.volume.keys.signer(BlobRef.decode(taken[1]).id).public
    store.blobs[key] = bytes(BLOB_SIZE)
    return client, key


async def test_what_was_stored_of_it_is_in_the_books_of_the_next(tmp_path: Path) -> None:
    client, other = await collided(Machine(tmp_path))
    await client.publish()
    report = await client.check()
    assert report.problems == []
    known = {client.volume.keys.signer(blob_id).public for blob_id in report.stored}
    assert set(client.machine.store.blobs) - known == {other}
