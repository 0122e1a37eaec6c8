"""Epochs in a simulation: how fast they follow each other, and what must hold of those that end.

In half of the seeds they only begin, up to as many as can be presented. In the others they end as
well: at random times, under whatever is being asked, and while no client runs; often more of them
than a client that was away has tokens in. In calm no epoch ends. Under a client's questions two do
not begin within GAP seconds: it compares the answers, and could not tell that from lies.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import trio

from hpkvd.epochs import Schedule
from hpkvd.ledger import Totals
from hpkvfs.net.moving import Pace
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    Done,
    ReissueRequest,
    decode_reply,
    decode_request,
)
from tests import books

KEEP = Schedule().keep
MOST = 16
GAP = 70.0
QUICK = Pace(notice=60.0, apart=2.0, move=30.0, move_late=10.0, look=5.0, pause=0.5)


@dataclass(frozen=True)
class Ageing:
    """A seed's epochs: how many can be presented, how many there are at most, the mean seconds
    from one to the next beyond GAP, and the chance that some end while no client runs."""

    keep: int = KEEP
    most: int = KEEP
    mean: float = 0.0
    away: float = 0.0

    @classmethod
    def draw(cls, chance: random.Random) -> Ageing:
        """One of all kinds."""
        if chance.random() < 0.5:
            return cls()
        mean = chance.choice([1.0, 30.0, 300.0, 3_000.0])
        return cls(chance.choice([1, 2, 2, 3, 4]), MOST, mean, chance.choice([0.3, 0.8, 1.0]))

    @property
    def ends(self) -> bool:
        """Whether epochs end in this seed."""
        return self.most > self.keep

    async def run(
        self, chance: random.Random, rotate: Callable[[], None], calm: Callable[[], bool]
    ) -> None:
        """Begin epochs at random times, for ever."""
        while self.mean:
            await trio.sleep(GAP + chance.expovariate(1 / self.mean))
            if not calm():
                rotate()

    def between_lives(self, chance: random.Random, rotate: Callable[[], None]) -> None:
        """No client runs; perhaps for longer than all live epochs."""
        if chance.random() < self.away:
            for _ in range(chance.randint(1, self.keep)):
                rotate()


class Outlived(NamedTuple):
    """`oldest`: number of the oldest epoch in use, at the latest, for a request to have an answer
    still if its client asks again."""

    oldest: int
    is_move: bool


def oldest_to_answer(frame: bytes, reply: bytes, in_use: Mapping[bytes, int]) -> Outlived | None:
    """Of a request that was performed, and that a wallet waits for; `in_use`: numbers by digest.

    A move outlives the epoch that it left, by one at least; any other request has its own epoch.
    """
    request = decode_request(frame)
    if not isinstance(request, CredentialedRequest) or request.epoch not in in_use:
        return None
    is_for_nothing = isinstance(request, ReissueRequest) and not request.presented
    if is_for_nothing or not isinstance(decode_reply(reply), Done):
        return None
    is_move = isinstance(request, ReissueRequest) and request.into is not None
    return Outlived(in_use[request.epoch] + is_move, is_move)


def check_books(totals: Totals, store: RemoteStore) -> int:
    """Both books tell the same story; the tokens that are outstanding and nobody can spend."""
    gone = books.compare(totals, [store.conservation])
    held = store._wallet.epochs
    assert held <= set(store.epochs_in_use), "tokens are held that nobody accepts"
    return gone
