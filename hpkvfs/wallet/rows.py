"""The rows of the wallet's journal, before they are sealed: canonical msgpack, or fixed bytes.

    credentials   epoch (32 B) || Credential.encode()
    pendings      [epoch, [input number...],
                   [[operation, delta, fingerprint, secrets, body, into]...], memo, place]
    receipts      [operation, memo]
    book          [bought, refunded, spent, expired, lost, forgone]
    reserve       [credential number...]

Reading raises ValueError, LookupError, TypeError or protocol.errors.Malformed for anything
else; the rows come out of a sealed file, so that only a bug of ours could make one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any, Final, cast

from hpkvfs.protocol import codec
from hpkvfs.protocol.credential import Credential
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Attempt, Book, Held, Pending

_EPOCH: Final = 32


def pack_held(held: Held) -> bytes:
    """A row of `credentials`."""
    return held.epoch + held.credential.encode()


def unpack_held(number: int, row: bytes) -> Held:
    """Inverse of pack_held."""
    return Held(number, row[:_EPOCH], Credential.decode(row[_EPOCH:]))


def pack_pending(pending: Pending) -> bytes:
    """A row of `pendings`; its inputs stay in `credentials` and are named here."""
    inputs = [held.number for held in pending.inputs]
    attempts = [
        [one.operation, one.delta, one.fingerprint, one.secrets, one.body, one.into]
        for one in pending.attempts
    ]
    return codec.pack([pending.epoch, inputs, attempts, pending.memo, pending.place])


def unpack_pending(number: int, row: bytes, held: Mapping[int, Held]) -> Pending:
    """Inverse of pack_pending, given the rows of `credentials` by number."""
    epoch, inputs, attempts, memo, place = _array(row)
    if not isinstance(inputs, list) or not isinstance(attempts, list):
        raise TypeError("not a pending")
    return Pending(
        number,
        epoch,
        tuple(held[one] for one in inputs),
        tuple(_attempt(*attempt) for attempt in attempts),
        memo,
        place,
    )


def _attempt(
    operation: int, delta: int, fingerprint: bytes, secrets: bytes, body: bytes, into: bytes
) -> Attempt:
    return Attempt(Operation(operation), delta, fingerprint, secrets, body, into)


def pack_receipt(operation: Operation, memo: bytes) -> bytes:
    """A row of `receipts`."""
    return codec.pack([operation, memo])


def unpack_receipt(row: bytes) -> tuple[Operation, bytes]:
    """Inverse of pack_receipt."""
    operation, memo = _array(row)
    if type(operation) is not int or not isinstance(memo, bytes):
        raise TypeError("not a receipt")
    return Operation(operation), memo


def pack_book(book: Book) -> bytes:
    """The book, kept in `meta`."""
    return codec.pack(astuple(book))


def unpack_book(row: bytes) -> Book:
    """Inverse of pack_book; one of format 3 has no last field."""
    bought, refunded, spent, expired, lost, *forgone = _array(row)
    return Book(bought, refunded, spent, expired, lost, *forgone)


def pack_reserve(reserve: Iterable[Held]) -> bytes:
    """The numbers of the credentials in the breakglass entry, kept in `meta`."""
    return codec.pack([held.number for held in reserve])


def unpack_reserve(row: bytes) -> frozenset[int]:
    """Inverse of pack_reserve."""
    return frozenset(_array(row))


def _array(row: bytes) -> list[Any]:
    return cast("list[Any]", codec.unpack(row))
