"""What a server's refusal means to whoever asked, and an answer that is none."""

from __future__ import annotations

from typing import Final

from hpkvfs.errors import KeyAbsent, KeyExists, Misbehaviour, Refusal, UserError
from hpkvfs.protocol.messages import Reason


class UnknownEpoch(Refusal):
    """The server does not use the epoch of these credentials."""


class EpochEnded(UnknownEpoch):
    """The epoch of these credentials has ended: they are worth nothing any more."""


class OldCounter(Refusal):
    """A newer breakglass entry is stored."""


class NoRoom(Refusal):
    """The server's disk is full; the same request may be performed when it is repeated."""


class BadVoucher(UserError, Refusal):
    """A voucher that buys nothing."""


class VoucherSpent(BadVoucher):
    """A voucher that was redeemed by another request."""


_BUG: Final = "it may be older or newer than this program, or one of them has a bug"
_WHY: Final[dict[Reason, tuple[type[Refusal], str, str]]] = {
    Reason.KEY_EXISTS: (KeyExists, "the key is taken already", ""),
    Reason.KEY_ABSENT: (KeyAbsent, "there is nothing under the key", ""),
    Reason.DIGEST_MISMATCH: (KeyAbsent, "there is another blob under the key", ""),
    Reason.UNKNOWN_EPOCH: (
        UnknownEpoch,
        "the server does not accept these tokens",
        "they are of an epoch that ended, or of another server",
    ),
    Reason.EPOCH_ENDED: (
        EpochEnded,
        "these tokens have expired: their epoch ended",
        "tokens last while their epoch does; use the vault now and then to keep them",
    ),
    Reason.UNKNOWN_VOUCHER: (
        BadVoucher,
        "the server does not know this voucher",
        "compare it with what its operator gave you",
    ),
    Reason.VOUCHER_SPENT: (VoucherSpent, "this voucher has been redeemed already", ""),
    Reason.VOUCHER_AMOUNT: (
        BadVoucher,
        "this voucher is for another amount",
        "copy it whole, as the operator gave it",
    ),
    Reason.OLD_COUNTER: (OldCounter, "a newer breakglass entry is stored already", ""),
    Reason.FULL: (NoRoom, "the server has no room left", "try again later, or ask its operator"),
    Reason.BAD_PROOF: (Refusal, "the server refused a proof of ours", _BUG),
    Reason.BAD_SIGNATURE: (Refusal, "the server refused a signature of ours", _BUG),
    Reason.MALFORMED: (Refusal, "the server could not read our request", _BUG),
}


def refusal(reason: Reason) -> Refusal:
    """The error to raise for a reason."""
    kind, message, hint = _WHY.get(reason, (Refusal, "the server refused", _BUG))
    return kind(message, hint)


def out_of_place() -> Misbehaviour:
    """The error to raise for a reply of the wrong kind."""
    return Misbehaviour(
        "the server answered something else than it was asked",
        "nothing is lost; is it a server for hpkvfs?",
    )
