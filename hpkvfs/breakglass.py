"""The breakglass entry of a vault: kept up, told of, and used when only the words are left.

In each epoch the entry is stored once, and only then, at a time drawn at random: neither that
it is stored nor when says anything of what the vault is used for. What is in it must still be
worth something when it is needed, perhaps months later. So, before it is stored, the larger
share of the tokens is carved into credentials of the *reserve*, which the wallet spends last
(wallet/wallet.py). Tokens of the reserve that were spent all the same are in the entry in vain
until the next epoch; `report` says how many are not.

    schedule --> (its time comes) --> carve the reserve --> note, durably: reserve and digest
        ^                                                       |
        +------------------ note: stored <------ store the entry

Invariants
  - the journal has what an entry will be, and which credentials are reserved for it, before a
    byte of it leaves; whether it was stored is found out from the server when that was cut short;
  - before the reserve is let go, the journal has that it is no longer what the entry holds: a new
    one that never left is not taken for the old one;
  - an entry that we opened is replaced within HURRY_HOURS, before its timer fires by default;
  - a credential out of an entry is claimed at once, each by a reissue of its own: it is held
    only when the server confirmed that nobody spent it before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Final

import msgpack
import trio

from hpkvfs.errors import EmptyWallet, HpkvError, SpentElsewhere
from hpkvfs.net.refusals import OldCounter, UnknownEpoch
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol import codec
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.types import Generation
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.wallet import breakglass
from hpkvfs.wallet.breakglass import Contents
from hpkvfs.wallet.journal import Journal

log = logging.getLogger(__name__)

Rng = Callable[[int], bytes]
Clock = Callable[[], int]

HOUR: Final = 3_600 * 10**9
HURRY_HOURS: Final = 24
CALM_HOURS: Final = 7 * 24
LOOK_SECONDS: Final = 600.0
_NOTE: Final = "breakglass"
_DUE: Final = "breakglass/due"
_CLAIMED: Final = "breakglass/claimed"


@dataclass(frozen=True, slots=True)
class Note:
    """The entry stored last, or being stored: its epoch, its counter, what was in it.

    `opened`: somebody opened it, so its timer runs. `stored`: the server confirmed it.
    `reserved`: the wallet's reserve is of what is in it, and of nothing else.
    """

    epoch: bytes
    number: int
    counter: int
    digest: bytes
    amount: int
    stored: bool
    opened: bool
    reserved: bool

    @property
    def is_good(self) -> bool:
        """Whether it needs no replacing before the next epoch."""
        return self.stored and self.reserved and not self.opened

    def encode(self) -> bytes:
        """A row of the journal."""
        return codec.pack(astuple(self))

    @classmethod
    def decode(cls, row: bytes) -> Note:
        """Inverse of encode; TypeError or Malformed on what can't be one."""
        fields = codec.unpack(row)
        if not isinstance(fields, list):
            raise TypeError("not a note")
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class Found:
    """What an entry gave: tokens, tokens that had been spent elsewhere, a generation that exists.

    `hours`: for how long it can still be opened.
    """

    gained: int
    lost: int
    generation: Generation | None
    hours: int


