"""Access times as relatime has them, on a clock of our own."""

from __future__ import annotations

import stat
from pathlib import Path

from hpkvfs.fs.filesystem import Changes
from hpkvfs.volume.items import MAX_TIME, MIN_TIME
from tests.fs.harness import Client, Machine

HOUR = 3_600 * 10**9


def read(client: Client, ino: int, after: int) -> bool:
    """Read it so many ns later; whether the access time is that of now."""
    client.machine.time += after
    before = client.fs.getattr(ino).atime
    client.fs.accessed(ino)
    return client.fs.getattr(ino).atime > before


async def test_relatime(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    client = machine.boot()
    fs = client.fs
    ino = fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
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
    machine = Machine(tmp_path)
    client = machine.boot()
    ino = client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    await client.publish()
    assert read(client, ino, HOUR)
    assert not client.publisher.pending
    atime = client.fs.getattr(ino).atime
    client.fs.setattr(ino, Changes(mode=0o600))
    await client.publish()
    client.close()
    again = machine.boot()
    assert (await again.do(again.fs.getattr, ino)).atime == atime
    again.close()


async def test_a_time_that_no_inode_can_hold_becomes_the_nearest_that_it_can(
    tmp_path: Path,
) -> None:
    machine = Machine(tmp_path)
    client = machine.boot()
    ino = client.fs.make(1, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    client.fs.setattr(ino, Changes(atime=-(1 << 70), mtime=1 << 70))
    await client.publish()
    client.close()
    again = machine.boot()
    inode = await again.do(again.fs.getattr, ino)
    assert (inode.atime, inode.mtime) == (MIN_TIME, MAX_TIME)
    again.close()
