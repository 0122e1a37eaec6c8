"""Blobs on a server, each call paid: types.BlobStore, and what its owner does with the wallet.

At most `max_in_flight` calls are under way at a time; the rest wait their turn. A call that is
cut short (by cancellation, by a server that does not answer, by a crash) leaves a pending, which
`run` or `recover` settles; net/resolving.py says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Final

import trio

from hpkvfs.errors import Misbehaviour, SpentElsewhere, StoreError, Unreachable, UserError
from hpkvfs.net.epochs import Epochs
from hpkvfs.net.line import Line
from hpkvfs.net.moving import PACE, Mover, Pace
from hpkvfs.net.order import Order
from hpkvfs.net.proving import Prover
from hpkvfs.net.purchases import Purchases
from hpkvfs.net.refusals import out_of_place, refusal
from hpkvfs.net.reserve import Reserve
from hpkvfs.net.teller import Teller
from hpkvfs.net.tender import Tender
from hpkvfs.net.till import Till
from hpkvfs.net.transport import Dialer
from hpkvfs.protocol.credential import Credential
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import (
    UNOPENED,
    CredentialedRequest,
    DeleteRequest,
    Entry,
    InsertRequest,
    IssueRequest,
    OpenEntryRequest,
    Reason,
    Refused,
    StoreEntryRequest,
)
from hpkvfs.protocol.tariff import Operation, Tariff
from hpkvfs.protocol.voucher import Voucher
from hpkvfs.types import Signer
from hpkvfs.wallet.journal import Journal, Receipt
from hpkvfs.wallet.wallet import Balance, Conservation, Held

MAX_IN_FLIGHT: Final = 16
PATIENCE_SECONDS: Final = 20.0
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0


class RemoteStore:
    """A server and the wallet that pays it.

    Every call may raise Unreachable after `patience` seconds (it may have been performed, or
    may yet be), EmptyWallet, a Refusal (nothing was spent), Misbehaviour, and VaultError when
    the journal cannot be written. Repeating an insert or delete that was cut short is free and
    safe: if it was performed after all, its memo has a receipt, and the call returns at once.
    """

    def __init__(
        self,
        journal: Journal,
        dialer: Dialer,
        rng: Callable[[int], bytes],
        *,
        identity: bytes | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        patience: float = PATIENCE_SECONDS,
        pace: Pace = PACE,
        prover: Prover | None = None,
    ) -> None:
        """`identity`: the key (32 bytes) in the server's onion address, if it has one; `prover`:
        who makes the proofs, the caller's thread if None.

        The journal stays the caller's to close, after the last call. VaultError if damaged.
        """
        line = Line(dialer, rng, patience)
        epochs = Epochs(journal, line, identity)
        till = Till(journal, line, epochs, rng, prover)
        self._journal = journal
        self._line = line
        self._till = till
        self._wallet = till.wallet
        self._pool_size = 2 * max_in_flight
        self._slots = trio.Semaphore(max_in_flight)
        self._epochs = epochs
        self._reserve = Reserve(till, epochs)
        self._tender = Tender(till, epochs, self._reserve)
        self._mover = Mover(self._tender, self._slots, pace, rng)
        self._teller = Teller(till, self._tender, self._pool_size)
        self._resolver = self._teller.resolver
        self._resolving = trio.Lock()
        self.purchases: Final = Purchases(journal, line, rng)

    # types.BlobStore

    async def insert(self, key: bytes, blob: bytes, memo: bytes) -> None:
        """See types.BlobStore.insert."""
        place = key + sha256(blob).digest()
        order = Order(
            Operation.INSERT, lambda epoch: InsertRequest(epoch, key, blob), memo=memo, place=place
        )
        async with self._slots:
            await self._teller.pay_once(order)

    async def look_up(self, key: bytes) -> bytes | None:
        """See types.BlobStore.look_up."""
        async with self._slots:
            return await self._teller.look_up(key)

    async def delete(self, signer: Signer, digest: bytes, memo: bytes) -> None:
        """See types.BlobStore.delete."""
        key = signer.public

        def sign(request: CredentialedRequest, credentials: bytes) -> CredentialedRequest:
            unsigned = DeleteRequest(request.epoch, key, digest, credentials=credentials)
            return replace(unsigned, signature=signer.sign(unsigned.signed))

        def make(epoch: bytes) -> CredentialedRequest:
            return DeleteRequest(epoch, key, digest)

        order = Order(Operation.DELETE, make, sign, memo, place=key + digest)
        async with self._slots:
            await self._teller.pay_once(order)

    # The wallet

    async def redeem(self, text: str) -> int:
        """Exchange a voucher for credentials; its amount. UserError if it buys nothing.

        When that was cut short, also by a crash, calling it again completes it.
        """
        try:
            voucher = Voucher.parse(text)
        except ValueError as error:
            raise UserError(str(error), "copy it whole, as the operator gave it") from error
        return await self.take(voucher)

    async def take(self, voucher: Voucher) -> int:
        """As `redeem`."""

        def make(epoch: bytes) -> CredentialedRequest:
            return IssueRequest(epoch, voucher.secret, voucher.amount)

        async with self._slots:
            await self._teller.buy(make, voucher.amount, voucher.digest)
        return voucher.amount

    async def prime(self) -> None:
        """Have credentials enough for `max_in_flight` calls at a time; free."""

        async def grow() -> None:
            await self._till.grow(await self.parameters())

        while self._wallet.size < self._pool_size:
            async with self._slots:
                await self._tender.surviving(grow)

    async def parameters(self) -> EpochParameters:
        """The newest epoch: number, tariff, issuer. Asked for once; Tagging if it changed."""
        return await self._tender.newest()

    @property
    def tariff(self) -> Tariff:
        """What operations cost in the newest epoch, as far as it is known."""
        live = self._epochs.live
        return live[-1].tariff if live else Tariff()

    @property
    def expired(self) -> int:
        """Tokens that were lost, since ever, with epochs that ended."""
        book = self._wallet.book
        return book.expired + book.lost

    @property
    def balance(self) -> Balance:
        """Tokens that can be spent, and tokens whose request is not settled."""
        return self._wallet.balance

    @property
    def conservation(self) -> Conservation:
        """Whether bought + refunded are held, pending, spent or expired, or there is a bug."""
        return self._wallet.conservation

    # Breakglass entries

    async def refresh(self) -> EpochParameters:
        """The newest epoch, asked for anew."""
        await self._tender.refresh()
        return await self._tender.newest()

    @property
    def epochs_in_use(self) -> tuple[bytes, ...]:
        """Digests of the epochs whose tokens the server takes, as it last said; newest last."""
        return self._epochs.digests

    async def epoch(self, digest: bytes) -> EpochParameters:
        """An epoch's parameters, pinned or asked for."""
        return await self._epochs.get(digest)

    @property
    def newest_epoch(self) -> int | None:
        """Number of the newest epoch this client was ever shown."""
        return self._epochs.newest_number

    @property
    def reserve(self) -> list[Held]:
        """What ordinary calls do not spend while there is anything else."""
        return self._wallet.reserve

    def spendable(self, epoch: bytes) -> int:
        """Tokens of one epoch that are neither reserved nor in a request."""
        return self._wallet.worth(epoch)

    def release_reserve(self) -> None:
        """Let what is reserved be spent as anything else."""
        self._wallet.release_reserve()

    async def fill_reserve(self, epoch: EpochParameters, amounts: Sequence[int]) -> None:
        """Reserve credentials of just these amounts, made by free reissues; EmptyWallet.

        Durable with the journal's next commit.
        """
        async with self._slots:
            await self._reserve.fill(epoch, amounts)

    async def store_entry(
        self, epoch: EpochParameters, signer: Signer, counter: int, value: bytes
    ) -> None:
        """Store a breakglass entry, paid in this epoch; OldCounter."""
        make = partial(StoreEntryRequest, key=signer.public, counter=counter, value=value)

        def sign(request: CredentialedRequest, credentials: bytes) -> CredentialedRequest:
            unsigned = make(request.epoch, credentials=credentials)
            return replace(unsigned, signature=signer.sign(unsigned.signed))

        order = Order(Operation.STORE_ENTRY, make, sign)
        async with self._slots:
            await self._teller.pay_in(order, epoch)

    async def open_entry(self, signer: Signer, entry: bytes = UNOPENED) -> Entry | None:
        """The breakglass entry under a key, free; None if there is none, or another.

        Naming it by its digest opens it: it is then gone after some time. Not naming any tells
        which there is.
        """
        unsigned = OpenEntryRequest(signer.public, entry)
        request = replace(unsigned, signature=signer.sign(unsigned.signed))
        reply = await self._line.ask(request.encode())
        match reply:
            case Refused(Reason.KEY_ABSENT | Reason.DIGEST_MISMATCH):
                return None
            case Refused(reason):
                raise refusal(reason)
            case Entry():
                return _checked(reply, entry)
        raise out_of_place()

    async def claim(self, epoch: bytes, credential: Credential, note: tuple[str, bytes]) -> None:
        """Take in a credential that a breakglass entry had; SpentElsewhere.

        `note`, a name and value for the journal, is there if and only if the claim is; then it is
        settled sooner or later, whatever this raises.
        """
        async with self._slots:
            await self._reserve.claim(epoch, credential, note)

    # What was left pending

    async def recover(self) -> list[Receipt]:
        """Resolve what an earlier run left pending; then all receipts, oldest first."""
        await self.resolve_pending()
        return self._journal.receipts

    def forget_receipts(self, up_to: int) -> None:
        """A published anchor has what the receipts with seq <= up_to tell."""
        self._journal.forget_receipts(up_to)

    async def resolve_pending(self) -> None:
        """Settle each request that was cut short; Unreachable at once, other failures last.

        One at a time: whoever calls this while `run` is settling something must not return
        before that is settled too, since what it then reads in the receipts has to be complete.
        """
        failures: list[StoreError] = []
        async with self._resolving, self._slots:
            self._resolver.unstick()
            while stranded := self._resolver.stranded():
                try:
                    await self._resolver.resolve(stranded[0])
                except Unreachable:
                    raise
                except SpentElsewhere as failure:
                    if stranded[0].number in self._wallet.pending:
                        failures.append(failure)
                    # else it was a claim, which is written off
                except StoreError as failure:  # it is stuck now: the next round is for others
                    if stranded[0].number in self._wallet.pending:
                        failures.append(failure)
        if failures:
            raise failures[0]

    # In the background.

    async def run(self) -> None:
        """Resolve what is cut short, notice new epochs and move into them; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._resolve_in_time)
            nursery.start_soon(self._mover.notice_in_time)
            nursery.start_soon(self._mover.move_in_time)

    async def _resolve_in_time(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            await self._resolver.any_stranded()
            try:
                await self.resolve_pending()
                pause = _FIRST_PAUSE
            except StoreError:
                await trio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def move_late(self) -> None:
        """Move what is left in epochs that may end soon, with short random pauses in between.

        For who does not let `run` do it in time; StoreError.
        """
        await self._mover.move_late()

    async def gather(self) -> None:
        """Move everything into the newest epoch, likewise: a breakglass entry is of one epoch."""
        await self._mover.move_all()


def _checked(reply: Entry, wanted: bytes) -> Entry:
    """What an honest server may say of an entry; Misbehaviour."""
    if wanted == UNOPENED:
        if reply.value is not None:
            raise out_of_place()
    elif reply.digest != wanted or reply.value is None or sha256(reply.value).digest() != wanted:
        raise Misbehaviour("the server answered with another breakglass entry than was asked for")
    return reply
