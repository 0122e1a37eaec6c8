"""Every operation with real credentials: what is paid, what is refused, what is recalled."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from hpkvd.handler import RETRY_AFTER, Handler
from hpkvd.ledger import Ledger, LedgerBusy, LedgerError, LedgerFull, Transaction, Verdict
from hpkvfs.protocol import codec
from hpkvfs.protocol.credential import CredentialRequest, Issuer
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import (
    DeleteRequest,
    Done,
    Fact,
    InsertRequest,
    IssueRequest,
    Outcome,
    Parameters,
    ParametersRequest,
    Reason,
    Refused,
    Reply,
    Spent,
    StoredFact,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from tests.server.support import (
    LocalServer,
    Purchase,
    Purse,
    epoch,
    identity,
    local_server,
    new_blob,
    new_key,
)

KEY = new_key()
BLOB = new_blob()
DIGEST = hashlib.sha256(BLOB).digest()


@pytest.fixture
async def purse(server: LocalServer) -> Purse:
    return await server.purse(1000, credentials=6)


async def perform(server: LocalServer, purse: Purse, purchase: Purchase) -> Done:
    return purse.settle(purchase, await server.ask(purchase.request))


def stored(purchase: Purchase, done: Done) -> StoredFact:
    return StoredFact(purchase.request.fingerprint, done.fact, done.issued)


async def refused(server: LocalServer, request: Purchase | bytes) -> Reason:
    """Ask, and see that nothing was spent by what was refused."""
    before = server.ledger.totals()
    frame = request if isinstance(request, bytes) else request.frame
    reply = await server.ask(frame)
    assert isinstance(reply, Refused)
    assert server.ledger.totals() == before
    return reply.reason


# -- what each operation does ---------------------------------------------------------------------


async def test_parameters_are_free(server: LocalServer) -> None:
    wanted = epoch().parameters
    for request in (ParametersRequest(), ParametersRequest(wanted.digest)):
        reply = await server.ask(request)
        assert isinstance(reply, Parameters)
        assert EpochParameters.decode(reply.parameters) == wanted
        assert reply.digests == (wanted.digest,)
        assert reply.identity == identity().public and reply.is_genuine
    assert await server.ask(ParametersRequest(bytes(32))) == Refused(Reason.UNKNOWN_EPOCH)


async def test_a_voucher_becomes_credentials_and_those_buy(server: LocalServer) -> None:
    purse = await server.purse(1000)
    done = await perform(server, purse, purse.insert(KEY.public, BLOB))
    assert done == Done(Fact(Operation.INSERT, Outcome.INSERTED, -10), done.issued)
    done = await perform(server, purse, purse.look_up(KEY.public))
    assert done == Done(Fact(Operation.LOOK_UP, Outcome.FOUND, -1), done.issued, BLOB)
    done = await perform(server, purse, purse.delete(KEY, DIGEST))
    assert done == Done(Fact(Operation.DELETE, Outcome.DELETED, 8), done.issued)
    done = await perform(server, purse, purse.look_up(KEY.public))
    assert done == Done(Fact(Operation.LOOK_UP, Outcome.ABSENT, -1), done.issued)
    done = await perform(server, purse, purse.reissue())
    assert done == Done(Fact(Operation.REISSUE, Outcome.REISSUED, 0), done.issued)
    assert purse.amount == 1000 - 10 - 1 + 8 - 1
    totals = server.ledger.totals()
    assert (totals.outstanding, totals.issued) == (purse.amount, 1000)
    assert (totals.charged, totals.refunded) == (12, 8)


async def test_credentials_of_no_value_are_free_and_leave_no_trace(server: LocalServer) -> None:
    purse, before = Purse(epoch().parameters), server.ledger.totals()
    purchase = purse.more()
    first = await perform(server, purse, purchase)
    assert first.fact == Fact(Operation.REISSUE, Outcome.REISSUED, 0)
    assert await server.ask(purchase.request) == first
    assert server.ledger.totals() == before
    assert [one.amount for one in purse.held] == [0, 0]
    done = await perform(server, purse, purse.reissue())
    assert done.fact.delta == 0


async def test_the_tariff_is_the_epochs_whatever_the_proof_says(
    server: LocalServer, purse: Purse
) -> None:
    """A client that proves another balance than the operation's mints nothing."""
    request = InsertRequest(purse.epoch, KEY.public, BLOB)
    generous = replace(purse.parameters, tariff=replace(purse.parameters.tariff, insert=9))
    purse.parameters, honest = generous, purse.parameters
    purchase = purse.buy(replace(request, epoch=generous.digest))
    purse.parameters = honest
    purchase.request = replace(purchase.request, epoch=honest.digest)
    assert await refused(server, purchase) is Reason.BAD_PROOF


