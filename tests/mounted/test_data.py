"""Random reads, writes, truncations and mappings against a file that is known to be right (as
fsx does), and several processes that fill, move and remove things at once (as fsstress does)."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted.client import Client, tree

MOST = 300_000
STEPS = 250


class Pair:
    """The same done to a file of ours and to one of the machine's own."""

    def __init__(self, ours: Path, model: Path, seed: int) -> None:
        self.paths = (ours, model)
        self.random = random.Random(seed)
        self.files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for path in self.paths]

    def close(self) -> None:
        for file in self.files:
            os.close(file)

    def step(self) -> None:
        size = os.fstat(self.files[1]).st_size
        place, length = self.random.randrange(MOST), self.random.randrange(1, 60_000)
        action = self.random.choice(
            [
                "write",
                "write",
                "read",
                "read",
                "truncate",
                "map",
                "append",
                "reopen",
                "drop",
                "sync",
            ]
        )
        if action == "write":
            data = self.random.randbytes(length)
            for file in self.files:
                os.pwrite(file, data, place)
        elif action == "read":
            ours, right = (os.pread(file, length, place) for file in self.files)
            assert ours == right, (place, length)
        elif action == "truncate":
            for file in self.files:
                os.ftruncate(file, place)
        elif action == "append":
            for file in self.files:
                os.pwrite(file, b"tail" * (length // 16), size)
        elif action == "map" and size:
            self._map(self.random.randrange(size), length, size)
        elif action == "reopen":
            self.close()
            self.files = [os.open(path, os.O_RDWR) for path in self.paths]
        elif action == "drop":
            os.fsync(self.files[0])
            os.posix_fadvise(self.files[0], 0, 0, os.POSIX_FADV_DONTNEED)
        elif action == "sync":
            os.fdatasync(self.files[0])
        sizes = [os.fstat(file).st_size for file in self.files]
        assert sizes[0] == sizes[1]

    def _map(self, place: int, length: int, size: int) -> None:
        data = self.random.randbytes(min(length, size - place))
        seen = []
        for file in self.files:
            with mmap.mmap(file, size, mmap.MAP_SHARED) as memory:
                seen.append(memory[place : place + len(data)])
                memory[place : place + len(data)] = data
        assert seen[0] == seen[1]


@pytest.mark.parametrize("seed", range(3))
def test_one_file_is_as_any_other(mount: Client, tmp_path: Path, seed: int) -> None:
    pair = Pair(mount.directory / "file", tmp_path / "model", seed)
    for _ in range(STEPS):
        pair.step()
    pair.close()
    assert pair.paths[0].read_bytes() == pair.paths[1].read_bytes()
    mount.remount(cold=True)
    assert pair.paths[0].read_bytes() == pair.paths[1].read_bytes()


STRESS = """
import os, random, sys
from contextlib import suppress
top, choice = sys.argv[1], random.Random(int(sys.argv[2]))
def some():
    return os.path.join(top, *(choice.choice("abcde") for _ in range(choice.randrange(1, 4))))
def write(path, mode):
    with open(path, mode) as file:
        file.seek(choice.randrange(50_000))
        file.write(choice.randbytes(choice.randrange(40_000)))
def sync(path):
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)
for _ in range(400):
    with suppress(OSError):
        choice.choice([
            lambda: os.mkdir(some()), lambda: os.mkdir(some()), lambda: write(some(), "wb"),
            lambda: write(some(), "r+b"), lambda: os.unlink(some()), lambda: os.rmdir(some()),
            lambda: os.rename(some(), some()), lambda: os.rename(some(), some()),
            lambda: os.link(some(), some()), lambda: os.symlink(some(), some()),
            lambda: os.truncate(some(), choice.randrange(60_000)), lambda: os.listdir(some()),
            lambda: os.chmod(some(), choice.choice([0o600, 0o755])),
            lambda: open(some(), "rb").read(),
            lambda: os.setxattr(some(), "user.x", b"x" * choice.randrange(300)),
            lambda: sync(some()),
        ])()
"""


def test_several_processes_at_once(vault: Client) -> None:
    """Nobody knows what will be there; but it is there again afterwards, and is sound."""
    vault.mount("--publish-interval", "0.5")
    command = [sys.executable, "-W", "ignore", "-c", STRESS, str(vault.directory)]
    workers = [subprocess.Popen([*command, str(seed)]) for seed in range(4)]
    assert [worker.wait(120) for worker in workers] == [0] * 4
    before = tree(vault.directory)
    assert len(before) > 10
    vault.remount(cold=True)
    assert tree(vault.directory) == before
    vault.umount()
    vault.fsck()
