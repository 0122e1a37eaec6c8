"""What the publisher has this machine remember: fs.publisher.Records.

Invariant: what is durable here is never ahead of the server. The log is synced before an anchor
that covers it is stored; a generation is noted when its anchor is there; and a receipt goes only
when that generation accounts for what it tells.
"""

from __future__ import annotations

from hpkvfs import kept, threads
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.net.store import RemoteStore
from hpkvfs.state import disk_trouble
from hpkvfs.volume.volume import Known
from hpkvfs.wallet.journal import Journal


class LocalRecords:
    """Durable facts in the redo log and the journal."""

    def __init__(self, fs: Filesystem, journal: Journal, store: RemoteStore) -> None:
        self._fs = fs
        self._journal = journal
        self._store = store

    async def sync_log(self) -> None:
        """Return when all changes so far are in the redo log, durably; VaultError."""
        with disk_trouble():
            await threads.in_thread(self._fs.syncer())

    async def save_known(self, known: Known) -> None:
        """Remember the newest generation, durably."""
        kept.save_known(self._journal, known)
        await self._journal.flush()

    def mark(self) -> int:
        """The newest receipt."""
        return max((receipt.seq for receipt in self._journal.receipts), default=0)

    def settle(self, mark: int) -> None:
        """Forget receipts that the known generation accounts for."""
        self._store.forget_receipts(mark)
        kept.come_back(self._journal)
