"""The ledger: what was spent, what it came to, and the blobs that it bought.

One Transaction holds everything a request changes: its serials, its fingerprint with the fact
and the issuer's reply, the blob stored or deleted, the voucher redeemed, and the books. It
happens as a whole, once, and durably before anybody hears of it. Therefore:

- a serial belongs to one request for as long as its epoch lasts; a voucher to one, for ever;
- a request that was performed is recalled with the fact and the reply it had;
- a request that was refused left nothing behind;
- issued = outstanding + charged - refunded, always. Outstanding are also the tokens that ended
  with their epoch: how many a client moved out of it in time is hidden (docs/credentials.md), so
  nobody but the clients can tell.

The ledger is the only judge: whatever a handler saw before is checked again inside the
transaction. No record holds a time, and none that outlives a request holds both a serial and a
storage key. (Except that a breakglass entry which was opened has the hour at which it goes.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from hpkvfs.protocol.messages import Done, Reason, Refused, StoredFact
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher


class LedgerError(Exception):
    """The ledger cannot do this; the message says why and what to do. Nothing was changed."""


class LedgerFull(LedgerError):
    """There is no room on the disk."""


class LedgerBusy(LedgerError):
    """Another process kept the ledger locked for too long."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read the blob under a key; never refused."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Insert:
    """Store a blob, whose SHA-256 is `digest`, under a key that is not in use."""

    key: bytes
    digest: bytes
    blob: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the blob under a key, if its SHA-256 is `digest`."""

    key: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class Redeem:
    """Spend the voucher with this digest, if it is worth `amount` and unspent."""

    voucher: bytes
    amount: int


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """Store a breakglass entry, unless the one under its key has a counter that is not smaller.

    `hours`: how long it can be opened once it was opened. `now`, in hours since some fixed time,
    tells whether the one in its place is gone.
    """

    key: bytes
    counter: int
    digest: bytes
    value: bytes = field(repr=False)
    hours: int
    now: int


Change: TypeAlias = Read | Insert | Delete | Redeem | StoreEntry | None


@dataclass(frozen=True, slots=True)
class Transaction:
    """A verified request: `delta` tokens go to its credentials, `issued` is the reply."""

    fingerprint: bytes
    epoch: int
    operation: Operation
    delta: int
    serials: tuple[bytes, ...]
    issued: bytes = field(repr=False)
    change: Change


@dataclass(frozen=True, slots=True)
class Known:
    """This request, or another one with a serial of it, was performed before."""

    facts: tuple[StoredFact, ...]


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """A breakglass entry; `gone_at` is the hour from which on it is not there any more."""

    counter: int
    digest: bytes
    value: bytes = field(repr=False)
    gone_at: int | None


@dataclass(frozen=True, slots=True)
class Opening:
    """Open the entry under a key if it has this digest; start its timer if none runs."""

    key: bytes
    digest: bytes
    now: int


Verdict: TypeAlias = Done | Refused | Known


@dataclass(frozen=True, slots=True)
class Totals:
    """The books and counts, in tokens, bytes and pieces; for operators."""

    issued: int
    charged: int
    refunded: int
    outstanding: int
    requests: int
    serials: int
    blobs: int
    entries: int
    vouchers: int
    voucher_amount: int


class Ledger(Protocol):
    """What the handler needs. Every method may raise LedgerError."""

    async def recall(self, fingerprint: bytes, serials: Sequence[bytes]) -> Known | None:
        """What is known of a request and its serials, durably, if anything is."""
        ...

    async def refusal(self, change: Change) -> Reason | None:
        """Why this change would be refused at this moment; to spare a costly proof."""
        ...

    async def read(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        ...

    async def apply(self, transaction: Transaction) -> Verdict:
        """Perform it unless it is known or refused; durable on return.

        It is performed also when the caller is cancelled while waiting.
        """
        ...

    async def entry(self, key: bytes, now: int) -> StoredEntry | None:
        """The breakglass entry under a key, unless its timer has fired."""
        ...

    async def open_entry(self, opening: Opening) -> StoredEntry | None:
        """The entry with its timer running, durably; None if it is not there or another."""
        ...

    async def retire(self, oldest: int) -> None:
        """No epoch below this one is presented any more, durably; what is kept of them goes."""
        ...

    @property
    def oldest_epoch(self) -> int:
        """Number of the oldest epoch that can be presented; requests of others are refused."""
        ...

    async def drop_entries(self, now: int) -> None:
        """Delete what is gone by now from the disk too."""
        ...


class Desk(Protocol):
    """What the operator's commands need, while a server runs or not; may raise LedgerError."""

    def add_vouchers(self, vouchers: Sequence[Voucher]) -> None:
        """Make these redeemable; durable on return."""
        ...

    def totals(self) -> Totals:
        """One consistent view of the books."""
        ...


class Engine(Ledger, Desk, Protocol):
    """A ledger and a desk in one place: what `hpkvd` opens."""

    def serving(self) -> AbstractAsyncContextManager[object]:
        """Perform what is asked; what was asked is performed before this ends."""
        ...

    def close(self) -> None:
        """Let go of it; idempotent."""
        ...
