"""A real server and real clients as processes of their own, to be killed at any moment.

Both are forked from the test process, which has everything imported, so that hundreds of
starts take seconds. They run the same code as hpkvd and hpkvfs, over loopback TCP, on real
files. What a client reports it writes to a pipe, one JSON line an event.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import secrets
import select
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from hpkvd.epochs import Epochs
from hpkvd.handler import Handler
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.payments import vouchers
from hpkvd.service import Limits, Service
from hpkvfs.errors import StoreError
from hpkvfs.net.transport import TcpDialer
from hpkvfs.session import Options, Session, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.volume.keys import VaultKeys
from tests.fs.play import START, Step, play, random_step, tree
from tests.net.harness import epoch_one, identity
from tests.ports import own_port

KEYS = VaultKeys(bytes(range(32)))
SECONDS_TO_ANSWER = 60
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A forked process and the lines it writes."""

    pid: int
    reader: int
    rest: bytes = b""
    lines: list[Any] = field(default_factory=list)

    def read(self, seconds: float) -> bool:
        """Take in what comes within so many seconds; False when the process ended."""
        ready, _, _ = select.select([self.reader], [], [], seconds)
        if not ready:
            return True
        part = os.read(self.reader, 1 << 16)
        *whole, self.rest = (self.rest + part).split(b"\n")
        self.lines += map(json.loads, whole)
        return bool(part)

    def wait_for(self, event: str) -> Any:
        """The value of an event; fails when the process ends without it."""
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while True:
            for line in self.lines:
                if line[0] == event:
                    return line[1]
            assert time.monotonic() < deadline, f"no {event} within {SECONDS_TO_ANSWER} s"
            assert self.read(1.0), f"the process ended without {event}: {self.lines[-3:]}"

    def kill(self) -> None:
        """kill -9, and take in what it had written."""
        os.kill(self.pid, signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Wait until it ends by itself."""
        while self.read(SECONDS_TO_ANSWER):
            pass
        os.close(self.reader)
        os.waitpid(self.pid, 0)


def fork(work: Callable[[Callable[[str, Any], None]], Awaitable[None]]) -> Child:
    """Run `work(report)` in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader)
    code = 1
    try:
        os.close(reader)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        def report(event: str, value: Any) -> None:
            os.write(writer, json.dumps([event, value]).encode() + b"\n")

        try:
            trio.run(work, report)
            code = 0
        except BaseException as error:
            report("failed", repr(error))
    finally:
        os._exit(code)


@dataclass
class World:
    """One server's and one client's disks, and the port between them."""

    directory: Path
    port: int = 0

    def __post_init__(self) -> None:
        self.ledger = self.directory / "ledger"
        self.state = StateDirectory(self.directory / "state")
        SqliteLedger.create(self.ledger)
        epoch_one(), identity()  # made here once, inherited by every server
        self.port = own_port()
        self.state.create(KEYS, f"127.0.0.1:{self.port}", None, secrets.token_bytes, new=True)

    def server(self) -> Child:
        """Start a server; it is ready on return."""

        async def work(report: Callable[[str, Any], None]) -> None:
            ledger = SqliteLedger(self.ledger, reserve=0)
            listeners = [socket.create_server(("127.0.0.1", self.port))]
            async with ledger.serving():
                handler = Handler(Epochs([epoch_one()], identity()), ledger)
                report("ready", None)
                await Service(handler.answer, Limits()).run(listeners, trio.Event())

        child = fork(work)
        child.wait_for("ready")
        return child

    def voucher(self, amount: int) -> str:
        """A new voucher; no server may be running."""
        with contextlib.closing(SqliteLedger(self.ledger, reserve=0)) as ledger:
            return str(vouchers.make(ledger, amount, 1, secrets.token_bytes)[0])

    def client(
        self, work: Callable[[Session, Callable[[str, Any], None]], Awaitable[None]]
    ) -> Child:
        """Start a client that does this with a vault in use."""

        async def run(report: Callable[[str, Any], None]) -> None:
            options = Options(publish_interval=0.03, cache_bytes=1 << 22, patience=2.0)
            dialer = TcpDialer("127.0.0.1", self.port)
            async with (
                open_session(
                    self.state,
                    KEYS,
                    dialer,
                    options,
                    clock=time.time_ns,
                    rng=secrets.token_bytes,
                ) as session,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(session.keep_going)
                await work(session, report)
                nursery.cancel_scope.cancel()

        return fork(run)


def worker(steps: list[Step], first: int) -> Any:
    """A client's work: steps from `first` on, for as long as it lives.

    Reports ("tree", digest) of what it found, ("begun", i) and ("done", [i, errno]) around
    each step, ("synced", i) when fsync has returned after step i.
    """

    async def work(session: Session, report: Callable[[str, Any], None]) -> None:
        report("tree", digest(await tree(session)))
        chance = random.Random(first)
        for i, step in enumerate(steps[first:], first):
            report("begun", i)
            report("done", [i, await play(session, step)])
            if chance.random() < 0.2:
                await session.sync()
                report("synced", i)
            if chance.random() < 0.03:
                with contextlib.suppress(StoreError):
                    await session.gc()
            await trio.sleep(chance.random() * 0.01)

    return work


async def inspector(session: Session, report: Callable[[str, Any], None]) -> None:
    """A client's work: settle everything, check everything, report."""
    report("tree", digest(await tree(session)))
    await session.connect()
    report_ = await session.fsck(extents=True)
    report("problems", report_.problems)
    await session.gc()
    again = await session.fsck(extents=True)
    report("problems_after_gc", again.problems)
    sums = session.store.conservation
    book = sums.book
    report("sums", [sums.holds, sums.balance.held, sums.balance.pending])
    report("book", [book.bought, book.spent, book.refunded])
    report("stored", sorted(again.stored))


async def redeemer(voucher: str, session: Session, report: Callable[[str, Any], None]) -> None:
    """A client's work: redeem a voucher."""
    report("redeemed", await session.redeem(voucher))


def digest(found: dict[Any, Any]) -> str:
    """A tree, so that two can be compared across processes."""
    return repr(
        sorted((path, (*facts[:-1], sorted(facts[-1].items()))) for path, facts in found.items())
    )


def program(seed: int, length: int) -> list[Step]:
    """A long random program."""
    chance = random.Random(seed)
    return [*START, *(random_step(chance) for _ in range(length))]


def moments(seed: int) -> Iterator[float]:
    """How long to let each life last, in seconds."""
    chance = random.Random(seed)
    while True:
        yield chance.choice([0.02, 0.1, 0.3]) * chance.random() * 2
