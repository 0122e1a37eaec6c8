"""The wallet's share in the breakglass entry: made for the next one, taken in from one.

Invariants:
  - what is reserved is of just the amounts that were asked for, and nobody ran between a
    credential's settlement and its being reserved;
  - a credential out of an entry is held only after a reissue of its own: the journal has the
    claim, with its note, before a byte of it leaves, and writes it off if somebody else spent it.

Whether the reserve is what an entry holds is known above (breakglass.py): while it is being filled,
and when that failed half-way, it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpkvfs.net.epochs import Epochs
from hpkvfs.net.order import Order
from hpkvfs.net.till import CLAIM, Till
from hpkvfs.protocol.credential import Credential
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import ReissueRequest
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Selection, split


class Reserve:
    """Credentials that ordinary requests take only when nothing else could pay."""

    def __init__(self, till: Till, epochs: Epochs) -> None:
        self._till = till
        self._wallet = till.wallet
        self._epochs = epochs

    async def fill(self, epoch: EpochParameters, amounts: Sequence[int]) -> None:
        """Have credentials of just these amounts in the reserve, which the journal then has.

        It is not durable yet. What fails may leave some of them there, which the next call lets go.
        """
        self._wallet.release_reserve()
        for amount in amounts:
            await self._fill_one(epoch, amount)
        self._till.journal.reserve(self._wallet.reserve)

    async def _fill_one(self, epoch: EpochParameters, amount: int) -> None:
        merges = True
        while merges:
            selection = self._wallet.carve(epoch.digest, amount)
            if selection is None:
                await self._till.grow(epoch)
                continue
            merges = selection.merges
            await self._till.reissue(epoch, selection)
        self._wallet.reserve_one(epoch.digest, amount)  # nobody ran since that was settled

    def release(self, epoch: EpochParameters) -> None:
        """Let what is reserved of an epoch be spent, or moved, as anything else."""
        if self._wallet.count_reserved(epoch.digest):
            self._wallet.release_reserve(epoch.digest)
            self._till.journal.reserve(self._wallet.reserve)

    async def claim(self, digest: bytes, credential: Credential, note: tuple[str, bytes]) -> None:
        """Take in a credential that an entry had; SpentElsewhere if it is worth nothing now.

        `digest`: of its epoch. `note` becomes durable together with the claim.
        """
        epoch = await self._epochs.get(digest)
        while (inputs := self._wallet.take_in(epoch.digest, credential)) is None:
            await self._till.grow(epoch)
        order = Order(Operation.REISSUE, lambda epoch: ReissueRequest(epoch, 2), memo=CLAIM)
        amounts = split(credential.amount, epoch.tariff.insert)
        selection = Selection(epoch.digest, inputs, amounts, False)
        pending, frame = self._till.begin(epoch, selection, order)
        with self._till.driving(pending):
            self._till.journal.put_meta(*note)
            await self._till.journal.begin_claim(pending, inputs[0], self._wallet.book)
            await self._till.answer(pending, frame)
