"""What waits to be published is left to the log: little memory, and the same bytes."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from hpkvfs.errors import VaultError
from hpkvfs.fs.inodes import Changes
from hpkvfs.volume.items import BLOCK
from tests.fs.harness import Client, Machine

BLOCKS = 200
AT_ONCE = 8 * BLOCK
HELD = 3 * BLOCK


def content(seed: int) -> bytes:
    return b"".join(bytes([seed, number]) * (BLOCK // 2) for number in range(BLOCKS))


def made(client: Client, data: bytes) -> int:
    """A file, written as a kernel that caches writes does; its inode number."""
    ino = client.fs.make(1, b"large", stat.S_IFREG | 0o644, 0, 0).ino
    for at in range(0, len(data), AT_ONCE):
        client.fs.write(ino, at, data[at : at + AT_ONCE])
    return ino


async def read(client: Client, ino: int) -> bytes:
    return await client.do(client.fs.read, ino, 0, BLOCKS * BLOCK)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_memory_holds_few_blocks_of_what_waits(machine: Machine) -> None:
    client, data = machine.boot(), content(1)
    ino = made(client, data)
    assert client.fs.in_memory < HELD + AT_ONCE
    assert client.fs.dirty > len(data), "it is still what publishing will cost"
    assert await read(client, ino) == data


async def test_so_it_is_after_a_crash(machine: Machine) -> None:
    ino = made(machine.boot(), content(1))
    again = machine.boot()
    assert again.fs.in_memory < HELD + AT_ONCE
    assert await read(again, ino) == content(1)


async def test_blocks_left_to_the_log_can_be_changed_and_published(machine: Machine) -> None:
    client, expected = machine.boot(), bytearray(content(1))
    ino = made(client, bytes(expected))
    for at, data in [(5, b"a" * 9), (BLOCK - 3, b"b" * 7), (40 * BLOCK, bytes(2 * BLOCK))]:
        client.fs.write(ino, at, data)
        expected[at : at + len(data)] = data
    cut = 150 * BLOCK + 77
    await client.do(client.fs.setattr, ino, Changes(size=cut))
    del expected[cut:]
    await client.publish()
    client.fs.write(ino, 20 * BLOCK + 1, b"upon what was published")
    expected[20 * BLOCK + 1 : 20 * BLOCK + 24] = b"upon what was published"
    assert await read(client, ino) == expected
    await client.publish()
    assert client.fs.in_memory == 0
    assert await read(machine.boot(), ino) == expected


async def test_what_is_cut_off_or_removed_is_not_counted(machine: Machine) -> None:
    client = machine.boot()
    ino = made(client, content(1))
    client.fs.write(ino, 0, b"in memory now")
    await client.do(client.fs.setattr, ino, Changes(size=0))
    assert client.fs.in_memory == client.fs.dirty < BLOCK


@pytest.mark.parametrize("flipped", [False, True])
async def test_a_changed_log_is_noticed(machine: Machine, flipped: bool) -> None:
    client = machine.boot()
    ino = made(client, content(1))
    path = machine.directory / "redo.1"
    raw = bytearray(path.read_bytes())
    raw[20 * BLOCK] ^= flipped
    path.write_bytes(raw)
    if flipped:
        with pytest.raises(VaultError, match="redo log 1 cannot be read back"):
            await read(client, ino)
    else:
        assert await read(client, ino) == content(1)
