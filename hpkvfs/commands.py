"""What can be asked of a vault in use, and the socket on which a mounting process is asked.

The same commands serve a vault that is not mounted: mount.py then opens it for one of them.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

import trio

from hpkvfs import beside, buying, keep
from hpkvfs.control import Progress, encode, encode_error, receive_line, short_path
from hpkvfs.errors import HpkvError, UserError, VaultError
from hpkvfs.mend import mend
from hpkvfs.restore import restore
from hpkvfs.session import Session
from hpkvfs.timeline import Timeline
from hpkvfs.volume.snapshots import Snapshot

log = logging.getLogger(__name__)

Arguments: TypeAlias = dict[str, Any]
Result: TypeAlias = dict[str, Any]
Command: TypeAlias = Callable[[Arguments, Progress], Awaitable[Result]]

CHANGING: Final = frozenset(
    {"gc", "create-snapshot", "delete-snapshots", "keep-snapshots", "restore", "keepalive"}
)
"""What a vault that is in use only to be read does not do: nothing of it would be published."""
REQUEST_SECONDS: Final = 5.0
DRAIN_SECONDS: Final = 5.0
_UCRED: Final = struct.Struct("3i")


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise the error of ours that a group consists of, instead of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        interrupted, other = group.split(KeyboardInterrupt)
        if interrupted is not None:
            raise KeyboardInterrupt from None
        if other is None or other.split(HpkvError)[1] is not None:
            raise
        raise _first(other) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Commands:
    """The commands over one session, by name. Those that change something take turns."""

    def __init__(self, session: Session, way: Callable[[], str]) -> None:
        """`way` says how the server is reached."""
        self.session = session
        self._way = way
        self.turn = trio.Lock()
        self._timeline = Timeline(session)
        self.is_mounted = False
        self._free: dict[str, Command] = {
            "status": self._status,
            "balance": self._balance,
            "gc": self._gc,
            "log": self._log,
            "snapshots": self._snapshots,
            "offers": self._offers,
            "purchases": self._purchases,
            "await-purchase": self._await_purchase,
            "lend-snapshot": self._lend_snapshot,
            "lend": self._lend,
        }
        self._in_turn: dict[str, Command] = {
            "sync": self._sync,
            "create-snapshot": self._create,
            "delete-snapshots": self._delete,
            "keep-snapshots": self._keep,
            "diff": self._diff,
            "restore": self._restore,
            "fsck": self._fsck,
            "redeem": self._redeem,
            "keepalive": self._keepalive,
            "buy": self._buy,
            "abandon-purchases": self._abandon,
        }

    async def run(self, name: str, arguments: Arguments, progress: Progress) -> Result:
        """Carry out one command; HpkvError."""
        if name in CHANGING and self.session.options.read_only and not arguments.get("dry_run"):
            raise VaultError(
                "the vault is mounted to be read only",
                "unmount it, and mount it without --read-only, --snapshot or --kept",
            )
        with ungrouped():
            if command := self._free.get(name):
                return await command(arguments, progress)
            if command := self._in_turn.get(name):
                async with self.turn:
                    return await command(arguments, progress)
        raise UserError(f"there is no command {name!r}", "is the mounted hpkvfs an older one?")

    async def _status(self, arguments: Arguments, progress: Progress) -> Result:
        return {**self.session.status(), "way": self._way()}

    async def _balance(self, arguments: Arguments, progress: Progress) -> Result:
        balance = self.session.store.balance
        return {
            "held": balance.held,
            "pending": balance.pending,
            "total": balance.total,
            "way": self._way(),
            "expired": self.session.store.expired,
        }

    async def _sync(self, arguments: Arguments, progress: Progress) -> Result:
        try:
            await self.session.pull()
        finally:
            await self.session.publish(progress)
        return {"generation": self.session.status()["generation"]}

    async def _gc(self, arguments: Arguments, progress: Progress) -> Result:
        session = self.session
        if arguments.get("dry_run"):
            count, tokens = session.collectable()
            held = session.status()["blobs_held"]
            return {"would_delete": count, "would_regain": tokens, "blobs_held": held}
        before = session.store.balance.total
        collected = await session.gc(progress, float(arguments.get("spread", 0)))
        after = session.store.balance.total
        return {
            "deleted": len(collected.deleted),
            "absent": len(collected.absent),
            "regained": session.refund(len(collected.deleted)),
            "gained": after - before,
            "held": after,
        }

    async def _fsck(self, arguments: Arguments, progress: Progress) -> Result:
        full, bound = bool(arguments.get("full")), arguments.get("max_tokens")
        repaired: list[str] = []
        if arguments.get("repair"):
            if self.is_mounted:
                raise VaultError(
                    "a vault that is mounted can be checked and not repaired",
                    "unmount it first: hpkvfs umount",
                )
            report, repaired = await mend(
                self.session, extents=full, max_tokens=bound, progress=progress
            )
        else:
            report = await self.session.fsck(extents=full, progress=progress, max_tokens=bound)
        return {
            "generation": report.generation,
            "files": report.files,
            "bytes": report.bytes,
            "nodes": report.nodes,
            "extents": report.extents,
            "snapshots": report.snapshots,
            "blobs_held": report.held,
            "dead": report.dead,
            "blobs": len(report.stored),
            "verified": report.verified,
            "unchecked": report.unchecked,
            "problems": report.problems,
            "repaired": repaired,
            "repairable": bool(report.repairs),
            "damaged": [asdict(damage) for damage in report.damaged],
        }

    async def _snapshots(self, arguments: Arguments, progress: Progress) -> Result:
        snapshots = await self._timeline.snapshots()
        known = self.session.volume.known
        rows = [_snapshot(snapshot) for snapshot in snapshots]
        if rows and known:
            rows[-1]["blobs_held"] = known.anchor.held.count
        return {"snapshots": rows}

    async def _lend_snapshot(self, arguments: Arguments, progress: Progress) -> Result:
        return await beside.lend_snapshot(self._timeline, str(arguments["name"]))

    async def _lend(self, arguments: Arguments, progress: Progress) -> Result:
        return await beside.lend(self.session.volume, str(arguments["ref"]), str(arguments["kind"]))

    async def _create(self, arguments: Arguments, progress: Progress) -> Result:
        return _snapshot(await self._timeline.create(arguments.get("name"), progress))

    async def _delete(self, arguments: Arguments, progress: Progress) -> Result:
        names = [str(name) for name in arguments["names"]]
        freed = await self._timeline.delete(names, progress)
        return {"deleted": names, "freed": freed, "regain": self.session.refund(freed)}

    async def _keep(self, arguments: Arguments, progress: Progress) -> Result:
        made, gone = await self._timeline.apply(keep.parse(str(arguments["keep"])), progress)
        return {"created": made, "deleted": gone}

    async def _log(self, arguments: Arguments, progress: Progress) -> Result:
        return {"generations": await self._timeline.log()}

    async def _diff(self, arguments: Arguments, progress: Progress) -> Result:
        changes = await self._timeline.diff(str(arguments["old"]), str(arguments["new"]))
        return {"changes": [asdict(change) for change in changes]}

    async def _restore(self, arguments: Arguments, progress: Progress) -> Result:
        done = await restore(
            self.session,
            await self._timeline.find(str(arguments["snapshot"])),
            str(arguments["path"]),
            arguments.get("to"),
            replace=bool(arguments.get("replace")),
            token=secrets.token_bytes(8),
            progress=progress,
        )
        if not self.is_mounted:
            await self.session.publish(progress)
        return asdict(done)

    async def _keepalive(self, arguments: Arguments, progress: Progress) -> Result:
        return await self.session.keepalive(now=bool(arguments.get("now")))

    async def _redeem(self, arguments: Arguments, progress: Progress) -> Result:
        amount = await self.session.redeem(str(arguments["voucher"]))
        return {"amount": amount, "held": self.session.store.balance.total}

    async def _offers(self, arguments: Arguments, progress: Progress) -> Result:
        return await buying.offers(self.session)

    async def _purchases(self, arguments: Arguments, progress: Progress) -> Result:
        return buying.purchases(self.session)

    async def _buy(self, arguments: Arguments, progress: Progress) -> Result:
        return await buying.buy(self.session, arguments)

    async def _await_purchase(self, arguments: Arguments, progress: Progress) -> Result:
        return await buying.await_purchase(self.session, arguments, progress)

    async def _abandon(self, arguments: Arguments, progress: Progress) -> Result:
        return await buying.abandon(self.session)


def _snapshot(snapshot: Snapshot) -> Result:
    return {
        "name": snapshot.name,
        "generation": snapshot.generation,
        "time": snapshot.time,
        "files": snapshot.files,
        "bytes": snapshot.size,
        "blobs": snapshot.live,
        "blobs_held": snapshot.held.count,
    }


def listen(path: Path) -> trio.SocketListener:
    """A socket at `path`, for this user alone. The caller holds the vault's lock."""
    path.unlink(missing_ok=True)
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        with short_path(path) as short:
            plain.bind(short)
    finally:
        os.umask(mask)
    plain.listen(16)
    return trio.SocketListener(trio.socket.from_stdlib_socket(plain))


