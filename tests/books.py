"""The books of a server and of all its clients, compared."""

from __future__ import annotations

from collections.abc import Sequence

from hpkvd.ledger import Totals
from hpkvfs.wallet.wallet import Conservation


def compare(totals: Totals, clients: Sequence[Conservation]) -> int:
    """Both sides tell the same story; how many tokens are outstanding that nobody can spend.

    Of what clients have as lost or forgone only the server knows whether it was spent or refunded.
    """
    assert all(one.holds for one in clients), "a wallet's books do not add up"
    assert not any(one.balance.pending for one in clients), "tokens are pending"
    books = [one.book for one in clients]
    spent, lost = sum(one.spent for one in books), sum(one.lost for one in books)
    refunded, forgone = sum(one.refunded for one in books), sum(one.forgone for one in books)
    _within("charged", totals.charged, spent, lost)
    _within("refunded", totals.refunded, refunded, forgone)
    bought = sum(one.bought for one in books)
    assert totals.issued == bought, f"issued: the server counts {totals.issued}, clients {bought}"
    expired = sum(one.expired for one in books)
    gone = expired + lost - (totals.charged - spent) + (totals.refunded - refunded)
    held = sum(one.balance.total for one in clients)
    assert totals.outstanding == held + gone, (
        f"outstanding: the server counts {totals.outstanding}, clients have {held} and lost {gone}"
    )
    return gone


def _within(what: str, theirs: int, mine: int, unknown: int) -> None:
    assert mine <= theirs <= mine + unknown, (
        f"{what}: the server counts {theirs}, clients {mine} and do not know of {unknown}"
    )
