"""Real PostgreSQL for tests: clusters in temporary directories, on ports of loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg

from tests.ports import own_port

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
PASSWORD = "pw-7f3a9c"
USER = "keeper"


class Cluster:
    """One PostgreSQL server: made on entering, gone on leaving."""

    def __init__(self, *settings: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="hpkvd-pg-"))
        self.data = self.home / "data"
        self.port = own_port()
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._schemas = 0
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.home, "postgres", "postgres")

    @property
    def pid(self) -> int:
        """Of its first process, while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        """Of a user with a password."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    @property
    def socket_url(self) -> str:
        """The same, through its Unix socket."""
        return self.url.replace("127.0.0.1", quote(str(self.home), safe=""))

    def new_url(self, *, socket: bool = False) -> str:
        """The URL of a new schema, which is as good as a database of its own."""
        self._schemas += 1
        schema = f"t{self._schemas}"
        self.execute(f"CREATE SCHEMA {schema}")
        url = self.socket_url if socket else self.url
        return f"{url}?options=-csearch_path%3D{schema}"

    def execute(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def make(self) -> None:
        secret = self.home / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        arguments = ["-D", str(self.data), "-U", USER, "-A", "scram-sha-256", "--no-sync"]
        _run([BIN / "initdb", *arguments, f"--pwfile={secret}", "--no-instructions"])

    def make_standby_of(self, primary: Cluster) -> None:
        """A copy of a running primary that follows it; it names itself `standby`."""
        link = f"{primary.url}?application_name=standby"
        _run([BIN / "pg_basebackup", "-D", str(self.data), "-d", link, "-R", "-X", "stream",
              "-c", "fast", "--no-sync"])  # fmt: skip

    def start(self) -> None:
        options = [
            f"-cport={self.port}", "-clisten_addresses=127.0.0.1",
            f"-cunix_socket_directories={self.home}",
            "-cmax_connections=60", "-cshared_buffers=32MB", *self._settings,
        ]  # fmt: skip
        with open(self.home / "log", "ab") as log:
            self._process = subprocess.Popen(
                [BIN / "postgres", "-D", str(self.data), *options],
                stdout=log, stderr=log, start_new_session=True, **_unprivileged(),
            )  # fmt: skip
        _until(self._answers, self.home / "log")

    def promote(self) -> None:
        _run([BIN / "pg_ctl", "promote", "-w", "-D", str(self.data)])

    def kill(self) -> None:
        """As a power cut: no process of it does anything any more."""
        if self._process is not None:
            for pid in [self._process.pid, *_children(self._process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # the quickest there is that tidies up
            self._process.wait(20)
            self._process = None

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.home)


def _unprivileged() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    account = pwd.getpwnam("postgres")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(
        command, capture_output=True, text=True, cwd="/", check=False, **_unprivileged()
    )
    assert result.returncode == 0, result.stderr


def _children(pid: int) -> list[int]:
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in listed.read_text().split()]
    return found


def _until(condition: Any, log: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
