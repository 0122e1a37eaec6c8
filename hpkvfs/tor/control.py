"""tor's control connection: how it is made, and what is read over it. The only importer of stem.

What is here blocks, and is called in threads. stem is imported when it is first needed, since
most commands never are.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

if TYPE_CHECKING:
    from stem.control import Controller as Controller

T = TypeVar("T")

Endpoint: TypeAlias = "tuple[str, int] | Path"
"""A TCP port on this machine, or a Unix socket."""

CONNECT_SECONDS: Final = 5.0


class TorError(Exception):
    """tor cannot be used; `message` is one sentence, `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def translated(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Call it; what stem raises becomes TorError, without stem's words where they may quote us."""
    import stem

    try:
        return function(*args)
    except stem.SocketClosed:
        raise TorError("tor stopped", "it will be tried again") from None
    except (stem.ControllerError, ValueError, OSError) as error:
        raise TorError(f"tor's control port fails: {type(error).__name__}") from None


def connect(endpoint: Endpoint, password: str | None) -> Controller:
    import stem
    import stem.connection
    from stem.control import Controller
    from stem.util import log as stem_log

    stem_log.get_logger().setLevel(logging.CRITICAL)
    try:
        _knock(endpoint)  # stem would leak the socket
        if isinstance(endpoint, Path):
            controller = Controller.from_socket_file(str(endpoint))
        else:
            controller = Controller.from_port(*endpoint)
    except PermissionError:
        raise TorError(
            f"the tor at {_name(endpoint)} is not yours to control",
            "join the group debian-tor and log in again, or give --tor own",
        ) from None
    except (stem.SocketError, ValueError, OSError):
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


def on_end(controller: Controller, call: Callable[[], None]) -> None:
    """Call it, in a thread of stem's, when the connection ends, or has."""
    from stem.control import State

    def status(_: Controller, state: str, __: float) -> None:
        if state == State.CLOSED:
            call()

    controller.add_status_listener(status, spawn=False)
    if not controller.is_alive():
        call()


def socks_of(controller: Controller) -> Endpoint:
    """A SOCKS port that keeps logins apart; Unix sockets first: nobody else gets between."""
    shared = [line for line in _socks_lines(controller) if "noisolatesocksauth" in line.lower()]
    for listener in sorted(_listeners(controller), key=lambda one: one.startswith("unix:"))[::-1]:
        if any(_may_be(listener, line) for line in shared):
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


def _socks_lines(controller: Controller) -> list[str]:
    """SocksPort, and __SocksPort, which Tor Browser gives its tor."""
    names = ("SocksPort", "__SocksPort")
    return [line for name in names for line in controller.get_conf(name, [], multiple=True) if line]


def _may_be(listener: str, line: str) -> bool:
    """Whether a listener can be the one that this line of settings made. In doubt, it is."""
    if line.startswith("unix:"):
        quoted = re.match(r'unix:"((?:[^"\\]|\\.)*)"', line)
        path = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else line.split()[0][len("unix:") :]
        return listener == f"unix:{path}"
    port = line.split()[0].rpartition(":")[2]
    return not listener.startswith("unix:") and port in ("auto", listener.rpartition(":")[2])


def _listeners(controller: Controller) -> Iterator[str]:
    for quoted in re.findall(r'"((?:[^"\\]|\\.)*)"', controller.get_info("net/listeners/socks")):
        yield re.sub(r"\\(.)", r"\1", quoted)


def _endpoint(listener: str) -> Endpoint:
    if listener.startswith("unix:"):
        return Path(listener.removeprefix("unix:"))
    host, _, port = listener.rpartition(":")
    return host.strip("[]"), int(port)


def _answers(endpoint: Endpoint) -> bool:
    try:
        _knock(endpoint)
    except OSError:
        return False
    return True


def _knock(endpoint: Endpoint) -> None:
    """Connect, and hang up; OSError."""
    with _plain_socket(endpoint) as (plain, address):
        plain.settimeout(CONNECT_SECONDS)
        plain.connect(address)


@contextmanager
def _plain_socket(endpoint: Endpoint) -> Iterator[tuple[socket.socket, Any]]:
    if isinstance(endpoint, Path):
        with socket.socket(socket.AF_UNIX) as plain:
            yield plain, str(endpoint)
    else:
        family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
        with socket.socket(family) as plain:
            yield plain, endpoint


def progress(said: str) -> str:
    """`tor is at 45 %: loading relay descriptors`, from a bootstrap phase."""
    fields = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', said))
    summary = unquoted(fields.get("SUMMARY", "starting"))
    return f"tor is at {fields.get('PROGRESS', '0')} %: {summary[:1].lower()}{summary[1:]}"


def unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text
