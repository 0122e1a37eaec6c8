"""The ledger: each thing happens once, as a whole, or not at all.

`ledger` is the contract; whatever implements Ledger and Desk must pass all but the last section.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpkvd.ledger import (
    Change,
    Delete,
    Insert,
    Known,
    LedgerBusy,
    LedgerError,
    LedgerFull,
    Opening,
    Read,
    Redeem,
    StoreEntry,
    Totals,
    Transaction,
    Verdict,
)
from hpkvd.ledger.sqlite import SCHEMA_VERSION, SqliteLedger
from hpkvfs.protocol.messages import Done, Fact, Outcome, Reason, Refused
from hpkvfs.protocol.tariff import Operation, Tariff
from hpkvfs.protocol.voucher import Voucher
from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE

TARIFF = Tariff()
VOUCHER = Voucher(1_000_000, b"v" * 20)
FLOAT = 100_000
OPERATIONS: dict[type[object], Operation] = {
    Read: Operation.LOOK_UP,
    StoreEntry: Operation.STORE_ENTRY,
    Insert: Operation.INSERT,
    Delete: Operation.DELETE,
    Redeem: Operation.ISSUE,
    type(None): Operation.REISSUE,
}


def name(text: str, size: int = 32) -> bytes:
    return hashlib.shake_256(text.encode()).digest(size)


def key(text: str) -> bytes:
    return b"\2" + name(text)


def blob(text: str) -> bytes:
    return name(text) * (BLOB_SIZE // 32) + b"!"


def insert(text: str) -> Insert:
    return Insert(key(text), hashlib.sha256(blob(text)).digest(), blob(text))


def delete(text: str) -> Delete:
    return Delete(key(text), insert(text).digest)


def entry(text: str, counter: int, now: int = 0) -> StoreEntry:
    value = name(text) * (ENTRY_SIZE // 32)
    return StoreEntry(key("entry"), counter, hashlib.sha256(value).digest(), value, 72, now)


def opening(stored: StoreEntry, now: int) -> Opening:
    return Opening(stored.key, stored.digest, now)


def transaction(what: str, change: Change, *serials: str) -> Transaction:
    operation = OPERATIONS[type(change)]
    return Transaction(
        fingerprint=name(what),
        epoch=1,
        operation=operation,
        delta=change.amount if isinstance(change, Redeem) else TARIFF.delta(operation),
        serials=tuple(b"\3" + name(serial) for serial in serials),
        issued=b"issued for " + what.encode(),
        change=change,
    )


def sale() -> Transaction:
    return transaction("sale", Redeem(VOUCHER.digest, VOUCHER.amount))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    SqliteLedger.create(tmp_path / "ledger.sqlite")
    return tmp_path / "ledger.sqlite"


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SqliteLedger]:
    ledger = SqliteLedger(path, reserve=0)
    try:
        async with ledger.serving():
            yield ledger
    finally:
        ledger.close()


@pytest.fixture
async def ledger(path: Path) -> AsyncIterator[SqliteLedger]:
    async with opened(path) as ledger:
        yield ledger


@pytest.fixture
async def funded(ledger: SqliteLedger) -> SqliteLedger:
    ledger.add_vouchers([VOUCHER])
    assert isinstance(await ledger.apply(sale()), Done)
    return ledger


def outcome(verdict: Verdict) -> Outcome | Reason:
    if isinstance(verdict, Done):
        return verdict.fact.outcome
    assert isinstance(verdict, Refused)
    return verdict.reason


async def test_what_is_stored_is_found_until_it_is_deleted(funded: SqliteLedger) -> None:
    assert outcome(await funded.apply(transaction("a", insert("x"), "s1", "s2"))) == (
        Outcome.INSERTED
    )
    found = await funded.apply(transaction("b", Read(key("x")), "s3", "s4"))
    assert found == Done(Fact(Operation.LOOK_UP, Outcome.FOUND, -1), b"issued for b", blob("x"))
    assert outcome(await funded.apply(transaction("c", delete("x"), "s5", "s6"))) == (
        Outcome.DELETED
    )
    assert outcome(await funded.apply(transaction("d", Read(key("x")), "s7", "s8"))) == (
        Outcome.ABSENT
    )
    assert await funded.read(key("x")) is None


async def test_a_repeated_transaction_is_recalled_and_changes_nothing(
    funded: SqliteLedger,
) -> None:
    first = transaction("a", insert("x"), "s1", "s2")
    done = await funded.apply(first)
    assert isinstance(done, Done)
    before = funded.totals()
    again = await funded.apply(first)
    assert isinstance(again, Known)
    (stored,) = again.facts
    assert (stored.fingerprint, stored.fact, stored.issued) == (name("a"), done.fact, done.issued)
    assert await funded.recall(first.fingerprint, first.serials) == again
    assert funded.totals() == before


async def test_serials_of_two_requests_recall_both(funded: SqliteLedger) -> None:
    await funded.apply(transaction("a", None, "s1", "s2"))
    await funded.apply(transaction("b", None, "s3", "s4"))
    both = await funded.apply(transaction("c", insert("x"), "s1", "s3"))
    assert isinstance(both, Known)
    assert {stored.fingerprint for stored in both.facts} == {name("a"), name("b")}
    one = await funded.apply(transaction("d", insert("x"), "s2", "fresh"))
    assert isinstance(one, Known)
    assert [stored.fingerprint for stored in one.facts] == [name("a")]
    assert await funded.read(key("x")) is None
    assert await funded.recall(name("e"), [b"\3" + name("fresh"), b"\3" + name("other")]) is None


REFUSALS: list[tuple[Change, Reason]] = [
    (insert("x"), Reason.KEY_EXISTS),
    (delete("absent"), Reason.KEY_ABSENT),
    (Delete(key("x"), name("another blob")), Reason.DIGEST_MISMATCH),
    (Redeem(name("no voucher"), 5), Reason.UNKNOWN_VOUCHER),
    (Redeem(VOUCHER.digest, VOUCHER.amount), Reason.VOUCHER_SPENT),
    (Redeem(Voucher(5, b"u" * 20).digest, 6), Reason.VOUCHER_AMOUNT),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
async def test_a_refused_transaction_spends_nothing(
    funded: SqliteLedger, change: Change, reason: Reason
) -> None:
    funded.add_vouchers([Voucher(5, b"u" * 20)])
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    before = funded.totals()
    assert await funded.refusal(change) is reason
    refused = transaction("refused", change, "s3", "s4")
    assert outcome(await funded.apply(refused)) is reason
    assert await funded.recall(refused.fingerprint, refused.serials) is None
    assert funded.totals() == before
    assert isinstance(await funded.apply(transaction("b", None, "s3", "s4")), Done)


async def test_an_entry_can_be_opened_until_its_timer_fires_and_is_gone_then(
    funded: SqliteLedger,
) -> None:
    one = entry("one", 1)
    assert outcome(await funded.apply(transaction("a", one, "s1", "s2"))) is Outcome.STORED
    assert funded.totals().entries == 1
    asked = await funded.entry(one.key, 900)
    assert asked is not None and asked.gone_at is None  # asking starts nothing
    opened = await funded.open_entry(opening(one, 1_000))
    assert opened is not None
    assert (opened.counter, opened.value, opened.gone_at) == (1, one.value, 1_073)
    assert await funded.open_entry(opening(one, 1_072)) == opened
    await funded.drop_entries(1_072)
    assert await funded.entry(one.key, 1_072) == opened
    assert await funded.open_entry(opening(one, 1_073)) is None
    assert await funded.entry(one.key, 1_073) is None
    await funded.drop_entries(1_073)
    assert funded.totals().entries == 0


async def test_an_entry_replaced_has_no_timer_and_cannot_be_opened_as_the_old_one(
    funded: SqliteLedger,
) -> None:
    old, new = entry("old", 1), entry("new", 2, now=1_000)
    await funded.apply(transaction("a", old, "s1", "s2"))
    assert await funded.open_entry(opening(old, 1_000)) is not None
    assert outcome(await funded.apply(transaction("b", new, "s3", "s4"))) is Outcome.STORED
    assert await funded.open_entry(opening(old, 1_000)) is None
    stored = await funded.entry(new.key, 9_999)
    assert stored is not None and (stored.value, stored.gone_at) == (new.value, None)
    assert funded.totals().entries == 1


async def test_the_first_opening_is_durable(path: Path) -> None:
    one = entry("one", 1)
    async with opened(path) as ledger:
        ledger.add_vouchers([VOUCHER])
        await ledger.apply(sale())
        await ledger.apply(transaction("a", one, "s1", "s2"))
        await ledger.open_entry(opening(one, 10))
    async with opened(path) as ledger:
        stored = await ledger.entry(one.key, 10)
        assert stored is not None and stored.gone_at == 83


@pytest.mark.parametrize("counter", [1, 2])
async def test_a_counter_that_does_not_grow_is_refused(funded: SqliteLedger, counter: int) -> None:
    await funded.apply(transaction("a", entry("new", 2), "s1", "s2"))
    before = funded.totals()
    late = entry("old", counter)
    assert await funded.refusal(late) is Reason.OLD_COUNTER
    assert outcome(await funded.apply(transaction("b", late, "s3", "s4"))) is Reason.OLD_COUNTER
    assert funded.totals() == before


async def test_an_entry_that_is_gone_is_replaced_whatever_its_counter(
    funded: SqliteLedger,
) -> None:
    await funded.apply(transaction("a", entry("old", 9), "s1", "s2"))
    await funded.open_entry(opening(entry("old", 9), 0))
    again = transaction("b", entry("new", 1, now=73), "s3", "s4")
    assert outcome(await funded.apply(again)) is Outcome.STORED


async def test_a_ledger_without_room_for_entries_is_given_it(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript("DROP TABLE entry; PRAGMA user_version = 1;")
    connection.close()
    async with opened(path) as ledger:
        assert ledger.totals().entries == 0


async def test_of_transactions_that_race_one_is_performed(funded: SqliteLedger) -> None:
    verdicts: list[Verdict] = []

    async def race(one: Transaction) -> None:
        verdicts.append(await funded.apply(one))

    async with trio.open_nursery() as nursery:
        for racer in ("a", "a", "b", "c"):
            nursery.start_soon(race, transaction(racer, insert(racer), "s1", "s2"))
    (done,) = (verdict for verdict in verdicts if isinstance(verdict, Done))
    for verdict in verdicts:
        if isinstance(verdict, Known):
            (stored,) = verdict.facts
            assert stored.issued == done.issued
    assert sum(isinstance(verdict, Known) for verdict in verdicts) == 3
    assert funded.totals().blobs == 1


async def test_of_insertions_under_one_key_one_is_performed(funded: SqliteLedger) -> None:
    outcomes: list[Outcome | Reason] = []

    async def race(number: int) -> None:
        one = transaction(f"r{number}", insert("x"), f"s{number}", f"t{number}")
        outcomes.append(outcome(await funded.apply(one)))

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(race, number)
    assert sorted(outcomes) == [Outcome.INSERTED] + [Reason.KEY_EXISTS] * 9


async def test_a_caller_who_gives_up_is_served_all_the_same(funded: SqliteLedger) -> None:
    one = transaction("a", insert("x"), "s1", "s2")
    with trio.CancelScope() as scope:
        scope.cancel()
        await funded.apply(one)
    with trio.fail_after(5):
        while await funded.recall(one.fingerprint, one.serials) is None:
            await trio.sleep(0.001)
    assert await funded.read(key("x")) == blob("x")


async def test_all_is_there_after_reopening(path: Path) -> None:
    async with opened(path) as ledger:
        ledger.add_vouchers([VOUCHER, Voucher(7, b"w" * 20)])
        await ledger.apply(sale())
        await ledger.apply(transaction("a", insert("x"), "s1", "s2"))
        before = ledger.totals()
    async with opened(path) as ledger:
        assert ledger.totals() == before
        assert await ledger.read(key("x")) == blob("x")
        assert isinstance(await ledger.apply(transaction("b", None, "s1", "s9")), Known)


async def test_the_books_are_those_of_what_happened(funded: SqliteLedger) -> None:
    funded.add_vouchers([Voucher(7, b"w" * 20)])
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    await funded.apply(transaction("b", Read(key("x")), "s3", "s4"))
    await funded.apply(transaction("c", delete("x"), "s5", "s6"))
    await funded.apply(transaction("d", None, "s7", "s8"))
    assert funded.totals() == Totals(
        issued=1_000_000,
        charged=11,
        refunded=8,
        outstanding=999_997,
        requests=5,
        serials=8,
        blobs=0,
        entries=0,
        vouchers=1,
        voucher_amount=7,
    )


changes = st.one_of(
    st.builds(insert, st.sampled_from("xyz")),
    st.builds(delete, st.sampled_from("xyz")),
    st.builds(lambda text: Read(key(text)), st.sampled_from("xyz")),
    st.just(Redeem(VOUCHER.digest, VOUCHER.amount)),
    st.none(),
)
steps = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), changes, st.sampled_from("pqrstu"), st.booleans()),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
def test_whatever_happens_the_books_balance_and_no_serial_is_spent_twice(
    steps: list[tuple[str, Change, str, bool]],
) -> None:
    """Batches of any transactions, with serials and fingerprints that collide, against a model."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "ledger.sqlite")
        SqliteLedger.create(path)
        trio.run(_model, path, steps)


