"""A snapshot mounted beside the vault that it is of: a second mount of one state directory.

Wallet, journal, cache and redo log belong to the process that has the vault mounted. This one has
the vault's keys, to find names, and nothing else: every blob that it reads it borrows from that
process, over the control socket, opened and verified there. So it pays for nothing, journals
nothing, and may end at any time.

    read -> Borrowed.fetch -> control socket -> lend -> Volume.fetch -> cache or server

While the vault is not mounted, what neither the kernel nor this process has in memory can't be read
(EHOSTDOWN); when it is mounted again, it can. A snapshot that is deleted meanwhile fades as its
blobs are collected.
"""

from __future__ import annotations

import base64
import json
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from hpkvfs.control import decode_error, encode, receive_line, short_path
from hpkvfs.errors import HpkvError, Unreachable, UserError, VaultError
from hpkvfs.mountpoint import BESIDE, STOP, mount_point, mounting
from hpkvfs.timeline import SnapshotBackend, Timeline
from hpkvfs.types import BlobRef, Missing
from hpkvfs.volume.blob import Kind, Sealer
from hpkvfs.volume.items import Clock, NameHash
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.snapshots import Snapshot, decode_table, encode_tables
from hpkvfs.volume.volume import Volume
from hpkvfs.writeback import Writeback

log = logging.getLogger(__name__)

LENT: Final = (Kind.NODE, Kind.EXTENT)
"""What reading a snapshot takes."""


# Who lends.


async def lend_snapshot(timeline: Timeline, name: str) -> dict[str, Any]:
    """What is to be known of a snapshot to read it; UserError."""
    (table,) = encode_tables([await timeline.find(name)])
    return {"table": base64.b64encode(table).decode()}


async def lend(volume: Volume, ref: str, kind: str) -> dict[str, Any]:
    """A blob's payload; UserError for what is none, and what fetching it raises."""
    try:
        blob, what = BlobRef.decode(base64.b64decode(ref)), Kind[kind]
    except (ValueError, KeyError):
        raise UserError("a blob that can't be") from None
    if what not in LENT:
        raise UserError("a blob that reading a snapshot does not take")
    return {"payload": base64.b64encode(await volume.fetch(blob, what)).decode()}


# Who borrows.


