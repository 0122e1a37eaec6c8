"""The vocabulary of ledger tests: transactions from short texts."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hpkvd.ledger import (
    Change,
    Delete,
    Engine,
    Insert,
    Opening,
    Read,
    Redeem,
    StoreEntry,
    Transaction,
    Verdict,
)
from hpkvd.ledger.urls import open_ledger
from hpkvfs.protocol.messages import Done, Outcome, Reason, Refused
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


def transaction(what: str, change: Change, *serials: str, into: int = 0) -> Transaction:
    operation = OPERATIONS[type(change)]
    return Transaction(
        fingerprint=name(what),
        epoch=1,
        operation=operation,
        delta=change.amount if isinstance(change, Redeem) else TARIFF.delta(operation),
        serials=tuple(b"\3" + name(serial) for serial in serials),
        issued=b"issued for " + what.encode(),
        change=change,
        into=into,
    )


async def refusal(ledger: Engine, change: Change) -> object:
    """Why a request that nothing is known of would be refused."""
    return await ledger.foresee(name("unheard of"), (), change)


def sale() -> Transaction:
    return transaction("sale", Redeem(VOUCHER.digest, VOUCHER.amount))


def outcome(verdict: Verdict) -> Outcome | Reason:
    if isinstance(verdict, Done):
        return verdict.fact.outcome
    assert isinstance(verdict, Refused)
    return verdict.reason


@asynccontextmanager
async def opened(url: str, max_blobs: int = 0) -> AsyncIterator[Engine]:
    """The ledger at a URL, serving."""
    ledger = open_ledger(url, max_blobs=max_blobs)
    try:
        async with ledger.serving():
            yield ledger
    finally:
        ledger.close()


async def fund(ledger: Engine) -> None:
    """Sell VOUCHER."""
    ledger.add_vouchers([VOUCHER])
    assert isinstance(await ledger.apply(sale()), Done)
