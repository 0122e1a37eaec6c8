"""Constants of plan.py that any machine can measure for itself in seconds, without a server."""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from hpkvd.ledger.rows import TABLES, Row, Rows
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.ledger.sqlite_rows import SqliteRows
from hpkvfs.protocol.credential import Issuer, Statement, parse, prepare
from hpkvfs.protocol.epoch import NO_EPOCH, EpochParameters
from hpkvfs.protocol.tariff import Operation, Tariff
from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE

PROOFS: Final = 120
REQUESTS: Final = 10_000
BLOBS: Final = 1_000
BATCH: Final = 500
MILLI: Final = 1e3

_TABLE: Final = {table.name: table for table in TABLES}


def constants() -> dict[str, float]:
    """Those of plan.Constants that concern proofs and the disk of a SQLite ledger."""
    proof, issued = proofs()
    with tempfile.TemporaryDirectory(prefix="hpkvd-measure-") as home:
        path = Path(home) / "ledger.sqlite"
        SqliteLedger.create(path)
        with closing(SqliteRows(path)) as rows:
            sizes = disk(rows, lambda: _file_bytes(rows), issued)
    return {"proof_ms": round(proof, 3)} | {f"sqlite_{name}": one for name, one in sizes.items()}


def proofs() -> tuple[float, int]:
    """Milliseconds of CPU to check an insertion's proof and issue, and bytes of what is issued.

    The median: a machine with other work adds to some.
    """
    rng = secrets.token_bytes
    issuer = Issuer.generate(rng)
    epoch = EpochParameters(0, Tariff(), issuer.parameters, NO_EPOCH)
    parameters = issuer.parameters
    buy = Statement(epoch.digest, Operation.ISSUE, b"voucher", 1_000)
    bought = prepare(parameters, buy, (), (1_000, 0), rng)
    held = bought.finish(parameters, issuer.issue(buy, parse(bought.request, 0)))
    about = Statement(epoch.digest, Operation.INSERT, bytes(65), -10)
    asked = prepare(parameters, about, held, (495, 495), rng).request
    taken = []
    for _ in range(PROOFS):
        start = time.thread_time()
        request = parse(asked, 2)
        issuer.verify(about, request)
        issued = issuer.issue(about, request)
        taken.append(time.thread_time() - start)
    return MILLI * statistics.median(taken), len(issued)


def disk(rows: Rows, used: Callable[[], int], issued: int) -> dict[str, float]:
    """Bytes of disk for each blob, request with its serials, and entry, of an empty ledger.

    Keys are random, as real ones are, so that pages are as full as they would be.
    """
    found = {}
    kinds: list[tuple[str, int, Callable[[], dict[str, list[Row]]]]] = [
        ("request_bytes", REQUESTS, lambda: _request(issued)),
        ("blob_bytes", BLOBS, _blob),
        ("entry_bytes", BLOBS, _entry),
    ]
    for name, count, make in kinds:
        before = used()
        for _ in range(count // BATCH):
            _put(rows, [make() for _ in range(BATCH)])
        found[name] = round((used() - before) / count, 1)
    return found


def _put(rows: Rows, made: Sequence[dict[str, list[Row]]]) -> None:
    for name in made[0]:
        rows.put(_TABLE[name], [row for one in made for row in one[name]])


def _request(issued: int) -> dict[str, list[Row]]:
    """As the ledger records one."""
    fingerprint = secrets.token_bytes(32)
    row = (fingerprint, 1, int(Operation.INSERT), 5, -10, secrets.token_bytes(issued))
    return {
        "request": [row],
        "serial": [(secrets.token_bytes(33), fingerprint) for _ in range(2)],
    }


def _blob() -> dict[str, list[Row]]:
    return {
        "blob": [(secrets.token_bytes(33), secrets.token_bytes(32), secrets.token_bytes(BLOB_SIZE))]
    }


def _entry() -> dict[str, list[Row]]:
    digest, value = secrets.token_bytes(32), secrets.token_bytes(ENTRY_SIZE)
    return {"entry": [(secrets.token_bytes(33), 1, 1, digest, value, 72, None)]}


def _file_bytes(rows: Rows) -> int:
    (pages,) = rows.one("PRAGMA page_count")
    (free,) = rows.one("PRAGMA freelist_count")
    (size,) = rows.one("PRAGMA page_size")
    return int((pages - free) * size)
