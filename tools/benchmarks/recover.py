"""What it takes to come back from the words alone, with a real server on loopback.

    lookups_10, lookups_1000, lookups_100000   paid look-ups from nothing to the first `ls`, for
                                               vaults of so many commits, without the hint of a
                                               breakglass entry; at most 2 log2(commits) + 10
    rounds_100000                              times the client waits for an answer to go on

Of the commits only the first is real; of the others just the anchors are stored that a vault
would keep, naming the same tree. The blobs that a lost client may have left are looked for
after the `ls`.
"""

from __future__ import annotations

import math
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from hpkvfs.fs.backend import run as perform
from hpkvfs.net.transport import TcpDialer
from hpkvfs.session import Options, Session, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.types import BlobRef, BlobStore, Generation, Signer, anchor_id
from hpkvfs.volume.anchor import kept_generations
from hpkvfs.volume.blob import Kind
from hpkvfs.volume.items import ROOT_INO
from hpkvfs.volume.keys import VaultKeys, make_words
from tools.benchmarks.local import Server, local_server

COMMITS: Final = (10, 1_000, 100_000)
FILES: Final = 20
TOKENS: Final = 100_000


def run(as_json: bool) -> dict[str, object]:
    """All figures; tells of its progress unless `as_json`. AssertionError when one is too high."""
    with tempfile.TemporaryDirectory(prefix="hpkvfs-recover-") as directory:
        return trio.run(_measure, Path(directory), _silent if as_json else _tell)


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _silent(message: str) -> None:
    pass


@dataclass(slots=True)
class Counting:
    """A store that counts look-ups, and the rounds they are made in."""

    store: BlobStore
    look_ups: int = 0
    rounds: int = 0
    in_flight: int = 0

    async def look_up(self, key: bytes) -> bytes | None:
        """See types.BlobStore."""
        self.look_ups += 1
        self.rounds += not self.in_flight
        self.in_flight += 1
        try:
            return await self.store.look_up(key)
        finally:
            self.in_flight -= 1

    async def insert(self, key: bytes, blob: bytes, memo: bytes) -> None:
        """See types.BlobStore."""
        await self.store.insert(key, blob, memo)

    async def delete(self, signer: Signer, digest: bytes, memo: bytes) -> None:
        """See types.BlobStore."""
        await self.store.delete(signer, digest, memo)


async def _measure(directory: Path, tell: Callable[[str], None]) -> dict[str, object]:
    figures: dict[str, object] = {}
    with local_server(directory / "server") as server:
        for commits in COMMITS:
            keys = VaultKeys.from_words(make_words(12, secrets.token_bytes))
            async with _opened(directory / f"first-{commits}", keys, server, new=True) as session:
                await _furnish(session)
                await _pretend(session, Generation(commits - 1))
            async with _opened(directory / f"again-{commits}", keys, server, new=False) as session:
                counting = await _come_back(session, commits)
            figures[f"lookups_{commits}"] = counting.look_ups
            bound = 2 * math.log2(commits) + 10
            tell(
                f"{commits:,} commits: {counting.look_ups} look-ups (at most {bound:.0f})"
                f" in {counting.rounds} rounds"
            )
            assert counting.look_ups <= bound
    figures[f"rounds_{COMMITS[-1]}"] = counting.rounds
    return figures


@asynccontextmanager
async def _opened(
    path: Path, keys: VaultKeys, server: Server, *, new: bool
) -> AsyncIterator[Session]:
    state = StateDirectory(path)
    state.create(keys, server.address, None, secrets.token_bytes, new=new)
    dialer, rng = TcpDialer(server.host, server.port), secrets.token_bytes
    async with open_session(state, keys, dialer, Options(), clock=time.time_ns, rng=rng) as session:
        await session.connect()
        await session.redeem(server.voucher(TOKENS))
        yield session


async def _furnish(session: Session) -> None:
    for number in range(FILES):
        name = b"%d" % number
        await perform(session, lambda name=name: session.fs.make(ROOT_INO, name, 0o100644, 0, 0))  # type: ignore[misc]
    await session.publish()


async def _pretend(session: Session, newest: Generation) -> None:
    """Store the anchors that are left when `newest` is the newest generation."""
    assert session.volume.known is not None
    anchor = session.volume.known.anchor
    for generation in sorted(kept_generations(newest) - {Generation(0)}):
        made = replace(anchor, generation=generation)
        ref, blob = session.volume.sealer.seal(anchor_id(generation), Kind.ANCHOR, made.encode())
        await _insert(session, ref, blob)


async def _insert(session: Session, ref: BlobRef, blob: bytes) -> None:
    await session.store.insert(session.keys.signer(ref.id).public, blob, b"")


async def _come_back(session: Session, commits: int) -> Counting:
    counting = Counting(session.store)
    session.volume.store = counting
    assert await session.find() == commits - 1
    session.load_local(0, 0)
    entries = await perform(session, lambda: session.fs.readdir(ROOT_INO, 0, 100))
    assert len(entries) >= FILES
    return counting
