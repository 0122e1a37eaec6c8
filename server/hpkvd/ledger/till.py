"""What payments leave in a ledger, for both engines: unsettled sales, takings, what was sold.

A sale that is settled is dropped in the transaction that makes its voucher: what remains is a
voucher like any other, and sums. `data` and the takings have money in them; whoever has the
ledger could spend what is in the till.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeAlias

from hpkvd.ledger import Sale, Settle, Taking
from hpkvfs.protocol.messages import Method

# Since schema 4 of SQLite, 5 of PostgreSQL; {bytes} is the engine's type.
_SCHEMA: Final = """
CREATE TABLE sale (
    voucher     {bytes} PRIMARY KEY, -- digest of the voucher it pays for
    method      BIGINT NOT NULL,
    tokens      BIGINT NOT NULL,    -- what the voucher will be worth
    sats        BIGINT NOT NULL,    -- what it brings
    due         BIGINT NOT NULL,    -- the hour from which on it is looked at again
    data        {bytes} NOT NULL     -- what its method needs to go on
);
CREATE TABLE taking (
    digest      {bytes} PRIMARY KEY, -- SHA-256 of the token
    sats        BIGINT NOT NULL,
    taken       BIGINT NOT NULL,    -- whether the operator took it out
    token       {bytes} NOT NULL     -- ecash
);
CREATE TABLE sold (
    id               BIGINT PRIMARY KEY CHECK (id = 0),
    cashu_tokens     BIGINT NOT NULL,
    cashu_sats       BIGINT NOT NULL,
    lightning_tokens BIGINT NOT NULL,
    lightning_sats   BIGINT NOT NULL
);
INSERT INTO sold VALUES (0, 0, 0, 0, 0);
"""

SALE: Final = "SELECT voucher, method, tokens, sats, due, data FROM sale"
TOTALS: Final = """
    (SELECT cashu_tokens FROM sold), (SELECT cashu_sats FROM sold),
    (SELECT lightning_tokens FROM sold), (SELECT lightning_sats FROM sold),
    (SELECT count(*) FROM sale),
    (SELECT count(*) FROM taking WHERE taken = 0),
    (SELECT CAST(coalesce(sum(sats), 0) AS BIGINT) FROM taking WHERE taken = 0)
"""
_NAMES: Final = {Method.CASHU: "cashu", Method.LIGHTNING: "lightning"}

Statement: TypeAlias = tuple[str, tuple[object, ...]]


class Connection(Protocol):
    """What sqlite3 and psycopg have in common."""

    @property
    def execute(self) -> Any:
        """Run a statement."""
        ...


def schema(octets: str) -> str:
    """The tables; `octets` is the engine's word for bytes."""
    return _SCHEMA.format(bytes=octets)


def stored(voucher: bytes, method: int, tokens: int, sats: int, due: int, data: bytes) -> Sale:
    """A row of `sale`."""
    return Sale(voucher, Method(method), tokens, sats, due, data)


def putting(sale: Sale) -> Statement:
    """Keep it."""
    row = (sale.voucher, int(sale.method), sale.tokens, sale.sats)
    return "INSERT INTO sale VALUES (?, ?, ?, ?, ?, ?)", (*row, sale.due, sale.data)


def dropping(voucher: bytes) -> Statement:
    """Forget it."""
    return "DELETE FROM sale WHERE voucher = ?", (voucher,)


def settling(settlement: Settle) -> list[Statement]:
    """A voucher, the takings, and the sums."""
    bought, name = settlement.sale, _NAMES[settlement.sale.method]
    statements: list[Statement] = [
        ("INSERT INTO voucher (digest, amount) VALUES (?, ?)", (bought.voucher, bought.tokens)),
        (
            f"UPDATE sold SET {name}_tokens = {name}_tokens + ?, {name}_sats = {name}_sats + ?",
            (bought.tokens, bought.sats),
        ),
    ]
    for one in settlement.takings:
        row = (one.digest, one.sats, 0, one.text.encode())
        statements.append(("INSERT INTO taking VALUES (?, ?, ?, ?)", row))
    return statements


def takings(connection: Connection, *, again: bool) -> list[Taking]:
    """Tokens that were not taken out, or all."""
    which = "" if again else " WHERE taken = 0"
    rows = connection.execute(f"SELECT sats, token FROM taking{which} ORDER BY digest").fetchall()
    return [Taking(sats, bytes(token).decode()) for sats, token in rows]


def mark_taken(connection: Connection, taken: Sequence[Taking], mark: str = "?") -> None:
    """These are the operator's now."""
    for one in taken:
        connection.execute(f"UPDATE taking SET taken = 1 WHERE digest = {mark}", (one.digest,))
