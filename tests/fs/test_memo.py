"""What is decoded and kept, over publications."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hpkvfs.types import Missing
from hpkvfs.volume.volume import Lru
from tests.fs.harness import Client, Machine

pytestmark = pytest.mark.trio
FILE = stat.S_IFREG | 0o644


def forget_nodes(client: Client) -> None:
    """As if many others had been read since: what is not decoded must be fetched again."""
    client.volume._nodes = Lru(1)


async def files(client: Client) -> list[bytes]:
    """Some files, published, and looked at."""
    names = [b"file%d" % number for number in range(20)]
    for name in names:
        client.fs.make(1, name, FILE, 0, 0)
    await client.publish()
    for name in names:
        await client.do(client.fs.lookup, 1, name)
    return names


async def test_what_was_looked_at_is_known_after_a_publication_without_a_fetch(
    tmp_path: Path,
) -> None:
    client = Machine(tmp_path).boot()
    names = await files(client)
    client.fs.make(1, b"another", FILE, 0, 0)
    await client.publish()
    forget_nodes(client)
    for name in names:
        assert client.fs.lookup(1, name).mode == FILE


async def test_what_else_came_with_a_publication_is_looked_at_again(tmp_path: Path) -> None:
    """The negative control: a snapshot is more than what was written."""
    client = Machine(tmp_path).boot()
    names = await files(client)
    client.publisher.create.append("snapshot")
    await client.publish()
    forget_nodes(client)
    with pytest.raises(Missing):
        client.fs.lookup(1, names[0])


async def test_another_state_in_between_is_not_taken_for_the_same(tmp_path: Path) -> None:
    """A generation of somebody else's, and before anybody looked, one of our own."""
    client = Machine(tmp_path).boot()
    (name, *_) = await files(client)
    ino = client.fs.lookup(1, name).ino
    client.fs.unlink(1, name)
    await client.publish()
    gone = client.volume.known
    client.fs.make(1, name, FILE, 0, 0)
    await client.publish()
    assert (await client.do(client.fs.lookup, 1, name)).ino != ino
    client.volume.known = gone  # followed
    client.fs.make(1, b"another", FILE, 0, 0)
    client.fs.freeze()
    before = client.fs.state
    client.fs.published(1, before)
    with pytest.raises(FileNotFoundError):
        await client.do(client.fs.lookup, 1, name)
