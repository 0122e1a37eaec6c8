"""A serving server's epochs: begun on schedule, taken up when a command began them, ended.

Ending an epoch has an order: the ledger refuses it, durably; then the handler no longer lists it;
then what is kept of it goes, the secret key first. So whoever is told that an epoch has ended can
rely on it that no request of it is performed any more, in no process: a look at a storage key then
tells for good whether an insertion in it was. A crash in between leaves what the next start
finishes: the ledger's `oldest_epoch` only grows, so an epoch that ended never comes back.

Of several servers on one ledger one begins an epoch, whichever comes first; the others say that
they miss it until its files are copied to them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Final

import trio

from hpkvd import config as settings
from hpkvd import epochs as epoch_files
from hpkvd import files, log
from hpkvd.config import Config, ConfigError
from hpkvd.epochs import EpochError, Epochs
from hpkvd.handler import Handler
from hpkvd.ledger import Engine, LedgerError
from hpkvfs.protocol.identity import Identity

POLL_SECONDS: Final = 1.0
TURNS_A_CHECK: Final = 60
SECONDS_PER_DAY: Final = 86_400


class Rotation:
    """Keeps the epochs that a handler uses those that there are."""

    def __init__(
        self,
        data: Path,
        identity: Identity,
        ledger: Engine,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = data / settings.EPOCHS
        self._data = data
        self._identity = identity
        self._ledger = ledger
        self._clock = clock
        self._complaints = log.Complaints()
        self._keep = 0

    def load(self, config: Config) -> Epochs:
        """The epochs that can be presented; EpochError."""
        self._keep = config.epochs.keep
        oldest = self._ledger.oldest_epoch
        with files.locked(self._directory):  # not while another process begins one
            epochs = epoch_files.load(self._directory, self._identity, self._keep, oldest)
            self._check(epochs)
        return epochs

    def _check(self, epochs: Epochs) -> None:
        newest = epochs.newest.parameters
        epoch_files.check(self._directory, newest, self._ledger.claim_epoch)

    async def run(
        self,
        handler: Handler,
        epochs: Epochs,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Until cancelled. Errors are told, and tried again: settings may be in the making.

        Started when the handler may answer: what `epochs` does not have, the ledger refuses.
        """
        await self._retire_before(epochs)
        epoch_files.forget(self._directory, epochs.oldest.number)
        task_status.started()
        for turn in count(1):
            await trio.sleep(POLL_SECONDS)
            try:
                epochs = await self._turn(handler, epochs)
                if turn % TURNS_A_CHECK == 0:
                    self._check(epochs)
            except (ConfigError, EpochError, LedgerError) as error:
                self._complaints.complain(f"epochs stay as they are: {error}")
            except OSError as error:
                self._complaints.complain(f"epochs stay as they are: {error.strerror}")

    async def _turn(self, handler: Handler, epochs: Epochs) -> Epochs:
        config = settings.load(self._data)
        if self._is_due(config, epochs):
            newest = epochs.newest.number
            oldest = epoch_files.oldest_kept(newest + 1, self._keep, self._ledger.oldest_epoch)
            rng, claim = secrets.token_bytes, self._ledger.claim_epoch
            epoch_files.rotate(self._directory, config.tariff, rng, oldest, claim, after=newest)
        number = epoch_files.newest_number(self._directory)
        if number == epochs.newest.number and config.epochs.keep == self._keep:
            return epochs
        changed = self.load(config)
        await self._retire_before(changed)
        handler.use(changed)
        log.tell(
            f"epoch {changed.newest.number} is in use; tokens of epoch"
            f" {changed.oldest.number} and later ones can be presented"
        )
        epoch_files.forget(self._directory, changed.oldest.number)
        return changed

    def _is_due(self, config: Config, epochs: Epochs) -> bool:
        if not config.epochs.days:
            return False
        began = epoch_files.began(self._directory, epochs.newest.number)
        return self._clock() >= began + config.epochs.days * SECONDS_PER_DAY

    async def _retire_before(self, epochs: Epochs) -> None:
        if epochs.oldest.number > self._ledger.oldest_epoch:
            await self._ledger.retire(epochs.oldest.number)
