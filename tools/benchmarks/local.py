"""A real `hpkvd` on loopback, for as long as a benchmark takes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens, and its operator's desk."""

    data: Path
    host: str
    port: int
    pid: int

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    @property
    def cpu(self) -> float:
        """Seconds of CPU that its process used, all threads, to the tick (10 ms)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def voucher(self, amount: int) -> str:
        """A new voucher worth `amount` tokens."""
        return _hpkvd("voucher", "--data", str(self.data), "--amount", str(amount)).strip()


@contextmanager
def local_server(data: Path) -> Iterator[Server]:
    """Set up a server in an empty directory, run it on a free port, stop it at the end."""
    _hpkvd("init", "--data", str(data))
    reading, writing = os.pipe()
    command = ["serve", "--workers", "0", "--data", str(data), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hpkvd", *command, "--ready-fd", str(writing)],
        pass_fds=[writing],
        preexec_fn=end_with_parent,
        stdout=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with open(reading) as ready:
            host, _, port = ready.readline().strip().rpartition(":")
        if not port:
            raise RuntimeError("the server did not start")
        yield Server(data, host, int(port), process.pid)
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)


def end_with_parent() -> None:
    """In a new process: be terminated when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def _hpkvd(*arguments: str) -> str:
    command = [sys.executable, "-m", "hpkvd", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
