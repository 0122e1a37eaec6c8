"""How many blobs real trees cost, with a real server on loopback and a real vault.

    doc_ratio     blobs that /usr/share/doc takes / (bytes of its files / 16,384); at most 1.15
    small_blobs   blobs that 1,000 files of 1 KiB in one directory take; at most 100

Counted is everything that the generation published last needs: extents, tree nodes, anchors,
pages of the dead list. Trees go in through the operations that the FUSE adapter calls, without
a mount, so this runs anywhere.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from hpkvfs.fs.backend import run as perform
from hpkvfs.net.transport import TcpDialer
from hpkvfs.session import Options, Session, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.types import PAYLOAD_SIZE
from hpkvfs.volume.items import ROOT_INO, Inode
from hpkvfs.volume.keys import VaultKeys, make_words
from tools.benchmarks.local import Server, local_server

DOC: Final = b"/usr/share/doc"
SMALL_FILES: Final = 1_000
SMALL_SIZE: Final = 1_024
TOKENS: Final = 10_000_000
WRITE_SIZE: Final = 128 * 1024

T = TypeVar("T")


def run(as_json: bool) -> dict[str, object]:
    """Both figures; tells of its progress unless `as_json`."""
    with tempfile.TemporaryDirectory(prefix="hpkvfs-space-") as directory:
        return trio.run(_measure, Path(directory), _silent if as_json else _tell)


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _silent(message: str) -> None:
    pass


async def _measure(directory: Path, tell: Callable[[str], None]) -> dict[str, object]:
    with local_server(directory / "server") as server:
        async with _vault(directory / "doc", server) as session:
            tree = _Tree(session)
            size = await tree.copy(DOC, ROOT_INO)
            doc_blobs = await tree.publish()
            tell(f"{size:,} bytes of {os.fsdecode(DOC)} take {doc_blobs:,} blobs")
        async with _vault(directory / "small", server) as session:
            tree = _Tree(session)
            for number in range(SMALL_FILES):
                await tree.add_file(ROOT_INO, b"%d" % number, [secrets.token_bytes(SMALL_SIZE)])
            small_blobs = await tree.publish()
            tell(f"{SMALL_FILES:,} files of {SMALL_SIZE:,} bytes take {small_blobs:,} blobs")
    return {"doc_ratio": round(doc_blobs * PAYLOAD_SIZE / size, 4), "small_blobs": small_blobs}


@asynccontextmanager
async def _vault(path: Path, server: Server) -> AsyncIterator[Session]:
    """A new vault with tokens enough, published only when asked to."""
    state = StateDirectory(path)
    keys = VaultKeys.from_words(make_words(12, secrets.token_bytes))
    state.create(keys, server.address, None, secrets.token_bytes, new=True)
    async with open_session(
        state,
        keys,
        TcpDialer(server.host, server.port),
        Options(log_limit=1 << 40),
        clock=time.time_ns,
        rng=secrets.token_bytes,
    ) as session:
        await session.connect()
        await session.redeem(server.voucher(TOKENS))
        yield session


class _Tree:
    """Fills a vault the way a kernel would."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._fs = session.fs
        self._copied: set[tuple[int, int]] = set()

    async def publish(self) -> int:
        """Publish everything; blobs that it takes."""
        await self._session.publish()
        return int(self._session.status()["blobs_live"])

    async def copy(self, source: bytes, parent: int) -> int:
        """Copy a directory's content; bytes of its regular files, however many names each has."""
        size = 0
        for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
            info = entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                await self._do(self._fs.symlink, parent, entry.name, os.readlink(entry.path), 0, 0)
            elif entry.is_dir():
                made = await self._do(self._fs.make, parent, entry.name, info.st_mode, 0, 0)
                size += await self.copy(entry.path, made.ino)
            elif entry.is_file() and (info.st_dev, info.st_ino) not in self._copied:
                self._copied.add((info.st_dev, info.st_ino))
                size += await self.add_file(parent, entry.name, _read(entry.path))
        return size

    async def add_file(self, parent: int, name: bytes, content: Iterable[bytes]) -> int:
        """A new file; its size."""
        made: Inode = await self._do(self._fs.make, parent, name, 0o100644, 0, 0)
        offset = 0
        for piece in content:
            await self._session.admit(len(piece))
            offset += await self._do(self._fs.write, made.ino, offset, piece)
        return offset

    async def _do(self, operation: Callable[..., T], *args: Any) -> T:
        return await perform(self._session, lambda: operation(*args))


def _read(path: bytes) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(WRITE_SIZE):
            yield piece
