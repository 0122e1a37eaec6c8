"""Random lives of a client and its server: faults, crashes, restarts.

Oracles, after the client has recovered: no token lost or made, on either side; each blob is on
the server if and only if the receipts say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.errors import EmptyWallet, KeyAbsent, KeyExists, Unreachable, VaultError
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol.group import SigningKey
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.journal import Receipt
from tests.doubles import Fault
from tests.examples import examples
from tests.net.harness import World, running
from tests.store_contract import memo_of, new_blob

BLOBS = [new_blob() for _ in range(4)]


@dataclass(frozen=True)
class Call:
    """Operations on some of the blobs, at once."""

    kinds: tuple[tuple[Operation, int], ...]


@dataclass(frozen=True)
class Faults:
    """What the next exchanges suffer; when they are used up the wire is sound."""

    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Die:
    """The disk fails after so many commits, the last of which may be kept; then a restart."""

    commits: int
    keeps_last: bool
    call: Call


@dataclass(frozen=True)
class Redeem:
    """A voucher."""

    amount: int


@dataclass(frozen=True)
class Recover:
    """What is pending is resolved."""


faults = st.lists(
    st.sampled_from([fault for fault in Fault if fault is not Fault.HANG]), max_size=6
).map(lambda chosen: Faults(tuple(chosen)))
calls = st.lists(
    st.tuples(
        st.sampled_from([Operation.INSERT, Operation.LOOK_UP, Operation.DELETE]),
        st.integers(0, len(BLOBS) - 1),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one[1],
).map(lambda chosen: Call(tuple(chosen)))
steps = st.one_of(
    calls,
    faults,
    st.builds(Die, st.integers(0, 4), st.booleans(), calls),
    st.builds(Redeem, st.integers(1, 60)),
    st.builds(Recover),
)


@dataclass
class Life:
    """One client through its restarts."""

    world: World
    store: RemoteStore

    async def step(self, step: object) -> None:
        match step:
            case Call():
                await self.call(step)
            case Faults(chosen):
                self.world.wire.faults.extend(chosen)
            case Die(commits, keeps_last, call):
                journal = self.world.journals[-1]
                journal.commits_left, journal.keeps_last = commits, keeps_last
                await self.call(call)
                self.restart()
            case Redeem(amount):
                await self.tolerate(self.store.redeem, await self.world.sold(amount))
            case Recover():
                await self.tolerate(self.store.recover)
        assert self.store.conservation.holds

    async def call(self, call: Call) -> None:
        async with trio.open_nursery() as nursery:
            for operation, index in call.kinds:
                nursery.start_soon(self.one, operation, *BLOBS[index])

    async def one(self, operation: Operation, signer: SigningKey, blob: bytes) -> None:
        match operation:
            case Operation.INSERT:
                await self.tolerate(self.store.insert, signer.public, blob, memo_of(blob))
            case Operation.DELETE:
                digest = hashlib.sha256(blob).digest()
                await self.tolerate(self.store.delete, signer, digest, memo_of(blob))
            case _:
                await self.tolerate(self.store.look_up, signer.public)

    async def tolerate(self, call: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(Unreachable, EmptyWallet, KeyExists, KeyAbsent, VaultError):
            await call(*arguments)  # type: ignore[misc]  # each of them is a coroutine function

    def restart(self) -> None:
        self.world.kill()
        self.store = self.world.client(patience=0.4)

    async def end(self) -> None:
        self.world.wire.faults.clear()
        self.restart()
        receipts = await self.store.recover()
        await self.world.wire.deliver_late()
        self.world.assert_conserved(self.store)
        await self.check_blobs(receipts)

    async def check_blobs(self, receipts: list[Receipt]) -> None:
        told = {(receipt.operation, receipt.memo) for receipt in receipts}
        for signer, blob in BLOBS:
            inserted = (Operation.INSERT, memo_of(blob)) in told
            deleted = (Operation.DELETE, memo_of(blob)) in told
            stored = await self.world.ledger.read(signer.public)
            assert stored == (blob if inserted and not deleted else None)


async def live(directory: Path, script: list[object]) -> None:
    async with running(directory) as world:
        life = Life(world, await world.rich_client(150, patience=0.4))
        for step in script:
            await life.step(step)
        await life.end()


@examples(25)
@given(st.lists(steps, max_size=10))
def test_no_token_and_no_blob_is_lost(script: list[object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trio.run(live, Path(directory), script)
