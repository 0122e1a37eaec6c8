"""Looking after a server: check, backup, restore, migrate, income, by the real commands."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import trio

from hpkvd import config, custody
from hpkvd.commands import serve
from hpkvd.ledger import LedgerBusy, LedgerError, urls
from hpkvd.ledger.rows import copy
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.ledger.sqlite_rows import SqliteRows
from hpkvd.metrics import Meter
from hpkvfs.protocol.messages import Done, Outcome, Spent
from tests.ports import own_port
from tests.server.customers import funded, status
from tests.server.ledgers import fund, insert, opened, transaction
from tests.server.postgres import PASSWORD, Cluster
from tests.server.support import ROOT, Purse, ServerProcess, hpkvd, new_blob, new_key


@pytest.fixture(params=["sqlite", "postgresql"])
def data(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with a ledger of either engine."""
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        monkeypatch.setenv("HPKVD_LEDGER", cluster.new_url())
    made = hpkvd("init", data=tmp_path / "data")
    monkeypatch.delenv("HPKVD_LEDGER", raising=False)
    assert made.returncode == 0, made.stderr
    return tmp_path / "data"


def stored(server: ServerProcess, purse: Purse) -> bytes:
    key, blob = new_key().public, new_blob()
    purchase = purse.insert(key, blob)
    assert purse.settle(purchase, server.ask(purchase.frame)).fact.outcome is Outcome.INSERTED
    return key