# -- refusals spend nothing ----------------------------------------------------------------------


async def test_after_every_refusal_the_same_credentials_still_pay(
    server: LocalServer, purse: Purse
) -> None:
    await perform(server, purse, purse.insert(KEY.public, BLOB))
    another = hashlib.sha256(b"another").digest()
    attempts: list[tuple[InsertRequest | DeleteRequest, Reason]] = [
        (InsertRequest(purse.epoch, KEY.public, new_blob()), Reason.KEY_EXISTS),
        (DeleteRequest(purse.epoch, new_key().public, DIGEST), Reason.KEY_ABSENT),
        (DeleteRequest(purse.epoch, KEY.public, another), Reason.DIGEST_MISMATCH),
        (DeleteRequest(purse.epoch, KEY.public, DIGEST), Reason.BAD_SIGNATURE),
    ]
    pair = purse.held[-2:]
    for request, reason in attempts:
        purse.held[-2:] = pair
        purchase = purse.buy(request)
        if isinstance(request, DeleteRequest):
            signature = new_key().sign(purchase.request.signed)
            purchase.request = replace(purchase.request, signature=signature)
        assert await refused(server, purchase) is reason
        purse.held += pair
    done = await perform(server, purse, purse.look_up(KEY.public))
    assert done.value == BLOB


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[CredentialRequest]:
    """The presentations whose proofs were verified."""
    verified: list[CredentialRequest] = []
    verify = Issuer.verify

    def noted(issuer: Issuer, statement: Any, request: CredentialRequest, *more: Any) -> None:
        verified.append(request)
        verify(issuer, statement, request, *more)

    monkeypatch.setattr(Issuer, "verify", noted)
    return verified


async def test_what_is_refused_or_recalled_costs_no_proof(
    server: LocalServer, tmp_path: Path, purse: Purse, proofs: list[CredentialRequest]
) -> None:
    done = purse.insert(KEY.public, BLOB)
    proofs.clear()
    await perform(server, purse, done)
    assert len(proofs) == 1  # the negative control
    assert isinstance(await server.ask(done.request), Done)
    stolen = purse.buy(DeleteRequest(purse.epoch, KEY.public, DIGEST))
    stolen.request = replace(stolen.request, signature=new_key().sign(stolen.request.signed))
    attempts = [
        (purse.insert(KEY.public, new_blob()), Reason.KEY_EXISTS),
        (stolen, Reason.BAD_SIGNATURE),
        (Purse(epoch().parameters).redeem(Voucher(50, b"v" * 20)), Reason.UNKNOWN_VOUCHER),
    ]
    for purchase, reason in attempts:
        assert await refused(server, purchase) is reason
    assert await refused(server, b"noise") is Reason.MALFORMED
    assert len(proofs) == 1
    async with local_server(tmp_path / "full.sqlite", reserve=2**62) as full:
        other = await full.purse(100)
        proofs.clear()
        assert await refused(full, other.insert(KEY.public, BLOB)) is Reason.FULL
        assert not proofs


