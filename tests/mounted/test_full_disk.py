"""A state directory whose disk is really full: a small tmpfs of its own, filled to the last byte.

What was fsynced is there, reading goes on, status says what is wrong, and when there is room
again all goes on without another mount.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.mounted.client import Client, Server, eventually

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def vault(small_disk: Path, own_server: Server, tmp_path: Path) -> Iterator[Client]:
    client = Client.at(tmp_path / "client")
    client.state = small_disk / "state"
    client.init(own_server)
    yield client
    client.discard()


def fill(disk: Path) -> Path:
    """Take all the room that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            for step in (MIB, 4096, 1):
                with suppress(OSError):
                    while file.write(bytes(step)) == step:
                        pass
            raise OSError
    assert os.statvfs(disk).f_bavail == 0
    return ballast


def write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def no_room() -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == errno.ENOSPC


def trouble(client: Client) -> Any:
    return client.json("status")["trouble"]


def test_a_mount_outlives_a_full_disk(own_server: Server, vault: Client, small_disk: Path) -> None:
    root, far = vault.directory, os.urandom(400_000)
    vault.mount("--cache-size", "1")
    (root / "far").write_bytes(far)
    vault.remount("--cache-size", "1", "--publish-interval", "3600", cold=True)
    assert trouble(vault) is None
    write_through(root / "near", b"near" * 5_000)
    ballast = fill(small_disk)
    with no_room():
        write_through(root / "too much", os.urandom(MIB // 2))
    assert (root / "near").read_bytes() == b"near" * 5_000
    assert (root / "far").read_bytes() == far  # out of the server, and paid for
    assert "No space left on device" in trouble(vault)
    assert "No space left on device" in vault.run("status").stdout
    vault.run("sync")  # the log's files are dropped, and so there is room again, in part
    ballast.unlink()
    write_through(root / "again", b"again")
    assert trouble(vault) is None
    vault.kill()
    vault.mount()
    assert (root / "near").read_bytes() == b"near" * 5_000
    assert (root / "far").read_bytes() == far
    assert (root / "again").read_bytes() == b"again"
    assert root.joinpath("too much").exists()  # made, and its content was refused
    vault.umount()
    vault.fsck()
    assert vault.json("balance")["total"] == own_server.status()["tokens"]["outstanding"]


def test_it_can_be_mounted_while_the_disk_is_full(vault: Client, small_disk: Path) -> None:
    """Then not even the journal has room, without which nothing is asked of the server."""
    vault.mount()
    (vault.directory / "file").write_bytes(b"file" * 100)
    vault.umount()
    ballast = fill(small_disk)
    assert "the disk is full" in vault.mount()
    assert "the disk is full" in trouble(vault)
    assert (vault.directory / "file").read_bytes() == b"file" * 100
    with no_room():
        write_through(vault.directory / "other", b"other")
    ballast.unlink()
    eventually(lambda: trouble(vault) is None, "the trouble to be over")
    write_through(vault.directory / "other", b"other")
    vault.umount()
    vault.fsck()