def test_a_backup_taken_while_serving_becomes_a_server(data: Path, tmp_path: Path) -> None:
    copied, again = tmp_path / "copy", tmp_path / "again"
    with ServerProcess(data) as server:
        purse = funded(server, 1000)
        parameters = server.parameters()
        key = stored(server, purse)
        result = hpkvd("backup", str(copied), data=data)
        assert result.returncode == 0, result.stderr
        spent = purse.look_up(key)  # after the backup
        assert isinstance(server.ask(spent.frame), Done)
        checked = hpkvd("check", data=data)
        assert (checked.returncode, checked.stdout) == (0, "the ledger is as it should be\n")
    files = [path for path in copied.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert {path.name for path in files} >= {"identity", "ledger.sqlite", "hpkvd.toml"}
    assert hpkvd("backup", str(copied), data=data).returncode == os.EX_CANTCREAT

    ledger = f"sqlite://{again}/ledger.sqlite"
    refused = hpkvd("restore", str(copied), "--ledger", ledger, data=again)
    assert refused.returncode == 1
    assert "can be spent again" in refused.stderr
    restored = hpkvd("restore", str(copied), "--yes", "--ledger", ledger, data=again)
    assert restored.returncode == 0, restored.stderr
    assert hpkvd("check", "--ledger", ledger, data=again).returncode == 0
    with ServerProcess(again, "--ledger", ledger) as server:
        assert server.parameters() == parameters
        # What the warning is about: what was spent after the backup is spent again.
        assert isinstance(server.ask(spent.frame), Done)


def order_on_disk(path: Path) -> list[bytes]:
    """The keys of all blobs, in the order of the pages that they are on."""
    with closing(sqlite3.connect(path)) as ledger:
        ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        keys = [key for (key,) in ledger.execute("SELECT key FROM blob ORDER BY id")]
        begun = "SELECT pageno FROM dbstat WHERE name = 'blob' AND path LIKE '%+000000'"
        pages = [page for (page,) in ledger.execute(f"{begun} ORDER BY path")]
    return [key for _, key in sorted(zip(pages, keys, strict=True))]


def agreement(one: list[bytes], other: list[bytes]) -> float:
    """Spearman's rank correlation; by chance within 5 / sqrt(len - 1)."""
    rank, size = {key: at for at, key in enumerate(other)}, len(one)
    squares = sum((at - rank[key]) ** 2 for at, key in enumerate(one))
    return 1 - 6 * squares / (size * (size**2 - 1))


def add_blobs(path: Path, count: int) -> list[bytes]:
    """Their keys, in the order in which they come."""
    keys = [os.urandom(33) for _ in range(count)]
    with closing(sqlite3.connect(path, isolation_level=None)) as ledger:
        ledger.execute("PRAGMA synchronous = OFF")
        for key in keys:
            row = (key, bytes(32), new_blob())
            ledger.execute("INSERT INTO blob VALUES (random(), ?, ?, ?)", row)
    return keys


def test_a_copy_does_not_tell_what_came_first(tmp_path: Path) -> None:
    path, copied = tmp_path / "ledger.sqlite", tmp_path / "copy"
    SqliteLedger.create(path)
    came = add_blobs(path, 200)
    assert agreement(came, order_on_disk(path)) > 0.99  # the negative control
    custody._copy_file(path, copied, lambda done, total: None)
    assert abs(agreement(came, order_on_disk(copied))) < 0.36
    assert copied.stat().st_mode & 0o777 == 0o600
    with closing(SqliteLedger(copied)) as ledger:
        assert ledger._write.execute("PRAGMA journal_mode").fetchone() == ("wal",)


class Endless(Exception):
    pass


def test_a_copy_ends_while_others_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two steps of it somebody does."""
    monkeypatch.setattr(custody, "TELL_STEPS", 100)
    path, copied, steps = tmp_path / "ledger.sqlite", tmp_path / "copy", 0
    SqliteLedger.create(path)
    add_blobs(path, 40)

    def written(*_: int) -> None:
        nonlocal steps
        steps += 1
        add_blobs(path, 1)
        if steps == 100:
            raise Endless

    custody._copy_file(path, copied, written)
    assert 3 < steps < 100
    with closing(sqlite3.connect(copied)) as ledger:
        assert ledger.execute("SELECT count(*) FROM blob").fetchone() == (40,)
    backup = closing(sqlite3.connect(path)), closing(sqlite3.connect(tmp_path / "other"))
    with backup[0] as ours, backup[1] as theirs, pytest.raises(Endless):  # the negative control
        ours.backup(theirs, pages=64, progress=written, sleep=0.0)


def test_a_ledger_moves_there_and_back_and_serves_only_where_it_is(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    here, there = f"sqlite://{data}/ledger.sqlite", cluster.new_url()
    back = f"sqlite://{data}/back.sqlite"
    monkeypatch.setenv("THERE", there)
    with ServerProcess(data) as server:
        purse = funded(server, 1000)
        key = stored(server, purse)
        pair = list(purse.held)
        spent = purse.look_up(key)
        done = server.ask(spent.frame)
        assert isinstance(done, Done)
        before = status(server)
        busy = hpkvd_plain("migrate", here, "env:THERE")
        assert (busy[0], "stop it first" in busy[1]) == (os.EX_TEMPFAIL, True)
    assert hpkvd_plain("migrate", here, "env:THERE") == (0, "")
    refused = hpkvd("serve", data=data)
    assert refused.returncode == os.EX_IOERR
    assert "moved elsewhere" in refused.stderr
    settings = data / "hpkvd.toml"
    settings.write_text(settings.read_text().replace('ledger = ""', f'ledger = "{there}"'))
    with ServerProcess(data) as server:
        assert status(server) == before | {"ledger": "PostgreSQL"}
        purse.held = pair
        reply = server.ask(purse.look_up(key).frame)
        assert isinstance(reply, Spent)
        assert reply.facts[0].issued == done.issued
        assert hpkvd_plain("migrate", "env:THERE", back)[0] == os.EX_TEMPFAIL
    assert hpkvd_plain("migrate", "env:THERE", back)[0] == 0
    assert "moved elsewhere" in hpkvd("status", data=data).stderr
    assert hpkvd("check", "--ledger", back, data=data).returncode == 0
    moved = hpkvd("status", "--ledger", back, "--json", data=data)
    assert json.loads(moved.stdout) == before | {"ledger": f"SQLite, {data}/back.sqlite"}


def hpkvd_plain(*arguments: str) -> tuple[int, str]:
    """A command that has no --data; what it tells but its progress, which a slow machine shows."""
    result = subprocess.run(
        [sys.executable, "-m", "hpkvd", *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    told = result.stderr.splitlines(keepends=True)
    return result.returncode, "".join(line for line in told if not line.endswith(" %\n"))


async def test_moving_that_was_cut_short_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    source = f"sqlite://{tmp_path}/ledger.sqlite"
    SqliteLedger.create(tmp_path / "ledger.sqlite")
    async with opened(source) as ledger:
        await fund(ledger)
        for number in range(8):
            what = f"{number}"
            await ledger.apply(transaction(what, insert(what), f"s{what}", f"t{what}"))
        before = ledger.totals()
    target = cluster.new_url()

    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done > 10:
            raise Cut

    with pytest.raises(Cut):
        custody.migrate(source, target, cut)
    with pytest.raises(LedgerError, match="not complete"):
        async with opened(target):
            pass
    async with opened(source) as ledger:  # still here
        assert ledger.totals() == before
    custody.migrate(source, target, lambda done, total: None)
    async with opened(target) as ledger:
        assert ledger.totals() == before
        assert await ledger.read(insert("3").key) == insert("3").blob


async def test_moving_that_ended_before_the_old_ledger_was_disabled_goes_on(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = f"sqlite://{tmp_path}/ledger.sqlite", cluster.new_url()
    SqliteLedger.create(tmp_path / "ledger.sqlite")
    async with opened(source) as ledger:
        await fund(ledger)

    class Killed(Exception):
        pass

    def killed(_: str) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(custody, "_retire", killed)
        custody.migrate(source, target, lambda done, total: None)
    other = f"sqlite://{tmp_path}/other.sqlite"
    SqliteLedger.create(tmp_path / "other.sqlite")
    with pytest.raises(LedgerError, match="not the original"):  # nor is another one disabled
        custody.migrate(other, target, lambda done, total: None)
    async with opened(other):
        pass
    custody.migrate(source, target, lambda done, total: None)
    with pytest.raises(LedgerError, match="moved elsewhere"):
        async with opened(source):
            pass
    async with opened(target):
        pass


def test_a_restoration_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    saved, data = tmp_path / "saved", tmp_path / "data"
    assert hpkvd("init", data=tmp_path / "old").returncode == 0
    assert hpkvd("backup", str(saved), data=tmp_path / "old").returncode == 0
    away = f"postgresql://keeper@127.0.0.1:{own_port()}/x"
    failed = hpkvd("restore", "--yes", "--ledger", away, str(saved), data=data)
    assert failed.returncode == os.EX_TEMPFAIL
    assert hpkvd("restore", "--yes", str(saved), data=data).returncode == 0
    assert hpkvd("check", data=data).returncode == 0


async def test_a_server_whose_database_was_away_does_not_go_on_with_a_ledger_that_moved(
    tmp_path: Path, cluster: Cluster
) -> None:
    url = cluster.new_url()
    urls.create(url)
    async with opened(url) as ledger:
        await fund(ledger)
        cluster.stop()
        cluster.start()
        custody.migrate(url, f"sqlite://{tmp_path}/there.sqlite", lambda done, total: None)
        for _ in range(2):
            with pytest.raises(LedgerError, match="moved elsewhere"):
                await ledger.apply(transaction("late", None, "s1", "s2"))


async def test_a_server_that_starts_opens_nothing_that_could_still_be_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    here, there = f"sqlite://{data}/ledger.sqlite", f"sqlite://{tmp_path}/there.sqlite"

    class Opened(Exception):
        pass

    def opening(*_: object) -> None:
        with pytest.raises(LedgerBusy, match="a server uses this ledger"):
            custody.migrate(here, there, lambda done, total: None)
        raise Opened

    monkeypatch.setattr(serve, "open_ledger", opening)
    with pytest.raises(Opened):
        await serve._answer(data, config.load(data), None, [], Meter(), trio.Event(), lambda: None)


async def test_a_copy_that_differs_is_not_taken_for_the_original(tmp_path: Path) -> None:
    for name in ("one", "other"):
        SqliteLedger.create(tmp_path / name)
    async with opened(f"sqlite://{tmp_path}/one") as ledger:
        await fund(ledger)
    async with opened(f"sqlite://{tmp_path}/other") as ledger:
        await fund(ledger)
        await ledger.apply(transaction("a", None, "s1", "s2"))
    with pytest.raises(LedgerError, match="not the original"):
        copy(SqliteRows(tmp_path / "one"), SqliteRows(tmp_path / "other"), lambda a, b: None)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("UPDATE blob SET blob = zeroblob(16433)", "1 blobs are damaged"),
        ("DELETE FROM blob", "the books have 1 blobs and the table has 0"),
        ("DELETE FROM request WHERE operation = 4", "2 spent serials belong to no request"),
        ("DELETE FROM serial WHERE serial = (SELECT max(serial) FROM serial)", "than two"),
        ("UPDATE request SET delta = -9 WHERE operation = 4", "requests add up to 9"),
    ],
)
async def test_check_finds_what_is_wrong(tmp_path: Path, damage: str, told: str) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    async with opened(f"sqlite://{data}/ledger.sqlite") as ledger:
        await fund(ledger)
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
    connection = sqlite3.connect(data / "ledger.sqlite")
    connection.execute(damage)
    connection.commit()
    connection.close()
    result = hpkvd("check", "--json", data=data)
    assert result.returncode == os.EX_DATAERR
    assert any(told in problem for problem in json.loads(result.stdout)["problems"])


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A data directory with an empty ledger in SQLite."""
    assert hpkvd("init", data=tmp_path / "data").returncode == 0
    return tmp_path / "data"


def test_a_check_says_on_a_terminal_what_takes_long(kept: Path) -> None:
    def told(*options: str) -> str:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "hpkvd", "check", *options, "--data", str(kept)]
        subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
            stdout=subprocess.DEVNULL, stderr=theirs, timeout=60, check=True,
        )  # fmt: skip
        os.write(theirs, b"end\n")  # or reading nothing would wait
        with open(ours, closefd=True) as terminal:
            shown = terminal.readline()
        os.close(theirs)
        return shown

    assert "every page and index of the file" in told()
    assert told("--quick") == "end\n"
    assert hpkvd("check", data=kept).stderr == ""


