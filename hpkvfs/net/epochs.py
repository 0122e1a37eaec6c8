"""The epochs of a server as this client knows them: asked for, compared, pinned in the journal.

A server that shows each user parameters of his own can tell its users apart ("tagging"), since
every request names the parameters it was made with. Therefore:

  - what a server says of its epochs is signed with its identity: the key in its onion address,
    or, for a server without one, the key that it showed first;
  - it is asked for over WITNESSES connections at once, of which it cannot know that they are
    one client's, and all must be told the same;
  - an epoch's parameters are pinned when first seen and never change. Others under the same
    number, or that do not continue the chain of hashes from the epoch before, are a lie. Each
    later question, at its own time and on its own connections, is one more comparison.

Whatever differs raises Tagging before anything is made with those parameters. An epoch's digit
table is checked before it is pinned, since a false table betrays amounts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import trio

from hpkvfs.errors import Misbehaviour, Tagging
from hpkvfs.net.line import Line
from hpkvfs.net.refusals import UnknownEpoch, out_of_place, refusal
from hpkvfs.parallel import each
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.messages import Parameters, ParametersRequest, Refused
from hpkvfs.wallet.journal import Journal

WITNESSES: Final = 3
SUCCESSION_SECONDS: Final = 2.0
_ROUNDS: Final = 3
_LONGEST_CHAIN: Final = 1_000
_PREFIX: Final = "epoch/"
_IDENTITY: Final = "identity"
_HINT: Final = (
    "a server that tells its users apart does so; nothing was spent: do not use it,"
    " and ask its operator"
)


Apart: TypeAlias = Callable[[], float]


class Epochs:
    """Pinned epochs, and which of them the server said it still uses."""

    def __init__(self, journal: Journal, line: Line, identity: bytes | None) -> None:
        """`identity`: 32 bytes, from the server's address; None takes and pins what it shows."""
        self._journal = journal
        self._line = line
        self._identities = {one for one in (identity, journal.meta(_IDENTITY)) if one is not None}
        self._known: dict[bytes, EpochParameters] = {}
        for name in journal.names(_PREFIX):
            self._add(EpochParameters.decode(journal.meta(name) or b""))
        self._live: list[EpochParameters] = []
        self.digests: tuple[bytes, ...] = ()
        self._tagging: Tagging | None = None
        self._asking = trio.Lock()

    def find(self, digest: bytes) -> EpochParameters | None:
        """The pinned epoch with this digest."""
        return self._known.get(digest)

    @property
    def live(self) -> Sequence[EpochParameters]:
        """Pinned epochs that the server uses, oldest first; empty before it was asked."""
        return self._live

    @property
    def newest_number(self) -> int | None:
        """Number of the newest pinned epoch."""
        return max((one.number for one in self._known.values()), default=None)

    def has_ended(self, digest: bytes) -> bool:
        """Whether the server said, signed and to all witnesses, that it no longer uses this one."""
        known = self._known.get(digest)
        if known is None or not self._live or digest in self.digests:
            return False
        return known.number < self._live[-1].number

    async def newest(self) -> EpochParameters:
        """The epoch that the server issues in; asked for when first needed.

        Once there was Tagging, also in the background, there is nothing else.
        """
        if self._tagging is not None:
            raise self._tagging
        if not self._live:
            async with self._asking:
                if not self._live:
                    await self.refresh()
        return self._live[-1]

    async def refresh(self, apart: Apart | None = None) -> None:
        """Ask which epochs there are; Tagging if that is not what others, or we, were shown.

        `apart`: how long each connection waits first, in seconds, where nobody does for the answer.
        Then they do not come in one moment, in which they can be told to be one client's.
        """
        try:
            await self._refresh(apart)
        except Tagging as tagging:
            self._tagging = tagging
            raise

    async def _refresh(self, apart: Apart | None) -> None:
        reply = await self._agreed(None, apart)
        newest = await self._accept(reply)
        if reply.digests[-1] != newest.digest:
            raise Misbehaviour("the server's newest epoch is not the last of its list", _HINT)
        self.digests = reply.digests
        known = [self._known[digest] for digest in reply.digests if digest in self._known]
        self._live = sorted(known, key=_number)

    async def get(self, digest: bytes) -> EpochParameters:
        """The epoch with this digest, pinned or asked for."""
        known = self._known.get(digest)
        if known is None:
            known = await self._accept(await self._agreed(digest))
        if known.digest != digest:
            raise Misbehaviour("the server answered with another epoch than was asked for")
        return known

    # Asking.

    async def _agreed(self, digest: bytes | None, apart: Apart | None = None) -> Parameters:
        """What all witnesses are told. A new epoch may begin while they ask: then once more.

        Not at once: a server's processes take an epoch up one after the other, within a second.
        """
        for _ in range(_ROUNDS):
            told = await self._told(digest, apart)
            for one in told:
                self._check_identity(one, told[0])
            if len({one.parameters if digest else one.encode() for one in told}) == 1:
                return told[0]
            if digest is not None or not _is_succession(told):
                break
            await trio.sleep(SUCCESSION_SECONDS)
        raise Tagging("the server shows different parameters to different connections", _HINT)

    async def _told(self, digest: bytes | None, apart: Apart | None) -> list[Parameters]:
        frame = ParametersRequest(digest).encode()
        told: list[Parameters] = []

        async def ask(_: int) -> None:
            if apart is not None:
                await trio.sleep(apart())
            reply = await self._line.ask(frame)
            if isinstance(reply, Refused):
                raise refusal(reply.reason)
            if not isinstance(reply, Parameters):
                raise out_of_place()
            told.append(reply)

        await each(range(WITNESSES), ask, WITNESSES)
        return told

    def _check_identity(self, told: Parameters, first: Parameters) -> None:
        if not told.is_genuine:
            raise Misbehaviour("the server's parameters are not signed by who they say", _HINT)
        if told.identity != first.identity:
            raise Tagging("the server shows different identities to different connections", _HINT)
        if self._identities - {told.identity}:
            raise Tagging("the server's parameters are signed by another identity", _OTHER)

    # Pinning.

    async def _accept(self, told: Parameters) -> EpochParameters:
        """Check and pin what a server showed, with all that came since what is pinned."""
        shown = _decode(told)
        new = [shown]
        while (oldest := new[-1]).digest not in self._known and self._is_after_known(oldest):
            if len(new) > _LONGEST_CHAIN:
                raise Misbehaviour("the server's epochs have no end", _HINT)
            new.append(await self._before(oldest))
        self._pin_identity(told.identity)
        for one in reversed(new):
            if one.digest not in self._known:
                self._pin(one)
        return self._known[shown.digest]

    async def _before(self, epoch: EpochParameters) -> EpochParameters:
        try:
            before = _decode(await self._agreed(epoch.previous))
        except UnknownEpoch:
            raise Tagging(
                f"the server does not show the epoch before epoch {epoch.number}", _HINT
            ) from None
        if not epoch.follows(before):
            raise Tagging(
                f"the server's epoch {epoch.number} does not follow epoch {before.number}", _HINT
            )
        return before

    def _is_after_known(self, shown: EpochParameters) -> bool:
        """Whether there should be others between this epoch and those that are pinned."""
        newest = max((one.number for one in self._known.values()), default=shown.number)
        return shown.number > newest + 1

    def _pin(self, shown: EpochParameters) -> None:
        self._check_place(shown)
        try:
            shown.verify()
        except ProtocolError as error:
            raise Misbehaviour(
                "the server's parameters would betray amounts", "do not use this server"
            ) from error
        self._journal.put_meta(f"{_PREFIX}{shown.number:010}", shown.encode())
        self._add(shown)

    def _pin_identity(self, identity: bytes) -> None:
        if self._journal.meta(_IDENTITY) is None:
            self._identities.add(identity)
            self._journal.put_meta(_IDENTITY, identity)

    def _check_place(self, shown: EpochParameters) -> None:
        for other in self._known.values():
            if other.number == shown.number:
                raise Tagging(
                    f"the server shows other parameters for epoch {shown.number} than before",
                    _HINT,
                )
            older, newer = sorted((other, shown), key=_number)
            if newer.number == older.number + 1 and not newer.follows(older):
                raise Tagging(
                    f"the server's epoch {newer.number} does not follow epoch {older.number}",
                    _HINT,
                )

    def _add(self, parameters: EpochParameters) -> None:
        self._known[parameters.digest] = parameters


_OTHER: Final = "it may be another server, or one that tells its users apart: ask its operator"


def _decode(told: Parameters) -> EpochParameters:
    try:
        return EpochParameters.decode(told.parameters)
    except ProtocolError as error:
        raise Misbehaviour("the server's parameters cannot be read", _OTHER) from error


def _is_succession(told: Sequence[Parameters]) -> bool:
    """Whether what was told differs only by one epoch that began in between."""
    different = list({one.digests: one for one in told}.values())
    if len(different) != 2:
        return False
    one, other = different
    return _succeeds(one, other) or _succeeds(other, one)


def _succeeds(newer: Parameters, older: Parameters) -> bool:
    """Whether the newest epoch of one names that of the other as the epoch before."""
    try:
        previous = EpochParameters.decode(newer.parameters).previous
    except ProtocolError:
        return False
    kept = newer.digests[:-1]
    return previous == older.digests[-1] and kept == older.digests[len(older.digests) - len(kept) :]


def _number(parameters: EpochParameters) -> int:
    return parameters.number