async def _model(path: Path, steps: list[tuple[str, Change, str, bool]]) -> None:
    facts: dict[bytes, Transaction] = {}
    spent: dict[bytes, bytes] = {}
    blobs: set[bytes] = set()
    redeemed = False

    async def check(one: Transaction) -> None:
        nonlocal redeemed
        verdict = await book.apply(one)
        owners = {spent[serial] for serial in one.serials if serial in spent}
        owners |= {one.fingerprint} & facts.keys()
        if owners:
            assert isinstance(verdict, Known)
            assert {stored.fingerprint for stored in verdict.facts} == owners
            return
        match one.change:
            case Insert(where):
                done = where not in blobs
                blobs.add(where)
            case Delete(where):
                done = where in blobs
                blobs.discard(where)
            case Redeem():
                done, redeemed = not redeemed, True
            case _:
                done = True
        assert isinstance(verdict, Done if done else Refused)
        if done:
            facts[one.fingerprint] = one
            spent.update(dict.fromkeys(one.serials, one.fingerprint))

    async with opened(path) as book:
        # Nothing can be spent before it was sold: in life, the proof of balance sees to that.
        float_ = Voucher(FLOAT, b"float" * 4)
        book.add_vouchers([VOUCHER, float_])
        await book.apply(transaction("float", Redeem(float_.digest, FLOAT)))
        for what, change, serial, pause in steps:
            await check(transaction(what + type(change).__name__, change, serial, serial + "'"))
            if pause:
                await trio.sleep(0)
        totals = book.totals()
    assert totals.issued == totals.outstanding + totals.charged - totals.refunded
    assert totals.outstanding == FLOAT + sum(one.delta for one in facts.values())
    assert (totals.blobs, totals.serials) == (len(blobs), len(spent))
    assert totals.requests == len(facts) + 1


