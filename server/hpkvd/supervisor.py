"""The parent of the workers: starts them, starts them again, and does nothing that could fail.

Each worker is a process of its own, executed anew (not forked: threads and locks of the parent
do not come along), with the listening sockets, and a channel to the parent on which it
sends its counts, in JSON, when it is ready and once a second after that. So the parent

- knows that a worker answers before it relies on it, and that it hangs when they stop coming;
- adds up the counts of all;
- is noticed when it dies: the channel ends, and the workers finish and go.

A worker that dies is replaced, at once the first time and ever later when it keeps dying.
Replacing all of them one by one (`reload`, on SIGHUP) is how new settings and epochs come into
use: there is always somebody who answers, and nothing has to be changed in a running process.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

import trio

from hpkvd import log
from hpkvd.metrics import Board

BEAT_SECONDS: Final = 1.0
HANG_SECONDS: Final = 30.0
START_SECONDS: Final = 60.0
MESSAGE_SIZE: Final = 2**16
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 10.0
STEADY_SECONDS: Final = 30.0  # who lived this long did not die of starting


class WorkerFailed(Exception):
    """A worker could not start; `code` is what it ended with (it has said why)."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a worker could not start ({_cause(code)})")
        self.code = code


@dataclass(eq=False, slots=True)
class _Worker:
    process: trio.Process
    channel: trio.socket.SocketType
    started: float
    pause: float
    ready: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    retired: bool = False

    def retire(self) -> None:
        """Ask it to finish and go."""
        self.retired = True
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)


