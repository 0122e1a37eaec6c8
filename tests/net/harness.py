"""A whole server in this process, and stores that talk to it over a Wire."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypedDict, Unpack

import trio

from hpkvd.epochs import Epoch, Epochs, first_epoch, next_epoch
from hpkvd.handler import Handler
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.payments import vouchers
from hpkvfs.net.moving import Pace
from hpkvfs.net.proving import Prover
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.tariff import Tariff
from tests import books
from tests.doubles import Clock, FailingJournal, Wire

KEY = bytes(range(32))


@cache
def epoch_one() -> Epoch:
    """One issuer for all tests: making one takes a while."""
    return first_epoch(Tariff(), secrets.token_bytes)


@cache
def chain(length: int) -> tuple[Epoch, ...]:
    """So many epochs, each after the one before; made once for all tests."""
    if length == 1:
        return (epoch_one(),)
    before = chain(length - 1)
    return *before, next_epoch(before[-1].parameters, Tariff(), secrets.token_bytes)


@cache
def identity() -> Identity:
    """One identity for all tests of a process."""
    return Identity(secrets.token_bytes(32))


class Options(TypedDict, total=False):
    """What World.client takes."""

    patience: float
    max_in_flight: int
    name: str
    identity: bytes | None
    pace: Pace | None
    prover: Prover | None


@dataclass
class World:
    """A server with its ledger, and one client's disk."""

    directory: Path
    ledger: SqliteLedger
    handler: Handler
    wire: Wire
    clock: Clock
    journals: list[FailingJournal] = field(default_factory=list)
    rotations: int = 0

    async def rotate(self, keep: int = 4) -> None:
        """The server begins an epoch, and ends those before the newest `keep`."""
        self.rotations += 1
        epochs = chain(1 + self.rotations)
        first = max(self.ledger.oldest_epoch, epochs[-keep:][0].number) - 1
        ended = [one.parameters for one in epochs[:first]]
        await self.ledger.retire(first + 1)
        self.handler.use(Epochs(epochs[first:], identity(), ended))

    def voucher(self, amount: int) -> str:
        """The text of a new voucher."""
        return str(vouchers.make(self.ledger, amount, 1, secrets.token_bytes)[0])

    async def sold(self, amount: int) -> str:
        """As `voucher`, also while the ledger is writing: life has another process for that."""
        while self.ledger._write.in_transaction:
            await trio.sleep(0.001)
        return self.voucher(amount)

    def client(
        self,
        *,
        patience: float = 10,
        max_in_flight: int = 4,
        name: str = "wallet",
        identity: bytes | None = None,
        pace: Pace | None = None,
        prover: Prover | None = None,
    ) -> RemoteStore:
        """A store over this client's journal; the last in `journals` is its."""
        journal = FailingJournal(self.directory / name, KEY, secrets.token_bytes)
        self.journals.append(journal)
        return RemoteStore(
            journal,
            self.wire,
            secrets.token_bytes,
            identity=identity,
            patience=patience,
            pace=pace or Pace(),
            prover=prover,
            max_in_flight=max_in_flight,
        )

    def kill(self) -> None:
        """The client dies: what its journal had not committed is gone."""
        self.journals.pop().die()

    async def rich_client(self, amount: int = 10_000, **options: Unpack[Options]) -> RemoteStore:
        """A store that has redeemed a voucher."""
        store = self.client(**options)
        await store.redeem(self.voucher(amount))
        return store

    async def impatient_client(self) -> RemoteStore:
        """A rich one that gives up soon."""
        await self.rich_client()
        await self.journals[-1].flush()
        self.kill()
        store = self.client(patience=0.3)
        await store.parameters()
        return store

    def assert_conserved(self, store: RemoteStore) -> None:
        """No token lost or made, on either side, with nothing pending."""
        books.compare(self.ledger.totals(), [store.conservation])


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[World]:
    """A server on a ledger in this directory."""
    SqliteLedger.create(directory / "ledger")
    ledger = SqliteLedger(directory / "ledger", reserve=0)
    try:
        async with ledger.serving():
            clock = Clock()
            handler = Handler(Epochs([epoch_one()], identity()), ledger, clock)
            world = World(directory, ledger, handler, Wire(handler.answer), clock)
            try:
                yield world
            finally:
                for journal in world.journals:
                    journal.die()
    finally:
        ledger.close()
