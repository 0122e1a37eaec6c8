"""One seed's run: its plan, its driver, and the check at the end."""

from __future__ import annotations

import errno
import hashlib
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import trio
from trio.testing import MockClock

from hpkvfs.errors import (
    DiskFull,
    EmptyWallet,
    Refusal,
    StoreError,
    Unreachable,
    UserError,
    VaultError,
)
from hpkvfs.net.refusals import NoRoom, VoucherSpent
from hpkvfs.net.store import RemoteStore
from hpkvfs.session import Session
from hpkvfs.types import BlobId
from hpkvfs.volume.keys import VaultKeys
from tests.fs.play import START, Step, Tree, play, random_step, tree
from tests.simulation.client import Machine, vault_trouble
from tests.simulation.epochs import GAP, QUICK, Ageing, check_books, oldest_to_answer
from tests.simulation.mutations import Replacement, planted
from tests.simulation.network import FINE, Network, Weather
from tests.simulation.oracle import Story, Watcher, check_status
from tests.simulation.patches import simulated
from tests.simulation.points import Faults, Point, Side
from tests.simulation.server import Server

LIMIT_SECONDS = 1_000_000.0
SHM = Path("/dev/shm")
EVENTS = {
    "fs": 30,
    "sync": 4,
    "publish": 3,
    "pause": 4,
    "gc": 3,
    "redeem": 1,
    "keepalive": 1,
    "rotate": 1,
    "stop": 1,
    "kill": 1,
    "kill server": 1,
    "fill client": 0.4,
    "fill server": 0.4,
    "weather": 1,
}


@dataclass(frozen=True)
class Outcome:
    """What came of a seed. `failure` is empty when all held; `trace` names the run exactly."""

    seed: int
    failure: str
    trace: str
    passed: Counter[Point]
    struck: Counter[Point]
    lines: list[str] = field(default_factory=list, repr=False)


def run(
    seed: int,
    *,
    real: bool = False,
    keep: bool = False,
    mutation: str | Callable[[], list[Replacement]] | None = None,
    at: Point | None = None,
    plays: Callable[..., World] | None = None,
) -> Outcome:
    """Play one seed.

    `real`: with real credentials; `keep`: its trace in `lines`; `mutation`: with a planted bug;
    `at`: with one death more, at this point; `plays`: another kind of World.
    """
    with ExitStack() as stack:
        shm = str(SHM) if SHM.is_dir() else None
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory("-sim", dir=shm)))
        stack.enter_context(simulated(str(seed), real=real))
        stack.enter_context(planted(mutation))
        world = (plays or World)(seed, directory, keep=keep)
        if at is not None:
            world.faults.crashes.setdefault(at, []).insert(0, 1)
        if world.ageing.ends:
            defaults = cast(Any, RemoteStore.__init__).__kwdefaults__
            stack.enter_context(patch.dict(defaults, pace=QUICK))
        stack.enter_context(patch("hpkvd.log.Complaints.complain", world.complain))
        failure = ""
        try:
            trio.run(world.live, clock=MockClock(autojump_threshold=0))
        except (Exception, BaseExceptionGroup) as error:
            failure = _first_line(error)
            if keep:
                world.note("failed", failure)
                world.lines += _where(error)
        finally:
            world.server.close()
        digest = world.hash.hexdigest()
        faults = world.faults
        return Outcome(seed, failure, digest, faults.passed, faults.struck, world.lines)


