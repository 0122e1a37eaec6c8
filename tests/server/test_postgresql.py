"""What the ledger in PostgreSQL has of its own: several servers, and a primary that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio

from hpkvd.ledger import LedgerBusy, LedgerError, postgresql_connection
from hpkvd.ledger.postgresql import PostgresqlLedger
from hpkvd.ledger.urls import create
from hpkvfs.protocol.messages import Done, Reply, Spent
from hpkvfs.protocol.voucher import Voucher
from tests.server.customers import Crowd, funded, status, workers
from tests.server.ledgers import fund, insert, opened, transaction
from tests.server.postgres import PASSWORD, Cluster
from tests.server.support import Purchase, Purse, ServerProcess, hpkvd, new_blob, new_key, until


@pytest.fixture
def url(cluster: Cluster) -> str:
    return cluster.new_url()


@pytest.fixture
def data(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPKVD_LEDGER", url)
    made = hpkvd("init", data=tmp_path / "data")
    assert made.returncode == 0, made.stderr
    monkeypatch.delenv("HPKVD_LEDGER")
    return tmp_path / "data"


def _asked_at_once(
    pool: ThreadPoolExecutor, servers: Sequence[ServerProcess], purchases: Sequence[Purchase]
) -> list[Reply]:
    return list(pool.map(lambda server, one: server.ask(one.frame), servers, purchases))


def test_two_servers_on_one_database_spend_nothing_twice(data: Path) -> None:
    """The same credentials, shown to both at once, in different requests."""
    with ServerProcess(data) as one, ServerProcess(data) as other:
        purse = funded(one, 100_000)
        performed = 0
        with ThreadPoolExecutor(2) as pool:
            for _ in range(12):
                pair = list(purse.held)
                purchases = []
                for _ in range(2):
                    purse.held = list(pair)
                    purchases.append(purse.insert(new_key().public, new_blob()))
                replies: list[Reply] = list(
                    pool.map(
                        lambda p: p[0].ask(p[1].frame), zip((one, other), purchases, strict=True)
                    )
                )
                winners = [reply for reply in replies if isinstance(reply, Done)]
                losers = [reply for reply in replies if isinstance(reply, Spent)]
                assert (len(winners), len(losers)) == (1, 1)
                assert losers[0].facts[0].issued == winners[0].issued
                winner = purchases[replies.index(winners[0])]
                purse.held = list(winner.finish(winners[0]))
                performed += 1
        books = status(one)
        assert books["blobs"] == performed
        assert books["tokens"]["outstanding"] == purse.amount == 100_000 - 10 * performed


def test_a_voucher_shown_to_two_servers_is_redeemed_at_one(data: Path) -> None:
    with ServerProcess(data) as one, ServerProcess(data) as other, ThreadPoolExecutor(2) as pool:
        made = hpkvd("voucher", "--amount", "50", "--count", "4", data=data)
        for voucher in map(Voucher.parse, made.stdout.split()):
            purses = [Purse(one.parameters()) for _ in range(2)]
            purchases = [purse.redeem(voucher) for purse in purses]
            replies = list(
                pool.map(lambda p: p[0].ask(p[1].frame), zip((one, other), purchases, strict=True))
            )
            assert sum(isinstance(reply, Done) for reply in replies) == 1
        assert status(one)["tokens"]["issued"] == 200


@pytest.fixture
def pair() -> Iterator[tuple[Cluster, Cluster]]:
    """A primary whose commits wait for its standby, and the standby."""
    with Cluster("-csynchronous_standby_names=standby") as primary, Cluster() as standby:
        primary.make()
        primary.start()
        standby.make_standby_of(primary)
        standby.start()
        state = "SELECT sync_state FROM pg_stat_replication"
        until(lambda: primary.execute(state) == [("sync",)])
        yield primary, standby


def test_what_was_acknowledged_survives_the_primary(
    pair: tuple[Cluster, Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load the primary is killed and the standby takes over; the server stays."""
    primary, standby = pair
    both = primary.url.replace(
        f"127.0.0.1:{primary.port}", f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    )
    data = tmp_path / "data"
    monkeypatch.setenv("HPKVD_LEDGER", both)
    assert hpkvd("init", data=data).returncode == 0
    with ServerProcess(data, workers=2) as server:
        with Crowd(server) as crowd:
            crowd.served(15)
            primary.kill()
            standby.promote()
            crowd.served(15)
        crowd.check()


