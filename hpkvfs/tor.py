"""A tor, found or started, and its control connection. A leaf, and the only importer of stem.

    down --> starting --> up --> down ...

`Tor` keeps itself going in the background: it finds a running tor or starts one that it owns,
waits until that has circuits, and begins again, after a pause that grows, when the control
connection ends, which is how it learns that tor died. Users call `ready`, which waits while tor
is starting and raises what is wrong while it is down.

Invariants:
  - onion services that were published are published again whenever tor comes up;
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

import logging
import math
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import trio

if TYPE_CHECKING:
    from stem.control import Controller

T = TypeVar("T")

Endpoint: TypeAlias = "tuple[str, int] | Path"
"""A TCP port on this machine, or a Unix socket."""

AUTO: Final = "auto"
OWN: Final = "own"
RUNNING: Final[tuple[Endpoint, ...]] = (
    Path("/run/tor/control"),  # Debian's
    ("127.0.0.1", 9051),
    ("127.0.0.1", 9151),  # Tor Browser's
)
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
CONNECT_SECONDS: Final = 5.0
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.1
PUBLISH_SECONDS: Final = 120.0

# What an owned tor is told. TAKEOWNERSHIP, which stem sends, then has it end with us.
_TORRC: Final = """\
DataDirectory {data}
SocksPort 127.0.0.1:auto
ControlPort 127.0.0.1:auto
ControlPortWriteToFile {port}
CookieAuthentication 1
AvoidDiskWrites 1
ClientOnly 1
__OwningControllerProcess {owner}
Log notice stdout
{more}
"""


class TorError(Exception):
    """tor cannot be used; `message` is one sentence, `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Onion:
    """An onion service: `port` of its address leads to `target` (127.0.0.1:N or unix:PATH).

    key: `ED25519-V3:` and 64 bytes in base64, as ADD_ONION takes it; options: further words of
    the ADD_ONION command, such as `PoWDefensesEnabled=1`.
    """

    port: int
    target: str
    key: str = field(repr=False)
    options: tuple[str, ...] = ()


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
        self._onions: list[Onion] = []
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
        """Publish a service, now and whenever tor is started again; `....onion`. TorError.

        Returns when its descriptor is at a directory, or after PUBLISH_SECONDS. The service
        ends with the control connection, that is when the block of `running` does.
        """
        await self.ready()
        assert self._controller is not None
        name = await self._add(self._controller, onion, wait=True)
        self._onions.append(onion)
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
            socks = await self._in_thread(_socks_of, controller)
        except TorError as error:  # a server needs none
            socks = error
        for onion in self._onions:
            await self._add(controller, onion, wait=False)
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
        async with self._own() as endpoint:
            controller = await self._connect(endpoint)
            async with self._closing(controller):
                yield controller

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
            return await self._in_thread(_connect, endpoint, self._password)

    @asynccontextmanager
    async def _closing(self, controller: Controller) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._in_thread(controller.close)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(
            _translated, function, args, abandon_on_cancel=True, limiter=self._limiter
        )

    # -- one of our own ----------------------------------------------------------------------

    @asynccontextmanager
    async def _own(self) -> AsyncIterator[Endpoint]:
        """Start one; where its control port is. It ends with the block, and with us."""
        program = shutil.which("tor", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        if program is None:
            raise TorError("there is no tor on this machine", "apt-get install tor")
        self._set_phase("starting tor")
        port_file = self._data / "port"
        try:
            self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
            port_file.unlink(missing_ok=True)
        except OSError as error:
            raise TorError(f"can't write to {self._data}: {error.strerror}") from None
        settings = _TORRC.format(
            data=_quoted(self._data), port=_quoted(port_file), owner=os.getpid(), more=self._more
        )
        command = [program, "--defaults-torrc", str(self._data / "none"), "-f", "-"]
        process = await trio.lowlevel.open_process(
            command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, start_new_session=True
        )
        self.owned_pid = process.pid
        try:
            assert process.stdin is not None and process.stdout is not None
            said = _Said()
            self._nursery.start_soon(said.listen, process.stdout)
            with suppress(trio.BrokenResourceError):
                await process.stdin.send_all(settings.encode())
            await process.stdin.aclose()
            yield await _control_port(process, port_file, said)
        finally:
            self.owned_pid = None
            await _end(process)

    # -- over the control connection ---------------------------------------------------------

    async def _watch(self, controller: Controller, ended: trio.Event) -> None:
        """Learn of the end of the connection and of streams, in stem's threads."""
        from stem.control import State

        idle, doomed = trio.open_memory_channel[tuple[str, str]](math.inf)
        self._nursery.start_soon(self._close_circuits, controller, doomed)

        def status(_: Controller, state: str, __: float) -> None:
            if state == State.CLOSED:
                later(ended.set)
                later(idle.close)

        def stream(event: Any) -> None:
            if event.status != "CLOSED":
                return
            login = _unquoted(event.keyword_args.get("SOCKS_USERNAME", ""))
            if login in self._expected:
                later(partial(idle.send_nowait, (login, event.circ_id or "0")))

        def later(function: Callable[[], Any]) -> None:
            def quietly() -> None:
                with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                    function()

            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(quietly)

        controller.add_status_listener(status, spawn=False)
        await self._in_thread(controller.add_event_listener, stream, "STREAM")
        if not controller.is_alive():
            status(controller, State.CLOSED, 0)

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
            self._set_phase(_progress(said))
            with trio.move_on_after(POLL_SECONDS):
                await ended.wait()
            if ended.is_set():
                raise TorError("tor stopped while it was starting", "it will be tried again")

    async def _add(self, controller: Controller, onion: Onion, *, wait: bool) -> str:
        words = [onion.key, "Flags=DiscardPK", *onion.options]
        words.append(f"Port={onion.port},{onion.target}")
        published, names = trio.Event(), set[str]()

        def uploaded(event: Any) -> None:
            if event.action == "UPLOADED":
                names.add(event.address)
                with suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(published.set)

        def add() -> str:
            if wait:
                controller.add_event_listener(uploaded, "HS_DESC")
            reply = controller.msg("ADD_ONION " + " ".join(words))
            if not reply.is_ok():
                _, _, text = next(iter(reply.content()))
                raise TorError(
                    f"tor does not publish the service: {text}",
                    "proof of work needs tor 0.4.8, its limits 0.4.9" if "PoW" in text else "",
                )
            return str(reply).partition("ServiceID=")[2].split()[0]

        try:
            name = await self._in_thread(add)
            with trio.move_on_after(PUBLISH_SECONDS):
                while wait and name not in names:
                    await published.wait()
                    published = trio.Event()
        finally:
            if wait:
                with trio.CancelScope(shield=True):
                    await self._in_thread(controller.remove_event_listener, uploaded)
        return f"{name}.onion"


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


# -- an owned process ------------------------------------------------------------------------


class _Said:
    """The last complaint of a process, for the error message; it keeps the pipe empty."""

    def __init__(self) -> None:
        self.complaint = ""

    async def listen(self, pipe: trio.abc.ReceiveStream) -> None:
        rest = b""
        async with pipe:
            with suppress(trio.BrokenResourceError):
                async for part in pipe:
                    *lines, rest = (rest + part).split(b"\n")
                    self._hear(lines)

    def _hear(self, lines: list[bytes]) -> None:
        for line in lines:
            found = re.search(rb"\[(?:warn|err)\] (.*)", line)
            if found and b"warnings above" not in line:
                self.complaint = found[1].decode(errors="replace")[:200]


async def _control_port(process: trio.Process, port_file: Path, said: _Said) -> Endpoint:
    with trio.fail_after(START_SECONDS):
        while not port_file.exists():
            if process.poll() is not None:
                await trio.sleep(POLL_SECONDS)  # its last words are on the way
                raise TorError(
                    f"tor does not start: {said.complaint or 'it does not say why'}",
                    "try it by hand: tor",
                )
            await trio.sleep(POLL_SECONDS)
    host, _, port = port_file.read_text().strip().removeprefix("PORT=").rpartition(":")
    return host, int(port)


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        if process.poll() is None:
            process.terminate()
            with trio.move_on_after(STOP_SECONDS):
                await process.wait()
            if process.poll() is None:
                process.kill()
        await process.wait()


def _quoted(path: Path) -> str:
    """As a torrc wants it."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


# -- what runs in threads ----------------------------------------------------------------------


def _translated(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Call it; what stem raises becomes TorError, without stem's words where they may quote us."""
    import stem

    try:
        return function(*args)
    except stem.SocketClosed:
        raise TorError("tor stopped", "it will be tried again") from None
    except (stem.ControllerError, ValueError, OSError) as error:
        raise TorError(f"tor's control port fails: {type(error).__name__}") from None


def _connect(endpoint: Endpoint, password: str | None) -> Controller:
    import stem
    import stem.connection
    from stem.control import Controller
    from stem.util import log as stem_log

    stem_log.get_logger().setLevel(logging.CRITICAL)
    try:
        if not _answers(endpoint):  # stem would leak the socket
            raise stem.SocketError
        if isinstance(endpoint, Path):
            controller = Controller.from_socket_file(str(endpoint))
        else:
            controller = Controller.from_port(*endpoint)
    except (stem.SocketError, ValueError):
        raise TorError(
            f"no tor answers at {_name(endpoint)}",
            "start it (systemctl start tor), or let hpkvfs start one: --tor own",
        ) from None
    try:
        controller.authenticate(password=password)
    except stem.connection.AuthenticationFailure as error:
        controller.close()
        raise _refused(endpoint, error, password) from None
    except BaseException:
        controller.close()
        raise
    return controller


def _refused(endpoint: Endpoint, error: Exception, password: str | None) -> TorError:
    from stem import connection

    where = f"the tor at {_name(endpoint)}"
    if isinstance(error, connection.UnreadableCookieFile):
        return TorError(f"{where} wants a cookie that you can't read", "join the group debian-tor")
    if isinstance(error, connection.MissingPassword) and password is None:
        return TorError(f"{where} wants a password", "give it with --tor-password-file")
    if isinstance(error, connection.PasswordAuthFailed):
        return TorError(f"{where} refuses the password", "give another with --tor-password-file")
    return TorError(f"{where} does not let us in", "let it use cookies: CookieAuthentication 1")


def _name(endpoint: Endpoint) -> str:
    return str(endpoint) if isinstance(endpoint, Path) else f"port {endpoint[1]}"


def _socks_of(controller: Controller) -> Endpoint:
    """A SOCKS port that keeps logins apart; Unix sockets first: nobody else gets between."""
    shared = [
        line.split()[0]
        for line in controller.get_conf("SocksPort", [], multiple=True)
        if line and "noisolatesocksauth" in line.lower()
    ]
    for listener in sorted(_listeners(controller), key=lambda one: one.startswith("unix:"))[::-1]:
        if any(listener == one or listener.endswith(f":{one}") for one in shared):
            continue
        endpoint = _endpoint(listener)
        if _answers(endpoint):
            return endpoint
    if shared:
        raise TorError(
            "tor's SOCKS port does not keep requests apart",
            "take NoIsolateSOCKSAuth out of its settings, or give --tor own",
        )
    raise TorError("tor has no SOCKS port that can be used", "give --tor own")


def _listeners(controller: Controller) -> Iterator[str]:
    for quoted in re.findall(r'"((?:[^"\\]|\\.)*)"', controller.get_info("net/listeners/socks")):
        yield re.sub(r"\\(.)", r"\1", quoted)


def _endpoint(listener: str) -> Endpoint:
    if listener.startswith("unix:"):
        return Path(listener.removeprefix("unix:"))
    host, _, port = listener.rpartition(":")
    return host.strip("[]"), int(port)


def _answers(endpoint: Endpoint) -> bool:
    with suppress(OSError), _plain_socket(endpoint) as (plain, address):
        plain.settimeout(CONNECT_SECONDS)
        plain.connect(address)
        return True
    return False


@contextmanager
def _plain_socket(endpoint: Endpoint) -> Iterator[tuple[socket.socket, Any]]:
    if isinstance(endpoint, Path):
        with socket.socket(socket.AF_UNIX) as plain:
            yield plain, str(endpoint)
    else:
        family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
        with socket.socket(family) as plain:
            yield plain, endpoint


def _progress(said: str) -> str:
    """`tor is at 45 %: loading relay descriptors`, from a bootstrap phase."""
    fields = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', said))
    summary = _unquoted(fields.get("SUMMARY", "starting"))
    return f"tor is at {fields.get('PROGRESS', '0')} %: {summary[:1].lower()}{summary[1:]}"


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