async def serve(listener: trio.SocketListener, commands: Commands, stop: trio.Event) -> None:
    """Carry out commands until `stop`, then finish telling the results of those under way."""

    async def converse(stream: trio.SocketStream) -> None:
        try:
            await _converse(stream, commands)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("who asked for a command went away")

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(_accept, listener, connections, converse)
            await stop.wait()
            accepting.cancel_scope.cancel()
        connections.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS


async def _accept(
    listener: trio.SocketListener,
    connections: trio.Nursery,
    converse: Callable[[trio.SocketStream], Awaitable[None]],
) -> None:
    async with listener:
        while True:
            stream = await listener.accept()
            if _is_ours(stream):
                connections.start_soon(converse, stream)
            else:
                await trio.aclose_forcefully(stream)


def _is_ours(stream: trio.SocketStream) -> bool:
    """Whether the other end runs as this user, or as root."""
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(raw)
    return uid in (0, os.getuid())


async def _converse(stream: trio.SocketStream, commands: Commands) -> None:
    async with stream:
        try:
            request = json.loads(await _line(stream))
            name, arguments = str(request["command"]), dict(request["arguments"])
        except (ValueError, KeyError, TypeError):
            error = UserError("a command that can't be read")
            await stream.send_all(encode({"error": encode_error(error)}))
            return
        reply = await _carry_out(stream, commands, name, arguments)
        if reply is None:
            return
        if name == "unmount":
            # left open on purpose: who asked waits for its end, which is that of the process
            os.dup(stream.socket.fileno())
        await stream.send_all(encode(reply))


