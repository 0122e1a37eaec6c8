"""Breakglass entries at the server: paid and signed to store, signed and free to open."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import trio

from hpkvfs.protocol.messages import UNOPENED, Done, Entry, Outcome, Reason, Refused, Reply, Spent
from tests.server.support import (
    LocalServer,
    Purse,
    new_key,
    new_value,
    open_entry,
)

KEY = new_key()
OLD, NEW = new_value(), new_value()
HOURS = 72


def digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


@pytest.fixture
async def purse(server: LocalServer) -> Purse:
    return await server.purse(1000, credentials=6)


async def store(server: LocalServer, purse: Purse, counter: int, value: bytes) -> Done:
    purchase = purse.store_entry(KEY, counter, value)
    return purse.settle(purchase, await server.ask(purchase.request))


async def ask(server: LocalServer, value: bytes) -> Reply:
    return await server.ask(open_entry(KEY, digest(value)))


async def test_storing_costs_the_tariffs_price_and_opening_nothing(
    server: LocalServer, purse: Purse
) -> None:
    done = await store(server, purse, 1, OLD)
    assert (done.fact.outcome, done.fact.delta) == (Outcome.STORED, -10)
    assert purse.amount == 990
    before = server.ledger.totals()
    assert (before.charged, before.entries) == (10, 1)
    assert await ask(server, OLD) == Entry(1, digest(OLD), OLD, HOURS + 1)
    assert server.ledger.totals() == before


async def test_words_alone_find_out_which_entry_there_is_and_start_nothing(
    server: LocalServer, purse: Purse
) -> None:
    await store(server, purse, 7, OLD)
    told = await server.ask(open_entry(KEY))
    assert told == Entry(7, digest(OLD), None, None)
    server.clock.pass_hours(10_000)
    assert await server.ask(open_entry(KEY)) == told


async def test_the_timer_starts_at_the_first_opening_and_not_anew(
    server: LocalServer, purse: Purse
) -> None:
    await store(server, purse, 1, OLD)
    server.clock.pass_hours(500)
    await ask(server, OLD)
    server.clock.pass_hours(HOURS)
    again = await ask(server, OLD)
    assert isinstance(again, Entry) and (again.value, again.hours) == (OLD, 1)
    assert await server.ask(open_entry(KEY)) == Entry(1, digest(OLD), None, 1)
    server.clock.pass_hours(1)
    assert await ask(server, OLD) == Refused(Reason.KEY_ABSENT)
    await server.ledger.drop_entries(server.handler.hour)
    assert server.ledger.totals().entries == 0


async def test_paying_anew_before_the_timer_fires_rearms_the_entry(
    server: LocalServer, purse: Purse
) -> None:
    await store(server, purse, 1, OLD)
    await ask(server, OLD)
    await store(server, purse, 2, NEW)
    server.clock.pass_hours(10 * HOURS)
    assert await ask(server, NEW) == Entry(2, digest(NEW), NEW, HOURS + 1)
    assert await ask(server, OLD) == Refused(Reason.DIGEST_MISMATCH)


async def test_an_old_request_to_store_restores_nothing_and_stops_no_timer(
    server: LocalServer, purse: Purse
) -> None:
    """The very frame is recalled, in a new purchase the counter is old, or the signature false."""
    first = purse.store_entry(KEY, 1, OLD)
    purse.settle(first, await server.ask(first.request))
    await store(server, purse, 2, NEW)
    opened = await ask(server, NEW)
    before = server.ledger.totals()
    assert isinstance(await server.ask(first.request), Done)
    assert await ask(server, NEW) == opened
    assert server.ledger.totals() == before
    for counter in (1, 2):
        late = purse.store_entry(KEY, counter, OLD)
        purse.held += [*(await server.purse(100)).held]
        assert await server.ask(late.request) == Refused(Reason.OLD_COUNTER)
    stolen = purse.store_entry(new_key(), 3, OLD)
    forged = replace(
        first.request, counter=3, credentials=stolen.request.credentials, key=KEY.public
    )
    assert await server.ask(forged) == Refused(Reason.BAD_SIGNATURE)
    assert await ask(server, NEW) == opened


async def test_an_old_request_to_open_starts_no_timer_of_a_newer_entry(
    server: LocalServer, purse: Purse
) -> None:
    await store(server, purse, 1, OLD)
    for recorded in (open_entry(KEY), open_entry(KEY, digest(OLD))):
        await server.ask(recorded)
    await store(server, purse, 2, NEW)
    assert await server.ask(open_entry(KEY, digest(OLD))) == Refused(Reason.DIGEST_MISMATCH)
    assert await server.ask(open_entry(KEY)) == Entry(2, digest(NEW), None, None)


async def test_only_the_key_opens(server: LocalServer, purse: Purse) -> None:
    await store(server, purse, 1, OLD)
    for entry in (UNOPENED, digest(OLD)):
        forged = replace(open_entry(new_key(), entry), key=KEY.public)
        assert await server.ask(forged) == Refused(Reason.BAD_SIGNATURE)
    unsigned = replace(open_entry(KEY), entry=digest(OLD))  # what only asked cannot open
    assert await server.ask(unsigned) == Refused(Reason.BAD_SIGNATURE)
    assert await server.ask(open_entry(KEY)) == Entry(1, digest(OLD), None, None)


async def test_a_key_that_was_not_paid_for_leaves_nothing(server: LocalServer) -> None:
    before = server.ledger.totals()
    for _ in range(5):
        assert await server.ask(open_entry(new_key())) == Refused(Reason.KEY_ABSENT)
        reply = await server.ask(open_entry(new_key(), digest(OLD)))
        assert reply == Refused(Reason.KEY_ABSENT)
    assert server.ledger.totals() == before


async def test_an_entry_that_cannot_be_paid_is_not_stored(
    server: LocalServer, purse: Purse
) -> None:
    """What proves another balance than the tariff's is refused, whatever is signed."""
    generous = replace(purse.parameters, tariff=replace(purse.parameters.tariff, entry=7))
    honest, purse.parameters = purse.parameters, generous
    purchase = purse.store_entry(KEY, 1, OLD)
    request = replace(purchase.request, epoch=honest.digest)
    signed = replace(request, signature=KEY.sign(request.signed))
    assert await server.ask(signed) == Refused(Reason.BAD_PROOF)
    assert server.ledger.totals().entries == 0


async def test_storing_is_idempotent_and_spent_serials_are_told(
    server: LocalServer, purse: Purse
) -> None:
    purchase = purse.store_entry(KEY, 1, OLD)
    replies: list[Reply] = []

    async def race() -> None:
        replies.append(await server.ask(purchase.request))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(race)
    assert all(reply == replies[0] for reply in replies) and isinstance(replies[0], Done)
    assert server.ledger.totals().charged == 10
    again = replace(purchase.request, counter=2)
    assert isinstance(await server.ask(again), Spent)