async def test_a_proof_is_of_one_request_only(server: LocalServer, purse: Purse) -> None:
    """Whoever takes the credentials out of a request can buy nothing else with them."""
    purchase = purse.insert(KEY.public, BLOB)
    thefts = [
        replace(purchase.request, key=new_key().public),
        replace(purchase.request, blob=new_blob()),
    ]
    for theft in thefts:
        assert await refused(server, theft.encode()) is Reason.BAD_PROOF
    await perform(server, purse, purchase)


async def test_a_deletion_refunds_only_who_signed_it(server: LocalServer, purse: Purse) -> None:
    await perform(server, purse, purse.insert(KEY.public, BLOB))
    purchase = purse.delete(KEY, DIGEST)
    thief = await server.purse(10)
    stolen = thief.buy(DeleteRequest(thief.epoch, KEY.public, DIGEST))
    stolen.request = replace(stolen.request, signature=purchase.request.signature)
    assert await refused(server, stolen) is Reason.BAD_SIGNATURE
    await perform(server, purse, purchase)


async def test_a_voucher_is_redeemed_once_for_its_amount(server: LocalServer) -> None:
    purse = Purse(epoch().parameters)
    voucher = Voucher(50, b"v" * 20)
    assert await refused(server, purse.redeem(voucher)) is Reason.UNKNOWN_VOUCHER
    server.ledger.add_vouchers([voucher])
    greedy = Voucher(5000, voucher.secret)
    assert await refused(server, purse.redeem(greedy)) is Reason.VOUCHER_AMOUNT
    purchase = purse.redeem(voucher)
    first = await perform(server, purse, purchase)
    assert await server.ask(purchase.request) == first
    assert await refused(server, purse.redeem(voucher)) is Reason.VOUCHER_SPENT
    assert server.ledger.totals().issued == 50
    assert purse.amount == 50


async def test_a_stolen_voucher_request_cannot_be_redirected(server: LocalServer) -> None:
    """The proof covers the voucher, so another's proof does not go with it."""
    voucher, purse = Voucher(50, b"v" * 20), Purse(epoch().parameters)
    server.ledger.add_vouchers([voucher])
    other = purse.redeem(Voucher(50, b"w" * 20)).request
    theft = IssueRequest(other.epoch, voucher.secret, 50, other.credentials)
    assert await refused(server, theft.encode()) is Reason.BAD_PROOF


async def test_an_unknown_epoch_is_refused(server: LocalServer, purse: Purse) -> None:
    purchase = purse.look_up(KEY.public)
    stray = replace(purchase.request, epoch=bytes(32))
    assert await refused(server, stray.encode()) is Reason.UNKNOWN_EPOCH


async def test_garbage_is_refused(server: LocalServer, purse: Purse) -> None:
    purchase = purse.look_up(KEY.public)
    frame = purchase.frame
    garbage = [
        bytes(codec.REQUEST_SIZE),
        b"\xff" * codec.REQUEST_SIZE,
        frame[:-1] + b"\1",
        b"GET / HTTP/1.1\r\n\r\n".ljust(codec.REQUEST_SIZE, b"\0"),
        replace(purchase.request, credentials=purchase.request.credentials[:-1]).encode(),
        replace(purchase.request, credentials=b"\0" * 1556).encode(),
        replace(purse.more().request, presented=2).encode(),
    ]
    for request in garbage:
        assert await refused(server, request) is Reason.MALFORMED
    await perform(server, purse, purchase)


async def test_every_flipped_byte_of_the_credentials_is_refused(
    server: LocalServer, purse: Purse
) -> None:
    purchase = purse.look_up(KEY.public)
    proof = purchase.request.credentials
    for place in range(0, len(proof), 61):
        changed = proof[:place] + bytes([proof[place] ^ 1]) + proof[place + 1 :]
        request = replace(purchase.request, credentials=changed)
        reason = await refused(server, request.encode())
        assert reason in (Reason.MALFORMED, Reason.BAD_PROOF)
    await perform(server, purse, purchase)


# -- repetition and double spending --------------------------------------------------------------