def test_a_damaged_file_is_one_sentence_and_half_a_backup_is_none(
    kept: Path, tmp_path: Path
) -> None:
    path, copied = kept / "ledger.sqlite", tmp_path / "copy"
    with closing(sqlite3.connect(path)) as ledger:
        (page,) = ledger.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'serial'"
        ).fetchone()
        (size,) = ledger.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        whole = file.read(size)
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    found = hpkvd("check", data=kept)
    assert (found.returncode, found.stdout.count("\n")) == (os.EX_DATAERR, 1)
    assert "the file is damaged" in found.stdout
    checked = hpkvd("check", "--quick", data=kept)
    assert (checked.returncode, checked.stdout) == (os.EX_IOERR, "")
    assert (
        checked.stderr == "hpkvd: the ledger failed (SQLITE_CORRUPT); check the disk and its file\n"
    )
    failed = hpkvd("backup", str(copied), data=kept)
    assert failed.returncode == os.EX_IOERR
    assert not copied.exists()
    with path.open("r+b") as file:  # repaired, under the same name
        file.seek((page - 1) * size)
        file.write(whole)
    assert hpkvd("backup", str(copied), data=kept).returncode == 0


async def test_an_index_that_has_lost_a_row_is_found(kept: Path) -> None:
    async with opened(f"sqlite://{kept}/ledger.sqlite") as ledger:
        await fund(ledger)
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
    assert hpkvd("check", data=kept).returncode == 0
    with closing(sqlite3.connect(kept / "ledger.sqlite", isolation_level=None)) as ledger_file:
        ledger_file.execute("PRAGMA writable_schema = ON")
        ledger_file.execute(
            "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master"
            " WHERE name = 'sqlite_autoindex_entry_1') WHERE name = 'sqlite_autoindex_blob_1'"
        )
    found = hpkvd("check", data=kept)
    assert (found.returncode, "the file is damaged" in found.stdout) == (os.EX_DATAERR, True)


