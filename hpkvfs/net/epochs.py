"""The epochs a client knows, pinned in its journal.

Who shows each client parameters of its own can tell the clients apart. So an epoch's parameters
are taken once and never changed: others under the same number, or that do not continue the
chain of hashes from the epoch before, are a lie. Their digit table is checked before the first
use, since a false table betrays amounts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hpkvfs.errors import Misbehaviour
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.wallet.journal import Journal

_PREFIX: Final = "epoch/"


class KnownEpochs:
    """Pinned epochs, and which of them the server said it still uses."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known: dict[bytes, EpochParameters] = {}
        for name in journal.names(_PREFIX):
            self._add(EpochParameters.decode(journal.meta(name) or b""))
        self._live: list[EpochParameters] = []

    def find(self, digest: bytes) -> EpochParameters | None:
        """The pinned epoch with this digest."""
        return self._known.get(digest)

    @property
    def live(self) -> Sequence[EpochParameters]:
        """Pinned epochs that the server uses, oldest first; empty before it was asked."""
        return self._live

    def set_live(self, digests: Sequence[bytes]) -> None:
        """What the server uses, as it says; digests that are not pinned have no say."""
        known = [self._known[digest] for digest in digests if digest in self._known]
        self._live = sorted(known, key=_number)

    def accept(self, encoded: bytes) -> EpochParameters:
        """Check and pin what a server showed; Misbehaviour if it cannot be what others see."""
        try:
            shown = EpochParameters.decode(encoded)
        except ProtocolError as error:
            raise Misbehaviour("the server's parameters cannot be read", _HINT) from error
        pinned = self._known.get(shown.digest)
        if pinned is not None:
            return pinned
        self._check_place(shown)
        try:
            shown.verify()
        except ProtocolError as error:
            raise Misbehaviour(
                "the server's parameters would betray amounts", "do not use this server"
            ) from error
        self._journal.put_meta(f"{_PREFIX}{shown.number:010}", encoded)
        self._add(shown)
        return shown

    def _check_place(self, shown: EpochParameters) -> None:
        for other in self._known.values():
            if other.number == shown.number:
                raise Misbehaviour(
                    f"the server shows other parameters for epoch {shown.number} than before",
                    _HINT,
                )
            older, newer = sorted((other, shown), key=_number)
            if newer.number == older.number + 1 and not newer.follows(older):
                raise Misbehaviour(
                    f"the server's epoch {newer.number} does not follow epoch {older.number}",
                    _HINT,
                )

    def _add(self, parameters: EpochParameters) -> None:
        self._known[parameters.digest] = parameters


_HINT: Final = "it may be another server, or one that tells its users apart: ask its operator"


def _number(parameters: EpochParameters) -> int:
    return parameters.number
