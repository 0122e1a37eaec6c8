"""One request in, one reply out.

Cheap before costly: with too much in work already, a request is not even decoded. What can be
refused for its bytes, for what the ledger knows already, or for a signature, is refused before
the proof is verified (over a millisecond, most of the cost of a request). Then the credentials
are issued, and one ledger transaction decides. Nothing
before that transaction changes anything, so a refusal at any step spends nothing.

The amount a request moves comes from its operation and the epoch's tariff, or from the voucher
as the ledger knows it; never from the request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from hpkvd.epochs import Epoch, Epochs
from hpkvd.ledger import (
    Change,
    Delete,
    Insert,
    Known,
    Ledger,
    LedgerBusy,
    LedgerError,
    LedgerFull,
    Opening,
    Read,
    Redeem,
    StoreEntry,
    Transaction,
    Verdict,
)
from hpkvd.log import Complaints
from hpkvd.metrics import Meter
from hpkvd.payments.cashier import Cashier
from hpkvd.turns import Turns
from hpkvfs.protocol.credential import CredentialRequest, parse
from hpkvfs.protocol.errors import BadProof, Malformed
from hpkvfs.protocol.group import verify_signature
from hpkvfs.protocol.messages import (
    UNOPENED,
    CredentialedRequest,
    DeleteRequest,
    Done,
    Entry,
    Fact,
    InsertRequest,
    IssueRequest,
    LookUpRequest,
    OffersRequest,
    OpenEntryRequest,
    Outcome,
    ParametersRequest,
    PayRequest,
    Reason,
    Refused,
    ReissueRequest,
    Reply,
    Request,
    Spent,
    StoreEntryRequest,
    decode_request,
)
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.protocol.voucher import voucher_digest

SECONDS_PER_HOUR: Final = 3_600
RETRY_AFTER: Final = 2
_BUSY: Final = Refused(Reason.BUSY, RETRY_AFTER)
_BUSY_FRAME: Final = _BUSY.encode()
_ENDED: Final = Refused(Reason.EPOCH_ENDED)


class Handler:
    """Answers requests out of the epochs in use and the ledger."""

    def __init__(
        self,
        epochs: Epochs,
        ledger: Ledger,
        clock: Callable[[], float] = time.time,
        meter: Meter | None = None,
        queue: int = 256,
        cashier: Cashier | None = None,
    ) -> None:
        """`clock`: seconds since 1970; breakglass entries have timers, nothing else has a time.

        `meter` counts what is answered. With `queue` requests in work, others are told "busy".
        `cashier`: ways to pay beside vouchers sold by hand.
        """
        self._epochs = epochs
        self._ledger = ledger
        self._clock = clock
        self._meter = meter or Meter()
        self._queue = queue
        self._cashier = cashier or Cashier(ledger, {}, clock)
        self._working = 0
        self._turns = Turns()
        self._complaints = Complaints()

    def use(self, epochs: Epochs) -> None:
        """Answer out of these epochs from the next request on."""
        self._epochs = epochs

    async def answer(self, frame: bytes) -> bytes:
        """The reply's frame, whatever the request's bytes are; raises nothing of its own."""
        if self._working >= self._queue:
            self._meter.answered(_BUSY, 0.0)
            return _BUSY_FRAME
        start = time.perf_counter()
        self._working += 1
        try:
            reply = await self._reply(frame)
        finally:
            self._working -= 1
        self._meter.answered(reply, time.perf_counter() - start)
        return reply.encode()

    async def _reply(self, frame: bytes) -> Reply:
        try:
            return await self._perform(decode_request(frame))
        except Malformed:
            return Refused(Reason.MALFORMED)
        except BadProof:
            return Refused(Reason.BAD_PROOF)
        except LedgerBusy:
            return _BUSY
        except LedgerFull:
            return Refused(Reason.FULL)
        except LedgerError:
            return Refused(Reason.INTERNAL)
        except Exception as error:
            kind = type(error).__name__
            self._complaints.complain(f"{kind} {_place(error)}; please report this bug")
            return Refused(Reason.INTERNAL)

    async def _perform(self, request: Request) -> Reply:
        if isinstance(request, ParametersRequest):
            return self._parameters(request)
        if isinstance(request, OpenEntryRequest):
            return await self._open_entry(request)
        if isinstance(request, OffersRequest):
            return self._cashier.offers
        if isinstance(request, PayRequest):
            return await self._cashier.pay(request)
        epochs = self._epochs
        epoch = epochs.find(request.epoch)
        if epoch is None:
            return await self._out_of_use(epochs, request)
        credentials = parse(request.credentials, request.presented)
        if isinstance(request, ReissueRequest) and not request.presented:
            return _free_credentials(epoch, request, credentials)
        into = _issuing_epoch(epochs, epoch, request)
        if isinstance(into, Reason):
            return Refused(into)
        return await self._purchase(epoch, into, request, credentials)

    def _parameters(self, request: ParametersRequest) -> Reply:
        return self._epochs.tell(request.epoch) or Refused(Reason.UNKNOWN_EPOCH)

    async def _purchase(
        self,
        epoch: Epoch,
        into: Epoch,
        request: CredentialedRequest,
        credentials: CredentialRequest,
    ) -> Reply:
        fingerprint, change = request.fingerprint, self._change(request, epoch.tariff)
        serials = credentials.serials
        foreseen = await self._ledger.foresee(fingerprint, serials, change)
        if isinstance(foreseen, Known):
            return await self._recalled(request, fingerprint, foreseen)
        reason = foreseen or _signature_refusal(request)
        if reason is not None:
            return Refused(reason)
        statement = request.statement(epoch.tariff)
        async with self._turns:
            start = time.perf_counter()
            epoch.issuer.verify(statement, credentials, None if into is epoch else into.issuer)
            issued = into.issuer.issue(statement, credentials)
            self._meter.worked("proofs", time.perf_counter() - start)
        transaction = Transaction(
            fingerprint=fingerprint,
            epoch=epoch.number,
            operation=request.operation,
            delta=statement.delta,
            serials=serials,
            issued=issued,
            change=change,
            into=into.number,
        )
        verdict: Verdict = await self._ledger.apply(transaction, self._turns.crowd)
        if isinstance(verdict, Known):
            return await self._recalled(request, fingerprint, verdict)
        if verdict == _ENDED and not self._epochs.has_ended(request.epoch):
            return _BUSY  # it ends just now: nobody hears so before we list it no more
        return verdict

    async def _out_of_use(self, epochs: Epochs, request: CredentialedRequest) -> Reply:
        """An epoch that ended pays for nothing; but what was moved out of it in time is told again
        for as long as the epoch lasts that it was moved into."""
        if isinstance(request, ReissueRequest) and request.into and epochs.find(request.into):
            fingerprint = request.fingerprint
            known = await self._ledger.foresee(fingerprint, ())
            if isinstance(known, Known):
                return await self._recalled(request, fingerprint, known)
        return Refused(_epoch_refusal(epochs, request.epoch))

    async def _open_entry(self, request: OpenEntryRequest) -> Reply:
        """Free, so whoever has not paid for an entry gets no further than one read."""
        now = self.hour
        stored = await self._ledger.entry(request.key, now)
        if stored is None:
            return Refused(Reason.KEY_ABSENT)
        if request.entry not in (UNOPENED, stored.digest):
            return Refused(Reason.DIGEST_MISMATCH)
        if not verify_signature(request.key, request.signed, request.signature):
            return Refused(Reason.BAD_SIGNATURE)
        if request.entry == UNOPENED:
            left = None if stored.gone_at is None else stored.gone_at - now
            return Entry(stored.counter, stored.digest, None, left)
        opened = await self._ledger.open_entry(Opening(request.key, request.entry, now))
        if opened is None or opened.gone_at is None:
            return Refused(Reason.DIGEST_MISMATCH)  # replaced meanwhile
        return Entry(opened.counter, opened.digest, opened.value, opened.gone_at - now)

    @property
    def hour(self) -> int:
        """The time, as coarse as timers need it: whole hours since 1970."""
        return int(self._clock()) // SECONDS_PER_HOUR

    async def keep_time(self) -> None:
        """What is due by the hour, of entries and payments; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cashier.keep_time)
            nursery.start_soon(self._drop_entries)

    async def _drop_entries(self) -> None:
        """Once an hour, delete the entries whose timers have fired; until cancelled."""
        while True:
            with suppress(LedgerError):
                await self._ledger.drop_entries(self.hour)
            await trio.sleep(SECONDS_PER_HOUR)

    def _change(self, request: CredentialedRequest, tariff: Tariff) -> Change:
        match request:
            case IssueRequest():
                return Redeem(voucher_digest(request.voucher), request.amount)
            case LookUpRequest():
                return Read(request.key)
            case InsertRequest():
                return Insert(request.key, request.digest, request.blob)
            case DeleteRequest():
                return Delete(request.key, request.digest)
            case StoreEntryRequest(_, key, counter, value):
                hours = tariff.entry_hours
                return StoreEntry(key, counter, request.digest, value, hours, self.hour)
            case ReissueRequest():
                return None

    async def _recalled(
        self, request: CredentialedRequest, fingerprint: bytes, known: Known
    ) -> Reply:
        for stored in known.facts:
            if stored.fingerprint == fingerprint:
                return Done(stored.fact, stored.issued, await self._found(request, stored.fact))
        return Spent(known.facts)

    async def _found(self, request: CredentialedRequest, fact: Fact) -> bytes | None:
        """The blob of a repeated look-up. One that found nothing once never finds anything, or
        it could be repeated for free until something is there."""
        if isinstance(request, LookUpRequest) and fact.outcome is Outcome.FOUND:
            return await self._ledger.read(request.key)
        return None


