"""A client's machine: a real session on simulated devices, dying and starting again."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import trio

from hpkvfs.errors import VaultError
from hpkvfs.net.transport import Dialer
from hpkvfs.session import Options, Session, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.wallet.journal import Journal, _Batch
from tests.simulation.disk import Disk, Place
from tests.simulation.points import SIDE, Crash, Faults, Point, Side

CACHE_BYTES = 1 << 20


@dataclass
class State:
    """As much of a StateDirectory as a session uses."""

    path: Place
    wallet: Path
    cache: Path
    is_new: bool

    @property
    def has_room(self) -> bool:
        """Whether the disk is not full."""
        return not self.path.disk.full

    @contextmanager
    def locked(self) -> Iterator[None]:
        """There is no other process."""
        yield


class SimulatedJournal(Journal):
    """A journal whose commits wait for simulated time, and whose process can die."""

    def __init__(self, path: Path, key: bytes, rng: Callable[[int], bytes]) -> None:
        self._machine = cast(Machine, SIDE.get())
        self._machine.check()
        super().__init__(path, key, rng)

    def _hand_over(self, batch: _Batch) -> None:
        self._machine.nursery.start_soon(self._commit_soon, batch)

    async def _commit_soon(self, batch: _Batch) -> None:
        await trio.sleep(self._machine.commit_seconds())
        if self._committing is batch:
            self._committed(batch, self._commit())

    def _execute(self, batch: _Batch) -> None:
        self._machine.check()
        if self._machine.disk_full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        super()._execute(batch)

    def _commit(self) -> sqlite3.Error | None:
        self._machine.at(Point.JOURNAL_BEFORE)
        failure = super()._commit()
        self._machine.at(Point.JOURNAL_AFTER)
        return failure

    def close(self) -> None:
        """As a process that ends, or one that was killed, leaves the file."""
        try:
            if self._machine.alive and self._committing is not None:
                self._committed(self._committing, self._commit())
            if self._machine.alive:
                super().close()
        finally:
            self._database.close()


class Machine(Side):
    """Where one client lives: its disk, and the session while it has one."""

    def __init__(
        self,
        name: str,
        directory: Path,
        keys: VaultKeys,
        faults: Faults,
        chance: random.Random,
        *,
        is_new: bool,
    ) -> None:
        super().__init__(name, faults)
        self.disk = Disk(self, chance)
        self.rng = chance.randbytes
        self._keys = keys
        self._chance = chance
        directory.mkdir()
        wallet, cache = directory / "wallet", directory / "cache"
        state = State(Place(self.disk), wallet, cache, is_new)
        self.state = cast(StateDirectory, state)
        self.options = Options(cache_bytes=CACHE_BYTES)
        self.nursery: trio.Nursery
        self.dialer: Dialer
        self.started = False
        """Whether the last client got as far as doing what it was started for."""
        self.power = False
        """Whether power was lost since whoever uses this last set it."""

    def commit_seconds(self) -> float:
        """How long the disk takes."""
        return self._chance.choice([0.0, 0.001, 0.01, 0.3])

    async def use(self, work: Callable[[Session], Awaitable[None]]) -> bool:
        """Start a client and do `work` with it; whether it lived to the end of it.

        VaultError when it cannot even start because its disk is full.
        """
        SIDE.set(self)
        self.alive, self.started = True, False
        try:
            async with trio.open_nursery() as self.nursery:
                self.scope = self.nursery.cancel_scope
                await self._session(work)
        except BaseExceptionGroup as group:
            _, rest = group.split(Crash)
            if rest is not None:
                raise rest from None
        lived, self.alive = self.alive, False
        if not lived:
            self._after_death()
        return lived

    async def _session(self, work: Callable[[Session], Awaitable[None]]) -> None:
        async with (
            open_session(
                self.state,
                self._keys,
                self.dialer,
                self.options,
                clock=_clock,
                rng=self.rng,
            ) as session,
            trio.open_nursery() as background,
        ):
            background.start_soon(session.keep_going)
            self.started = True
            await work(session)
            background.cancel_scope.cancel()

    def _after_death(self) -> None:
        if self._chance.random() < 0.6:
            self.power = True
            self.disk.lose_power()
            if self._chance.random() < 0.5:
                self.forget_cache()

    def forget_cache(self) -> None:
        """What is read next comes from the server."""
        self.state.cache.unlink(missing_ok=True)


def _clock() -> int:
    return 1_700_000_000_000_000_000 + int(trio.current_time() * 1e9)


@contextmanager
def vault_trouble() -> Iterator[list[VaultError]]:
    """Collect the VaultErrors that end a client, out of their groups."""
    found: list[VaultError] = []
    try:
        yield found
    except VaultError as error:
        found.append(error)
    except BaseExceptionGroup as group:
        ours, rest = group.split(VaultError)
        if rest is not None:
            raise rest from None
        assert ours is not None
        found += cast("list[VaultError]", list(_leaves(ours)))


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