class Supervisor:
    """`count` workers, each run by `command` with `--socket FD... --channel FD` added."""

    def __init__(
        self,
        command: Sequence[str],
        sockets: Sequence[socket.socket],
        count: int,
        *,
        stop_seconds: float,
    ) -> None:
        self.board = Board()
        self._command = command
        self._sockets = sockets
        self._count = count
        self._stop_seconds = stop_seconds
        self._workers: list[_Worker] = []
        self._stopping = False
        self._reloading = trio.Lock()
        self._nursery: trio.Nursery | None = None

    @property
    def workers(self) -> int:
        """How many answer now."""
        return sum(worker.ready.is_set() and not worker.retired for worker in self._workers)

    async def run(self, stop: trio.Event, ready: Callable[[], None]) -> WorkerFailed | None:
        """Keep the workers going until `stop`, then until they have finished.

        WorkerFailed, at once, if one of the first ones does not get as far as answering.
        """
        failed: int | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for _ in range(self._count):
                    await self._start()
                failed = await self._failed_start(stop)
                if failed is None and not stop.is_set():
                    ready()
                    await stop.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop()
                nursery.cancel_scope.cancel()
        return None if failed is None else WorkerFailed(failed)

    async def reload(self) -> None:
        """Replace every worker by a new one; those that cannot be replaced stay."""
        async with self._reloading:
            for old in [one for one in self._workers if not one.retired]:
                if self._stopping:
                    return
                new = await self._start_anew()
                if new is None or not new.ready.is_set():
                    log.tell("a new worker could not start; the old ones go on as they are")
                    return
                # One that died meanwhile has been replaced already.
                (new if old.ended.is_set() else old).retire()
            log.tell("reloaded")

    async def _failed_start(self, stop: trio.Event) -> int | None:
        """When all answer, or on `stop`: None; as soon as one cannot: its exit code."""
        for worker in list(self._workers):
            await _any(worker.ready, worker.ended, stop)
            if stop.is_set():
                return None
            if not worker.ready.is_set():
                return worker.process.returncode or os.EX_SOFTWARE
        return None

    async def _start(self, pause: float = FIRST_PAUSE) -> _Worker:
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs, ExitStack() as unless_started:
            unless_started.callback(ours.close)
            fds = [one.fileno() for one in self._sockets]
            arguments = [*_option("--socket", fds), *_option("--channel", [theirs.fileno()])]
            process = await trio.lowlevel.open_process(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[*fds, theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent, which tells them to stop
            )
            unless_started.pop_all()
        channel = trio.socket.from_stdlib_socket(ours)
        worker = _Worker(process, channel, trio.current_time(), pause)
        self._workers.append(worker)
        assert self._nursery is not None
        self._nursery.start_soon(self._tend, worker)
        return worker

    async def _tend(self, worker: _Worker) -> None:
        """Listen to a worker until it ends, and replace it if that was not agreed."""
        with trio.CancelScope(shield=True):
            await self._listen(worker)
            code = await worker.process.wait()
            worker.channel.close()
        self.board.retire(worker.process.pid)
        self._workers.remove(worker)
        worker.ended.set()
        if self._stopping or worker.retired or not worker.ready.is_set():
            return
        self.board.died += 1
        log.tell(f"a worker ended ({_cause(code)}); starting another")
        await self._replace(worker)

    async def _replace(self, worker: _Worker) -> None:
        pause = worker.pause
        if trio.current_time() - worker.started > STEADY_SECONDS:
            pause = FIRST_PAUSE
        while not self._stopping:
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            if self._stopping:
                return
            new = await self._start_anew(pause)
            if new is not None and (new.ready.is_set() or new.retired):
                return
            log.tell(f"the new worker could not start; trying again in {pause:g} s")

    async def _start_anew(self, pause: float = FIRST_PAUSE) -> _Worker | None:
        """A worker that answers or has ended; None when the machine has no room for a process."""
        try:
            new = await self._start(pause)
        except OSError as error:
            log.tell(f"no process can be started ({error.strerror})")
            return None
        await _any(new.ready, new.ended)
        return new

    async def _listen(self, worker: _Worker) -> None:
        """What it tells, until it ends; kill it if it only falls silent."""
        patience = START_SECONDS
        while True:
            with trio.move_on_after(patience) as scope:
                try:
                    told = await worker.channel.recv(MESSAGE_SIZE)
                except OSError:
                    return
            if scope.cancelled_caught:
                log.tell(f"a worker was silent for {patience:g} s; ending it")
                worker.process.kill()
                return
            if not told:
                return
            self.board.update(worker.process.pid, json.loads(told))
            worker.ready.set()
            patience = HANG_SECONDS

    async def _stop(self) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.retire()
        with trio.move_on_after(self._stop_seconds):
            await self._gone()
        for worker in self._workers:
            worker.process.kill()
        await self._gone()

    async def _gone(self) -> None:
        for worker in list(self._workers):
            await worker.ended.wait()


class Channel:
    """The worker's end of the channel to its parent."""

    def __init__(self, fd: int, snapshot: Callable[[], Mapping[str, float]]) -> None:
        self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
        self._snapshot = snapshot

    async def report(self) -> None:
        """Tell what was counted, now and every BEAT_SECONDS, and a last time when cancelled."""
        try:
            while True:
                await self._tell()
                await trio.sleep(BEAT_SECONDS)
        finally:
            with trio.move_on_after(BEAT_SECONDS, shield=True):
                await self._tell()

    async def parent_gone(self) -> None:
        """Return when nobody listens any more."""
        try:
            await self._socket.recv(1)
        except OSError:
            return

    async def _tell(self) -> None:
        with suppress(OSError):
            await self._socket.send(json.dumps(self._snapshot()).encode())


async def _any(*events: trio.Event) -> None:
    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(_then_cancel, event, nursery.cancel_scope)


async def _then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


def _option(name: str, fds: Sequence[int]) -> list[str]:
    return [text for fd in fds for text in (name, str(fd))]


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"killed by signal {-code}"


def command(*arguments: str) -> list[str]:
    """How this program is run again; -P, or modules in the current directory would come first."""
    return [sys.executable, "-P", "-m", "hpkvd", *arguments]


def cores() -> int:
    """Processors this process may use."""
    return max(1, math.ceil(len(os.sched_getaffinity(0))))
