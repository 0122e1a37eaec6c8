"""Composition: a vault opened for one command, or mounted until it is unmounted.

A mounting process lives through these steps, and each is undone by the end of its scope:

    lock the state directory, read local state          (state.py, session.open_session)
    connect to the server, or note why not              _start
    publish in the background, answer commands          Session.keep_going, commands.serve
    answer the kernel until unmounted                   fuse.serve
    publish what is left                                _finish

What can't be published stays in the redo log, and is published after the next mount.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from hpkvfs import buying, commands
from hpkvfs.breakglass import Found, warning
from hpkvfs.commands import Arguments, Commands, Result, ungrouped
from hpkvfs.control import Progress, no_progress
from hpkvfs.errors import (
    DiskFull,
    EmptyWallet,
    HpkvError,
    Misbehaviour,
    NothingThere,
    SecondWriter,
    StoreError,
    Unreachable,
    UserError,
)
from hpkvfs.fs.backend import Backend
from hpkvfs.fs.shelf import SNAPSHOTS_NAME
from hpkvfs.keep import Policy
from hpkvfs.mountpoint import STOP, check_detached, detaching, is_mounted, mount_point, mounting
from hpkvfs.net.proving import helpers_here
from hpkvfs.net.transport import Way
from hpkvfs.session import Options, Session, TakeOver, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.timeline import SnapshotBackend, Timeline, is_name_taken
from hpkvfs.upkeep import look_after
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.wallet import journal
from hpkvfs.writeback import Writeback

log = logging.getLogger(__name__)

T = TypeVar("T")

CLOCK_REALTIME_COARSE: Final = 5  # linux/time.h; Python does not name it
NEEDS_NO_TREE: Final = ("status", "balance", "redeem", "keepalive", *buying.COMMANDS)
ENOUGH: Final = 200


@dataclass(frozen=True, slots=True)
class Vault:
    """A vault on this machine, its keys, the way to its server and who that is (32 bytes)."""

    state: StateDirectory
    keys: VaultKeys
    way: Way
    identity: bytes | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    """Where and how to mount; `notice` is told what the user should know at once.

    snapshot: mount this one alone; policy: automatic snapshots; collect_every: seconds over
    which a collection is spread, and from one to the next; 0: none.
    """

    directory: Path
    ready: Callable[[], None]
    notice: Callable[[str], None]
    read_only: bool = False
    allow_other: bool = False
    snapshot: str | None = None
    policy: Policy = ()
    collect_every: float = 0.0
    options: Options = field(default_factory=Options)


def run(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """trio.run, raising errors of ours and KeyboardInterrupt bare."""
    with ungrouped():
        return trio.run(function, *args)


@asynccontextmanager
async def opened(vault: Vault, options: Options) -> AsyncIterator[Session]:
    """The vault, from local state alone; AlreadyInUse, VaultError."""
    if options.patience is None:
        options = replace(options, patience=vault.way.patience)
    async with (
        vault.way.running(),
        open_session(
            vault.state,
            vault.keys,
            vault.way,
            options,
            identity=vault.identity,
            clock=now,
            rng=secrets.token_bytes,
            uid=os.getuid(),
            gid=os.getgid(),
        ) as session,
    ):
        yield session


def now() -> int:
    """Nanoseconds since 1970, by the clock that the kernel stamps files with."""
    return time.clock_gettime_ns(CLOCK_REALTIME_COARSE)


def _is_lost(vault: Vault, session: Session) -> bool:
    """Whether this state directory has yet to learn what the vault holds."""
    return session.volume.known is None and not vault.state.is_new


# -- without mounting ------------------------------------------------------------------------


async def perform(vault: Vault, name: str, arguments: Arguments, progress: Progress) -> Result:
    """Open the vault for one command; AlreadyInUse, and what the command raises."""
    async with opened(vault, Options(patience=vault.way.patience / 2)) as session:
        if name not in NEEDS_NO_TREE:
            await vault.way.probe()
            if _is_lost(vault, session):
                await session.recover()
        result = await Commands(session, vault.way.describe).run(name, arguments, progress)
        if name not in NEEDS_NO_TREE:
            with suppress(StoreError):  # then the next command does it
                await session.store.move_late()
        return result


async def recover(vault: Vault, voucher: str | None) -> Result:
    """Bring a vault back from its keys alone; NothingThere when the server has none of it.

    Tokens come from the breakglass entry first. The voucher is redeemed before anything is
    looked up only if there are none, since then it is not known yet whether there is a vault.
    When it was cut short, calling it again with the same voucher goes on.
    """
    async with opened(vault, Options()) as session:
        if not _is_lost(vault, session):
            raise UserError(
                f"the vault in {vault.state.path} is here already", "mount it with hpkvfs mount"
            )
        await vault.way.probe()
        await session.connect()
        found = await session.breakglass.recover()
        if voucher is not None and not session.store.balance.total:
            await session.redeem(voucher)
            voucher = None
        try:
            generation, orphans = await session.recover(found.generation if found else None)
        except EmptyWallet as error:
            raise _what_to_buy(found) from error
        except NothingThere as error:
            raise _nothing_there(vault, session, error) from error
        if voucher is not None:
            await _redeem_again(session, voucher)
        return {
            "generation": generation,
            "orphans": orphans,
            "entry": found is not None,
            "tokens_gained": found.gained if found else 0,
            "tokens_lost": found.lost if found else 0,
            **session.status(),
        }


async def _redeem_again(session: Session, voucher: str) -> None:
    """Redeem, unless an earlier try did."""
    try:
        await session.redeem(voucher)
    except UserError:
        if not session.store.balance.total:
            raise


def _what_to_buy(found: Found | None) -> EmptyWallet:
    """Say why there are no tokens, and how many it takes."""
    hint = (
        f"buy a voucher from the server's operator, {ENOUGH} tokens will do,"
        " and give it with --voucher-file"
    )
    if found is None:
        return EmptyWallet("there are no tokens to recover with, and no breakglass entry", hint)
    if found.lost:
        return EmptyWallet(
            f"the {found.lost:,} tokens of the breakglass entry were spent since: by the machine"
            " that is lost, or where the vault was recovered before",
            hint,
        )
    return EmptyWallet("the breakglass entry has too few tokens to recover with", hint)


def _nothing_there(vault: Vault, session: Session, error: NothingThere) -> NothingThere:
    tokens = session.store.balance.total
    if not tokens:
        return error
    return NothingThere(
        f"{error.message}, and their passphrase; {tokens:,} tokens are kept in {vault.state.path}",
        "look at the words, the passphrase and --server, and recover again: it goes on with them",
    )


def take_along(
    state: StateDirectory, old: VaultKeys, keys: VaultKeys, password: str | None
) -> None:
    """Give a state directory that found nothing for its words other words, tokens and all.

    VaultError, and nothing changed, when it has a vault after all.
    """
    with state.locked():
        wallet = state.other_wallet
        secret, rng = keys.secret("wallet"), secrets.token_bytes
        journal.reseal(state.wallet, old.secret("wallet"), wallet, secret, rng)
        state.change_keys(keys, password, wallet, secrets.token_bytes)


# -- mounted ---------------------------------------------------------------------------------


class MountedCommands(Commands):
    """Commands of a mounted vault: also those that need to know where it is mounted."""

    def __init__(self, session: Session, vault: Vault, request: Mount) -> None:
        super().__init__(session, vault.way.describe)
        self._vault = vault
        self._request = request
        self._free["status"] = self._mounted_status
        self._free["unmount"] = self._unmount
        self.unmounted = False
        self.is_mounted = True
        self.snapshots_dir: Path | None = None
        self._leave = trio.Event()
        self._finished = trio.Event()
        self._report: Progress = no_progress
        self._outcome: Result = {}

    async def _mounted_status(self, arguments: Arguments, progress: Progress) -> Result:
        return {
            **await self._status(arguments, progress),
            "mounted": str(self._request.directory),
            "detached": not is_mounted(self._request.directory),
            "read_only": self._request.read_only,
            "snapshots_dir": str(self.snapshots_dir) if self.snapshots_dir else None,
            "pid": os.getpid(),
        }

    async def _unmount(self, arguments: Arguments, progress: Progress) -> Result:
        """Publish while the filesystem still answers, then unmount, then the rest."""
        self._report = progress
        await _pull(self.session)
        if not await _is_pointless(self.session, self._vault.way):
            try:
                await self.session.publish(progress)
            except HpkvError as error:
                log.warning("before unmounting: %s", error)
        if arguments.get("force"):
            self._leave.set()
        elif not self.unmounted:
            await _detach(self._request.directory)
        await self._finished.wait()
        return self._outcome

    async def told_to_leave(self) -> None:
        """Return when someone wants the filesystem gone whether it is in use or not."""
        await self._leave.wait()

    async def finish(self) -> None:
        """Publish what is left after unmounting, and say what could not be."""
        trouble = await _finish(self.session, self._vault.way, lambda d, t: self._report(d, t))
        left = self.session.fs.totals().dirty if trouble else 0
        self._outcome = {"trouble": trouble, "unpublished_bytes": left}
        if trouble:
            log.warning("not published: %s; it is kept in %s", trouble, self._vault.state.path)
        self._finished.set()


async def mount(vault: Vault, request: Mount) -> None:
    """Mount, serve until unmounted or told to stop, publish what is left.

    AlreadyInUse, UserError (the directory), SecondWriter, Misbehaviour.
    """
    from hpkvfs import fuse

    directory = mount_point(request.directory)
    request = replace(request, directory=directory)
    options = fuse.mount_options(read_only=request.read_only, allow_other=request.allow_other)
    helped = replace(request.options, helpers=helpers_here())
    async with opened(vault, helped) as session:
        session.reserve_room()
        session.followed = lambda: fuse.forget_caches(session.fs)
        writeback = Writeback(fuse.forget_alias)
        await _start(vault, session, request)
        backend: Backend = session
        served = MountedCommands(session, vault, request)
        if request.snapshot is not None:
            backend = SnapshotBackend(session, await Timeline(session).find(request.snapshot))
        elif await is_name_taken(session):
            request.notice(_TAKEN)
        elif session.shelf.shown:
            served.snapshots_dir = request.directory / os.fsdecode(SNAPSHOTS_NAME)
        listener, stop = commands.listen(vault.state.control), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(commands.serve, listener, served, stop)
            try:
                async with trio.open_nursery() as background:
                    background.start_soon(session.keep_going)
                    if not request.read_only:
                        look = (request.policy, request.collect_every, served.turn)
                        background.start_soon(look_after, session, *look)
                    session.changed_behind = fuse.forget_name
                    session.pull = partial(writeback.pull, directory)
                    await _serve(fuse, backend, directory, options, request, served, writeback)
                    session.pull = trio.lowlevel.checkpoint
                    served.unmounted = True
                    with trio.open_signal_receiver(*STOP) as signals:
                        await _unless_told_again(served.finish, signals)
                    background.cancel_scope.cancel()
            finally:
                vault.state.control.unlink(missing_ok=True)
                stop.set()


async def _start(vault: Vault, session: Session, request: Mount) -> None:
    """Connect; go on without the server if it is merely not there, or wants tokens."""
    if _is_lost(vault, session):
        await session.recover()
        return
    try:
        await vault.way.probe()
        expired = session.store.expired
        await session.connect()
        if expired := session.store.expired - expired:
            request.notice(
                f"{expired:,} tokens expired: their epoch ended before they were used,"
                " or before it was known that they had been"
            )
    except (SecondWriter, Misbehaviour) as error:
        if not request.read_only:
            raise
        request.notice(f"{error.message}; what is known here is mounted")
    except (StoreError, DiskFull) as error:
        session.offline_because = error
        request.notice(f"{error.message}; what is here can be used, and is published later")
    if session.took_over is not None:
        request.notice(_told(session.took_over))
    at_risk = warning(session.breakglass.report())
    if at_risk is not None and not request.read_only:
        request.notice(at_risk)


def _told(took: TakeOver) -> str:
    """What a user should know of a takeover."""
    found = f"took over generation {took.generation} of another client"
    if took.kept is None:
        return f"{found}; what was written here lies on top of it"
    return (
        f"{found}; what was written here ({took.dirty:,} bytes) does not fit it and is kept aside:"
        f" hpkvfs mount --kept {took.kept} DIR shows it, read-only, until either client runs gc"
    )


_TAKEN: Final = (
    f"the vault has a file {SNAPSHOTS_NAME.decode()!r} of its own, which hides the snapshots;"
    " rename it, or mount one with --snapshot"
)


async def _serve(
    fuse: Any,
    backend: Backend,
    directory: Path,
    options: set[str],
    request: Mount,
    served: MountedCommands,
    writeback: Writeback,
) -> None:
    """Answer the kernel until unmounted, a signal to stop, or a forced unmount."""
    is_up = False

    def ready() -> None:
        nonlocal is_up
        is_up = True
        nursery.start_soon(leave_on_signal)
        nursery.start_soon(leave_when_told)
        request.ready()

    async def leave_on_signal() -> None:
        with trio.open_signal_receiver(*STOP) as signals:
            await anext(signals)
            await _unless_told_again(partial(_pull, served.session), signals)
            fuse.stop()

    async def leave_when_told() -> None:
        await served.told_to_leave()
        fuse.stop()

    async with trio.open_nursery() as nursery:
        with mounting(directory, lambda: is_up):
            follows = request.read_only
            await fuse.serve(backend, str(directory), options, ready, writeback, follows=follows)
        nursery.cancel_scope.cancel()


async def _pull(session: Session) -> None:
    """Take over what the kernel holds, as far as it can be."""
    try:
        await session.pull()
    except HpkvError as error:
        log.warning("before unmounting: %s", error)


async def _unless_told_again(
    function: Callable[[], Awaitable[None]], signals: AsyncIterator[int]
) -> None:
    """Run it, but leave it at the next signal to stop."""

    async def obey() -> None:
        await anext(signals)
        log.warning("stopped before all was published; the rest is kept")
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey)
        await function()
        nursery.cancel_scope.cancel()


async def _finish(session: Session, way: Way, progress: Progress) -> str | None:
    """Publish what is left; why it could not be, or None."""
    try:
        if await _is_pointless(session, way):
            return session.trouble if session.publisher.pending else None
        await session.finish(progress)
    except HpkvError as error:
        return error.message
    return None


async def _is_pointless(session: Session, way: Way) -> bool:
    """Whether the server was away lately, and still is."""
    if session.trouble is None:
        return False
    try:
        await way.probe()
    except Unreachable:
        return True
    return False


async def _detach(directory: Path) -> None:
    """Unmount as umount(8) does; UserError when the filesystem is in use."""
    if not is_mounted(directory):
        raise UserError(
            f"{directory} was unmounted before, but programs still have files of it open",
            "end them, or leave with --force",
        )
    try:
        done = await trio.run_process(
            detaching(directory), check=False, capture_stderr=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError("fusermount3 is missing", "install fuse3") from None
    check_detached(directory, done.returncode, done.stderr)
