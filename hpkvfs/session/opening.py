"""A session built from a state directory, from local state alone.

Invariant: whoever has a session holds the lock of its state directory, and what it opened is closed
before the lock goes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from hpkvfs import kept
from hpkvfs.breakglass import Breakglass
from hpkvfs.cache import BlobCache
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.fs.redolog import RedoLog
from hpkvfs.fs.shelf import Shelf
from hpkvfs.net.proving import Helpers, Here, Prover
from hpkvfs.net.store import RemoteStore
from hpkvfs.net.transport import PATIENCE_SECONDS, Dialer
from hpkvfs.session.options import Options
from hpkvfs.session.session import Rng, Session
from hpkvfs.state import StateDirectory, disk_trouble
from hpkvfs.volume.blob import Sealer
from hpkvfs.volume.items import Clock, NameHash
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.volume import Volume
from hpkvfs.wallet.journal import Journal

_WRITER = "writer"


@asynccontextmanager
async def open_session(
    state: StateDirectory,
    keys: VaultKeys,
    dialer: Dialer,
    options: Options,
    *,
    clock: Clock,
    rng: Rng,
    identity: bytes | None = None,
    uid: int = 0,
    gid: int = 0,
) -> AsyncIterator[Session]:
    """The vault of a state directory, from local state alone; AlreadyInUse, VaultError.

    `identity`: the key (32 bytes) in the server's onion address, if it has one.
    The caller then runs `connect` (before or while using it) and, for anything that lasts,
    `keep_going`.
    """
    log_directory = kept.log_directory(state, options.kept)
    with (
        state.locked(),
        closing(Journal(state.wallet, keys.secret("wallet"), rng)) as journal,
        closing(_cache(state, keys, options, rng)) as cache,
        closing(RedoLog(log_directory, keys.secret("redo"), rng)) as redo,
        closing(Helpers(Here(rng), options.helpers)) as helpers,
    ):
        prover = helpers if options.helpers else None
        session = _build(
            state, keys, dialer, options, journal, cache, redo, clock, rng, identity, prover
        )
        if session.volume.known is not None or state.is_new:
            with disk_trouble():
                session.load_local(uid, gid)
        yield session


def _cache(state: StateDirectory, keys: VaultKeys, options: Options, rng: Rng) -> BlobCache:
    with disk_trouble():
        return BlobCache(state.cache, keys.secret("cache"), options.cache_bytes, rng)


def _build(
    state: StateDirectory,
    keys: VaultKeys,
    dialer: Dialer,
    options: Options,
    journal: Journal,
    cache: BlobCache,
    redo: RedoLog,
    clock: Clock,
    rng: Rng,
    identity: bytes | None,
    prover: Prover | None,
) -> Session:
    patience = options.patience or PATIENCE_SECONDS
    store = RemoteStore(journal, dialer, rng, identity=identity, patience=patience, prover=prover)
    sealer = Sealer(keys, rng)
    known = kept.known(journal, options.kept)
    volume = Volume(keys, sealer, store, cache, known, memory=options.caches)
    writer = journal.meta(_WRITER)
    if writer is None:
        writer = rng(8)
        journal.put_meta(_WRITER, writer)
    names = NameHash(keys.secret("names"))
    breakglass = Breakglass(keys, store, journal, clock, rng)
    rooms: list[Session] = []
    shelf = Shelf(volume, names, shown=options.snapshots_shown)
    held = options.memory // 16
    fs = Filesystem(shelf, redo, names, clock, lambda size: rooms[0].admission.room(size), held)
    parts = (keys, journal, store, volume, fs, shelf, names, writer)
    rooms.append(Session(*parts, options, clock, breakglass, rng, state, redo))
    return rooms[0]
