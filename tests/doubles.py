"""Stand-ins with faults at hand: a store in memory, a wire to a server, a disk that fails.

MemoryStore keeps the promises of types.BlobStore that RemoteStore keeps, no more: a call that
fails with Unreachable may or may not have been performed; a repeated insert or delete with the
memo of one that was performed succeeds without being performed (or paid) again.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import trio
from trio.abc import Stream

from hpkvfs.errors import EmptyWallet, KeyAbsent, KeyExists, Unreachable
from hpkvfs.types import BLOB_SIZE, Signer
from hpkvfs.wallet.journal import Journal

PRICES = {"insert": -10, "look_up": -1, "delete": 8}


@dataclass(slots=True)
class MemoryStore:
    """A BlobStore in a dict.

    Faults, each settable at any time:
      down        every call raises Unreachable and performs nothing
      fail_next   so many coming calls raise Unreachable and perform nothing
      lose_next   so many coming calls are performed, then raise Unreachable (a lost reply)
      fail_after  after so many more performed calls the store goes down (a crash backend)
      delay       seconds that each call sleeps before anything else
      tokens      the purse; None never runs empty
    """

    blobs: dict[bytes, bytes] = field(default_factory=dict)
    down: bool = False
    fail_next: int = 0
    lose_next: int = 0
    fail_after: int | None = None
    delay: float = 0.0
    tokens: int | None = None
    calls: Counter[str] = field(default_factory=Counter)
    performed: Counter[str] = field(default_factory=Counter)
    outcomes: list[tuple[str, bytes]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def insert(self, key: bytes, blob: bytes, memo: bytes) -> None:
        """See types.BlobStore.insert."""
        if len(blob) != BLOB_SIZE or len(key) != 33:
            raise ValueError("not the shape of a blob or of a storage key")
        await self._arrive("insert")
        if self._repeats("insert", memo):
            return
        if key in self.blobs:
            raise KeyExists("the key is already taken")
        self._pay("insert")
        self.blobs[key] = blob
        self._perform("insert", memo)

    async def look_up(self, key: bytes) -> bytes | None:
        """See types.BlobStore.look_up."""
        await self._arrive("look_up")
        self._pay("look_up")
        self._perform("look_up", b"")
        return self.blobs.get(key)

    async def delete(self, signer: Signer, digest: bytes, memo: bytes) -> None:
        """See types.BlobStore.delete."""
        await self._arrive("delete")
        if self._repeats("delete", memo):
            return
        blob = self.blobs.get(signer.public)
        if blob is None or hashlib.sha256(blob).digest() != digest:
            raise KeyAbsent("there is no such blob")
        self._pay("delete")
        del self.blobs[signer.public]
        self._perform("delete", memo)

    async def _arrive(self, call: str) -> None:
        self.calls[call] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(self.delay)
        finally:
            self.in_flight -= 1
        if self.down:
            raise Unreachable("the server is down")
        if self.fail_next > 0:
            self.fail_next -= 1
            raise Unreachable("the connection broke")

    def _repeats(self, call: str, memo: bytes) -> bool:
        return bool(memo) and (call, memo) in self.outcomes

    def _pay(self, call: str) -> None:
        if self.tokens is None:
            return
        if self.tokens + PRICES[call] < 0:
            raise EmptyWallet("not enough tokens for the operation")
        self.tokens += PRICES[call]

    def _perform(self, call: str, memo: bytes) -> None:
        self.performed[call] += 1
        if memo:
            self.outcomes.append((call, memo))
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after <= 0:
                self.down, self.fail_after = True, None
        if self.lose_next > 0:
            self.lose_next -= 1
            raise Unreachable("the answer was lost")


class Fault(Enum):
    """What becomes of one exchange."""

    NONE = auto()
    NO_ROUTE = auto()  # the connection is refused: no byte leaves
    LOSE_REQUEST = auto()  # bytes leave, the server gets none
    LOSE_REPLY = auto()  # the server performs it, its answer is lost
    BREAK_REPLY = auto()  # half of the answer comes
    DUPLICATE = auto()  # the server gets the request twice, the second answer comes
    LATE = auto()  # the request is lost for now, and delivered at the next `Wire.deliver_late`
    HANG = auto()  # the server performs it and never answers


@dataclass
class Clock:
    """A clock that stands still unless it is moved."""

    seconds: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds

    def pass_hours(self, hours: float) -> None:
        self.seconds += 3_600 * hours


@dataclass(slots=True)
class Wire:
    """A Dialer straight into a server's handler; `faults` are used up one by each connection.

    `alter` edits each reply: a lying server. `frames` has every request that left the client.
    `struck` is set when a fault has done its work.
    """

    answer: Callable[[bytes], Awaitable[bytes]]
    faults: deque[Fault] = field(default_factory=deque)
    alter: Callable[[bytes], bytes] | None = None
    down: bool = False
    frames: list[bytes] = field(default_factory=list)
    late: list[bytes] = field(default_factory=list)
    struck: trio.Event = field(default_factory=trio.Event)

    async def dial(self) -> Stream:
        """See transport.Dialer."""
        await trio.lowlevel.checkpoint()
        fault = self.faults.popleft() if self.faults else Fault.NONE
        if self.down or fault is Fault.NO_ROUTE:
            raise OSError("no route")
        return _Connection(self, fault)

    async def deliver_late(self) -> None:
        """What was delayed reaches the server, which answers nobody."""
        while self.late:
            await self.answer(self.late.pop(0))


class _Connection(Stream):
    def __init__(self, wire: Wire, fault: Fault) -> None:
        self._wire = wire
        self._fault = fault
        self._frame = b""
        self._reply: bytes | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._frame = bytes(data)
        self._wire.frames.append(self._frame)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._reply is None:
            self._reply = await self._exchange()
        part, self._reply = self._reply[:max_bytes], self._reply[max_bytes:]
        return part

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _exchange(self) -> bytes:
        if self._fault is Fault.NONE:
            reply = await self._wire.answer(self._frame)
            return self._wire.alter(reply) if self._wire.alter else reply
        reply = await self._strike()
        self._wire.struck.set()
        if self._fault is Fault.HANG:
            await trio.sleep_forever()
        return reply

    async def _strike(self) -> bytes:
        match self._fault:
            case Fault.LOSE_REQUEST:
                return b""
            case Fault.LATE:
                self._wire.late.append(self._frame)
                return b""
        reply = await self._wire.answer(self._frame)
        match self._fault:
            case Fault.BREAK_REPLY:
                return reply[: len(reply) // 2]
            case Fault.DUPLICATE:
                return await self._wire.answer(self._frame)
        return b""


class FailingJournal(Journal):
    """A journal whose process dies: after `commits_left` commits nothing is written any more.

    With `keeps_last` the commit that fails is on the disk all the same.
    """

    commits_left: int | None = None
    keeps_last = False

    def die(self) -> None:
        """Close the file as a killed process does: without what was not committed."""
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join()
        self._database.close()

    def _commit(self) -> sqlite3.Error | None:
        if self.commits_left is None or self.commits_left > 0:
            if self.commits_left is not None:
                self.commits_left -= 1
            return super()._commit()
        if self.keeps_last:
            super()._commit()
        return sqlite3.OperationalError("the disk is gone")
