"""A tor that is kept up: found or started, watched, found or started again.

    down --> starting --> up --> down ...

`Tor` keeps itself going in the background: it finds a running tor or starts one that it owns,
waits until that has circuits, and begins again, after a pause that grows, when the control
connection ends, which is how it learns that tor died. Users call `ready`, which waits while tor
is starting and raises what is wrong while it is down.

Invariants:
  - an onion service that was published is published again whenever tor comes up;
  - circuits of streams that `expect` announced are closed as soon as their stream is. Otherwise
    they pile up: 2,000 unused circuits take tor to a tenth of its speed. Streams of others that
    use the same tor are left alone;
  - SOCKS logins and control passwords come in events and go into commands, never into a log:
    stem's logger, which quotes events even in its errors, is silenced.

stem is threaded: calls that block run in threads; its events come in a thread of its own, from
which nothing is called that might block, or closing the connection would wait for it for ever.
Sources: tor's control-spec, rend-spec-v3; tor(1).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from hpkvfs.tor import services
from hpkvfs.tor.control import (
    CONNECT_SECONDS,
    Endpoint,
    TorError,
    connect,
    on_end,
    progress,
    socks_of,
    translated,
    unquoted,
)
from hpkvfs.tor.process import owned
from hpkvfs.tor.services import Onion

if TYPE_CHECKING:
    from hpkvfs.tor.control import Controller

T = TypeVar("T")

AUTO: Final = "auto"
OWN: Final = "own"
RUNNING: Final[tuple[Endpoint, ...]] = (
    Path("/run/tor/control"),  # Debian's
    ("127.0.0.1", 9051),
    ("127.0.0.1", 9151),  # Tor Browser's
)
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
POLL_SECONDS: Final = 0.1
PUBLISH_SECONDS: Final = 120.0


def parse_where(text: str) -> Endpoint | str:
    """`auto`, `own`, a control port on this machine, or a control socket; ValueError."""
    if text in (AUTO, OWN):
        return text
    if text.isascii() and text.isdigit() and 0 < int(text) < 65_536:
        return ("127.0.0.1", int(text))
    if "/" in text:
        return Path(text).absolute()
    raise ValueError(f"not a way to tor: {text}")


class Tor:
    """One tor; made by `running`."""

    def __init__(
        self,
        where: Endpoint | str,
        data: Path,
        nursery: trio.Nursery,
        *,
        password: str | None,
        more: str,
        tell: Callable[[str], None],
    ) -> None:
        self._where = where
        self._data = data
        self._nursery = nursery
        self._password = password
        self._more = more
        self._tell_user = tell
        self._token = trio.lowlevel.current_trio_token()
        self._limiter = trio.CapacityLimiter(8)
        self._controller: Controller | None = None
        self._socks: Endpoint | TorError | None = None
        self._onion: Onion | None = None
        self._expected: set[str] = set()
        self._trouble: TorError | None = None
        self._changed = trio.Event()
        self._said = ""
        self.phase = "tor is not started"
        self.owned_pid: int | None = None
        self.starts = 0
        """How often it came up."""

    # -- for everybody ---------------------------------------------------------------------

    async def ready(self) -> None:
        """Return once it has circuits; TorError while it is down.

        The time to wait is the caller's: after it, `phase` says how far tor got.
        """
        while self._controller is None:
            if self._trouble is not None:
                raise self._trouble
            await self._changed.wait()

    async def socks(self) -> Endpoint:
        """Its SOCKS port, once it is ready; TorError."""
        await self.ready()
        assert self._socks is not None
        if isinstance(self._socks, TorError):
            raise self._socks
        return self._socks

    @property
    def is_up(self) -> bool:
        """Whether it has circuits."""
        return self._controller is not None

    def expect(self, username: str) -> None:
        """Close the circuit of the stream with this SOCKS user name as soon as it is closed."""
        self._expected.add(username)

    async def idle(self) -> None:
        """Return when the circuits of all streams that were announced are closed."""
        while self._expected and self.is_up:
            await trio.sleep(POLL_SECONDS / 10)
        await trio.lowlevel.checkpoint()

    async def publish(self, onion: Onion) -> str:
        """Publish the one service, now and whenever tor is started again; `....onion`. TorError.

        Returns when its descriptor is at a directory, or after PUBLISH_SECONDS. The service
        ends with the control connection, that is when the block of `running` does.
        """
        await self.ready()
        assert self._controller is not None and self._onion is None
        self._onion = onion  # from now on: tor may go and come back before this returns
        try:
            name = await self._add(self._controller, onion, wait=True)
        except BaseException:
            self._onion = None
            raise
        if onion.limits.introductions and self.owned_pid is None:
            self._tell_user("how many introductions come is not limited: that takes --tor own")
        return name

    # -- keeping it up ---------------------------------------------------------------------

    async def keep(self) -> None:
        """Find or start it, again and again; until cancelled."""
        pause = FIRST_PAUSE
        while True:
            before = self.starts
            try:
                async with self._control() as controller:
                    ended = trio.Event()
                    await self._watch(controller, ended)
                    await self._bootstrapped(controller, ended)
                    await self._come_up(controller)
                    await ended.wait()
                    raise TorError("tor stopped", "it will be tried again")
            except TorError as error:
                self._go_down(error)
            except trio.TooSlowError:
                self._go_down(TorError("tor does not answer", "is it stuck? restart it"))
            pause = FIRST_PAUSE if self.starts > before else min(2 * pause, LONGEST_PAUSE)
            await trio.sleep(pause)
            self._trouble = None

    async def _come_up(self, controller: Controller) -> None:
        socks: Endpoint | TorError
        try:
            socks = await self._in_thread(socks_of, controller)
        except TorError as error:  # a server needs none
            socks = error
        if self._onion is not None:
            await self._add(controller, self._onion, wait=False)
        self._controller, self._socks, self._trouble = controller, socks, None
        self.starts += 1
        self._set_phase("connected to the Tor network")

    def _go_down(self, error: TorError) -> None:
        self._controller = self._socks = None
        self._expected.clear()
        self._trouble = error
        self._set_phase(error.message)

    def _set_phase(self, phase: str) -> None:
        self.phase = phase
        self._changed.set()
        self._changed = trio.Event()
        if phase != self._said:
            self._said = phase
            self._tell_user(phase)

    @asynccontextmanager
    async def _control(self) -> AsyncIterator[Controller]:
        """An authenticated control connection to a tor found or started; TorError."""
        self._set_phase("looking for tor")
        if self._where != OWN:
            controller = await self._find()
            if controller is not None:
                async with self._closing(controller):
                    yield controller
                return
        self._set_phase("starting tor")
        async with owned(self._data, self._more, self._nursery) as process:
            self.owned_pid = process.pid
            try:
                controller = await self._connect(process.control)
                async with self._closing(controller):
                    yield controller
            finally:
                self.owned_pid = None

    async def _find(self) -> Controller | None:
        """One that runs; None when any will do and there is none."""
        if isinstance(self._where, tuple | Path):
            return await self._connect(self._where)
        for endpoint in RUNNING:
            with suppress(TorError, trio.TooSlowError):
                return await self._connect(endpoint)
        return None

    async def _connect(self, endpoint: Endpoint) -> Controller:
        with trio.fail_after(CONNECT_SECONDS):
            return await self._in_thread(connect, endpoint, self._password)

    @asynccontextmanager
    async def _closing(self, controller: Controller) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(controller.close)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(
            translated, function, args, abandon_on_cancel=True, limiter=self._limiter
        )

    # -- over the control connection ---------------------------------------------------------

    async def _watch(self, controller: Controller, ended: trio.Event) -> None:
        """Learn of the end of the connection and of streams, in stem's threads."""
        idle, doomed = trio.open_memory_channel[tuple[str, str]](math.inf)
        self._nursery.start_soon(self._close_circuits, controller, doomed)

        def over() -> None:
            later(ended.set)
            later(idle.close)

        def stream(event: Any) -> None:
            if event.status != "CLOSED":
                return
            login = unquoted(event.keyword_args.get("SOCKS_USERNAME", ""))
            if login in self._expected:
                later(partial(idle.send_nowait, (login, event.circ_id or "0")))

        def later(function: Callable[[], Any]) -> None:
            def quietly() -> None:
                with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                    function()

            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(quietly)

        await self._in_thread(controller.add_event_listener, stream, "STREAM")
        on_end(controller, over)

    async def _close_circuits(
        self, controller: Controller, doomed: trio.MemoryReceiveChannel[tuple[str, str]]
    ) -> None:
        """Close circuits as they fall idle, all that there are in one go."""

        def close(circuits: list[tuple[str, str]]) -> None:
            for _, circuit in circuits:  # one that tor closed already is refused, and no matter
                controller.msg(f"CLOSECIRCUIT {circuit}")

        async for first in doomed:
            circuits = [first]
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    circuits.append(doomed.receive_nowait())
            with suppress(TorError):
                await self._in_thread(close, circuits)
            self._expected.difference_update(login for login, _ in circuits)

    async def _bootstrapped(self, controller: Controller, ended: trio.Event) -> None:
        while True:
            said = await self._in_thread(controller.get_info, "status/bootstrap-phase")
            if "TAG=done" in said:
                return
            self._set_phase(progress(said))
            with trio.move_on_after(POLL_SECONDS):
                await ended.wait()
            if ended.is_set():
                raise TorError("tor stopped while it was starting", "it will be tried again")

    async def _add(self, controller: Controller, onion: Onion, *, wait: bool) -> str:
        published, names = trio.Event(), set[str]()

        def uploaded(event: Any) -> None:
            if event.action == "UPLOADED":
                names.add(f"{event.address}.onion")
                with suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(published.set)

        def add() -> str:
            if wait:
                controller.add_event_listener(uploaded, "HS_DESC")
            return services.publish(controller, onion, self._data if self.owned_pid else None)

        try:
            name = await self._in_thread(add)
            with trio.move_on_after(PUBLISH_SECONDS):
                while wait and name not in names:
                    await published.wait()
                    published = trio.Event()
        finally:
            if wait:
                with trio.CancelScope(shield=True), suppress(TorError):
                    await self._in_thread(controller.remove_event_listener, uploaded)
        return name


@asynccontextmanager
async def running(
    where: Endpoint | str,
    data: Path,
    *,
    password: str | None = None,
    more: str = "",
    tell: Callable[[str], None] = lambda phase: None,
) -> AsyncIterator[Tor]:
    """A tor that is kept up in the background while the block runs.

    where: see parse_where; data: where an owned one keeps its state (made if need be, 0700);
    password: for a control port that wants one; more: further settings of an owned one, in
    torrc's format, such as bridges; tell: is told each new phase, a sentence for the user.
    """
    async with trio.open_nursery() as nursery:
        tor = Tor(where, data, nursery, password=password, more=more, tell=tell)
        nursery.start_soon(tor.keep)
        yield tor
        nursery.cancel_scope.cancel()
