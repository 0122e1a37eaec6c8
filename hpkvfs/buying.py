"""Buying tokens for a vault in use: what may be bought, the steps of a purchase, waiting for it.

The commands of `hpkvfs buy`, by name; net/purchases.py says why each may be cut short anywhere.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import trio

from hpkvfs.control import Progress
from hpkvfs.errors import Unreachable, UserError
from hpkvfs.net.purchases import Bill, Purchase, read_token
from hpkvfs.net.refusals import BadVoucher, NotSettled, PaymentRefused
from hpkvfs.protocol.messages import Method
from hpkvfs.session import Session

Result: TypeAlias = dict[str, Any]

COMMANDS: Final = ("offers", "purchases", "buy", "await-purchase", "abandon-purchases")
FIRST_POLL: Final = 1.0
LONGEST_POLL: Final = 10.0


async def offers(session: Session) -> Result:
    """What the server takes, and at what price."""
    rows = [
        {
            "method": one.method.name.lower(),
            "tokens_per_ksat": one.rate,
            "least": one.least,
            "most": one.most,
            "mints": [place.decode("ascii", "backslashreplace") for place in one.places],
        }
        for one in await session.store.purchases.offers()
    ]
    return {"offers": rows}


def purchases(session: Session) -> Result:
    """Those that are not finished."""
    rows = [
        {"id": one.digest.hex(), "method": one.method.name.lower(), "tokens": one.amount}
        for one in session.store.purchases.unfinished
    ]
    return {"purchases": rows}


async def buy(session: Session, arguments: Result) -> Result:
    """One step of a purchase, an earlier one by its `id`: what is to be paid, or that it is."""
    return await _step(session, await _purchase(session, arguments))


async def await_purchase(session: Session, arguments: Result, progress: Progress) -> Result:
    """Step after step until it is paid, or cannot be any more. `progress` is in seconds."""
    purchase = _find(session, str(arguments["id"]))
    start, pause = trio.current_time(), FIRST_POLL
    left: float = int(arguments.get("seconds", 0)) or 1
    total = int(left)
    while True:
        try:
            result = await _step(session, purchase)
        except (Unreachable, NotSettled):
            if trio.current_time() - start > left:
                raise
        else:
            if result["state"] == "paid":
                return result
            if not result["seconds"]:
                raise UserError(
                    "the invoice cannot be paid any more",
                    "if it was paid, run hpkvfs buy again; if not, hpkvfs buy --abandon",
                )
        progress(min(int(trio.current_time() - start), total), total)
        await trio.sleep(pause)
        pause = min(pause * 1.5, LONGEST_POLL)


async def abandon(session: Session) -> Result:
    """Give up what is not finished; an invoice that turns out to be paid is taken instead.

    Whatever is paid later is lost. Ecash is not asked about, since asking pays with it.
    """
    abandoned, tokens = 0, 0
    for one in session.store.purchases.unfinished:
        bought = await _bought(session, one) if one.method is Method.LIGHTNING else None
        if bought is None:
            await session.store.purchases.forget(one)
            abandoned += 1
        else:
            tokens += bought
    return {"abandoned": abandoned, "tokens": tokens}


async def _bought(session: Session, purchase: Purchase) -> int | None:
    """The tokens that it brought now; None: it is not paid, or nobody can tell."""
    try:
        result = await _step(session, purchase)
    except (PaymentRefused, NotSettled):
        return None
    return int(result["tokens"]) if result["state"] == "paid" else None


async def _purchase(session: Session, arguments: Result) -> Purchase:
    if "id" in arguments:
        return _find(session, str(arguments["id"]))
    if arguments["method"] == "lightning":
        return await session.store.purchases.begin_lightning(int(arguments["tokens"]))
    text = str(arguments["token"])
    return await session.store.purchases.begin_cashu(text, await _least(session, text))


async def _least(session: Session, text: str) -> int:
    """What a token must bring at least: its worth at the offered price, less the dearest fee.

    A mint takes less than one sat for each coin that is swapped.
    """
    token = read_token(text)
    for one in await session.store.purchases.offers():
        if one.method is Method.CASHU:
            return max(1, one.tokens(max(0, token.amount - len(token.proofs))))
    return 1


def _find(session: Session, name: str) -> Purchase:
    for one in session.store.purchases.unfinished:
        if one.digest.hex() == name:
            return one
    raise UserError("there is no such purchase any more", "see hpkvfs balance")


async def _step(session: Session, purchase: Purchase) -> Result:
    found = await session.store.purchases.advance(purchase)
    result: Result = {"id": purchase.digest.hex(), "method": purchase.method.name.lower()}
    if isinstance(found, Bill):
        return result | {
            "state": "open",
            "tokens": found.tokens,
            "sats": found.sats,
            "invoice": found.invoice,
            "seconds": found.seconds,
        }
    try:
        tokens = await session.take(found)
    except BadVoucher as error:  # by another client, or by this one and its state was lost since
        await session.store.purchases.forget(purchase)
        raise UserError(
            "what this paid for has been redeemed already", "hpkvfs balance tells what there is"
        ) from error
    return result | {"state": "paid", "tokens": tokens, "held": session.store.balance.total}
