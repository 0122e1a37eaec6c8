"""Conflicts in the database (class 40): tried again until they succeed, and nothing doubles.

Real ones where PostgreSQL can be brought to them: serialisation failures between two servers whose
transactions are SERIALIZABLE, a deadlock with a stranger. Those that it cannot be brought to, a
COMMIT that is reported as failed and was not, are injected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest
import trio
from psycopg import errors

from hpkvd.ledger import Engine, Known, Transaction, Verdict, postgresql_batch
from hpkvd.ledger.rules import Job, Result
from hpkvd.ledger.urls import create
from hpkvfs.protocol.messages import Done, Outcome
from tests.server.ledgers import (
    TARIFF,
    VOUCHER,
    delete,
    fund,
    insert,
    key,
    opened,
    outcome,
    transaction,
)
from tests.server.postgres import Cluster


@pytest.fixture
def url(cluster: Cluster) -> str:
    url = cluster.new_url()
    create(url)
    return url


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What each try of a batch failed with, by SQLSTATE."""
    seen: Counter[str] = Counter()
    write = postgresql_batch.write

    def counted(connection: Any, jobs: Sequence[Job]) -> tuple[Sequence[Result], int]:
        try:
            return write(connection, jobs)
        except psycopg.Error as error:
            seen[error.sqlstate or ""] += 1
            raise

    monkeypatch.setattr(postgresql_batch, "write", counted)
    yield seen


def serializable(url: str) -> str:
    return f"{url}%20-cdefault_transaction_isolation%3Dserializable"


async def apply_all(
    ledgers: Sequence[Engine], transactions: Sequence[Transaction]
) -> list[tuple[Transaction, Verdict]]:
    """Every transaction at every ledger, all at once."""
    verdicts = []

    async def apply(ledger: Engine, one: Transaction) -> None:
        verdicts.append((one, await ledger.apply(one)))

    async with trio.open_nursery() as nursery:
        for one in transactions:
            for ledger in ledgers:
                nursery.start_soon(apply, ledger, one)
    return verdicts


async def test_servers_whose_transactions_are_serialisable_get_everything_done(
    url: str, failures: Counter[str]
) -> None:
    async with opened(serializable(url)) as one, opened(serializable(url)) as other:
        await fund(one)
        for turn in range(12):
            asked = [
                transaction(f"{turn}.{n}", insert(f"{turn}.{n}"), f"s{turn}.{n}", f"t{turn}.{n}")
                for n in range(4)
            ]
            verdicts = await apply_all([one, other], asked)
            for asked_one in asked:
                kinds = [type(verdict) for this, verdict in verdicts if this is asked_one]
                assert sorted(kind.__name__ for kind in kinds) == ["Done", "Known"]
        totals = one.totals()
    assert failures["40001"] > 0, "nothing conflicted, so nothing was shown"
    assert (totals.requests, totals.serials, totals.blobs) == (49, 96, 48)
    assert totals.outstanding == VOUCHER.amount - 48 * TARIFF.insert


async def test_conflicting_requests_of_serialisable_servers_are_performed_once(
    url: str, failures: Counter[str]
) -> None:
    """One serial, two requests, two servers, again and again."""
    async with opened(serializable(url)) as one, opened(serializable(url)) as other:
        await fund(one)
        for turn in range(12):
            rivals = [
                transaction(f"{turn}.{n}", insert(f"{turn}.{n}"), "s" + str(turn), f"t{turn}.{n}")
                for n in range(2)
            ]
            async with trio.open_nursery() as nursery:
                verdicts: list[Verdict] = []

                async def apply(
                    ledger: Engine, rival: Transaction, found: list[Verdict] = verdicts
                ) -> None:
                    found.append(await ledger.apply(rival))

                for ledger, rival in zip((one, other), rivals, strict=True):
                    nursery.start_soon(apply, ledger, rival)
            assert sorted(type(verdict).__name__ for verdict in verdicts) == ["Done", "Known"]
        totals = one.totals()
    assert totals.blobs == 12
    assert totals.outstanding == VOUCHER.amount - 12 * TARIFF.insert


async def test_a_deadlock_is_tried_again(
    url: str, cluster: Cluster, failures: Counter[str]
) -> None:
    """A stranger holds the second of two blobs, and wants the first. (PostgreSQL looks once, so
    long after a wait began: by then the stranger must wait too.)"""
    first, second = sorted(("x", "y"), key=key)
    async with opened(f"{url}%20-cdeadlock_timeout%3D1s") as ledger:
        await fund(ledger)
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
        await ledger.apply(transaction("b", insert("y"), "s3", "s4"))
        deletions = [
            transaction("c", delete(first), "s5", "s6"),
            transaction("d", delete(second), "s7", "s8"),
        ]
        with psycopg.connect(url) as stranger:
            stranger.execute("SET deadlock_timeout = '60s'")
            lock = "SELECT 1 FROM blob WHERE key = %s FOR UPDATE"
            stranger.execute(lock, (key(second),))

            async def want_the_other() -> None:
                waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                while cluster.execute(waits) == [(0,)]:
                    await trio.sleep(0.005)
                await trio.to_thread.run_sync(stranger.execute, lock, (key(first),))
                stranger.rollback()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(want_the_other)
                verdicts = await apply_all([ledger], deletions)
        assert failures["40P01"] == 1
        assert {outcome(verdict) for _, verdict in verdicts} == {Outcome.DELETED}
        assert ledger.totals().blobs == 0


ERRORS: list[Callable[[str], psycopg.Error]] = [
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.StatementCompletionUnknown,
    errors.AdminShutdown,
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("committed", [False, True])
async def test_whatever_a_commit_is_said_to_be_it_is_performed_once(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[str], psycopg.Error],
    committed: bool,
) -> None:
    """It fails three times, before the first statement or after COMMIT."""
    write, left = postgresql_batch.write, [3]

    def failing(connection: Any, jobs: Sequence[Job]) -> tuple[Sequence[Result], int]:
        if left[0] == 0:
            return write(connection, jobs)
        left[0] -= 1
        if committed:
            write(connection, jobs)
        raise error("injected")

    async with opened(url) as ledger:
        await fund(ledger)
        monkeypatch.setattr(postgresql_batch, "write", failing)
        one = transaction("a", insert("x"), "s1", "s2")
        verdict = await ledger.apply(one)
        assert left == [0]
        if committed:
            assert isinstance(verdict, Known)
            assert [(fact.fingerprint, fact.issued) for fact in verdict.facts] == [
                (one.fingerprint, one.issued)
            ]
        else:
            assert isinstance(verdict, Done)
        totals = ledger.totals()
    assert (totals.requests, totals.serials, totals.blobs) == (2, 2, 1)
    assert totals.outstanding == VOUCHER.amount - TARIFF.insert
