"""How many blobs real trees cost, with a real server on loopback and a real vault.

    doc_ratio     blobs that /usr/share/doc takes / (bytes of its files / 16,384); at most 1.15
    small_blobs   blobs that 1,000 files of 1 KiB in one directory take; at most 100

Counted is everything the newest generation needs: extents, tree nodes, anchors, dead-list
pages. Trees go in through the operations that the FUSE adapter calls, without a mount, so this
runs anywhere.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio
from tools.benchmarks.local import Server, local_server

from hpkvfs.net.transport import TcpDialer
from hpkvfs.session import Options, Session, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.types import PAYLOAD_SIZE
from hpkvfs.volume.items import ROOT_INO
from hpkvfs.volume.keys import VaultKeys, make_words

DOC = Path("/usr/share/doc")
SMALL_FILES = 1_000
SMALL_SIZE = 1_024
TOKENS = 10_000_000
CHUNK = 1 << 20

T = TypeVar("T")


def run(as_json: bool) -> dict[str, object]:
    """Both figures; progress goes to standard error unless `as_json`."""
    with tempfile.TemporaryDirectory(prefix="hpkvfs-space-") as directory:
        return trio.run(_measure, Path(directory), not as_json)


async def _measure(directory: Path, talk: bool) -> dict[str, object]:
    def tell(message: str) -> None:
        if talk:
            print(message, file=sys.stderr)

    with local_server(directory / "server") as server:
        async with _vault(directory / "doc", server) as session:
            size = await _copy(session, DOC, ROOT_INO)
            tell(f"copied {size:,} bytes of {DOC}")
            await session.publish(_telling(tell))
            doc_ratio = _live(session) / (size / PAYLOAD_SIZE)
        async with _vault(directory / "small", server) as session:
            for number in range(SMALL_FILES):
                data = secrets.token_bytes(SMALL_SIZE)
                await _create(session, ROOT_INO, b"%04d" % number, [data])
            await session.publish(_telling(tell))
            small_blobs = _live(session)
    return {"doc_ratio": round(doc_ratio, 4), "small_blobs": small_blobs}


def _live(session: Session) -> int:
    return int(session.status()["blobs_live"])


def _telling(tell: Callable[[str], None]) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == total:
            tell(f"stored {done:,} blobs")

    return progress


@asynccontextmanager
async def _vault(path: Path, server: Server) -> AsyncIterator[Session]:
    """A new vault with tokens enough, published only when asked to."""
    state = StateDirectory(path)
    keys = VaultKeys.from_words(make_words(12, secrets.token_bytes))
    state.create(keys, server.address, None, secrets.token_bytes, new=True)
    dialer, options = TcpDialer(server.host, server.port), Options(dirty_limit=1 << 40)
    async with open_session(
        state, keys, dialer, options, clock=time.time_ns, rng=secrets.token_bytes
    ) as session:
        await session.connect()
        await session.redeem(server.voucher(TOKENS))
        yield session


async def _copy(session: Session, source: Path, parent: int) -> int:
    """Copy a directory's content; bytes of its regular files, each link counted once."""
    total, seen = 0, dict[tuple[int, int], int]()
    for entry in sorted(os.scandir(os.fsencode(source)), key=lambda entry: entry.name):
        info = entry.stat(follow_symlinks=False)
        identity = info.st_dev, info.st_ino
        if entry.is_symlink():
            target = os.readlink(entry.path)
            await _do(
                session, lambda p=parent, e=entry, t=target: session.fs.symlink(p, e.name, t, 0, 0)
            )
        elif entry.is_dir(follow_symlinks=False):
            ino = (
                await _do(
                    session,
                    lambda p=parent, e=entry, m=info.st_mode: session.fs.make(p, e.name, m, 0, 0),
                )
            ).ino
            total += await _copy(session, Path(os.fsdecode(entry.path)), ino)
        elif entry.is_file(follow_symlinks=False):
            total += info.st_size
    return total


async def _create(session: Session, parent: int, name: bytes, data: Iterator[bytes]) -> None: ...