def test_a_backup_is_not_part_of_what_it_copies(kept: Path) -> None:
    inside = hpkvd("backup", str(kept / "copy"), data=kept)
    assert (inside.returncode, (kept / "copy").exists()) == (os.EX_CANTCREAT, False)
    assert "name one outside" in inside.stderr


def test_of_a_tor_of_our_own_only_its_settings_are_copied(kept: Path, tmp_path: Path) -> None:
    (kept / "tor" / "service").mkdir(parents=True)
    for name in ("torrc", "state", "service/hs_ed25519_secret_key"):
        (kept / "tor" / name).write_text(name)
    assert hpkvd("backup", str(tmp_path / "copy"), data=kept).returncode == 0
    assert [path.name for path in (tmp_path / "copy" / "tor").iterdir()] == ["torrc"]


def test_what_is_no_backup_is_not_restored(kept: Path, tmp_path: Path) -> None:
    result = hpkvd("restore", "--yes", str(kept / "epochs"), data=tmp_path / "new")
    assert result.returncode == os.EX_NOINPUT
    assert "no backup" in result.stderr
    assert "init" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_who_restores_into_another_ledger_is_told_to_name_it(kept: Path, tmp_path: Path) -> None:
    copied, url = str(tmp_path / "copy"), f"sqlite://{tmp_path}/other.sqlite"
    assert hpkvd("backup", copied, data=kept).returncode == 0
    elsewhere = hpkvd("restore", "--yes", "--ledger", url, copied, data=tmp_path / "one")
    assert elsewhere.stdout.endswith("; set `ledger` in hpkvd.toml\n")
    as_before = hpkvd("restore", "--yes", copied, data=tmp_path / "two")
    assert (as_before.returncode, "set `ledger`" in as_before.stdout) == (0, False)


