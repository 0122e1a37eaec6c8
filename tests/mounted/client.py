"""A server and a client, each the real command in processes of their own, and a directory tree
as a value, so that it can be compared with what it was before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests import commands
from tests.ports import own_port

TOKENS = 20_000


def run(
    name: str, *arguments: str | Path, stdin: str = "", code: int = 0, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must be with this exit code."""
    done = commands.run(name, *arguments, stdin=stdin, cwd=cwd)
    assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
    return done


class Server:
    """hpkvd with data of its own, on a port that it keeps when it is started again."""

    process: Any

    def __init__(self, data: Path) -> None:
        self.data = data
        run("hpkvd", "init", "--data", data)
        self.address = f"127.0.0.1:{own_port()}"
        self.start()

    def start(self) -> None:
        """Return when it answers."""
        arguments = ("serve", "--workers", "0", "--data", self.data, "--listen", self.address)
        told, tell = os.pipe()
        with open(told) as lines, open(tell, "w") as stdout:
            with open(os.devnull) as nothing:
                self.process = commands.Command("hpkvd", arguments, (nothing, stdout, 2))
            stdout.close()
            assert lines.readline(), "the server did not start"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def voucher(self, amount: int) -> str:
        return run("hpkvd", "voucher", "--data", self.data, "--amount", str(amount)).stdout.strip()

    def status(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(
            run("hpkvd", "status", "--data", self.data, "--json").stdout
        )
        return report


@dataclass
class Client:
    """hpkvfs with one state directory and one place to mount on."""

    state: Path
    directory: Path
    words: Path
    pid: int | None = field(default=None)

    @classmethod
    def at(cls, base: Path) -> Client:
        base.mkdir(exist_ok=True)
        directory = base / "mnt"
        directory.mkdir()
        return cls(base / "state", directory, base / "words")

    def run(
        self, *arguments: str | Path, stdin: str = "", code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        return run("hpkvfs", "--state", self.state, *arguments, stdin=stdin, code=code)

    def json(self, *arguments: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.run(*arguments, "--json").stdout)
        return result

    def init(self, server: Server, tokens: int = TOKENS) -> None:
        self.run("init", "--server", server.address, "--no-password", "--words-file", self.words)
        if tokens:
            self.run("redeem", "-", stdin=server.voucher(tokens))

    def mount(self, *flags: str) -> str:
        """Mount; what was said on standard error."""
        said = self.run("mount", *flags, self.directory).stderr
        assert self.directory.is_mount()
        self.pid = self.json("status")["pid"]
        return said

    def umount(self, *, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.run("umount", self.directory, code=code)
        assert not self.directory.is_mount()
        self._wait_for_exit()
        return done

    def remount(self, *flags: str, cold: bool = False) -> None:
        """Unmount and mount again; `cold`: with nothing cached on this machine."""
        self.umount()
        if cold:
            (self.state / "cache").unlink()
        self.mount(*flags)

    def kill(self) -> None:
        """kill -9 of the mounting process; its dead mount stays."""
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)
        self._wait_for_exit()

    def terminate(self) -> None:
        assert self.pid is not None
        os.kill(self.pid, signal.SIGTERM)
        self._wait_for_exit()

    def _wait_for_exit(self) -> None:
        assert self.pid is not None
        eventually(lambda: not _runs(self.pid), "the mounting process to end")
        self.pid = None

    def fsck(self) -> None:
        """The oracle: nothing wrong with what is at the server."""
        assert self.json("fsck", "--full")["problems"] == []

    def discard(self) -> None:
        """Leave nothing mounted and nothing running, whatever happened."""
        if self.pid is not None and _runs(self.pid):
            os.kill(self.pid, signal.SIGKILL)
            self._wait_for_exit()
        subprocess.run(
            ["fusermount3", "-u", "-z", str(self.directory)], check=False, capture_output=True
        )


def _runs(pid: int | None) -> bool:
    """Whether a process, which need not be our child, is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


class Entry(NamedTuple):
    """All that a program can see of a file, except what the filesystem chooses (ino, ctime)."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime: int
    content: str
    xattrs: dict[str, bytes]


def tree(directory: Path) -> dict[str, Entry]:
    """Everything below a directory, by path."""
    found = {".": _entry(directory)}
    for path in sorted(directory.rglob("*")):
        found[str(path.relative_to(directory))] = _entry(path)
    return found


def _entry(path: Path) -> Entry:
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(facts.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        content = ""
    xattrs = {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
    }
    return Entry(
        facts.st_mode,
        facts.st_nlink,
        facts.st_uid,
        facts.st_gid,
        facts.st_rdev,
        facts.st_size,
        facts.st_mtime_ns,
        content,
        xattrs,
    )


def forget_everything(client: Client) -> None:
    """Lose the machine: all of the state directory."""
    shutil.rmtree(client.state)