def test_what_a_standby_was_not_waited_for_would_be_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the standby is behind, and the primary commits without it."""
    with Cluster() as primary, Cluster() as standby:
        primary.make()
        primary.start()
        monkeypatch.setenv("HPKVD_LEDGER", primary.url)
        assert hpkvd("init", data=tmp_path / "data").returncode == 0
        with ServerProcess(tmp_path / "data") as server:
            crowd = Crowd(server)
            standby.make_standby_of(primary)
            with crowd:
                crowd.served(15)
        primary.kill()
        standby.start()
        standby.promote()
        monkeypatch.setenv("HPKVD_LEDGER", standby.url)
        with ServerProcess(tmp_path / "data") as server:
            crowd._server = server
            with pytest.raises(AssertionError):
                crowd.check()


async def test_a_lost_connection_is_made_again(url: str, cluster: Cluster) -> None:
    create(url)
    async with opened(url) as ledger:
        await fund(ledger)
        cluster.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'hpkvd serve'"
        )
        assert isinstance(await ledger.apply(transaction("a", insert("x"), "s1", "s2")), Done)
        assert await ledger.read(insert("x").key) == insert("x").blob


async def test_a_database_that_is_away_is_told_of(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_connection, "FAILOVER_SECONDS", 0.2)
    create(url)
    async with opened(url) as ledger:
        monkeypatch.setattr(ledger, "_writer", postgresql_connection.Session(
            "postgresql://nobody@127.0.0.1:1/none", autocommit=False
        ))  # fmt: skip
        with pytest.raises(LedgerBusy, match="does not answer"):
            await ledger.apply(transaction("a", None, "s1", "s2"))


def test_a_ledger_is_made_once_and_known_by_its_schema(url: str) -> None:
    with pytest.raises(LedgerError, match="hpkvd init"):
        PostgresqlLedger(url)
    create(url)
    with pytest.raises(LedgerError, match="already"):
        create(url)
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE hpkvd SET version = version + 1")
    with pytest.raises(LedgerError, match=r"newer hpkvd.*upgrade"):
        PostgresqlLedger(url)


def test_a_ledger_of_before_payments_is_given_their_tables(url: str) -> None:
    create(url)
    with psycopg.connect(url) as connection:
        for table in ("sale", "taking", "sold", "newest"):
            connection.execute(f"DROP TABLE {table}".encode())
        connection.execute("UPDATE hpkvd SET version = 4")
    for _ in range(2):
        ledger = PostgresqlLedger(url)
        assert ledger.totals().cashu_tokens == 0
        ledger.close()


def test_commits_are_durable_whatever_the_database_does_by_default(url: str) -> None:
    create(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER DATABASE postgres SET synchronous_commit = 'off'")
        try:
            with postgresql_connection.connect(url, autocommit=False) as ours:
                assert ours.execute("SHOW synchronous_commit").fetchone() == ("on",)
        finally:
            connection.execute("ALTER DATABASE postgres RESET synchronous_commit")


def test_the_password_is_in_no_command_line_and_no_log(data: Path, url: str) -> None:
    refused = hpkvd("status", "--ledger", url, data=data)
    assert refused.returncode == 2
    assert "HPKVD_LEDGER" in refused.stderr
    assert PASSWORD not in refused.stdout + refused.stderr
    settings = data / "hpkvd.toml"
    settings.write_text(settings.read_text().replace(PASSWORD, "wrong-7c1"))
    failed = hpkvd("status", data=data)
    assert failed.returncode == os.EX_TEMPFAIL
    assert "wrong-7c1" not in failed.stdout + failed.stderr
    settings.write_text(settings.read_text().replace("wrong-7c1", PASSWORD))
    with ServerProcess(data, workers=1) as server:
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        assert PASSWORD not in listed.stdout
        assert PASSWORD not in server.stop()[1]


def test_a_worker_that_dies_while_the_database_is_away_comes_back_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says why in one sentence, without the database's address."""
    with Cluster() as cluster:
        cluster.make()
        cluster.start()
        monkeypatch.setenv("HPKVD_LEDGER", cluster.url)
        assert hpkvd("init", data=tmp_path / "data").returncode == 0
        with ServerProcess(tmp_path / "data", workers=1) as server:
            before = workers(server)
            cluster.kill()
            os.kill(min(before), signal.SIGKILL)
            assert server.process.stderr is not None
            told = ""
            while "could not start; trying again" not in told:
                told += server.process.stderr.readline()
            cluster.start()
            assert server.parameters()
            _, more = server.stop()
    assert "hpkvd: the database cannot be reached" in told
    for unsaid in ("Traceback", str(cluster.port), "127.0.0.1"):
        assert unsaid not in told + more


async def test_a_connection_has_one_thread_at_a_time_also_while_an_epoch_is_retired(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shares one may be cut off in its middle, or read another's answer."""
    create(url)
    held: dict[object, threading.Lock] = {}
    shared: list[object] = []
    run = postgresql_connection.Session.run

    def watched(session: postgresql_connection.Session, work: Callable[[Any], Any]) -> Any:
        lock = held.setdefault(session, threading.Lock())
        if not lock.acquire(blocking=False):
            shared.append(session)
            return run(session, work)
        try:
            time.sleep(0.01)  # long enough to be come upon
            return run(session, work)
        finally:
            lock.release()

    async with opened(url) as ledger:
        await fund(ledger)
        monkeypatch.setattr(postgresql_connection.Session, "run", watched)

        async def read() -> None:
            while not done.cancel_called:
                assert await ledger.read(insert("x").key) is None

        with trio.CancelScope() as done:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for oldest in range(2, 12):
                    await ledger.retire(oldest)
                    assert ledger.oldest_epoch == oldest
                done.cancel()
        with trio.fail_after(60):
            while ledger.totals().requests:
                await trio.sleep(0.01)
    assert len(held) == 2 and not shared