@pytest.mark.parametrize("price", ["nan", "inf", "-1"])
def test_income_at_no_price_at_all_is_a_wrong_command_line(kept: Path, price: str) -> None:
    result = hpkvd("income", "--json", "--price", price, data=kept)
    assert (result.returncode, result.stdout) == (2, "")
    assert "price" in result.stderr


async def test_income_adds_up(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    async with opened(f"sqlite://{data}/ledger.sqlite") as ledger:
        await fund(ledger)
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
    report = json.loads(hpkvd("income", "--price", "0.01", "--json", data=data).stdout)
    assert report["sold"] == {"tokens": 1_000_000, "money": 10_000.0}
    assert report["earned"] == {"tokens": 10, "money": 0.1}
    assert report["owed"]["tokens"] == 999_990
    assert "earned" in hpkvd("income", data=data).stdout


def test_migrating_what_is_not_there_names_it_and_leaves_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "a", tmp_path / "no" / "a"):
        code, told = hpkvd_plain("migrate", f"sqlite://{path}", f"sqlite://{tmp_path}/b")
        assert (code, told.startswith(f"hpkvd: there is no ledger at {path};")) == (74, True)
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_taken_from_the_command_line(cluster: Cluster, tmp_path: Path) -> None:
    code, told = hpkvd_plain("migrate", f"sqlite://{tmp_path}/a", cluster.url)
    assert (code, "env:NAME" in told, PASSWORD in told) == (2, True, False)
