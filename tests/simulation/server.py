"""The server's machine: the real handler and ledger, dying and starting again."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import trio

from hpkvd.epochs import Epoch, Epochs, first_epoch, next_epoch
from hpkvd.handler import Handler
from hpkvd.ledger import LedgerError, Totals
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.payments import vouchers
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.tariff import Tariff
from tests.simulation.epochs import Ageing
from tests.simulation.oracle import Watcher
from tests.simulation.points import SIDE, Crash, Faults, Point, Side


@cache
def identity() -> Identity:
    """Of all simulated servers."""
    return Identity(random.Random("identity").randbytes(32))


@cache
def chain(length: int) -> tuple[Epoch, ...]:
    """So many epochs, of all simulated servers: making one takes longer than a simulation."""
    if length == 1:
        return (first_epoch(Tariff(), random.Random("issuer").randbytes),)
    before = chain(length - 1)
    chance = random.Random(f"issuer {length}")
    return *before, next_epoch(before[-1].parameters, Tariff(), chance.randbytes)


class Server(Side):
    """Lives one after another on one ledger, until the simulation ends."""

    def __init__(
        self,
        directory: Path,
        faults: Faults,
        chance: random.Random,
        watch: Watcher,
        ageing: Ageing,
    ) -> None:
        super().__init__("server", faults)
        self._path = directory / "ledger"
        self._chance = chance
        self._watch = watch
        self._ageing = ageing
        self._ledger: SqliteLedger | None = None
        self._handler: Handler | None = None
        self._nursery: trio.Nursery | None = None
        self.epochs = 1
        self.listed = 0
        self.wanted = trio.Event()
        SqliteLedger.create(self._path)
        self.desk = SqliteLedger(self._path)

    async def run(self) -> None:
        """Live, die, wait, live again; for ever."""
        SIDE.set(self)
        while True:
            try:
                await self._live()
            except BaseExceptionGroup as group:
                _, rest = group.split(Crash)
                if rest is not None:
                    raise rest from None
            self.wanted = trio.Event()
            with trio.move_on_after(self._chance.choice([0.1, 1.0, 15.0])):
                await self.wanted.wait()

    async def _live(self) -> None:
        ledger = self._ledger = SqliteLedger(self._path, reserve=0)
        try:
            async with trio.open_nursery() as nursery:
                self.scope, self.alive = nursery.cancel_scope, True
                async with ledger.serving(), trio.open_nursery() as self._nursery:
                    await self._take_up()
                    await trio.sleep_forever()
        finally:
            self.alive, self._handler = False, None
            ledger.close()

    @property
    def oldest(self) -> int:
        """Number of the oldest epoch that is to be in use."""
        return max(1, self.epochs - self._ageing.keep + 1)

    @property
    def in_use(self) -> dict[bytes, int]:
        """Numbers of the epochs that are to be in use, by digest."""
        return {one.parameters.digest: one.number for one in chain(self.epochs)[self.oldest - 1 :]}

    def rotate(self) -> None:
        """The next epoch begins, and one may end for it."""
        before, self.epochs = self.epochs, min(self.epochs + 1, self._ageing.most)
        if self.epochs == before or not self.alive:
            return  # who starts takes up all there are
        if self._handler is not None and self._nursery is not None:
            self._nursery.start_soon(self._take_up)

    async def _take_up(self) -> None:
        """As hpkvd.rotation: what is listed no more, the ledger has refused before."""
        SIDE.set(self)
        assert self._ledger is not None
        while True:
            newest, oldest = self.epochs, self.oldest
            try:
                if self._ledger.oldest_epoch < oldest:
                    await self._ledger.retire(oldest)
            except LedgerError:
                await trio.sleep(1)
            if newest == self.epochs and self._ledger.oldest_epoch >= oldest - (oldest == 1):
                break
        chained = chain(newest)
        ended = [one.parameters for one in chained[: oldest - 1]]
        epochs = Epochs(chained[oldest - 1 :], identity(), ended)
        self.listed = newest
        if self._handler is None:
            self._handler = Handler(epochs, self._ledger, _clock)
        else:
            self._handler.use(epochs)

    async def deliver(self, frame: bytes) -> bytes | None:
        """A request comes in: the reply that leaves, or None."""
        if not self.alive or self._nursery is None or self._handler is None:
            return None
        done, replies = trio.Event(), list[bytes]()
        self._nursery.start_soon(self._serve, frame, replies, done)
        await done.wait()
        return replies[0] if replies else None

    async def _serve(self, frame: bytes, replies: list[bytes], done: trio.Event) -> None:
        SIDE.set(self)
        assert self._handler is not None
        try:
            self.at(Point.REQUEST_CAME)
            reply = await self._handler.answer(frame)
            self.check()
            self._watch.answered(frame, reply)
            self.at(Point.REPLY_BEFORE)
            replies.append(reply)
        finally:
            done.set()

    def commit(self, execute: Callable[..., Any], *arguments: Any) -> Any:
        """What a thread does for the ledger, with the moments around a COMMIT.

        That alone goes there by threads.in_thread, which takes no arguments.
        """
        if arguments:
            return execute(*arguments)
        self.at(Point.LEDGER_BEFORE)
        if self.disk_full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            error.sqlite_errorname = "SQLITE_FULL"
            raise error
        result = execute()
        self.at(Point.LEDGER_AFTER)
        return result

    # The operator, and who can look into everything.

    def voucher(self, amount: int) -> str:
        """The text of a new voucher."""
        return str(vouchers.make(self.desk, amount, 1, self._chance.randbytes)[0])

    def totals(self) -> Totals:
        """The books."""
        return self.desk.totals()

    def keys(self) -> set[bytes]:
        """Every storage key there is a blob under."""
        return {key for (key,) in self.desk._read.execute("SELECT key FROM blob")}

    def serials(self) -> set[bytes]:
        """Every serial that counts as spent."""
        return {serial for (serial,) in self.desk._read.execute("SELECT serial FROM serial")}

    def close(self) -> None:
        """After the simulation."""
        self.desk.close()


def _clock() -> float:
    return 1_700_000_000 + trio.current_time()
