"""A tor of our own: started with settings of ours and no others, and ended with us."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Final

import trio

from hpkvfs.tor.control import Endpoint, TorError

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.1
TORRC: Final = "torrc"
# Told us by our service manager, and not to be answered by tor, which otherwise says it is ready.
MANAGER: Final = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")

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


@dataclass(frozen=True, slots=True)
class Owned:
    """A process that runs, and where its control port is."""

    pid: int
    control: Endpoint


def further_settings(data: Path) -> str:
    """What the user put into `data`/torrc, such as bridges; empty without. TorError."""
    path = data / TORRC
    try:
        return path.read_text() if path.exists() else ""
    except (OSError, UnicodeDecodeError):
        raise TorError(f"can't read {path}", "it has further settings for tor") from None


@asynccontextmanager
async def owned(data: Path, more: str, nursery: trio.Nursery) -> AsyncIterator[Owned]:
    """Start one with its state in `data`; it ends with the block, and with us. TorError.

    more: further settings in torrc's format; what it says is read in the nursery.
    """
    program = shutil.which("tor", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        raise TorError("there is no tor on this machine", "apt-get install tor")
    port_file = data / "port"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        port_file.unlink(missing_ok=True)
    except OSError as error:
        raise TorError(f"can't write to {data}: {error.strerror}") from None
    settings = _TORRC.format(
        data=_quoted(data), port=_quoted(port_file), owner=os.getpid(), more=more
    )
    command = [program, "--defaults-torrc", str(data / "none"), "-f", "-"]
    environment = {name: value for name, value in os.environ.items() if name not in MANAGER}
    process = await trio.lowlevel.open_process(
        command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, start_new_session=True, env=environment
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        said = _Said()
        nursery.start_soon(said.listen, process.stdout)
        with suppress(trio.BrokenResourceError):
            await process.stdin.send_all(settings.encode())
        await process.stdin.aclose()
        yield Owned(process.pid, await _control_port(process, port_file, said))
    finally:
        await _end(process)


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
    # One line for each port, also for those of further settings; any of them will do.
    found = re.search(r"^PORT=(\S+):(\d+)$", port_file.read_text(), re.MULTILINE)
    if found is None:
        raise TorError("tor does not say where its control port is", "try it by hand: tor")
    return found[1], int(found[2])


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
