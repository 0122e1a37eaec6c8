"""`hpkvd plan`: figures follow from each other, from the tariff, and from what was measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpkvd import measure
from hpkvd.cli import main
from hpkvd.plan import SOURCES, Constants, Demand, Plan, changed, plan
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.types import BLOB_SIZE
from tests.server.support import hpkvd
from tools.benchmarks.__main__ import BENCHMARKS

GIB = 2**30


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", "--data", "/nonexistent", *arguments])


def report(*arguments: str) -> Any:
    result = run("--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def planned(vaults: int, engine: str = "postgresql", **demand: Any) -> Plan:
    return plan(Demand(vaults, **demand), Tariff(), Constants(), engine)


def test_ten_times_the_vaults_take_ten_times_as_much() -> None:
    one, ten = planned(100_000), planned(1_000_000)
    for part in ("requests", "storage", "bandwidth", "income"):
        small, large = asdict(getattr(one, part)), asdict(getattr(ten, part))
        for name, value in small.items():
            assert large[name] == pytest.approx(10 * value, rel=1e-3), name
    assert ten.shards.databases == pytest.approx(10 * one.shards.databases, rel=0.1)


def test_one_database_has_it_all_until_its_bytes_or_its_commits_are_too_many() -> None:
    assert planned(100).shards.databases == 1
    many_bytes = planned(100, bytes_each=2000 * GIB).shards
    assert many_bytes.key > 10 and many_bytes.serial == 1
    slow = replace(Constants(), postgresql_transactions_s=600.0)  # else bytes come first
    most = slow.postgresql_transactions_s * 0.6 * 86_400 / 200 / 3
    calm, busy = (
        plan(Demand(round(most * by), bytes_each=0), Tariff(), slow, "postgresql").shards
        for by in (0.99, 1.02)
    )
    assert (calm.databases, calm.commits_a_request) == (1, 1)
    assert busy.serial > 1 and busy.commits_a_request > 3
    assert "commits" in busy.why


def test_the_internet_can_be_planned_for() -> None:
    internet = planned(10**8)
    assert internet.storage.blobs * BLOB_SIZE > 10**8 * GIB
    assert internet.shards.key * internet.demand.shard_bytes > internet.storage.blob_bytes
    kept = internet.shards.serial * internet.demand.shard_bytes
    assert kept > internet.storage.spent_bytes_most
    a_day = 10**8 * 200 / 86_400 * internet.demand.peak
    assert internet.cores.proofs > a_day * Constants().proof_ms / 1000


def test_serials_grow_by_the_day_and_go_with_their_epoch() -> None:
    storage = planned(1000, keep=4, days=90.0).storage
    assert storage.spent_bytes_most == pytest.approx(360 * storage.spent_bytes_a_day, rel=1e-6)
    assert storage.spent_bytes_most == pytest.approx(4 * storage.dropped_bytes_an_epoch, rel=1e-6)
    shorter = planned(1000, keep=2, days=30.0).storage
    assert shorter.spent_bytes_most < storage.spent_bytes_most / 5
    assert shorter.blob_bytes == storage.blob_bytes


def test_income_is_what_the_tariff_takes_less_what_it_gives_back() -> None:
    demand = Demand(10, bytes_each=0, operations=100, inserts=0.3, deletes=0.2, days=100.0)
    income = plan(demand, Tariff(2, 20, 15, 20), Constants(), "postgresql").income
    entries_a_day = 10 * 20 / 100
    assert income.charged_a_day == 500 * 2 + 300 * 20 + entries_a_day
    assert income.refunded_a_day == 200 * 15
    assert income.earned_a_year == (income.charged_a_day - income.refunded_a_day) * 365


def test_prices_come_from_the_settings_or_the_line(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", "--insert", "30", "--refund", "5", data=data).returncode == 0
    settings = data / "hpkvd.toml"
    settings.write_text(settings.read_text().replace("keep = 4", "keep = 2"))
    told = hpkvd("plan", "--vaults", "10", "--price", "0.5", "--json", data=data)
    planned = json.loads(told.stdout)
    assert (planned["tariff"]["insert"], planned["tariff"]["refund"]) == (30, 5)
    (only,) = planned["plans"]
    assert only["demand"]["keep"] == 2
    assert only["money"]["owed"] == only["income"]["owed"] * 0.5
    assert report("--insert", "7", "--refund", "1")["tariff"]["insert"] == 7


def test_people_get_a_column_for_each_number_of_vaults() -> None:
    result = run("--price", "0.0004", "--currency", "EUR")
    for wanted in ("storage, all copies", "shards by serial", "money earned a year EUR"):
        assert wanted in result.output
    (vaults,) = (line for line in result.output.splitlines() if line.startswith("vaults"))
    assert vaults.split() == ["vaults", "100", "10", "k", "1", "M", "100", "M"]


WRONG = [
    (("--vaults", "many"), "`many` is no number"),
    (("--vaults", "0"), "vaults are 1 or more"),
    (("--bytes", "-1"), "`-1` is no number"),
    (("--bytes", "1iB"), "`1iB` is no number"),
    (("--inserts", "0.8", "--deletes", "0.3"), "together too"),
    (("--inserts", "nan"), "the shares"),
    (("--peak", "0.5"), "a peak is 1 or more"),
    (("--busy", "0"), "what may be busy"),
    (("--replicas", "0"), "copies"),
    (("--price", "nan"), "price"),
    (("--replicas", "1" + 400 * "0"), "cannot be added up"),
    (("--shard", "1"), "a shard has 1 GiB"),
    (("--insert", "5", "--refund", "6"), "refund"),
    (("--engine", "sqlite", "--vaults", "10M"), "SQLite is one file"),
    (("--engine", "sqlite", "--vaults", "10", "--replicas", "2"), "SQLite is one file"),
]


@pytest.mark.parametrize(("arguments", "told"), WRONG)
def test_what_makes_no_sense_is_refused_in_one_sentence(
    arguments: tuple[str, ...], told: str
) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert told in result.output


def test_constants_can_be_those_of_another_machine(tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"proof_ms": 2 * Constants().proof_ms}))
    twice = report("--vaults", "1M", "--constants", str(file))["plans"][0]["cores"]["proofs"]
    assert twice == pytest.approx(2 * planned(10**6).cores.proofs)
    for content, told in (
        ('{"proof": 1}', "no constant `proof`"),
        ('{"proof_ms": 0}', "above 0"),
        ("[1]", "not a JSON object"),
        ("{", "not a JSON object"),
    ):
        file.write_text(content)
        result = run("--constants", str(file))
        assert (result.exit_code, result.output.count("\n")) == (2, 1)
        assert told in result.output
    assert run("--constants", str(tmp_path / "none")).exit_code == os.EX_NOINPUT


def test_every_constant_says_how_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PROOFS", 3)
    monkeypatch.setattr(measure, "REQUESTS", 1000)
    monkeypatch.setattr(measure, "BLOBS", 500)
    result = run("--measure", "--vaults", "1k")
    assert result.exit_code == 0
    for one in fields(Constants):
        assert one.name in result.output
        command = SOURCES[one.name][1].split()
        assert command[:2] == ["hpkvd", "plan"] or command[1] in BENCHMARKS, command


def test_what_this_machine_measures_is_near_what_is_written_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of bytes, which no load of the machine changes: a schema that grows must be noticed."""
    monkeypatch.setattr(measure, "PROOFS", 1)
    written, measured = Constants(), changed(Constants(), measure.constants())
    for name in ("sqlite_blob_bytes", "sqlite_request_bytes", "sqlite_entry_bytes"):
        assert getattr(measured, name) == pytest.approx(getattr(written, name), rel=0.05), name
    assert replace(measured, proof_ms=written.proof_ms) != written
