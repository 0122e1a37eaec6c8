"""Customers of a real server: they shop, are cut off, ask again, cheat, and keep count."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import SigningKey
from hpkvfs.protocol.messages import Done, Outcome, Reason, Refused, Reply, Spent
from hpkvfs.protocol.voucher import Voucher
from tests.server.support import (
    Purchase,
    Purse,
    ServerProcess,
    hpkvd,
    new_blob,
    new_key,
    until,
)

KEPT: Final = 100
PAUSE_SECONDS: Final = 0.05


def funded(server: ServerProcess, amount: int) -> Purse:
    """A purse that redeemed a voucher made while the server runs."""
    made = hpkvd("voucher", "--amount", str(amount), data=server.data)
    purse = Purse(server.parameters())
    purchase = purse.redeem(Voucher.parse(made.stdout))
    purse.settle(purchase, server.ask(purchase.frame))
    return purse


def status(server: ServerProcess) -> Any:
    return json.loads(hpkvd("status", "--json", data=server.data).stdout)


@dataclass
class Customer:
    """Inserts and deletes until the connection fails; knows what was acknowledged.

    What the server did not answer is kept as `pending`, to be repeated as it was. Every
    `cheats`-th time the credentials just spent are shown once more, in another request.
    """

    purse: Purse
    cheats: int = 0
    stored: dict[SigningKey, bytes] = field(default_factory=dict)
    deleted: list[SigningKey] = field(default_factory=list)
    acknowledged: int = 0
    caught: int = 0
    kept: list[tuple[bytes, Done]] = field(default_factory=list)
    pending: tuple[Purchase, SigningKey, bytes] | None = None
    stolen: Purchase | None = None
    failure: BaseException | None = None

    def shop(self, server: ServerProcess, going: Callable[[], bool] = lambda: True) -> None:
        """Until it is told to stop, or the server does not answer."""
        try:
            while going():
                if self.pending is None:
                    self.step(server)
                else:
                    self.again(server)
                self.cheat(server)
        except (OSError, Malformed):
            pass  # the server died
        except BaseException as error:
            self.failure = error

    def again(self, server: ServerProcess) -> None:
        """Ask once more for what was not answered, as it was."""
        if self.pending is not None:
            self.settle(server.ask(self.pending[0].frame))

    def step(self, server: ServerProcess) -> None:
        """One insertion, or a deletion if enough is stored."""
        spent = self.purse.held[-2:]
        if len(self.stored) > 3:
            key, blob = next(iter(self.stored.items()))
            purchase = self.purse.delete(key, hashlib.sha256(blob).digest())
        else:
            key, blob = new_key(), new_blob()
            purchase = self.purse.insert(key.public, blob)
        self.pending = purchase, key, blob
        if self.cheats and self.acknowledged % self.cheats == 0 and self.stolen is None:
            thief = Purse(self.purse.parameters, spent)
            self.stolen = thief.insert(new_key().public, new_blob())
        self.settle(server.ask(purchase.frame))

    def cheat(self, server: ServerProcess) -> None:
        """Show again what an answered request has spent."""
        if self.stolen is None or self.pending is not None:
            return
        reply = server.ask(self.stolen.frame)
        if not _busy(reply):
            assert isinstance(reply, Spent), reply
            self.caught += 1
            self.stolen = None

    def settle(self, reply: Reply) -> None:
        if _busy(reply):
            time.sleep(PAUSE_SECONDS)
            return
        assert self.pending is not None
        purchase, key, blob = self.pending
        done = self.purse.settle(purchase, reply)
        if done.fact.outcome is Outcome.INSERTED:
            self.stored[key] = blob
        else:
            del self.stored[key]
            self.deleted.append(key)
        self._keep(purchase.frame, done)
        self.pending = None

    def _keep(self, frame: bytes, done: Done) -> None:
        """A sample of everything, since it began."""
        self.acknowledged += 1
        if len(self.kept) < KEPT:
            self.kept.append((frame, done))
        elif (place := random.randrange(self.acknowledged)) < KEPT:
            self.kept[place] = frame, done

    def check(self, server: ServerProcess, sample: int = 10) -> None:
        """What was acknowledged is as it was: replies, blobs, their absence."""
        for frame, done in random.sample(self.kept, min(sample, len(self.kept))):
            again = server.ask(frame)
            assert isinstance(again, Done), again
            assert (again.fact, again.issued) == (done.fact, done.issued)
        for key, blob in self.stored.items():
            purchase = self.purse.look_up(key.public)
            assert self.purse.settle(purchase, server.ask(purchase.frame)).value == blob
        for key in random.sample(self.deleted, min(3, len(self.deleted))):
            purchase = self.purse.look_up(key.public)
            done = self.purse.settle(purchase, server.ask(purchase.frame))
            assert done.fact.outcome is Outcome.ABSENT


def _busy(reply: Reply) -> bool:
    return isinstance(reply, Refused) and reply.reason is Reason.BUSY


class Crowd:
    """Customers who shop at a server, each in a thread of its own, while within.

    As clients do, they send again, as it was, what was not answered.
    """

    def __init__(
        self, server: ServerProcess, count: int = 3, amount: int = 10_000, cheats: int = 0
    ) -> None:
        self._server = server
        self._sold = count * amount
        self._going = True
        self.customers = [Customer(funded(server, amount), cheats) for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._shop, args=(one,), daemon=True) for one in self.customers
        ]

    def _shop(self, one: Customer) -> None:
        while self._going and one.failure is None:
            one.shop(self._server, lambda: self._going)
            time.sleep(PAUSE_SECONDS)

    @property
    def answered(self) -> int:
        """Requests so far."""
        return sum(one.acknowledged for one in self.customers)

    def served(self, more: int, seconds: float = 60) -> None:
        """Wait until so many more were answered."""
        enough = self.answered + more
        until(lambda: self.answered >= enough or any(o.failure for o in self.customers), seconds)
        self._raise()

    def _raise(self) -> None:
        for one in self.customers:
            if one.failure is not None:
                raise one.failure

    def check(self, sample: int = 10) -> Any:
        """The books are those of the customers, nothing acknowledged is lost; the books."""
        self._raise()
        for one in self.customers:
            while one.pending is not None:
                one.again(self._server)
            while one.stolen is not None:
                one.cheat(self._server)
        books = status(self._server)
        assert books["tokens"]["issued"] == self._sold
        assert books["tokens"]["outstanding"] == sum(one.purse.amount for one in self.customers)
        assert books["blobs"] == sum(len(one.stored) for one in self.customers)
        for one in self.customers:
            one.check(self._server, sample)
        return books

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()


def workers(server: ServerProcess) -> set[int]:
    """Its processes that answer; but with `workers=0`, none."""
    found: set[int] = set()
    for listed in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        found.update(map(int, listed.read_text().split()))
    return found