async def _line(stream: trio.SocketStream) -> bytes:
    """One request; less than a line when it is too long, too slow or breaks off."""
    line = bytearray()
    with trio.move_on_after(REQUEST_SECONDS):
        await receive_line(stream, line)
    return bytes(line)


async def _carry_out(
    stream: trio.SocketStream, commands: Commands, name: str, arguments: Arguments
) -> dict[str, Any] | None:
    """The reply, with progress told until then; None when the other end went away."""
    latest, news = (0, 0), trio.Event()

    def report(done: int, total: int) -> None:
        nonlocal latest
        latest = (done, total)
        news.set()

    async def tell() -> None:
        nonlocal news
        try:
            while True:
                await news.wait()
                news = trio.Event()
                with trio.move_on_after(REQUEST_SECONDS, shield=True):  # whole lines only
                    await stream.send_all(encode({"progress": latest}))
        except trio.BrokenResourceError:
            nursery.cancel_scope.cancel()

    reply = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        reply = await _reply(commands, name, arguments, report)
        nursery.cancel_scope.cancel()
    return reply


async def _reply(
    commands: Commands, name: str, arguments: Arguments, report: Progress
) -> dict[str, Any]:
    try:
        return {"result": await commands.run(name, arguments, report)}
    except HpkvError as error:
        return {"error": encode_error(error)}
    except Exception:
        log.exception("%s failed", name)
        return {
            "error": encode_error(HpkvError(f"{name} failed: a bug", "the log has the details"))
        }
