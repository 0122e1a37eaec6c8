"""Two writers and a follower of one vault, with snapshots and collection, under one seed.

Rounds, in each of which both writers change what they have, unaware of each other, and publish:
one of them wins. What must hold of a round, whatever the weather and whoever dies:

  - just one publishes; the other is refused, keeps all it synced, and is told of --takeover;
  - it takes over: what it changed lies on top of the winner's, or is kept aside and readable;
  - the follower finds what was published, and every snapshot is as it was made, collections or not;
  - in the end fsck finds nothing, all blobs are accounted for, and the books of all three clients
    together are the server's.

Epochs begin meanwhile, and in half of the seeds end (epochs.py): while one client writes the others
are away, so that what they hold expires, and what they had asked for is answered no more.
"""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from hpkvfs import kept
from hpkvfs.errors import EmptyWallet, SecondWriter, Unreachable
from hpkvfs.net.refusals import VoucherSpent
from hpkvfs.protocol.credential import Credential
from hpkvfs.session import Options, Session
from hpkvfs.timeline import SnapshotBackend, Timeline
from hpkvfs.wallet.wallet import Conservation
from tests import books
from tests.fs.play import START, Step, Tree, play, random_step, tree
from tests.simulation.client import CACHE_BYTES, Machine
from tests.simulation.oracle import TO_A_FILE, Story, check_status, together, totals_of
from tests.simulation.world import World

TOKENS, FEW, VOUCHERS = 20_000, 2_000, 48
AWAY, TWIN, LET_GO = 0.2, 0.5, 0.7
WRITER = Options(cache_bytes=CACHE_BYTES, publish_interval=1e7)
READER = replace(WRITER, read_only=True, follow_interval=1e7)
TRIES, IN_CALM = 12, 6


@dataclass(eq=False)
class Client:
    """A machine, what is done on it, and how much of that is in what everybody has."""

    machine: Machine
    options: Options = WRITER
    story: Story = field(default_factory=Story)
    base: int = 0
    outcome: str = ""

    def agree(self, steps: list[Step]) -> None:
        """From now on it has just this."""
        self.story, self.base = told(steps), len(steps)


def told(steps: list[Step]) -> Story:
    """The story of these steps, all of them durable."""
    story = Story()
    story.begin()
    for step in steps:
        story.expect(step, 0)
    story.durable = story.now
    return story


