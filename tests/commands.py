"""The commands hpkvfs and hpkvd in processes of their own that begin within hundredths of a second.

Most of what a short command takes is Python's start and its imports, and tests run commands by the
thousand. So one process imports everything, once, and forks:

    test process --socket--> starter --fork--> supervisor --fork--> command

The supervisor tells which process it is and, later, how it ended. A command has files, arguments,
environment and directory of its own, and memory in which nothing happened before. What commands
start by themselves (the process of a mount, its helpers, a server's workers) starts as it does for
users; whole commands do in tests/cli, tests/tools and tests/tor.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, Final, NoReturn

ROOT: Final = Path(__file__).parents[1]
ENVIRONMENT: Final = {
    name: value for name, value in os.environ.items() if not name.startswith(("HPKV", "COVERAGE"))
} | {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
MOST_BYTES: Final = 1 << 17
MOST_SECONDS: Final = 120.0
END_SECONDS: Final = 10.0


def command(module: str, *arguments: str | Path) -> list[str]:
    """The line of a command, or another module, that starts as it does for users."""
    return [sys.executable, "-m", module, *map(str, arguments)]


class Command:
    """One that runs: `hpkvfs` or `hpkvd`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        files: Sequence[int | IO[Any]],
        *,
        environment: Mapping[str, str] = ENVIRONMENT,
        cwd: Path | None = None,
    ) -> None:
        """Start it; `files`: standard input, output and error."""
        request = [name, list(map(str, arguments)), dict(environment), str(cwd or Path.cwd())]
        self._supervisor, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fds = [one if isinstance(one, int) else one.fileno() for one in files]
            socket.send_fds(_starter(), [json.dumps(request).encode()], [*fds, theirs.fileno()])
        self.pid = int(self._supervisor.recv(MOST_BYTES))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """How it ended (negative: by which signal); None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = MOST_SECONDS) -> int:
        """The same, when it has ended; TimeoutExpired."""
        if self.returncode is None:
            self._supervisor.settimeout(timeout)
            try:
                self.returncode = int(self._supervisor.recv(MOST_BYTES))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0) from None
            self._supervisor.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    name: str,
    *arguments: str | Path,
    stdin: str = "",
    environment: Mapping[str, str] = ENVIRONMENT,
    cwd: Path | None = None,
    timeout: float = MOST_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; killed, and TimeoutExpired, when that takes too many seconds."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as told,
        tempfile.TemporaryFile("w+") as complained,
    ):
        given.write(stdin)
        given.seek(0)
        files = (given, told, complained)
        command = Command(name, arguments, files, environment=environment, cwd=cwd)
        try:
            code = command.wait(timeout)
        except subprocess.TimeoutExpired:
            command.kill()
            raise
        told.seek(0)
        complained.seek(0)
        return subprocess.CompletedProcess(arguments, code, told.read(), complained.read())


@cache
def _starter() -> socket.socket:
    """The way to this process's starter, which ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        starter = subprocess.Popen(
            command("tests.commands"),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
        )
    atexit.register(starter.wait, END_SECONDS)
    atexit.register(ours.close)  # which comes first, and ends it
    return ours


# The starter's side.


def main() -> None:
    """Import everything, then start commands until nobody is left to ask for one."""
    import hpkvd.cli
    import hpkvd.ledger.postgresql
    import hpkvfs.cli
    import hpkvfs.mount
    import hpkvfs.ui

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    commands = {"hpkvfs": hpkvfs.cli.main, "hpkvd": hpkvd.cli.main}
    asked = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    while True:
        message, fds, *_ = socket.recv_fds(asked, MOST_BYTES, 4)
        if not message:
            return
        if os.fork() == 0:
            asked.close()
            _supervise(commands, json.loads(message), fds)
        for fd in fds:
            os.close(fd)


def _supervise(commands: Mapping[str, Any], request: list[Any], fds: list[int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        _become(commands, request, fds)
    *files, told = fds
    for fd in files:
        os.close(fd)
    try:
        os.write(told, b"%d" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(told, b"%d" % os.waitstatus_to_exitcode(status))
    finally:
        os._exit(0)


def _become(commands: Mapping[str, Any], request: list[Any], fds: list[int]) -> NoReturn:
    """Do what the command does, in a process made for it."""
    code = 1
    try:
        name, arguments, environment, directory = request
        for place, fd in enumerate(fds[:3]):
            os.dup2(fd, place)
        for fd in fds:
            os.close(fd)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [name, *arguments]
        commands[name](args=arguments, prog_name=name)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    main()