def _epoch_refusal(epochs: Epochs, digest: bytes) -> Reason:
    return Reason.EPOCH_ENDED if epochs.has_ended(digest) else Reason.UNKNOWN_EPOCH


def _issuing_epoch(epochs: Epochs, epoch: Epoch, request: CredentialedRequest) -> Epoch | Reason:
    """The epoch of the credentials requested: a reissue may move them into a later one."""
    if not isinstance(request, ReissueRequest) or request.into is None:
        return epoch
    into = epochs.find(request.into)
    if into is None:
        return _epoch_refusal(epochs, request.into)
    return into if into.number > epoch.number else Reason.UNKNOWN_EPOCH


def _free_credentials(
    epoch: Epoch, request: ReissueRequest, credentials: CredentialRequest
) -> Reply:
    """Two credentials of no value. The issuer's reply is a function of the request: repeating
    it gives the same one, with nothing stored that anybody could fill the disk with."""
    statement = request.statement(epoch.tariff)
    epoch.issuer.verify(statement, credentials)
    fact = Fact(request.operation, Outcome.REISSUED, 0)
    return Done(fact, epoch.issuer.issue(statement, credentials))


def _signature_refusal(request: CredentialedRequest) -> Reason | None:
    if not isinstance(request, DeleteRequest | StoreEntryRequest):
        return None
    signed = verify_signature(request.key, request.signed, request.signature)
    return None if signed else Reason.BAD_SIGNATURE


def _place(error: Exception) -> str:
    """Where it was raised; its message might quote the request, so that is not told."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "nowhere"
    return f"in {trace.tb_frame.f_code.co_name}, line {trace.tb_lineno}"