class World:
    """Two machines, a network, and what happens to them."""

    def __init__(self, seed: int, directory: Path, *, keep: bool) -> None:
        def chance(name: str) -> random.Random:
            return random.Random(f"{seed}/{name}")

        self.hash = hashlib.sha256()
        self.lines: list[str] = []
        self._keep = keep
        self._chance = chance("life")
        self._directory = directory
        self._keys = VaultKeys(hashlib.sha256(f"vault {seed}".encode()).digest())
        self._network_chance = chance("network")
        plan = chance("plan")
        self.faults = Faults(_crashes(plan))
        self.events = _plan(plan)
        self.weather = Weather.draw(plan)
        self.story = Story()
        self.watcher = Watcher()
        self.ageing = Ageing.draw(chance("ageing"))
        self._ageing_chance = chance("ageing of epochs")
        _add_cuts(self.events, self.ageing, chance("cuts"))
        self.server = Server(directory, self.faults, chance("server"), self.watcher, self.ageing)
        self.vouchers = [self.server.voucher(amount) for amount in _amounts(plan)]
        self.plenty = [self.server.voucher(5_000) for _ in range(24 if self.ageing.ends else 4)]
        self.redeemed: list[str] = []
        self.machine = self._machine("first", chance("first"), is_new=True)
        self.second = self._machine("second", chance("second"), is_new=False)
        self.filled = False
        self.finished = False
        self.held = self.safe = self.gone = 0
        self._turned = 0.0
        self._cutting = ""
        self._missed = 0
        self.network: Network

    def _machine(self, name: str, chance: random.Random, *, is_new: bool) -> Machine:
        directory = self._directory / name
        return Machine(name, directory, self._keys, self.faults, chance, is_new=is_new)

    # -- the record ------------------------------------------------------------------------

    def note(self, what: str, detail: object = "") -> None:
        """Add to the trace."""
        when = f"{trio.current_time():.6f}" if _in_trio() else ""
        line = f"{when} {what} {_brief(detail)}".strip()
        self.hash.update(line.encode() + b"\n")
        if self._keep:
            self.lines.append(line)

    def _tell(self, what: str, frame: bytes) -> None:
        self.note(what, hashlib.sha256(frame).hexdigest()[:16])

    def complain(self, message: str) -> None:
        """What the server would tell its operator."""
        self.note("complaint", message)
        assert self.filled, f"the server complains: {message}"
        assert "report this bug" not in message, message

    # -- life ------------------------------------------------------------------------------

    async def live(self) -> None:
        """All of it, from the first start to the last check."""
        start = trio.current_time()
        with trio.CancelScope(deadline=start + LIMIT_SECONDS) as limit:
            async with trio.open_nursery() as nursery:
                self.network = Network(self._network_chance, nursery, self._deliver, self._tell)
                self.network.weather = self.weather
                self.network.swallows = self._swallows
                nursery.start_soon(self.server.run)
                nursery.start_soon(self.ageing.run, self._ageing_chance, self._turn, self._is_calm)
                for machine in (self.machine, self.second):
                    machine.dialer = self.network.dialer(machine)
                await self._first_machine()
                if self._chance.random() < 0.4:
                    await self._second_machine()
                nursery.cancel_scope.cancel()
        assert not limit.cancelled_caught, "it never comes to an end"

    async def _deliver(self, frame: bytes) -> bytes | None:
        return await self.server.deliver(frame)

    def _turn(self) -> None:
        self._turned = trio.current_time()
        self.server.rotate()
        self.note("epoch", self.server.epochs)

    def _swallows(self, frame: bytes, reply: bytes, side: Side) -> bool:
        """Whether this is what `_cut_short` is after: then the client dies, the reply unread."""
        if not self._cutting or side is not self.machine or not side.alive or not self.faults.armed:
            return False
        outlived = oldest_to_answer(frame, reply, self.server.in_use)
        if outlived is None or (self._cutting == "move" and not outlived.is_move):
            return False
        self._cutting, self._missed = "", outlived.oldest
        self.note("cut short", outlived)
        side.kill()
        return True

    def _between_lives(self) -> None:
        """Epochs end: of a request that was cut short just as many as leave it an answer."""
        if not self._missed:
            self.ageing.between_lives(self._ageing_chance, self._turn)
        while self.server.oldest < self._missed and self.server.epochs < self.ageing.most:
            self._turn()
        self._missed = 0

    def _is_calm(self) -> bool:
        """Or one began just now."""
        return not self.faults.armed or trio.current_time() < self._turned + GAP

    async def _first_machine(self) -> None:
        while not self.finished:
            with vault_trouble() as trouble:
                lived = await self.machine.use(self._life)
                self.note("ended" if lived else "died", f"power={self.machine.power}")
            if not self.finished:
                self._between_lives()
            while self.server.alive and self.server.listed < self.server.epochs:
                await trio.sleep(0.01)
            if trouble:
                self.note("trouble", trouble[0])
                assert self.filled, f"a client ended by itself: {trouble[0]}"
                assert not self.machine.started, f"a full disk ended a mount: {trouble[0]}"
                self.machine.disk_full = False

    async def _life(self, session: Session) -> None:
        await self._start(session)
        while self.events:
            what, detail = self.events.pop(0)
            self.note(what, detail)
            await getattr(self, "_" + what.replace(" ", "_"))(session, detail)
            assert session.store.conservation.holds, "the wallet's books do not add up"
            if what == "stop":
                return
        await self._finale(session)
        self.finished = True

    async def _start(self, session: Session) -> None:
        if self._chance.random() < 0.5:
            await self._tolerate(session.connect())
        if not self.story.trees:
            self.story.begin()
            return
        async with self.calm():
            found = await self._tree(session)
            self.story.survived(found, power=self.machine.power)
            self.machine.power = False

    @asynccontextmanager
    async def calm(self) -> AsyncIterator[None]:
        """No faults, and a server: what is looked at now must be as it should."""
        armed, self.faults.armed = self.faults.armed, False
        weather, self.network.weather = self.network.weather, FINE
        self.machine.disk_full = self.server.disk_full = False
        while not self.server.alive:
            self.server.wanted.set()
            await trio.sleep(0.01)
        yield
        self.faults.armed, self.network.weather = armed, weather

    async def _tree(self, session: Session) -> Tree:
        for _ in range(20):
            try:
                return await tree(session)
            except EmptyWallet:
                await self._redeem_one(session, self.plenty)
            except Unreachable:
                await trio.sleep(1)
        raise AssertionError("the server cannot be reached in calm")

    async def _tolerate(self, call: Awaitable[Any]) -> bool:
        """Whether it succeeded; failures that the weather and full disks explain are no news."""
        try:
            await call
        except (Unreachable, EmptyWallet) as error:
            self.note("failed", error)
        except (Refusal, VaultError) as error:
            self.note("failed", error)
            if isinstance(error, VoucherSpent) and self.ageing.ends:
                return False  # its epoch ended before the answer came
            if not self.filled or type(error) not in (NoRoom, DiskFull):
                raise
        else:
            return True
        return False

    # -- events ----------------------------------------------------------------------------

    async def _fs(self, session: Session, step: Step) -> None:
        self.story.begun = step
        try:
            found = await play(session, step)
        except (StoreError, DiskFull) as error:
            self.story.begun = None
            if not isinstance(error, Unreachable | EmptyWallet) and not self.filled:
                raise
            return
        if found == errno.ENOSPC:
            self.story.begun = None
        else:
            self.story.expect(step, found)

    async def _sync(self, session: Session, later: bool) -> None:
        if later:
            self.machine.nursery.start_soon(self._sync_now, session)
        else:
            await self._sync_now(session)

    async def _sync_now(self, session: Session) -> None:
        steps, story = self.story.now, self.story
        await session.sync()
        story.durable = max(story.durable, min(steps, story.now))

    async def _publish(self, session: Session, _: Any) -> None:
        steps = self.story.now
        if await self._tolerate(session.publish()):
            self.story.durable = max(self.story.durable, steps)

    async def _gc(self, session: Session, _: Any) -> None:
        await self._tolerate(session.gc())

    async def _keepalive(self, session: Session, _: Any) -> None:
        await self._tolerate(session.keepalive(now=True))

    async def _redeem(self, session: Session, _: Any) -> None:
        await self._redeem_one(session, self.vouchers)

    async def _redeem_one(self, session: Session, vouchers: list[str]) -> None:
        if vouchers:
            self.redeemed.append(vouchers.pop())
            await self._tolerate(session.redeem(self.redeemed[-1]))

    async def _pause(self, session: Session, seconds: float) -> None:
        await trio.sleep(seconds)

    async def _stop(self, session: Session, _: Any) -> None:
        await self._tolerate(session.finish())

    async def _rotate(self, session: Session, _: Any) -> None:
        if not self.ageing.ends or trio.current_time() >= self._turned + GAP:
            self._turn()

    async def _cut_short(self, session: Session, kind: str) -> None:
        self._cutting = kind
        if kind == "move":
            await self._rotate(session, None)
            await trio.sleep(2 * GAP)

    async def _kill(self, session: Session, _: Any) -> None:
        self.machine.crash()

    async def _kill_server(self, session: Session, _: Any) -> None:
        self.server.kill()

    async def _fill_client(self, session: Session, seconds: float) -> None:
        await self._fill(self.machine, seconds)

    async def _fill_server(self, session: Session, seconds: float) -> None:
        await self._fill(self.server, seconds)

    async def _fill(self, side: Machine | Server, seconds: float) -> None:
        async def empty() -> None:
            await trio.sleep(seconds)
            side.disk_full = False

        side.disk_full = self.filled = True
        self.machine.nursery.start_soon(empty)

    async def _weather(self, session: Session, weather: Weather) -> None:
        self.network.weather = weather

    # -- the end ---------------------------------------------------------------------------

    async def _finale(self, session: Session) -> None:
        """Calm comes, and every account must balance."""
        async with self.calm():
            await trio.sleep(400)  # whatever was under way has come
            await self._insist(session.connect)
            for text in [*self.redeemed, self.plenty.pop()]:
                try:
                    await session.redeem(text)
                except UserError:
                    self.note("redeemed before")
            await session.store.resolve_pending()
            assert await self._tree(session) == self.story.trees[-1], "the tree is another"
            await session.publish()
            await session.gc()
            report = await session.fsck(extents=True)
            assert report.problems == [], report.problems
            self._check_blobs(report.stored)
            check_status(session, len(report.stored))
            await trio.sleep(60)
            self.gone = self._check_books(session)
            self.held = session.store.balance.total
            self.safe = session.breakglass.report()["tokens"]

    async def _insist(self, call: Any) -> None:
        for _ in range(5):
            try:
                await call()
                return
            except (Unreachable, EmptyWallet) as error:
                self.note("failed", error)
                await self._redeem_one(call.__self__, self.plenty)
        raise AssertionError("no connection in calm")

    def _check_blobs(self, stored: Iterable[BlobId]) -> None:
        keys = {self._keys.signer(blob_id).public for blob_id in stored}
        lost, leaked = len(keys - self.server.keys()), len(self.server.keys() - keys)
        assert not lost, f"{lost} blobs are lost"
        assert not leaked, f"{leaked} blobs are stored and not accounted for"

    def _check_books(self, session: Session) -> int:
        totals = self.server.totals()
        gone = check_books(totals, session.store)
        wallet, spent = session.store._wallet, self.server.serials()
        held = [one.credential for one in (*wallet.held(), *wallet.reserve)]
        self.watcher.check_nothing_forgotten(held, spent, set(self.server.in_use))
        presented = totals.serials // 2
        if self.server.oldest == 1:
            assert len(self.watcher.spent) <= totals.serials, "a serial was not recorded"
        assert presented <= totals.requests
        self.note("books", session.store.conservation)
        return gone

    async def _second_machine(self) -> None:
        """The words alone bring the same tree back, and the tokens of the entry."""

        async def look(session: Session) -> None:
            entry = await session.breakglass.recover()
            gained = entry.gained if entry else 0
            assert gained >= self.safe, f"of {self.safe} tokens {gained} were recovered"
            await session.redeem(self.plenty.pop())
            _, orphans = await session.recover(entry.generation if entry else None)
            assert orphans == 0, f"{orphans} blobs were left over"
            total, lost = session.store.balance.total, self.held - gained + self.gone
            assert self.server.totals().outstanding == total + lost, "tokens were made or lost"
            found = await self._tree(session)
            assert found == self.story.trees[-1], "the words bring another tree back"

        self.faults.armed = False
        self.network.weather = FINE
        await self.second.use(look)


