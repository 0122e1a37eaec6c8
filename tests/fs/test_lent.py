"""A file that changes does not lend its owner's rights any more: the kernel was promised that."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.inodes import Changes
from tests.fs.harness import Machine

CAPABILITY = b"security.capability"

LOSES: dict[str, Callable[[Filesystem, int], object]] = {
    "write": lambda fs, ino: fs.write(ino, 0, b"new"),
    "truncate": lambda fs, ino: fs.setattr(ino, Changes(size=0)),
    "chown": lambda fs, ino: fs.setattr(ino, Changes(uid=7)),
    "chgrp": lambda fs, ino: fs.setattr(ino, Changes(gid=7)),
}
KEEPS: dict[str, Callable[[Filesystem, int], object]] = {
    "read": lambda fs, ino: fs.read(ino, 0, 1),
    "times": lambda fs, ino: fs.setattr(ino, Changes(mtime=1)),
    "chmod": lambda fs, ino: fs.setattr(ino, Changes(mode=0o4755)),
}


@pytest.mark.parametrize("change", [*LOSES, *KEEPS])
async def test_capabilities_and_set_uid_go_with_content_and_owner(
    tmp_path: Path, change: str
) -> None:
    client = Machine(tmp_path).boot()
    fs = client.fs
    ino = fs.make(1, b"tool", stat.S_IFREG | 0o4755, 0, 0).ino
    fs.write(ino, 0, b"content")
    fs.setattr(ino, Changes(mode=0o4755))
    fs.setxattr(ino, CAPABILITY, b"all of them")
    fs.setxattr(ino, b"user.note", b"stays")
    {**LOSES, **KEEPS}[change](fs, ino)
    lends = change in KEEPS
    assert (CAPABILITY in fs.listxattr(ino)) == lends
    assert bool(fs.getattr(ino).mode & stat.S_ISUID) == lends
    assert fs.getxattr(ino, b"user.note") == b"stays"
    client.close()
