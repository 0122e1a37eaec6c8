"""What programs wrote and the kernel still holds, and having it handed over.

The kernel keeps what is written to an open file in its page cache for up to half a minute
(writeback cache). `pull` has it handed over, without the programs' help: so `hpkvfs sync`, a
snapshot, and the end of a mount include files that are still open.

Only files that are open for writing, or mapped, have pages that the kernel holds. syncfs(2)
makes it send them all, but returns before we have answered (of a FUSE filesystem the kernel does
not wait for data, fs/fs-writeback.c, wait_sb_inodes). fsync(2) does wait, and needs a descriptor.
So each such file has, while `pull` runs, one more name in the root directory: it has 128 random
bits and nobody else can guess it, it is not listed, and the kernel is made to forget it.

A mount that was taken away while files are open (`fusermount3 -u -z`) lives on until they are
closed, and has no path any more by which to reach them: then we can only say so.

All this is done by sync(1), in a process of its own. A thread of this process that waits for an
answer of ours could not be killed while the rest of it is, and nobody would answer it any more:
the mount would hang for ever.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from hpkvfs.errors import VaultError
from hpkvfs.mountpoint import is_mounted

log = logging.getLogger(__name__)

FILES_AT_ONCE: Final = 256


class Writeback:
    """The files of one mount that are open, and those of them that may have been written to."""

    def __init__(self, forget: Callable[[bytes], None]) -> None:
        """`forget` has the kernel forget a name in the root directory."""
        self._forget = forget
        self._open: Counter[int] = Counter()
        self._written: set[int] = set()
        self._names: dict[bytes, int] = {}
        self._turn = trio.Lock()

    def opened(self, ino: int, flags: int) -> None:
        """A file was opened, with flags as of open(2)."""
        self._open[ino] += 1
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._written.add(ino)

    def closed(self, ino: int) -> None:
        """One of the descriptors that were opened is gone, with all its copies and mappings."""
        self._open[ino] -= 1
        if self._open[ino] <= 0:
            del self._open[ino]
            self._written.discard(ino)

    def named(self, name: bytes) -> int | None:
        """The file that has this name in the root directory for the moment."""
        return self._names.get(name)

    async def pull(self, directory: Path) -> None:
        """Return when all that was written before the call was handed over.

        `directory`: where the filesystem is mounted; it must go on answering meanwhile.
        VaultError when some could not be taken (the program that wrote it is told too).
        """
        async with self._turn:
            if not self._written:
                return
            if not is_mounted(directory):
                raise VaultError(
                    f"{directory} was unmounted while programs had files of it open",
                    "what they wrote since they last synced is taken when they sync or close",
                )
            token = secrets.token_hex(16)
            self._names = {f".hpkvfs-{token}-{ino}".encode(): ino for ino in self._written}
            paths = [str(directory / os.fsdecode(name)) for name in self._names]
            try:
                said = await _sync("-f", "--", str(directory))
                for at in range(0, len(paths), FILES_AT_ONCE):
                    said += await _sync("--", *paths[at : at + FILES_AT_ONCE])
            finally:
                names, self._names = self._names, {}
                for name in names:
                    self._forget(name)  # or it keeps the inode, also when it is unlinked
            _explain(said)


async def _sync(*arguments: str) -> list[str]:
    """Run sync(1); its complaints."""
    done = await trio.run_process(
        ["sync", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_stderr=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    return done.stderr.decode(errors="replace").splitlines()


def _explain(said: list[str]) -> None:
    for line in said:
        log.warning("what the kernel holds: %s", line)
    # A file that its owner's modes close to us, or that was closed meanwhile, was handed over by
    # the first call all the same, if not certainly before we went on.
    harmless = ("Permission denied", "No such file or directory")
    failed = [line for line in said if not line.endswith(harmless)]
    if failed:
        raise VaultError(
            "some of what programs wrote to open files could not be taken:"
            f" {failed[0].rpartition(': ')[2]}",
            "hpkvfs status says what is wrong; the programs are told when they sync or close",
        )
