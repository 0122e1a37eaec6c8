"""Errors, in families by what the caller should do about them.

    UserError         say it and stop: the user can put it right          exit 2
    VaultError        the vault's state forbids it                        exit 3
    StoreError        the server or the way to it                         exit 4
      Unreachable       try again later, nothing is lost
      Refusal           the server said no; nothing was spent
    Misbehaviour      the server, or someone between, lied                exit 5
      Tagging           the server tells its users apart                    exit 5
    EmptyWallet       buy tokens                                          exit 6

Every message is one sentence that can be shown as it is; `hint` says what to do next.
"""

from __future__ import annotations


class HpkvError(Exception):
    """Base of everything we raise on purpose."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(HpkvError):
    """Bad input: words, voucher, path, option."""

    exit_code = 2


class VaultError(HpkvError):
    """The local state or the vault itself does not allow the operation."""

    exit_code = 3


class AlreadyInUse(VaultError):
    """Another process holds this vault's state directory."""


class DiskFull(VaultError):
    """The disk of the state directory has no room; goes on when there is some."""


class NewerFormat(VaultError):
    """Written by a newer hpkvfs than this one."""


class NoState(VaultError):
    """There is no vault in the state directory."""


class NothingThere(VaultError):
    """The server has no generation of this vault."""


class SecondWriter(VaultError):
    """Another client published a generation we did not know of."""


class StoreError(HpkvError):
    """The store could not do what was asked."""

    exit_code = 4


class Unreachable(StoreError):
    """No answer: the server is down, or the way to it is."""


class Refusal(StoreError):
    """The server refused and spent nothing."""


class KeyExists(Refusal):
    """An insert found its key taken."""


class KeyAbsent(Refusal):
    """A delete found nothing, or something else, under its key."""


class Misbehaviour(StoreError):
    """An answer that no honest server gives."""

    exit_code = 5


class SpentElsewhere(Misbehaviour):
    """Tokens of this wallet were spent by a request that it did not make."""


class CorruptBlob(Misbehaviour):
    """A blob is missing, altered, or not what its reference promised."""


class Tagging(Misbehaviour):
    """The server shows its users different parameters, which tells them apart."""


class EmptyWallet(StoreError):
    """Not enough tokens for the operation."""

    exit_code = 6
