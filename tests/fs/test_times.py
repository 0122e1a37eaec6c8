"""Access times as relatime has them, on a clock of our own."""

from __future__ import annotations

import stat
from pathlib import Path

from hpkvfs.fs.inodes import Changes
from hpkvfs.volume.items import MAX_TIME, MIN_TIME, Inode
from tests.fs.harness import Client, Machine

HOUR = 3_600 * 10**9


def read(client: Client, ino: int, after: int) -> bool:
    """Read it so many ns later; whether the access time is that of now."""
    client.machine.time += after
    before = client.fs.getattr(ino).atime
    client.fs.accessed(ino)
    return client.fs.getattr(ino).atime > before


def with_a_file(directory: Path) -> tuple[Client, int]:
    """A client with one file, and the number of its inode."""
    client = Machine(directory).boot()
    return client, client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino


async def kept(client: Client, ino: int) -> Inode:
    """The inode as a later run of this client finds it, when all is published."""
    await client.publish()
    client.close()
    again = client.machine.boot()
    inode = await again.do(again.fs.getattr, ino)
    again.close()
    return inode


async def test_relatime(tmp_path: Path) -> None:
    client, ino = with_a_file(tmp_path)
    fs = client.fs
    assert read(client, ino, HOUR), "never read since it was made"
    assert not read(client, ino, HOUR), "read since it changed, less than a day ago"
    assert not read(client, ino, 22 * HOUR)
    assert read(client, ino, HOUR), "a day ago"
    fs.write(ino, 0, b"new")
    assert read(client, ino, HOUR), "written since"
    fs.setattr(ino, Changes(mode=0o600))
    assert read(client, ino, HOUR), "changed since"
    client.close()


async def test_reading_makes_nothing_to_publish_and_its_time_is_kept_with_the_next_change(
    tmp_path: Path,
) -> None:
    client, ino = with_a_file(tmp_path)
    await client.publish()
    assert read(client, ino, HOUR)
    assert not client.publisher.pending
    atime = client.fs.getattr(ino).atime
    client.fs.setattr(ino, Changes(mode=0o600))
    assert (await kept(client, ino)).atime == atime


async def test_a_time_that_no_inode_can_hold_becomes_the_nearest_that_it_can(
    tmp_path: Path,
) -> None:
    client, ino = with_a_file(tmp_path)
    client.fs.setattr(ino, Changes(atime=-(1 << 70), mtime=1 << 70))
    inode = await kept(client, ino)
    assert (inode.atime, inode.mtime) == (MIN_TIME, MAX_TIME)
