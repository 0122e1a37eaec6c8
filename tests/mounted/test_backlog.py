"""Changes that wait to be published are bounded, those of names and attributes as well."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mounted.client import Client, Server, eventually

MIB = 1 << 20
SLACK = 300_000  # zeros written ahead, and the operation that found room


def log_size(client: Client) -> int:
    return sum(path.stat().st_size for path in client.state.glob("redo.*"))


def change_names(root: Path, client: Client, times: int) -> int:
    """Rename, link, chmod and tag without end; the largest that the log got."""
    largest = 0
    (root / "0").touch()
    for number in range(times):
        old, new = root / str(number), root / str(number + 1)
        os.setxattr(old, "user.note", os.urandom(300))
        os.chmod(old, 0o600 + number % 2)
        os.link(old, root / "link")
        os.unlink(root / "link")
        os.rename(old, new)
        if number % 50 == 0:
            largest = max(largest, log_size(client))
    return largest


def test_writing_waits_for_the_publisher_and_fails_without_a_server(
    own_server: Server, own_vault: Client
) -> None:
    root = own_vault.directory
    # only what waits makes it publish
    own_vault.mount("--log-limit", "1", "--publish-interval", "1000", "--patience", "2")
    generation = own_vault.json("status")["generation"]
    largest = change_names(root, own_vault, 1_200)  # some two MiB of log, one inode and one name
    assert largest <= MIB + SLACK
    assert (own_vault.json("status")["generation"] or 0) > (generation or 0)
    own_vault.run("sync")

    own_server.stop()
    with pytest.raises(OSError) as caught:
        change_names(root, own_vault, 4_000)
    assert caught.value.errno == errno.ENOSPC
    assert log_size(own_vault) <= MIB + SLACK
    names = sorted(os.listdir(root))
    for change in (os.mkdir, os.mkfifo, Path.touch):
        with pytest.raises(OSError) as caught:
            change(root / "more")
        assert caught.value.errno == errno.ENOSPC
    assert sorted(os.listdir(root)) == names, "reading goes on"

    own_server.start()
    own_vault.run("sync")
    (root / "more").touch()
    eventually(lambda: log_size(own_vault) < MIB // 2, "the log to be dropped")
    own_vault.umount()
    own_vault.fsck()
