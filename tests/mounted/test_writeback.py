"""What programs wrote, did not sync, and have open still: the kernel holds it until it is asked."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path

from tests.mounted.client import Client, eventually

CONTENT = bytes(range(256)) * 40


def held_back(path: Path) -> int:
    """A descriptor of a file whose content only the kernel has."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, CONTENT)
    return fd


def close(fd: int) -> None:
    """Close a descriptor, whose filesystem may be gone."""
    with suppress(OSError):
        os.close(fd)


def after_kill_9(client: Client, path: Path) -> bytes:
    client.kill()
    client.mount()
    return path.read_bytes() if path.exists() else b""


def test_sync_includes_what_is_open_and_was_never_synced(mount: Client) -> None:
    path, mapped_path = mount.directory / "file", mount.directory / "mapped"
    fd = held_back(mount.directory / "control")
    assert after_kill_9(mount, mount.directory / "control") == b"", "without a sync it is lost"
    close(fd)
    (mount.directory / "control").unlink()
    mapped_path.write_bytes(bytes(len(CONTENT)))
    fd, mapped_fd = held_back(path), os.open(mapped_path, os.O_RDWR)
    with mmap.mmap(mapped_fd, len(CONTENT)) as memory:
        os.close(mapped_fd)
        memory[:] = CONTENT
        mount.run("sync")
        assert mount.json("status")["unpublished_bytes"] == 0
        os.write(fd, b"and life goes on")
        memory[:4] = b"more"
    assert path.read_bytes() == CONTENT + b"and life goes on"
    assert sorted(os.listdir(mount.directory)) == ["file", "mapped"]
    mount.kill()
    close(fd)
    (mount.state / "cache").unlink()
    for log in mount.state.glob("redo.*"):
        log.unlink()  # published, not only logged
    mount.mount()
    assert path.read_bytes() == CONTENT
    assert mapped_path.read_bytes() == CONTENT


def test_snapshots_and_sigterm_include_what_is_open(mount: Client) -> None:
    path = mount.directory / "file"
    fd, nameless = held_back(path), held_back(mount.directory / "nameless")
    (mount.directory / "nameless").unlink()
    mount.run("snapshot", "create", "s")
    assert os.pread(nameless, len(CONTENT), 0) == CONTENT
    assert mount.json("status")["files"] == 3
    os.close(nameless)
    eventually(lambda: mount.json("status")["files"] == 2, "nothing to keep the nameless file")
    os.pwrite(fd, b"newer", 0)
    assert (mount.directory / ".snapshots" / "s" / "file").read_bytes() == CONTENT
    mount.terminate()
    close(fd)
    (mount.state / "cache").unlink()
    mount.mount()
    assert path.read_bytes() == b"newer" + CONTENT[5:]


def test_umount_with_force_includes_many_that_are_open(mount: Client) -> None:
    paths = [mount.directory / str(number) for number in range(300)]
    fds = [held_back(path) for path in paths]
    mount.run("umount", "--force", mount.directory)
    mount._wait_for_exit()
    for fd in fds:
        close(fd)
    mount.mount()
    assert all(path.read_bytes() == CONTENT for path in paths)
