"""Talking to the process that has a vault mounted, over a unix socket in its state directory.

One connection carries one command, as lines of JSON:

    -> {"command": NAME, "arguments": {...}}
    <- {"progress": [DONE, TOTAL]}                               any number of times
    <- {"result": {...}} or {"error": {"message", "hint", "exit_code"}}

After the result of "unmount" the connection ends when the process does. This half is the
client's; it is quick to import, since commands of a mounted vault need nothing else. The
server's half is in commands.py.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hpkvfs.errors import HpkvError, UserError

if TYPE_CHECKING:
    import trio

MAX_LINE: Final = 1 << 20

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Another name for `path` that fits in a socket's address, which has 108 bytes at most."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message).encode() + b"\n"


async def receive_line(stream: trio.SocketStream, line: bytearray) -> None:
    """Receive a message into `line`: less than a line if it is too long or breaks off."""
    while not line.endswith(b"\n") and len(line) <= MAX_LINE:
        part = await stream.receive_some(65_536)
        if not part:
            break
        line += part


def encode_error(error: HpkvError) -> dict[str, Any]:
    """An error as it is sent."""
    return {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}


def decode_error(form: dict[str, Any]) -> HpkvError:
    """Inverse of encode_error, except that the class is lost."""
    error = HpkvError(form["message"], form["hint"])
    error.exit_code = form["exit_code"]
    return error


def reach(path: Path) -> socket.socket | None:
    """A connection to the process behind this socket; None when there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as short:
            connection.connect(short)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise UserError(f"can't use {path}: {error.strerror}", "is it your vault?") from None
    return connection


def ask(
    connection: socket.socket,
    command: str,
    arguments: dict[str, Any],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Have one command carried out; its result. HpkvError as the other process raised it."""
    try:
        connection.sendall(encode({"command": command, "arguments": arguments}))
        for line in connection.makefile("rb"):
            message = json.loads(line)
            if "progress" in message:
                progress(*message["progress"])
            elif "error" in message:
                raise decode_error(message["error"])
            else:
                result: dict[str, Any] = message["result"]
                return result
    except (OSError, ValueError):
        pass
    raise HpkvError(
        "the mounting process stopped before it answered", "see the log in the state directory"
    )


def wait_for_end(connection: socket.socket) -> None:
    """Return when the process at the other end is gone."""
    try:
        while connection.recv(4096):
            pass
    except OSError:
        pass
