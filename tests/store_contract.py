"""What every BlobStore does: a test module runs each of CONTRACT on a store of its own."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable

import pytest
import trio

from hpkvfs.errors import KeyAbsent, KeyExists
from hpkvfs.protocol.group import SigningKey
from hpkvfs.types import BLOB_SIZE, BlobStore


def new_blob() -> tuple[SigningKey, bytes]:
    """A storage key nobody has used, and bytes of a blob's size."""
    return SigningKey(secrets.token_bytes(32)), secrets.token_bytes(BLOB_SIZE)


def memo_of(blob: bytes) -> bytes:
    """A memo as the volume makes them: it has the blob's digest."""
    return bytes(8) + hashlib.sha256(blob).digest()


async def what_is_inserted_is_found(store: BlobStore) -> None:
    signer, blob = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    assert await store.look_up(signer.public) == blob


async def an_absent_key_is_none(store: BlobStore) -> None:
    signer, _ = new_blob()
    assert await store.look_up(signer.public) is None


async def a_taken_key_is_refused_and_kept(store: BlobStore) -> None:
    signer, blob = new_blob()
    _, other = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    with pytest.raises(KeyExists):
        await store.insert(signer.public, other, memo_of(other))
    assert await store.look_up(signer.public) == blob


async def a_repeated_insert_succeeds(store: BlobStore) -> None:
    signer, blob = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    await store.insert(signer.public, blob, memo_of(blob))


async def what_is_deleted_is_gone(store: BlobStore) -> None:
    signer, blob = new_blob()
    digest = hashlib.sha256(blob).digest()
    await store.insert(signer.public, blob, memo_of(blob))
    await store.delete(signer, digest, b"gone" + memo_of(blob))
    assert await store.look_up(signer.public) is None
    await store.delete(signer, digest, b"gone" + memo_of(blob))


async def an_absent_blob_cannot_be_deleted(store: BlobStore) -> None:
    signer, blob = new_blob()
    with pytest.raises(KeyAbsent):
        await store.delete(signer, hashlib.sha256(blob).digest(), b"")


async def another_blob_is_not_deleted(store: BlobStore) -> None:
    signer, blob = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    with pytest.raises(KeyAbsent):
        await store.delete(signer, hashlib.sha256(b"another").digest(), b"")
    assert await store.look_up(signer.public) == blob


async def a_used_key_can_be_used_again(store: BlobStore) -> None:
    signer, blob = new_blob()
    _, other = new_blob()
    await store.insert(signer.public, blob, memo_of(blob))
    await store.delete(signer, hashlib.sha256(blob).digest(), b"")
    await store.insert(signer.public, other, memo_of(other))
    assert await store.look_up(signer.public) == other


async def many_at_a_time(store: BlobStore) -> None:
    blobs = [new_blob() for _ in range(20)]
    found: dict[bytes, bytes | None] = {}

    async def there_and_back(signer: SigningKey, blob: bytes) -> None:
        await store.insert(signer.public, blob, memo_of(blob))
        found[signer.public] = await store.look_up(signer.public)

    async with trio.open_nursery() as nursery:
        for signer, blob in blobs:
            nursery.start_soon(there_and_back, signer, blob)
    assert found == {signer.public: blob for signer, blob in blobs}


CONTRACT: list[Callable[[BlobStore], Awaitable[None]]] = [
    what_is_inserted_is_found,
    an_absent_key_is_none,
    a_taken_key_is_refused_and_kept,
    a_repeated_insert_succeeds,
    what_is_deleted_is_gone,
    an_absent_blob_cannot_be_deleted,
    another_blob_is_not_deleted,
    a_used_key_can_be_used_again,
    many_at_a_time,
]