class Rivals(World):
    """Plays rounds in place of a World's events."""

    def __init__(self, seed: int, directory: Path, *, keep: bool) -> None:
        super().__init__(seed, directory, keep=keep)
        chance = random.Random(f"{seed}/reader")
        reader = self._machine("reader", chance, is_new=False)
        self.vouchers = [self.server.voucher(TOKENS) for _ in range(VOUCHERS)]
        self.writers = [Client(self.machine), Client(self.second)]
        self.reader = Client(reader, READER)
        self.truth: list[Step] = []
        """What was published last."""
        self.snapshots: dict[str, Tree] = {}
        self._chance_of_snapshots = random.Random(f"{seed}/snapshots")

    async def _first_machine(self) -> None:
        self.reader.machine.dialer = self.network.dialer(self.reader.machine)
        for client in (*self.writers, self.reader):
            await self._live(client, self._arrive)
        for number in range(self._chance.randint(1, 3)):
            await self._contest()
            await self._look_back(number)
        await self._end()

    async def _second_machine(self) -> None:
        """Both have been there."""

    # -- lives -----------------------------------------------------------------------------

    async def _live(
        self, client: Client, work: Callable[[Client, Session], Awaitable[Any]]
    ) -> None:
        """Start it, do this, and end it; again from the start when it dies of it."""
        done = False

        async def life(session: Session) -> None:
            nonlocal done
            await work(client, session)
            done = True

        while not done:
            client.machine.options = client.options
            lived = await client.machine.use(life)
            self.note(client.machine.name, f"{work.__name__} {lived}")
            await self._nobody_there()

    async def _nobody_there(self) -> None:
        """Between two lives, unless others are there, epochs may end."""
        clients = (*self.writers, self.reader)
        if self.faults.armed and not any(one.machine.alive for one in clients):
            if self._ageing_chance.random() < AWAY:
                self.ageing.between_lives(self._ageing_chance, self._turn)
            while self.server.alive and self.server.listed < self.server.epochs:
                await trio.sleep(0.01)

    async def _insist_on(self, session: Session, call: Callable[[], Awaitable[Any]]) -> Any:
        """Until it is done, in calm if need be, and with tokens bought for it; SecondWriter."""
        for attempt in range(TRIES):
            try:
                if attempt < IN_CALM:
                    return await call()
                async with self._calm_for(session):
                    return await call()
            except (Unreachable, EmptyWallet) as error:
                self.note("failed", error)
                if isinstance(error, EmptyWallet):
                    await self._buy(session)
            except VoucherSpent as error:
                self.note("failed", error)
                assert self.ageing.ends, "a voucher is spent and its tokens are not there"
        raise AssertionError("the server cannot be reached in calm")

    async def _buy(self, session: Session) -> None:
        """Tokens; those of which no answer came are settled by whoever connects next."""
        try:
            await session.redeem(self.vouchers.pop())
        except (Unreachable, EmptyWallet) as error:
            self.note("failed", error)
        except VoucherSpent as error:  # by a life before, in an epoch that has ended
            self.note("failed", error)
            assert self.ageing.ends, "a voucher is spent and its tokens are not there"

    @asynccontextmanager
    async def _calm_for(self, session: Session) -> AsyncIterator[None]:
        """As `calm`, with tokens enough in epochs that last as long as it does."""
        async with self.calm():
            for _ in range(TRIES):
                try:
                    await session.store.refresh()
                    break
                except Unreachable:
                    await trio.sleep(1)
            if session.store.balance.held < FEW:
                await self._buy(session)
            yield

    async def _seen(self, session: Session) -> Tree:
        """What is there now; df agrees with it."""
        async with self._calm_for(session):
            found = await tree(session)
        totals = session.fs.totals()
        assert (totals.files, totals.bytes) == totals_of(found), "df tells other totals"
        return found

    async def _wake(self, client: Client, session: Session) -> None:
        """What was done before is there."""
        found = await self._seen(session)
        client.story.survived(found, power=client.machine.power)
        client.machine.power = False

    async def _arrive(self, client: Client, session: Session) -> None:
        """Buy tokens, and take over what there is, or begin."""
        await self._buy(session)
        if client is not self.writers[0]:
            if session.volume.known is None:
                await self._insist_on(session, session.recover)
            await self._insist_on(session, session.connect)
            assert await self._seen(session) == told(self.truth).trees[-1], "another vault arrived"
            client.agree(self.truth)
            return
        if not client.story.trees:
            client.story.begin()
        else:
            await self._wake(client, session)
        while client.story.now < len(START):
            await self._step(client, session, START[client.story.now])
        await self._insist_on(session, session.publish)
        self.truth = list(client.story.steps)
        client.agree(self.truth)

    async def _step(self, client: Client, session: Session, step: Step) -> None:
        client.story.begun = step
        try:
            found = await play(session, step)
        except (Unreachable, EmptyWallet):
            found = errno.ENOSPC
        if found == errno.ENOSPC:
            client.story.begun = None
            if session.store.balance.held < FEW:
                await self._buy(session)
            return
        self.note("fs", step)
        client.story.expect(step, found)

    # -- a contest -------------------------------------------------------------------------

    async def _contest(self) -> None:
        self._apart = self._chance.random() < 0.6
        for client in self.writers:
            client.outcome = ""
            await self._live(client, self._write)
        first, second = self._chance.sample(self.writers, 2)
        if self._chance.random() < 0.4:
            async with trio.open_nursery() as nursery:  # both at a time
                nursery.start_soon(self._live, first, self._try)
                nursery.start_soon(self._live, second, self._try)
        for client in (first, second):
            if not client.outcome:
                await self._live(client, self._publish_or_lose)
        won = [client for client in self.writers if client.outcome == "won"]
        assert len(won) == 1, f"{len(won)} writers published the same generation"
        winner, loser = won[0], next(one for one in self.writers if one is not won[0])
        self.truth = list(winner.story.steps)
        winner.agree(self.truth)
        await self._live(loser, self._is_kept)
        if self._chance.random() < 0.6:
            await self._live(self.reader, self._follow)
        await self._take_over(loser)
        await self._live(winner, self._agree)

    async def _write(self, client: Client, session: Session) -> None:
        """Some changes, some of them synced; none is published."""
        await self._wake(client, session)
        if client.story.now == client.base:
            await self._insist_on(session, session.connect)
            client.agree(self.truth)
            assert await self._seen(session) == client.story.trees[-1], "it follows something else"
        wanted, tries = self._chance.randint(1, 5), 0
        while not session.fs.active or client.story.now < client.base + wanted:
            tries += 1
            apart = self._apart and tries < 20
            step = self._step_apart(client) if apart else random_step(self._chance)
            await self._step(client, session, step)
            if self._chance.random() < 0.3:
                await self._sync_now_of(client, session)
        await self._sync_now_of(client, session)

    def _step_apart(self, client: Client) -> Step:
        """Something to a file that the other writer leaves alone, so that both fit together."""
        path = (b"b",) if client is self.writers[0] else (b"a", b"c")
        while True:
            name, _, *rest = random_step(self._chance)
            if name in TO_A_FILE:
                return (name, path, *rest)

    async def _sync_now_of(self, client: Client, session: Session) -> None:
        steps = client.story.now
        await session.sync()
        client.story.durable = max(client.story.durable, steps)

    async def _try(self, client: Client, session: Session) -> None:
        await self._wake(client, session)
        await self._publish_once(client, session)

    async def _publish_or_lose(self, client: Client, session: Session) -> None:
        await self._wake(client, session)
        await self._insist_on(session, lambda: self._publish_once(client, session, suppress=False))

    async def _publish_once(
        self, client: Client, session: Session, *, suppress: bool = True
    ) -> None:
        try:
            await session.publish()
            client.outcome = "won"
        except SecondWriter as error:
            client.outcome = "lost"
            assert "--takeover" in error.hint, "who lost is not told what to do"
            assert "--takeover" in str(session.trouble), "status does not say what to do"
        except (Unreachable, EmptyWallet, VoucherSpent):
            if not suppress:
                raise
        self.note(client.machine.name, client.outcome or "undecided")

    async def _is_kept(self, client: Client, session: Session) -> None:
        """The changes that were refused are in the local log, also after another start."""
        await self._wake(client, session)
        assert client.story.now > client.base, "what was synced here is gone"
        await self._sync_now_of(client, session)

    # -- taking over -----------------------------------------------------------------------

    async def _take_over(self, client: Client) -> None:
        mine, before = client.story.steps[client.base :], client.story.trees[-1]
        client.options = replace(WRITER, takeover=True)
        await self._live(client, self._go_on)
        client.options = WRITER
        copies = kept.numbers(client.machine.state)
        merged = together(self.truth, mine, client.base)
        found = client.outcome
        self.note("took over", found)
        if found == "on top":
            assert merged is not None, "changes were put on top that do not fit"
            client.story = told(merged)
        else:
            client.agree(self.truth)
            assert copies, "changes were neither put on top nor kept aside"
            client.options = replace(READER, kept=copies[-1])
            self._expected = before
            await self._live(client, self._read_kept)
            client.options = WRITER
        await self._live(client, self._publish_mine)
        self.truth = list(client.story.steps)
        client.agree(self.truth)

    async def _go_on(self, client: Client, session: Session) -> None:
        await self._insist_on(session, session.connect)
        found, merged = (
            await self._seen(session),
            together(self.truth, client.story.steps[client.base :], client.base),
        )
        is_merged = merged is not None and found == told(merged).trees[-1]
        is_theirs = found == told(self.truth).trees[-1]
        assert is_merged or is_theirs, "what was taken over is neither"
        took = session.took_over
        client.outcome = "on top" if is_merged else "aside"
        if took is not None:
            aside = took.kept is not None
            assert is_theirs if aside else is_merged, "it is not what the user is told"
            client.outcome = "aside" if aside else "on top"
        elif is_merged and is_theirs:
            client.outcome = "aside" if kept.numbers(client.machine.state) else "on top"
        client.machine.power = False

    async def _read_kept(self, client: Client, session: Session) -> None:
        assert await self._seen(session) == self._expected, "what was kept aside is something else"
        client.machine.power = False

    async def _publish_mine(self, client: Client, session: Session) -> None:
        await self._wake(client, session)
        await self._insist_on(session, session.publish)

    async def _agree(self, client: Client, session: Session) -> None:
        """The winner goes on from what the other published after it."""
        await self._insist_on(session, session.connect)
        assert await self._seen(session) == told(self.truth).trees[-1], "it did not follow"
        client.agree(self.truth)
        client.machine.power = False

    async def _follow(self, client: Client, session: Session) -> None:
        await self._insist_on(session, session.connect)
        async with self._calm_for(session):
            await session.follow(thorough=self._chance.random() < 0.5)
            await session.follow(thorough=True)
        assert await self._seen(session) == told(self.truth).trees[-1], "the follower is behind"
        client.machine.power = False

    # -- snapshots, collection -------------------------------------------------------------

    async def _look_back(self, number: int) -> None:
        """One of them makes and deletes snapshots, goes on writing, and collects meanwhile."""
        client = self._chance.choice(self.writers)
        self._names = [f"s{number}"]
        if self._chance_of_snapshots.random() < TWIN:
            self._names.append(f"t{number}")
        for work in (self._snapshot, self._write_and_collect, self._check_snapshots):
            await self._live_uncached(client, work)
        if len(self.snapshots) > 1 and self._chance_of_snapshots.random() < LET_GO:
            await self._live_uncached(client, self._let_go)
            await self._live_uncached(client, self._check_snapshots)
        if self._chance.random() < 0.6:
            await self._live(self.reader, self._follow)
        await self._live(next(one for one in self.writers if one is not client), self._agree)

    async def _live_uncached(
        self, client: Client, work: Callable[[Client, Session], Awaitable[Any]]
    ) -> None:
        await self._live(client, work)
        client.machine.forget_cache()

    async def _snapshot(self, client: Client, session: Session) -> None:
        await self._wake(client, session)
        await self._insist_on(session, session.connect)
        timeline = Timeline(session)
        async with self._calm_for(session):
            there = {one.name for one in await timeline.snapshots()}
            for name in self._names:
                if name not in there:
                    await timeline.create(name)
                self.snapshots[name] = client.story.trees[-1]
            gone = [one for one in self.snapshots if self._chance.random() < 0.25]
            if gone:
                await timeline.delete(gone)
        for name in gone:
            del self.snapshots[name]

    async def _write_and_collect(self, client: Client, session: Session) -> None:
        await self._wake(client, session)
        await self._insist_on(session, session.connect)
        spread = self._chance.choice([0.0, 5.0, 600.0])

        async def collect() -> None:
            await self._tolerate(session.gc(spread=spread))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            for _ in range(self._chance.randint(1, 6)):
                await self._step(client, session, random_step(self._chance))
                if self._chance.random() < 0.5:
                    await self._tolerate(session.publish())
                await trio.sleep(self._chance.choice([0.0, 1.0, 60.0]))
        await self._insist_on(session, session.publish)
        await self._insist_on(session, session.gc)
        self.truth = list(client.story.steps)
        client.agree(self.truth)

    async def _let_go(self, client: Client, session: Session) -> None:
        """Delete the newest snapshot: what died since and an older one has too must stay."""
        await self._wake(client, session)
        await self._insist_on(session, session.connect)
        newest = list(self.snapshots)[-1]
        async with self._calm_for(session):
            await Timeline(session).delete([newest])
        del self.snapshots[newest]
        await self._insist_on(session, session.gc)

    async def _check_snapshots(self, client: Client, session: Session) -> None:
        await self._wake(client, session)
        async with self._calm_for(session):
            await session.connect()
            there = {one.name: one for one in await Timeline(session).snapshots()}
            assert there.keys() == self.snapshots.keys(), "other snapshots than were made"
            for name, one in there.items():
                found = await tree(SnapshotBackend(session, one))
                assert found == self.snapshots[name], f"snapshot {name} is not what it was"

    # -- the end ---------------------------------------------------------------------------

    async def _end(self) -> None:
        """Calm comes; each settles what it has, and every account must balance."""
        self.sums: dict[str, Conservation] = {}
        self.held_by: dict[str, list[Credential]] = {}
        async with self.calm():
            await trio.sleep(400)
            await self._live(self.reader, self._settle)
            for client in reversed(self.writers):
                await self._live(client, self._settle)
        self._check_sums()

    def _check_sums(self) -> None:
        """The books of all clients together are the server's."""
        totals = self.server.totals()
        books.compare(totals, list(self.sums.values()))
        held = [one for all_of_it in self.held_by.values() for one in all_of_it]
        spent = self.server.serials()
        self.watcher.check_nothing_forgotten(held, spent, set(self.server.in_use))
        if self.server.oldest == 1:
            assert len(self.watcher.spent) <= totals.serials, "a serial was not recorded"

    async def _settle(self, client: Client, session: Session) -> None:
        async with self._calm_for(session):
            await self._insist_on(session, session.connect)
            await session.store.resolve_pending()
        if client is not self.reader:
            await session.publish()
            await session.gc()
        assert await tree(session) == told(self.truth).trees[-1], "the tree is another"
        if client is self.writers[0]:
            report = await session.fsck(extents=True)
            assert report.problems == [], report.problems
            self._check_blobs(report.stored)
            check_status(session, len(report.stored))
        await trio.sleep(60)
        while session.store.balance.pending:  # tokens on their way into the newest epoch
            await trio.sleep(1)
        wallet = session.store._wallet
        held = [one.credential for one in (*wallet.held(), *wallet.reserve)]
        self.held_by[client.machine.name] = held
        self.sums[client.machine.name] = session.store.conservation