def _crashes(chance: random.Random) -> dict[Point, list[int]]:
    """Where to die, and at which passages: here and there, or over and over at one point."""
    if chance.random() < 0.2:
        return {}
    passages = [1, 1, 2, 3, 5, 8, 13, 30]
    if chance.random() < 0.3:
        again = [chance.choice(passages) for _ in range(chance.randint(2, 5))]
        return {chance.choice(list(Point)): again}
    chosen = chance.sample(list(Point), chance.randint(1, 4))
    crashes = {point: [chance.choice(passages)] for point in chosen}
    if chance.random() < 0.3:  # where a reply that was too quick is worse than none
        crashes[Point.LEDGER_BEFORE] = chance.choices(passages, k=3)
    return crashes


def _plan(chance: random.Random) -> list[tuple[str, Any]]:
    """What is done: tens of operations."""
    plan: list[tuple[str, Any]] = [("redeem", None)]
    plan += [("fs", step) for step in START]
    kinds = chance.choices(list(EVENTS), list(EVENTS.values()), k=chance.randint(8, 30))
    details: dict[str, Callable[[], Any]] = {
        "fs": lambda: random_step(chance),
        "sync": lambda: chance.random() < 0.3,
        "pause": lambda: chance.choice([0.01, 0.3, 2.0, 15.0, 100.0, 4_000.0]),
        "fill client": lambda: chance.choice([0.1, 5.0, 30.0]),
        "fill server": lambda: chance.choice([0.1, 5.0, 30.0]),
        "weather": lambda: Weather.draw(chance),
    }
    for kind in kinds:
        plan.append((kind, details[kind]() if kind in details else None))
    return plan


def _add_cuts(plan: list[tuple[str, Any]], ageing: Ageing, chance: random.Random) -> None:
    """Where epochs end, some requests are cut short shortly before."""
    if ageing.ends:
        for _ in range(chance.randint(1, 3)):
            place = chance.randint(1 + len(START), len(plan))
            plan.insert(place, ("cut short", chance.choice(["move", "move", "any"])))


def _amounts(chance: random.Random) -> list[int]:
    """Vouchers, the first of them last; some are small."""
    return [chance.choice([1, 40, 300, 2_000]) for _ in range(6)] + [
        chance.choice([300, 1_000, 2_000, 2_000])
    ]


def _brief(detail: object) -> str:
    """As str, with long bytes cut short."""
    if isinstance(detail, tuple):
        return " ".join(map(_brief, detail))
    if isinstance(detail, bytes) and len(detail) > 12:
        return f"{detail[:4]!r}...{len(detail)}"
    return "" if detail is None else str(detail)


def _in_trio() -> bool:
    try:
        trio.current_time()
    except RuntimeError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _where(error: BaseException) -> list[str]:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return "".join(traceback.format_exception(error)).splitlines()
