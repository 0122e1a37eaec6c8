"""Too much, by the real command: too many at a time, a full store, a full disk."""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from hpkvfs.protocol.messages import Outcome, Reason, Refused
from tests.server.customers import funded
from tests.server.postgres import Cluster
from tests.server.support import Purse, ServerProcess, hpkvd, new_blob, new_key


@pytest.fixture
def data(tmp_path: Path) -> Path:
    assert hpkvd("init", data=tmp_path / "data").returncode == 0
    return tmp_path / "data"


def setting(data: Path, name: str, value: int) -> None:
    path = data / "hpkvd.toml"
    lines = path.read_text().splitlines()
    assert any(line.startswith(f"{name} = ") for line in lines)
    changed = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in lines]
    path.write_text("\n".join(changed))


def pay_for_all_but_insertions(server: ServerProcess, purse: Purse) -> None:
    """With something stored, the server has become full: refused as that, and nothing is spent."""
    key, blob = new_key(), new_blob()
    held = purse.amount, list(purse.held)
    refused = purse.insert(key.public, blob)
    assert server.ask(refused.frame) == Refused(Reason.FULL)
    purse.held = held[1]
    purchase = purse.look_up(key.public)
    done = purse.settle(purchase, server.ask(purchase.frame))
    assert done.fact.outcome is Outcome.ABSENT
    assert purse.amount == held[0] - 1


def stored_then_full(data: Path, make_full: Callable[[], None]) -> None:
    key, blob = new_key(), new_blob()
    with ServerProcess(data, workers=1) as server:
        purse = funded(server, 1000)
        purchase = purse.insert(key.public, blob)
        purse.settle(purchase, server.ask(purchase.frame))
    make_full()
    with ServerProcess(data, workers=1) as server:
        pay_for_all_but_insertions(server, purse)
        purchase = purse.look_up(key.public)
        assert purse.settle(purchase, server.ask(purchase.frame)).value == blob
        before = purse.amount
        purchase = purse.delete(key, hashlib.sha256(blob).digest())
        purse.settle(purchase, server.ask(purchase.frame))
        assert purse.amount == before + 8
        code, told = server.stop()
    assert code == 0
    assert told == "hpkvd: stopping; the last requests are being answered\nhpkvd: stopped\n"


def test_with_the_disk_as_good_as_full_reads_and_deletes_go_on(data: Path) -> None:
    stored_then_full(data, lambda: setting(data, "reserve_mib", 2**40))


def test_a_store_of_its_greatest_size_reads_and_deletes(data: Path) -> None:
    def fill() -> None:
        setting(data, "max_gib", 1)
        with closing(sqlite3.connect(data / "ledger.sqlite", isolation_level=None)) as ledger:
            ledger.execute("UPDATE books SET blobs = 2000000")

    stored_then_full(data, fill)


def test_so_does_one_in_postgresql(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, data = cluster.new_url(), tmp_path / "data"
    monkeypatch.setenv("HPKVD_LEDGER", url)
    assert hpkvd("init", data=data).returncode == 0
    schema = url.rpartition("%3D")[2]

    def fill() -> None:
        setting(data, "max_gib", 1)
        cluster.execute(f"UPDATE {schema}.books SET blobs = 2000000")

    stored_then_full(data, fill)


def test_beyond_its_queue_a_server_says_busy_and_spends_nothing(data: Path) -> None:
    """Who was told so and comes back is served; what he had still pays."""
    setting(data, "queue", 1)
    with ServerProcess(data, workers=1) as server, ThreadPoolExecutor(6) as crowd:
        purses = [funded(server, 100) for _ in range(6)]
        purchases = [purse.insert(new_key().public, new_blob()) for purse in purses]
        turned_away = 0
        end = time.monotonic() + 60
        while not turned_away:
            assert time.monotonic() < end
            replies = list(crowd.map(server.ask, [one.frame for one in purchases]))
            busy = [reply for reply in replies if isinstance(reply, Refused)]
            assert all(reply.reason is Reason.BUSY and reply.retry_after for reply in busy)
            turned_away += len(busy)
        for purse, purchase in zip(purses, purchases, strict=True):
            reply = server.ask(purchase.frame)
            purse.settle(purchase, reply)
        assert [purse.amount for purse in purses] == [90] * 6


def test_connections_beyond_the_limit_wait_for_a_place(data: Path) -> None:
    """Idle ones have theirs for `seconds`; then those who wait are served."""
    setting(data, "connections", 2)
    path = data / "hpkvd.toml"
    text = path.read_text()
    path.write_text("\n".join(
        "seconds = 1.0" if line.startswith("seconds = ") else line for line in text.splitlines()
    ))  # fmt: skip
    with ServerProcess(data, workers=1) as server:
        idle = [socket.create_connection(server.address) for _ in range(4)]
        assert server.parameters().number == 1
        for connection in idle:
            connection.close()
        assert server.stop()[0] == os.EX_OK
