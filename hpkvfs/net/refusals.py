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


class PaymentRefused(UserError, Refusal):
    """A payment that buys nothing; nothing was taken."""


class NotSettled(Refusal):
    """A payment of which it is not known yet what it came to; repeating it tells."""


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
    Reason.NOT_OFFERED: (
        PaymentRefused,
        "this server does not take that",
        "hpkvfs buy shows what it takes",
    ),
    Reason.BAD_TOKEN: (
        PaymentRefused,
        "the mint does not know this token's coins",
        "look at the token in a wallet",
    ),
    Reason.OTHER_MINT: (
        PaymentRefused,
        "this server does not take tokens of that mint",
        "swap it at one of the mints that hpkvfs buy shows; it is as good as it was",
    ),
    Reason.OTHER_UNIT: (
        PaymentRefused,
        "this server takes tokens in sat only",
        "swap it for sat; it is as good as it was",
    ),
    Reason.TOO_LITTLE: (
        PaymentRefused,
        "this is less than the server sells at a time, after the mint's fee",
        "hpkvfs buy shows the least; a token is as good as it was",
    ),
    Reason.TOO_MUCH: (
        PaymentRefused,
        "this is more than the server sells at a time",
        "pay in parts; a token is as good as it was",
    ),
    Reason.TOKEN_SPENT: (PaymentRefused, "the mint says that this token was spent already", ""),
    Reason.INVOICE_EXPIRED: (
        PaymentRefused,
        "the invoice has expired unpaid",
        "order anew: hpkvfs buy --lightning --tokens N",
    ),
    Reason.PAYMENT_UNSETTLED: (
        NotSettled,
        "the mint, or the server's Lightning node, does not answer",
        "nothing is lost: run hpkvfs buy again later",
    ),
    Reason.MINT_LIES: (
        NotSettled,
        "the mint gave the server an answer that cannot be true",
        "keep the token and tell the server's operator; hpkvfs buy tries again",
    ),
    Reason.OTHER_AMOUNT: (
        NotSettled,
        "the payment comes to another amount than was ordered",
        "tell the server's operator; hpkvfs buy tries again, --abandon gives it up",
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