async def test_a_repeated_request_performs_nothing_and_gives_the_same_reply(
    server: LocalServer, purse: Purse
) -> None:
    inserted = purse.insert(KEY.public, BLOB)
    done = await perform(server, purse, inserted)
    found = purse.look_up(KEY.public)
    value = await perform(server, purse, found)
    before = server.ledger.totals()
    assert await server.ask(inserted.request) == done
    assert await server.ask(found.request) == value
    assert server.ledger.totals() == before
    deleted = purse.delete(KEY, DIGEST)
    gone = await perform(server, purse, deleted)
    after = server.ledger.totals()
    assert await server.ask(deleted.request) == gone
    assert await server.ask(inserted.request) == done
    assert await server.ask(found.request) == replace(value, value=None)
    assert server.ledger.totals() == after
    assert await server.ledger.read(KEY.public) is None


async def test_a_look_up_that_found_nothing_never_finds_anything(
    server: LocalServer, purse: Purse
) -> None:
    absent = purse.look_up(KEY.public)
    done = await perform(server, purse, absent)
    await perform(server, purse, purse.insert(KEY.public, BLOB))
    assert await server.ask(absent.request) == done


async def test_a_serial_spent_by_another_request_recalls_that_one(
    server: LocalServer, purse: Purse
) -> None:
    pair = purse.held[-2:]
    first = purse.insert(KEY.public, BLOB)
    purse.held += pair
    second = purse.look_up(KEY.public)
    done = await perform(server, purse, first)
    before = server.ledger.totals()
    assert await server.ask(second.request) == Spent((stored(first, done),))
    assert server.ledger.totals() == before


async def test_serials_spent_by_two_requests_recall_both(server: LocalServer) -> None:
    purse = await server.purse(100, credentials=4)
    a, b, c, d = purse.held
    purse.held = [a, b]
    first = purse.look_up(KEY.public)
    purse.held = [c, d]
    second = purse.look_up(KEY.public)
    purse.held = [a, c]
    third = purse.insert(KEY.public, BLOB)
    facts = {
        stored(purchase, await perform(server, purse, purchase)) for purchase in (first, second)
    }
    reply = await server.ask(third.request)
    assert isinstance(reply, Spent)
    assert set(reply.facts) == facts
    assert await server.ledger.read(KEY.public) is None


async def together(server: LocalServer, *purchases: Purchase) -> list[Reply]:
    """Ask all at once. Each is past the cheap checks before any is in the ledger."""
    replies: list[Reply] = [Refused(Reason.INTERNAL)] * len(purchases)

    async def one(index: int) -> None:
        replies[index] = await server.ask(purchases[index].request)

    async with trio.open_nursery() as nursery:
        for index in range(len(purchases)):
            nursery.start_soon(one, index)
    return replies


async def test_identical_requests_that_race_are_one(server: LocalServer, purse: Purse) -> None:
    purchase = purse.insert(KEY.public, BLOB)
    replies = await together(server, *[purchase] * 5)
    assert len(set(replies)) == 1
    purse.settle(purchase, replies[0])
    assert purse.amount == server.ledger.totals().outstanding == 990


async def test_of_conflicting_requests_that_race_one_is_performed(
    server: LocalServer, purse: Purse
) -> None:
    pair = purse.held[-2:]
    purchases = []
    for _ in range(5):
        purchases.append(purse.insert(new_key().public, BLOB))
        purse.held += pair
    replies = await together(server, *purchases)
    (winner,) = (i for i, reply in enumerate(replies) if isinstance(reply, Done))
    performed = replies[winner]
    assert isinstance(performed, Done)
    spent = Spent((stored(purchases[winner], performed),))
    assert [reply for reply in replies if reply is not performed] == [spent] * 4
    totals = server.ledger.totals()
    assert (totals.blobs, totals.charged) == (1, 10)


async def test_of_insertions_that_race_for_a_key_one_pays(
    server: LocalServer, purse: Purse
) -> None:
    purchases = [purse.insert(KEY.public, new_blob()) for _ in range(3)]
    replies = await together(server, *purchases)
    assert sum(isinstance(reply, Done) for reply in replies) == 1
    assert replies.count(Refused(Reason.KEY_EXISTS)) == 2
    assert server.ledger.totals().charged == 10