class Lender:
    """The process that has the vault mounted."""

    def __init__(self, path: Path) -> None:
        """`path`: of its control socket."""
        self._path = path

    async def snapshot(self, name: str) -> Snapshot:
        """The snapshot of this name; HpkvError."""
        found = await self._ask("lend-snapshot", {"name": name})
        return decode_table(base64.b64decode(found["table"]))[0]

    async def blob(self, ref: BlobRef, kind: Kind) -> bytes:
        """A blob's payload; HpkvError."""
        wanted = {"ref": base64.b64encode(ref.encode()).decode(), "kind": kind.name}
        return base64.b64decode((await self._ask("lend", wanted))["payload"])

    async def _ask(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            with short_path(self._path) as short:
                stream = await trio.open_unix_socket(short)
            async with stream:
                await stream.send_all(encode({"command": command, "arguments": arguments}))
                line = bytearray()
                await receive_line(stream, line)
                answer = json.loads(line)
        except (OSError, ValueError, trio.BrokenResourceError) as error:
            log.debug("the control socket: %s", error)
            raise Unreachable(
                "the vault is not mounted any more", "mount it: this mount then goes on"
            ) from None
        if "error" in answer:
            raise _as_it_was(decode_error(answer["error"]))
        result: dict[str, Any] = answer["result"]
        return result


def _as_it_was(error: HpkvError) -> HpkvError:
    """That a server is away is no fault of the blob, and a program is told so."""
    if error.exit_code != Unreachable.exit_code:
        return error
    return Unreachable(error.message, error.hint)


class _Nothing:
    """The store and the cache of who has neither. Implements types.BlobStore, volume.Cache."""

    async def insert(self, key: bytes, blob: bytes, memo: bytes) -> None:
        """VaultError."""
        raise VaultError("nothing is stored by who borrows")

    async def look_up(self, key: bytes) -> bytes | None:
        """VaultError."""
        raise VaultError("nothing is looked up by who borrows")

    async def delete(self, signer: object, digest: bytes, memo: bytes) -> None:
        """VaultError."""
        raise VaultError("nothing is deleted by who borrows")

    def get(self, ref: BlobRef) -> bytes | None:
        """None."""
        return None

    def payloads(self, refs: Iterable[BlobRef], kind: bytes) -> list[bytes | None]:
        """None of them."""
        return [None for _ in refs]

    def __contains__(self, ref: BlobRef) -> bool:
        return False

    def put(self, ref: BlobRef, blob: bytes) -> None:
        """Forget it at once."""

    def drop(self, ref: BlobRef) -> None:
        """It is not there."""


class _BorrowedVolume(Volume):
    """Blobs in memory that come from the lender."""

    def __init__(
        self, keys: VaultKeys, lender: Lender, rng: Callable[[int], bytes], memory: int
    ) -> None:
        nothing = _Nothing()
        super().__init__(keys, Sealer(keys, rng), nothing, nothing, None, memory)
        self._lender = lender

    async def fetch(self, ref: BlobRef, kind: Kind, *, fresh: bool = False) -> bytes:
        """See Volume.fetch."""
        async with self._slots:
            return await self._lender.blob(ref, kind)


class Borrowed:
    """What a snapshot is read from, in place of a session. Implements timeline.Source."""

    def __init__(
        self,
        keys: VaultKeys,
        lender: Lender,
        clock: Clock,
        rng: Callable[[int], bytes],
        memory: int,
        nursery: trio.Nursery,
    ) -> None:
        """`memory`: bytes of nodes and extents to keep; `nursery`: for what is fetched ahead."""
        self.volume: Volume = _BorrowedVolume(keys, lender, rng, memory)
        self.names = NameHash(keys.secret("names"))
        self.clock = clock
        self._nursery = nursery

    async def load(self, missing: Missing) -> None:
        """Bring blobs into memory; HpkvError."""
        await self.volume.load(missing)

    def prefetch(self, refs: list[BlobRef]) -> None:
        """Fetch extents in the background."""
        self.volume.prefetch(refs, self._nursery)


@dataclass(frozen=True, slots=True)
class Showing:
    """What to show, and where: a snapshot's name, an empty directory.

    memory: bytes of nodes and extents to keep; ready: called when it can be used.
    """

    snapshot: str
    directory: Path
    ready: Callable[[], None]
    allow_other: bool
    memory: int


async def show(control: Path, keys: VaultKeys, clock: Clock, showing: Showing) -> None:
    """Mount a snapshot of the vault behind this control socket, until unmounted or told to stop.

    UserError (the snapshot, the directory), Unreachable.
    """
    from hpkvfs import fuse

    lender = Lender(control)
    snapshot = await lender.snapshot(showing.snapshot)
    directory = mount_point(showing.directory)
    options = fuse.mount_options(read_only=True, allow_other=showing.allow_other, source=BESIDE)
    is_up = False
    async with trio.open_nursery() as nursery:

        async def stop_when_told() -> None:
            with trio.open_signal_receiver(*STOP) as signals:
                await anext(signals)
            fuse.stop()

        def ready() -> None:
            nonlocal is_up
            is_up = True
            nursery.start_soon(stop_when_told)
            showing.ready()

        source = Borrowed(keys, lender, clock, secrets.token_bytes, showing.memory, nursery)
        backend, writeback = SnapshotBackend(source, snapshot), Writeback(fuse.forget_alias)
        with mounting(directory, lambda: is_up):
            await fuse.serve(backend, str(directory), options, ready, writeback)
        nursery.cancel_scope.cancel()