# -- SQLite's own ------------------------------------------------------------------------------


def test_a_ledger_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(LedgerError, match="hpkvd init"):
        SqliteLedger(path)
    SqliteLedger.create(path)
    with pytest.raises(LedgerError, match="exists"):
        SqliteLedger.create(path)


def test_the_file_is_as_it_should_be(path: Path) -> None:
    ledger = SqliteLedger(path)
    try:
        pragmas = {"page_size": 4096, "auto_vacuum": 2, "journal_mode": "wal", "synchronous": 2}
        for pragma, value in pragmas.items():
            assert ledger._write.execute(f"PRAGMA {pragma}").fetchone() == (value,)
    finally:
        ledger.close()


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        (f"user_version = {SCHEMA_VERSION + 1}", "newer hpkvd.*upgrade"),
        ("application_id = 1", "not a ledger of hpkvd"),
    ],
)
def test_a_file_of_another_kind_or_a_newer_one_is_refused(
    path: Path, pragma: str, message: str
) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA {pragma}")
    connection.close()
    with pytest.raises(LedgerError, match=message):
        SqliteLedger(path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(os.urandom(8192))
    with pytest.raises(LedgerError):
        SqliteLedger(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process in the middle of writing."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.close()


async def test_a_lock_is_waited_for_while_reading_goes_on(funded: SqliteLedger, path: Path) -> None:
    async with trio.open_nursery() as nursery:
        with locked(path):
            nursery.start_soon(funded.apply, transaction("a", insert("x"), "s1", "s2"))
            await trio.sleep(0.05)
            assert await funded.read(key("x")) is None
            assert funded.totals().requests == 1
    assert await funded.read(key("x")) == blob("x")


async def test_a_lock_that_stays_is_told_of(
    funded: SqliteLedger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpkvd.ledger.sqlite.LOCK_SECONDS", 0.05)
    one = transaction("a", insert("x"), "s1", "s2")
    with locked(path), pytest.raises(LedgerBusy):
        await funded.apply(one)
    assert isinstance(await funded.apply(one), Done)


async def test_a_full_disk_spends_nothing_and_leaves_reading_alone(funded: SqliteLedger) -> None:
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    before = funded.totals()
    (pages,) = funded._write.execute("PRAGMA page_count").fetchone()
    funded._write.execute(f"PRAGMA max_page_count = {pages}")
    one = transaction("b", insert("y"), "s3", "s4")
    with pytest.raises(LedgerFull):
        await funded.apply(one)
    assert funded.totals() == before
    assert await funded.recall(one.fingerprint, one.serials) is None
    assert await funded.read(key("x")) == blob("x")
    funded._write.execute(f"PRAGMA max_page_count = {pages * 10}")
    assert isinstance(await funded.apply(one), Done)


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a broken disk: only COMMIT writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_commit_that_fails_spends_nothing(funded: SqliteLedger, path: Path) -> None:
    await funded.apply(transaction("a", insert("x"), "s1", "s2"))
    before = funded.totals()
    one = transaction("b", insert("y"), "s3", "s4")
    with files_no_longer_than(path.with_name(f"{path.name}-wal").stat().st_size + 5000):
        with pytest.raises(LedgerError, match="IOERR"):
            await funded.apply(one)
        assert funded.totals() == before
        assert await funded.read(key("x")) == blob("x")
        assert await funded.recall(one.fingerprint, one.serials) is None
    assert isinstance(await funded.apply(one), Done)


async def test_insertions_leave_the_last_of_the_disk_to_the_others(path: Path) -> None:
    ledger = SqliteLedger(path, reserve=2**62)
    assert await ledger.refusal(insert("x")) is Reason.FULL
    assert await ledger.refusal(entry("x", 1)) is Reason.FULL
    assert await ledger.refusal(Read(key("x"))) is None
    ledger.close()


async def test_deleted_blobs_give_their_space_back(
    funded: SqliteLedger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpkvd.ledger.sqlite.VACUUM_PAGES", 20)
    texts = [f"blob {number}" for number in range(100)]
    for text in texts:
        await funded.apply(transaction("i" + text, insert(text), "s" + text, "t" + text))
    (full,) = funded._write.execute("PRAGMA page_count").fetchone()
    for text in texts:
        await funded.apply(transaction("d" + text, delete(text), "u" + text, "v" + text))
    with trio.fail_after(5):
        while funded._write.execute("PRAGMA freelist_count").fetchone()[0] >= 40:
            await trio.sleep(0.01)
    assert funded._write.execute("PRAGMA page_count").fetchone()[0] < full - 300


async def test_the_order_of_rows_is_not_the_order_of_arrival(funded: SqliteLedger) -> None:
    keys = [key(f"{number}") for number in range(40)]
    for number in range(40):
        what = f"{number}"
        await funded.apply(transaction(what, insert(what), "s" + what, "t" + what))
    stored = [row[0] for row in funded._read.execute("SELECT key FROM blob NOT INDEXED")]
    assert sorted(stored) == sorted(keys)
    assert stored != keys


async def test_no_record_joins_a_key_to_a_serial(funded: SqliteLedger) -> None:
    """What a seized disk tells: the tables have no column in common but the fingerprint."""
    tables = ("request", "serial", "blob", "voucher", "entry")
    columns = {
        table: {row[1] for row in funded._read.execute(f"PRAGMA table_info({table})")}
        for table in tables
    }
    assert columns["blob"] == {"id", "key", "digest", "blob"}
    assert columns["serial"] == {"serial", "fingerprint"}
    assert columns["voucher"] == {"digest", "amount", "spent"}
    assert columns["entry"] == {
        "key", "epoch", "counter", "digest", "value", "hours", "gone_at",
    }  # fmt: skip
    assert columns["request"] == {
        "fingerprint", "epoch", "operation", "outcome", "delta", "issued",
    }  # fmt: skip
