"""Another writer's blob in the way of a publication: nothing that ours stored is forgotten."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hpkvfs.errors import Unreachable
from hpkvfs.types import BLOB_SIZE, BlobRef
from tests.fs.harness import Client, Machine

SIZE = 200_000


async def collided(machine: Machine) -> tuple[Client, bytes]:
    """A publication whose insertions lost their replies, and the first of which another's is in
    the place of; the key of that one."""
    client = machine.boot()
    await client.publish()
    ino = client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    client.fs.write(ino, 0, bytes(range(250)) * (SIZE // 250))
    store = machine.store
    before = len(store.outcomes)
    store.lose_next = 4
    with pytest.raises(Unreachable):
        await client.publish()
    store.lose_next = 0
    first = min(store.outcomes[before:], key=lambda outcome: BlobRef.decode(outcome[1]).id)
    key = client.volume.keys.signer(BlobRef.decode(first[1]).id).public
    store.outcomes.remove(first)
    store.blobs[key] = bytes(BLOB_SIZE)
    return client, key


async def unaccounted(client: Client, other: bytes) -> set[bytes]:
    """Keys of blobs at the store that nothing of ours names, but the other's."""
    report = await client.check()
    assert report.problems == []
    known = {client.volume.keys.signer(blob_id).public for blob_id in report.stored}
    return set(client.machine.store.blobs) - known - {other}


async def test_what_was_stored_of_it_is_in_the_books_of_the_next(tmp_path: Path) -> None:
    client, other = await collided(Machine(tmp_path))
    await client.publish()
    assert client.publisher.orphans == set()
    assert await unaccounted(client, other) == set()