# -- trouble ---------------------------------------------------------------------------------


class Failing:
    """A ledger that fails when it comes to writing."""

    def __init__(self, server: LocalServer, error: Exception) -> None:
        self._ledger, self._error = server.ledger, error
        self.foresee = server.ledger.foresee
        self.read = server.ledger.read

    async def apply(self, transaction: Transaction, behind: int = 0) -> Verdict:
        raise self._error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LedgerFull("full"), Reason.FULL),
        (LedgerBusy("busy"), Reason.BUSY),
        (LedgerError("broken"), Reason.INTERNAL),
        (ZeroDivisionError("a bug"), Reason.INTERNAL),
    ],
)
async def test_what_cannot_be_written_is_not_spent_and_reading_goes_on(
    server: LocalServer, purse: Purse, error: Exception, reason: Reason
) -> None:
    earlier = purse.insert(KEY.public, BLOB)
    done = await perform(server, purse, earlier)
    sound = server.handler._ledger
    server.handler._ledger = cast(Ledger, Failing(server, error))
    purchase = purse.look_up(KEY.public)
    assert await refused(server, purchase) is reason
    assert await server.ask(earlier.request) == done
    assert isinstance(await server.ask(ParametersRequest()), Parameters)
    server.handler._ledger = sound
    await perform(server, purse, purchase)


async def test_with_too_much_in_work_others_are_told_when_to_come_back(
    server: LocalServer, purse: Purse
) -> None:
    """Before their bytes are looked at, and only as long as it lasts."""
    handler = Handler(server.handler._epochs, server.ledger, queue=2)
    crowded = replace(server, handler=handler)
    release, sound = trio.Event(), server.ledger.apply

    class Slow(Failing):
        async def apply(self, transaction: Transaction, behind: int = 0) -> Verdict:
            await release.wait()
            return await sound(transaction)

    handler._ledger = cast(Ledger, Slow(server, LedgerError("")))
    purchases = [purse.insert(new_key().public, new_blob()) for _ in range(2)]
    replies: list[Reply] = []

    async def ask(frame: bytes) -> None:
        replies.append(await crowded.ask(frame))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for purchase in purchases:
                nursery.start_soon(ask, purchase.frame)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert await crowded.ask(b"noise") == Refused(Reason.BUSY, RETRY_AFTER)
            release.set()
    assert all(isinstance(reply, Done) for reply in replies)
    assert await crowded.ask(b"noise") == Refused(Reason.MALFORMED)


async def test_when_room_runs_out_insertions_are_refused_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    async with local_server(tmp_path / "ledger.sqlite", reserve=2**62) as server:
        purse = await server.purse(100)
        pair = list(purse.held)
        assert await refused(server, purse.insert(KEY.public, BLOB)) is Reason.FULL
        purse.held = pair
        await perform(server, purse, purse.look_up(KEY.public))


async def test_a_bug_is_told_of_once_and_without_the_request(
    server: LocalServer, purse: Purse, caplog: pytest.LogCaptureFixture
) -> None:
    purchase = purse.look_up(KEY.public)
    bug = ZeroDivisionError(purchase.request.key.hex())
    server.handler._ledger = cast(Ledger, Failing(server, bug))
    for _ in range(3):
        assert await refused(server, purchase) is Reason.INTERNAL
    (record,) = caplog.records
    told = record.getMessage()
    assert "ZeroDivisionError in apply" in told
    assert purchase.request.key.hex() not in told


async def test_every_reply_has_the_one_size(server: LocalServer, purse: Purse) -> None:
    purchase = purse.insert(KEY.public, BLOB)
    found = purse.look_up(KEY.public)
    frames = [bytes(codec.REQUEST_SIZE), ParametersRequest().encode(), purchase.frame]
    frames += [purchase.frame, found.frame, purse.more().frame]
    for frame in frames:
        assert len(await server.handler.answer(frame)) == codec.REPLY_SIZE
