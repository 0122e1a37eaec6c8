"""One request in, one reply out.

Cheap before costly: what can be refused for its bytes, for what the ledger knows already, or
for a signature, is refused before the proof is verified (over a millisecond, most of the cost
of a request). Then the credentials are issued, and one ledger transaction decides. Nothing
before that transaction changes anything, so a refusal at any step spends nothing.

The amount a request moves comes from its operation and the epoch's tariff, or from the voucher
as the ledger knows it; never from the request.
"""

from __future__ import annotations

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
    Read,
    Redeem,
    Transaction,
    Verdict,
)
from hpkvd.log import Complaints
from hpkvfs.protocol.credential import CredentialRequest, parse
from hpkvfs.protocol.errors import BadProof, Malformed
from hpkvfs.protocol.group import verify_signature
from hpkvfs.protocol.messages import (
    CredentialedRequest,
    DeleteRequest,
    Done,
    Fact,
    InsertRequest,
    IssueRequest,
    LookUpRequest,
    Outcome,
    ParametersRequest,
    Reason,
    Refused,
    ReissueRequest,
    Reply,
    Request,
    Spent,
    decode_request,
)
from hpkvfs.protocol.voucher import voucher_digest


class Handler:
    """Answers requests out of the epochs in use and the ledger."""

    def __init__(self, epochs: Epochs, ledger: Ledger) -> None:
        self._epochs = epochs
        self._ledger = ledger
        self._complaints = Complaints()

    async def answer(self, frame: bytes) -> bytes:
        """The reply's frame, whatever the request's bytes are; raises nothing of its own."""
        return (await self._reply(frame)).encode()

    async def _reply(self, frame: bytes) -> Reply:
        try:
            return await self._perform(decode_request(frame))
        except Malformed:
            return Refused(Reason.MALFORMED)
        except BadProof:
            return Refused(Reason.BAD_PROOF)
        except LedgerBusy:
            return Refused(Reason.BUSY)
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
        epoch = self._epochs.find(request.epoch)
        if epoch is None:
            return Refused(Reason.UNKNOWN_EPOCH)
        credentials = parse(request.credentials, request.presented)
        if isinstance(request, ReissueRequest) and not request.presented:
            return _free_credentials(epoch, request, credentials)
        return await self._purchase(epoch, request, credentials)

    def _parameters(self, request: ParametersRequest) -> Reply:
        return self._epochs.tell(request.epoch) or Refused(Reason.UNKNOWN_EPOCH)

    async def _purchase(
        self, epoch: Epoch, request: CredentialedRequest, credentials: CredentialRequest
    ) -> Reply:
        fingerprint, change = request.fingerprint, _change(request)
        known = await self._ledger.recall(fingerprint, credentials.serials)
        if known is not None:
            return await self._recalled(request, fingerprint, known)
        reason = await self._ledger.refusal(change) or _signature_refusal(request)
        if reason is not None:
            return Refused(reason)
        statement = request.statement(epoch.tariff)
        epoch.issuer.verify(statement, credentials)
        transaction = Transaction(
            fingerprint=fingerprint,
            epoch=epoch.number,
            operation=request.operation,
            delta=statement.delta,
            serials=credentials.serials,
            issued=epoch.issuer.issue(statement, credentials),
            change=change,
        )
        verdict: Verdict = await self._ledger.apply(transaction)
        if isinstance(verdict, Known):
            return await self._recalled(request, fingerprint, verdict)
        return verdict

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


def _free_credentials(
    epoch: Epoch, request: ReissueRequest, credentials: CredentialRequest
) -> Reply:
    """Two credentials of no value. The issuer's reply is a function of the request: repeating
    it gives the same one, with nothing stored that anybody could fill the disk with."""
    statement = request.statement(epoch.tariff)
    epoch.issuer.verify(statement, credentials)
    fact = Fact(request.operation, Outcome.REISSUED, 0)
    return Done(fact, epoch.issuer.issue(statement, credentials))


def _change(request: CredentialedRequest) -> Change:
    match request:
        case IssueRequest():
            return Redeem(voucher_digest(request.voucher), request.amount)
        case LookUpRequest():
            return Read(request.key)
        case InsertRequest():
            return Insert(request.key, request.digest, request.blob)
        case DeleteRequest():
            return Delete(request.key, request.digest)
        case ReissueRequest():
            return None


def _signature_refusal(request: CredentialedRequest) -> Reason | None:
    if not isinstance(request, DeleteRequest):
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
