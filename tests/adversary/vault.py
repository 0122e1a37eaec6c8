"""A whole vault in this process, at a server that can be made to lie."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hpkvfs.fs.backend import run
from hpkvfs.protocol.messages import Reply, Request, decode_reply, decode_request
from hpkvfs.session import Options, Session, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.types import BlobId, Generation, anchor_id
from hpkvfs.volume.keys import VaultKeys
from tests.fs.play import START, Tree, play, tree
from tests.net.harness import World, running

Lie = Callable[[Request, Reply], Reply | None]
"""What is answered in place of an honest reply; None lets it be."""


@dataclass
class Vault:
    """One vault, its machines, and the only server it knows."""

    world: World
    directory: Path
    keys: VaultKeys = field(default_factory=lambda: VaultKeys(secrets.token_bytes(32)))
    told: int = 0
    """Lies told so far."""

    def __post_init__(self) -> None:
        self._honest = self.world.wire.answer

    @asynccontextmanager
    async def session(
        self, machine: str = "first", patience: float = 20, spread: float = 0
    ) -> AsyncIterator[Session]:
        """The vault in use on one of its machines; nothing runs in the background."""
        state = StateDirectory(self.directory / machine)
        if not state.exists:
            is_new = machine == "first"
            state.create(self.keys, "127.0.0.1:1", None, secrets.token_bytes, new=is_new)
        async with open_session(
            state,
            self.keys,
            self.world.wire,
            Options(cache_bytes=1 << 20, patience=patience, spread=spread),
            clock=lambda: int(self.world.clock() * 1e9),
            rng=secrets.token_bytes,
        ) as session:
            yield session

    def lie(self, lie: Lie) -> None:
        """From now on the server answers with this; what it does stays honest."""
        honest = self.world.wire.answer

        async def answer(frame: bytes) -> bytes:
            reply = await honest(frame)
            told = lie(decode_request(frame), decode_reply(reply))
            self.told += told is not None
            return reply if told is None else told.encode()

        self.world.wire.answer = answer

    def key(self, blob_id: BlobId) -> bytes:
        """The storage key of a blob."""
        return self.keys.signer(blob_id).public

    def anchor_key(self, generation: int) -> bytes:
        """The storage key of an anchor."""
        return self.key(anchor_id(Generation(generation)))

    async def assert_well(
        self, expected: Tree, machine: str = "first", spent_elsewhere: int = 0
    ) -> None:
        """With an honest server all is there, and the tokens of both sides add up.

        `spent_elsewhere`: tokens that another server with the same keys took.
        """
        self.world.wire.answer = self._honest
        async with self.session(machine) as session:
            if session.volume.known is None:
                await session.recover()
            else:
                await session.connect()
            assert await tree(session) == expected
            report = await session.fsck(extents=True)
            assert report.problems == []
            assert session.store.conservation.holds
            assert session.store.balance.pending == 0
            if machine == "first":
                held = self.world.ledger.totals().outstanding - spent_elsewhere
                assert session.store.balance.total == held, (session.store.balance.total, held)


@asynccontextmanager
async def vault(directory: Path) -> AsyncIterator[Vault]:
    """A vault with 3,000 tokens and a published generation: START of tests/fs/play.py."""
    async with running(directory) as world:
        made = Vault(world, directory)
        async with made.session() as session:
            await session.redeem(world.voucher(3_000))
            for step in START:
                assert await play(session, step) == 0
            await session.publish()
        yield made


async def read(session: Session, name: bytes) -> bytes:
    """A file in the root directory."""
    inode = await run(session, lambda: session.fs.lookup(1, name))
    return await run(session, lambda: session.fs.read(inode.ino, 0, inode.size))