class Breakglass:
    """Keeps a vault's entry up, and recovers from it."""

    def __init__(
        self, keys: VaultKeys, store: RemoteStore, journal: Journal, clock: Clock, rng: Rng
    ) -> None:
        """`clock` gives ns since 1970."""
        self._keys = keys
        self._store = store
        self._journal = journal
        self._clock = clock
        self._rng = rng
        self._turn = trio.Lock()
        row = journal.meta(_NOTE)
        self._note = Note.decode(row) if row else None

    # -- keeping it up ----------------------------------------------------------------------

    async def due(self) -> int | None:
        """When to store the next entry (ns since 1970); None: not before the next epoch."""
        newest = (await self._store.parameters()).digest
        note = self._note
        if note is not None and note.epoch == newest and note.is_good:
            return None
        drawn = self._drawn
        if drawn is not None and drawn[0] == newest:
            return drawn[1]
        return await self._draw(newest)

    async def _is_due(self) -> bool:
        due = await self.due()
        return due is not None and due <= self._clock()

    async def _draw(self, epoch: bytes) -> int:
        note = self._note
        hours = CALM_HOURS if note is not None and note.is_good else HURRY_HOURS
        at = self._clock() + hours * HOUR * int.from_bytes(self._rng(4), "big") // 2**32
        self._journal.put_meta(_DUE, msgpack.packb([epoch, at]))
        await self._journal.flush()
        return at

    @property
    def _drawn(self) -> tuple[bytes, int] | None:
        row = self._journal.meta(_DUE)
        if row is None:
            return None
        epoch, at = msgpack.unpackb(row)
        return epoch, at

    async def run(self, generation: Callable[[], Generation | None]) -> None:
        """Store the entry whenever it is due; until cancelled.

        When its time came while nobody was here, it is not stored at once: that would tell when
        we came.
        """
        await trio.sleep(LOOK_SECONDS * int.from_bytes(self._rng(4), "big") / 2**32)
        while True:
            try:
                await self.renew_if_due(generation())
            except HpkvError as error:
                log.warning("the breakglass entry was not stored: %s", error)
            await trio.sleep(LOOK_SECONDS)

    async def renew_if_due(self, generation: Generation | None) -> bool:
        """Store the entry if its time has come and there are tokens for it; whether it was."""
        if not await self._is_due():
            return False
        await self._store.refresh()
        if not await self._is_due():  # there is a newer epoch, which has a time of its own
            return False
        try:
            return await self.renew(generation)
        except EmptyWallet as error:
            log.info("no breakglass entry: %s", error)
            return False

    async def renew(self, generation: Generation | None) -> bool:
        """Store an entry of the newest epoch now; whether that was done now or only noted.

        EmptyWallet when there is nothing to put into it, or to pay for it with; StoreError.
        """
        async with self._turn:
            epoch = await self._store.refresh()
            while True:
                try:
                    return await self._renew_in(epoch, generation)
                except (UnknownEpoch, EmptyWallet) as error:
                    if isinstance(error, UnknownEpoch):
                        await self._store.refresh()
                    newest = await self._store.parameters()
                    if newest.digest == epoch.digest:
                        raise
                    epoch = newest  # it began meanwhile, and what there is has moved into it

    async def _renew_in(self, epoch: EpochParameters, generation: Generation | None) -> bool:
        if await self._was_stored(epoch):
            return False
        try:
            await self._store_entry(epoch, generation, self._next_counter(epoch))
        except OldCounter:  # of a client that was lost, or is beside us
            there = await self._store.open_entry(self._keys.entry_signer(epoch.digest))
            await self._store_entry(epoch, generation, there.counter + 1 if there else 1)
        return True

    def _next_counter(self, epoch: EpochParameters) -> int:
        return self._note.counter + 1 if self._note and self._note.epoch == epoch.digest else 1

    async def _was_stored(self, epoch: EpochParameters) -> bool:
        """Whether an entry, of whose storing no answer came, is there after all."""
        note = self._note
        if note is None or note.stored or note.epoch != epoch.digest:
            return False
        there = await self._store.open_entry(self._keys.entry_signer(epoch.digest))
        if there is None or there.digest != note.digest:
            return False
        await self._remember(replace(note, stored=True))
        return True

    async def _store_entry(
        self, epoch: EpochParameters, generation: Generation | None, counter: int
    ) -> None:
        await self._let_go()
        await self._store.gather()
        amounts = shares(self._store.spendable(epoch.digest), epoch.tariff.entry)
        await self._store.fill_reserve(epoch, amounts)
        contents = Contents(generation, tuple(one.credential for one in self._store.reserve))
        value = breakglass.seal(contents, self._key, epoch.digest, self._rng)
        signer = self._keys.entry_signer(epoch.digest)
        digest = breakglass.digest(value)
        note = Note(
            epoch.digest, epoch.number, counter, digest, contents.amount, False, False, True
        )
        await self._remember(note)
        await self._store.store_entry(epoch, signer, counter, value)
        await self._remember(replace(note, stored=True))

    async def _let_go(self) -> None:
        """The reserve is for the next entry: what is in the last one is spent as anything else."""
        if self._note is not None:
            await self._remember(replace(self._note, reserved=False))
        self._store.release_reserve()

    async def _remember(self, note: Note) -> None:
        self._note = note
        self._journal.put_meta(_NOTE, note.encode())
        await self._journal.flush()

    @property
    def _key(self) -> bytes:
        return self._keys.secret("breakglass")

    # -- telling of it ------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What the words alone would bring back, from local state.

        state: "none" (no entry), "safe" (newest epoch), "ageing" (an older one, still accepted),
        "opened" (its timer runs), "expired" (its epoch is over); tokens: those in it that were
        not spent; stored_tokens: those that were in it at first; epoch, newest: numbers of the
        epoch whose end makes it worthless, and of the newest one known; due: when the next is
        stored, in seconds since 1970, None if not before the next epoch; at_risk: whether most of
        what is held would be lost with this machine, or may be before long.
        """
        note, drawn = self._note, self._drawn
        state = self._state()
        counts = note is not None and note.is_good and state in _GOOD
        safe = sum(one.amount for one in self._store.reserve) if counts else 0
        held = self._store.balance.held
        is_waiting = drawn is not None and (
            note is None or note.epoch != drawn[0] or not note.is_good
        )
        return {
            "state": state,
            "tokens": safe,
            "epoch": note.number if note is not None else None,
            "newest": self._store.newest_epoch,
            "held": held,
            "at_risk": held > 0 and (state != "safe" or safe < held / 4),
            "stored_tokens": note.amount if note is not None and note.stored else 0,
            "due": drawn[1] // 10**9 if drawn is not None and is_waiting else None,
        }

    def _state(self) -> str:
        note, used = self._note, self._store.epochs_in_use
        if note is None or not note.stored:
            return "none"
        if note.opened:
            return "opened"
        if used and note.epoch not in used:
            return "expired"
        return "safe" if note.number == self._store.newest_epoch else "ageing"

    # -- using it -------------------------------------------------------------------------------

    async def recover(self) -> Found | None:
        """Take what the newest entry has into the wallet; None when there is no entry.

        It can be repeated, here and elsewhere, until the entry is gone.
        """
        await self._store.refresh()
        for epoch in reversed(self._store.epochs_in_use):
            try:
                found = await self._recover_from(epoch)
            except UnknownEpoch:  # it ended meanwhile, and what is in its entry with it
                continue
            if found is not None:
                return found
        return None

    async def _recover_from(self, epoch: bytes) -> Found | None:
        signer = self._keys.entry_signer(epoch)
        there = await self._store.open_entry(signer)
        opened = there and await self._store.open_entry(signer, there.digest)
        if opened is None or opened.value is None:
            return None
        contents = breakglass.unseal(opened.value, self._key, epoch)
        number = (await self._store.epoch(epoch)).number
        note = Note(
            epoch, number, opened.counter, opened.digest, 0, True, opened=True, reserved=False
        )
        await self._remember(note)
        lost = await self._claim(epoch, opened.digest, contents)
        gained = contents.amount - lost
        return Found(gained, lost, contents.generation, opened.hours or 0)

    async def _claim(self, epoch: bytes, entry: bytes, contents: Contents) -> int:
        """Claim each credential, unless an earlier try did; tokens that somebody else spent."""
        lost = 0
        for number, credential in enumerate(contents.credentials, 1):
            if self._claimed(entry) >= number:
                continue
            note = (_CLAIMED, msgpack.packb([entry, number]))
            try:
                await self._store.claim(epoch, credential, note)
            except SpentElsewhere:
                lost += credential.amount
        return lost

    def _claimed(self, entry: bytes) -> int:
        row = self._journal.meta(_CLAIMED)
        known, number = msgpack.unpackb(row) if row else (b"", 0)
        return int(number) if known == entry else 0


_GOOD: Final = ("safe", "ageing")


def warning(report: Mapping[str, Any]) -> str | None:
    """What to tell at once of what `report` says; None when there is nothing to worry about."""
    if not report["at_risk"]:
        return None
    return (
        f"of {report['held']:,} tokens the words alone would bring back {report['tokens']:,}"
        f"{_UNTIL.get(report['state'], '')}: see `hpkvfs status`, or run `hpkvfs keepalive --now`"
    )


_UNTIL: Final = {
    "ageing": ", and none once their epoch has ended",
    "opened": ", and none before long, since the entry was opened",
}


def shares(spendable: int, price: int) -> tuple[int, int]:
    """Two amounts to put into an entry of this price: three quarters of what can be spent.

    Two, so that when one must be spent the other is still good. EmptyWallet when nothing much
    would be left to recover.
    """
    reserve = min(spendable * 3 // 4, spendable - price)
    if reserve < 2:
        raise EmptyWallet(
            f"a breakglass entry costs {price} tokens and there are {spendable} to spend",
            "redeem a voucher",
        )
    return reserve - reserve // 2, reserve // 2
