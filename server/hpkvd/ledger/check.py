"""Whether a ledger is what it says: books against requests and vouchers, blobs against digests.

Everything is looked at in one snapshot, also while a server writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from hpkvd.ledger.rows import TABLES, Progress, Rows, count, every
from hpkvfs.protocol.tariff import Operation

_BY_NAME: Final = {table.name: table for table in TABLES}


def problems(rows: Rows, *, blobs: bool, progress: Progress) -> Iterator[str]:
    """One sentence for each thing that is wrong. `blobs`: look at every page and blob as well."""
    with rows.snapshot():
        if blobs and (damage := rows.damage()):
            yield f"the file is damaged, and what is in it cannot be relied on: {damage}"
            return
        yield from _books(rows)
        yield from _orphans(rows)
        yield from _payments(rows)
        if blobs:
            yield from _digests(rows, progress)


def _books(rows: Rows) -> Iterator[str]:
    issued, charged, refunded, outstanding, *counts = map(
        int,
        rows.one(
            "SELECT issued, charged, refunded, outstanding, requests, serials, blobs FROM books"
        ),
    )
    if issued != outstanding + charged - refunded:
        yield "the books do not balance: issued is not outstanding + charged - refunded"
    for name, told in zip(("request", "serial", "blob"), counts, strict=True):
        actual = count(rows, _BY_NAME[name])
        if actual != told:
            yield f"the books have {told:,} {name}s and the table has {actual:,}"
    yield from _sums(rows, issued, charged, refunded)
    yield from _redeemed(rows, issued)


def _sums(rows: Rows, issued: int, charged: int, refunded: int) -> Iterator[str]:
    """The requests against the books; those of ended epochs are gone and cannot be added up."""
    issue = int(Operation.ISSUE)
    queries = {
        "issued": (issued, f"operation = {issue}", 1),
        "charged": (charged, f"operation <> {issue} AND delta < 0", -1),
        "refunded": (refunded, f"operation <> {issue} AND delta > 0", 1),
    }
    for name, (told, condition, sign) in queries.items():
        (total,) = rows.one(f"SELECT coalesce(sum(delta), 0) FROM request WHERE {condition}")
        actual = sign * int(total)
        if actual > told or (actual < told and not _swept(rows)):
            yield f"the books have {told:,} tokens {name} and the requests add up to {actual:,}"


def _redeemed(rows: Rows, issued: int) -> Iterator[str]:
    """Vouchers stay, spent or not: what was issued is what those that are spent were worth."""
    (redeemed,) = rows.one("SELECT coalesce(sum(amount), 0) FROM voucher WHERE spent <> 0")
    if int(redeemed) != issued:
        yield f"the books have {issued:,} tokens issued and vouchers of {int(redeemed):,} are spent"


def _swept(rows: Rows) -> bool:
    """Whether requests of ended epochs may be gone: the first epoch is number 1."""
    (oldest,) = rows.one("SELECT oldest FROM ended")
    return int(oldest) > 1


def _orphans(rows: Rows) -> Iterator[str]:
    (orphans,) = rows.one(
        "SELECT count(*) FROM serial WHERE NOT EXISTS"
        " (SELECT 1 FROM request WHERE request.fingerprint = serial.fingerprint)"
    )
    if orphans:
        yield f"{orphans:,} spent serials belong to no request"
    (odd,) = rows.one(
        "SELECT count(*) FROM (SELECT 1 FROM serial WHERE EXISTS"
        " (SELECT 1 FROM request, ended WHERE request.fingerprint = serial.fingerprint"
        " AND request.epoch >= ended.oldest) GROUP BY fingerprint HAVING count(*) <> 2) odd"
    )
    if odd:
        yield f"{odd:,} requests have another number of serials than two"


def _payments(rows: Rows) -> Iterator[str]:
    """A sale ends in the transaction that makes its voucher and counts what it brought (till.py).

    A node keeps the money of its invoices, a mint that makes them does not: so takings are worth
    at least what was sold for ecash, and at most what was sold.
    """
    (odd,) = rows.one(
        "SELECT count(*) FROM sale WHERE EXISTS"
        " (SELECT 1 FROM voucher WHERE voucher.digest = sale.voucher)"
    )
    if odd:
        yield f"{odd:,} sales are unsettled whose vouchers are there already"
    tokens, least, most = map(
        int,
        rows.one(
            "SELECT cashu_tokens + lightning_tokens, cashu_sats, cashu_sats + lightning_sats"
            " FROM sold"
        ),
    )
    vouchers, takings = (
        int(rows.one(f"SELECT coalesce(sum({column}), 0) FROM {table}")[0])
        for column, table in (("amount", "voucher"), ("sats", "taking"))
    )
    if tokens > vouchers:
        yield f"{tokens:,} tokens were paid for and all vouchers add up to {vouchers:,}"
    if not least <= takings <= most:
        yield (
            f"{takings:,} sat of ecash came in, and payments of {least:,} to {most:,} sat"
            " should have brought them"
        )
    tables = every(rows, _BY_NAME["taking"])
    damaged = sum(
        hashlib.sha256(token).digest() != digest for chunk in tables for digest, *_, token in chunk
    )
    if damaged:
        yield f"{damaged:,} tokens of ecash are damaged: their SHA-256 is another than was stored"


def _digests(rows: Rows, progress: Progress) -> Iterator[str]:
    total, done = count(rows, _BY_NAME["blob"]) + count(rows, _BY_NAME["entry"]), 0
    places = {"blob": (1, 2), "entry": (3, 4)}
    for name, (digest, value) in places.items():
        damaged = 0
        for chunk in every(rows, _BY_NAME[name]):
            damaged += sum(hashlib.sha256(row[value]).digest() != row[digest] for row in chunk)
            done += len(chunk)
            progress(done, total)
        if damaged:
            kind = "blobs" if name == "blob" else "breakglass entries"
            yield f"{damaged:,} {kind} are damaged: their SHA-256 is another than was stored"
