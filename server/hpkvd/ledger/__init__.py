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
storage key. (Except that a breakglass entry which was opened has the hour at which it goes, and
a sale that is not settled the hour from which on it may be given up.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple, Protocol, TypeAlias

from hpkvfs.protocol.messages import Done, Method, Reason, Refused, StoredFact
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
    """A verified request: `delta` tokens go to its credentials, `issued` is the reply.

    `epoch`: number of that in which it pays; `into`: of that in which its credentials are issued,
    if that is a later one.
    """

    fingerprint: bytes
    epoch: int
    operation: Operation
    delta: int
    serials: tuple[bytes, ...]
    issued: bytes = field(repr=False)
    change: Change
    into: int = 0

    @property
    def kept_with(self) -> int:
        """Number of the epoch whose end ends its record: the last in which `issued` has a use."""
        return max(self.epoch, self.into)


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


@dataclass(frozen=True, slots=True)
class Sale:
    """A payment that was begun and is not settled: of the voucher with this digest.

    `sats`: what it brings; `data`: what the method needs to go on after a crash, such as the seed
    of the coins that it asks a mint for; `due`: the hour from which on it is looked at again.
    """

    voucher: bytes
    method: Method
    tokens: int
    sats: int
    due: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Taking:
    """Ecash that a payment brought: `text` is a token, money to whoever has it."""

    sats: int
    text: str = field(repr=False)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token."""
        return sha256(self.text.encode()).digest()


@dataclass(frozen=True, slots=True)
class Begin:
    """Keep a sale durably before anything is asked of anybody; answered with what is kept."""

    sale: Sale


@dataclass(frozen=True, slots=True)
class Settle:
    """The sale was paid: its voucher can be redeemed, and `takings` are the operator's."""

    sale: Sale
    takings: tuple[Taking, ...] = ()


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Forget a sale that nobody can pay any more."""

    voucher: bytes


@dataclass(frozen=True, slots=True)
class Paid:
    """A voucher of so many tokens is there, redeemed or not."""

    tokens: int


Verdict: TypeAlias = Done | Refused | Known


class NewestEpoch(NamedTuple):
    """Number of an epoch, and 63 bits of its parameters' digest; (0, 0) is before the first."""

    number: int
    mark: int

    @classmethod
    def of(cls, number: int, digest: bytes) -> NewestEpoch:
        """Of the epoch whose parameters have this digest."""
        return cls(number, int.from_bytes(digest[:8], "big") >> 1)


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
    cashu_tokens: int
    cashu_sats: int
    lightning_tokens: int
    lightning_sats: int
    sales: int
    takings: int
    takings_sats: int


class Ledger(Protocol):
    """What the handler needs. Every method may raise LedgerError."""

    async def foresee(
        self, fingerprint: bytes, serials: Sequence[bytes], change: Change = None
    ) -> Known | Reason | None:
        """What is known of a request and its serials, durably; else why its change would be
        refused at this moment; None if it would not. It spares a costly proof."""
        ...

    async def read(self, key: bytes) -> bytes | None:
        """The blob under a key."""
        ...

    async def apply(self, transaction: Transaction, behind: int = 0) -> Verdict:
        """Perform it unless it is known or refused; durable on return.

        It is performed also when the caller is cancelled while waiting. `behind`: so many others
        are right behind it, for which it is worth a moment's wait (group.py).
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

    async def sale(self, voucher: bytes) -> Sale | Paid | None:
        """How far paying for the voucher with this digest is."""
        ...

    async def account(self, job: Begin | Settle | GiveUp) -> Sale | Paid | None:
        """Keep, settle or forget a sale; what is there then, durably.

        Settling twice changes nothing, and neither does beginning what was begun or is paid.
        """
        ...

    async def sales(self, now: int) -> list[Sale]:
        """The sales that are due at this hour."""
        ...

    async def open_sales(self) -> int:
        """How many sales are not settled."""
        ...


class Desk(Protocol):
    """What the operator's commands need, while a server runs or not; may raise LedgerError."""

    def add_vouchers(self, vouchers: Sequence[Voucher]) -> None:
        """Make these redeemable; durable on return."""
        ...

    def totals(self) -> Totals:
        """One consistent view of the books."""
        ...

    def takings(self, *, again: bool = False) -> list[Taking]:
        """Ecash that was not taken out yet, or (`again`) all that ever came in."""
        ...

    def mark_taken(self, takings: Sequence[Taking]) -> None:
        """These were taken out; durable on return."""
        ...

    def claim_epoch(self, epoch: NewestEpoch) -> NewestEpoch:
        """Make this the newest epoch of all servers on this ledger, unless that is as new; durably.

        What it is after that. Also while this very object serves.
        """
        ...


class Engine(Ledger, Desk, Protocol):
    """A ledger and a desk in one place: what `hpkvd` opens."""

    def serving(self) -> AbstractAsyncContextManager[object]:
        """Perform what is asked; what was asked is performed before this ends."""
        ...

    def close(self) -> None:
        """Let go of it; idempotent."""
        ...
