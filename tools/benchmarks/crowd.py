"""A crowd for benchmarks: requests made beforehand, played at a server, and what it took.

Every request is real: a proof of its own, a connection of its own through a Unix socket, which is
how a tor on the same machine hands connections over. Playing them costs next to nothing (epoll, no
parsing): less than 0.1 ms of CPU each, which is told, since the crowd has to share the machine with
the server.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hpkvd import config, epochs, identity
from hpkvd.epochs import Epoch
from hpkvd.ledger import urls
from hpkvfs.protocol.codec import REPLY_SIZE
from hpkvfs.protocol.credential import Credential, Statement, parse, prepare
from hpkvfs.protocol.messages import Done, decode_reply
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from tests.server.support import Purse, ServerProcess, hpkvd, new_blob, new_key

WORTH = 100
IN_FLIGHT = 64
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """Frames that any fresh ledger with these keys answers, and the voucher that pays for them."""

    data: Path
    epoch: Epoch
    voucher: Voucher
    redeem: bytes
    frames: list[bytes]


@dataclass(slots=True)
class Result:
    """One run: seconds of CPU, when each reply came, and how long each took."""

    requests: int
    in_flight: int
    server: float
    client: float
    replied: list[float] = field(repr=False)
    latencies: list[float] = field(repr=False)

    @property
    def rate(self) -> float:
        """Requests a second, as long as so many are in flight: from when those that were sent
        first are answered until none is left to be sent.

        Replies come in bursts, so it is the slope of the line through them all.
        """
        middle = self.replied[self.in_flight : self.requests - self.in_flight]
        return statistics.linear_regression(middle, range(len(middle))).slope

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.replied[-1]

    @property
    def per_core(self) -> float:
        """Requests for each second of CPU of the server."""
        return self.requests / self.server


def mint(epoch: Epoch, count: int) -> list[Credential]:
    """Credentials of WORTH each, made with the issuer's key: quicker than buying them."""
    digest, parameters = epoch.parameters.digest, epoch.parameters.issuer
    minted: list[Credential] = []
    while len(minted) < count:
        statement = Statement(digest, Operation.ISSUE, b"", 2 * WORTH)
        draft = prepare(parameters, statement, (), (WORTH, WORTH), secrets.token_bytes)
        minted += draft.finish(parameters, epoch.issuer.issue(statement, parse(draft.request, 0)))
    return minted


def make_load(home: Path, requests: int) -> Load:
    """A server's keys and the requests for it."""
    data = home / "keys"
    made = hpkvd("init", data=data)
    if made.returncode != 0:
        raise RuntimeError(made.stderr)
    server = identity.load(data / config.IDENTITY)
    epoch = epochs.load(data / config.EPOCHS, server, keep=1).newest
    purse = Purse(epoch.parameters)
    voucher = Voucher.generate(2**31, secrets.token_bytes)
    redeem = purse.redeem(voucher).frame
    frames = []
    for _ in range(requests // 2):
        key = new_key()
        purse.held = mint(epoch, 4)
        frames += [purse.insert(key.public, new_blob()).frame, purse.look_up(key.public).frame]
    return Load(data, epoch, voucher, redeem, frames)


def play(
    server: ServerProcess, frames: Sequence[bytes], in_flight: int
) -> tuple[list[float], list[float], list[bytes]]:
    """Send every frame on a connection of its own, so many at a time.

    Seconds: when each reply came, since the start, and how long each took; and the replies.
    """
    waiting, replied, latencies, replies = iter(frames), [], [], []
    with selectors.DefaultSelector() as selector:

        def begin() -> bool:
            frame = next(waiting, None)
            if frame is None:
                return False
            connection = server.connect()
            connection.sendall(frame)
            selector.register(connection, selectors.EVENT_READ, (time.perf_counter(), bytearray()))
            return True

        start = time.perf_counter()
        active = sum(begin() for _ in range(in_flight))
        while active:
            for selected, _ in selector.select(30):
                connection = selected.fileobj
                assert isinstance(connection, socket.socket)
                began, reply = selected.data
                part = connection.recv(2**16)
                reply += part
                if len(reply) < REPLY_SIZE and part:
                    continue
                now = time.perf_counter()
                replied.append(now - start)
                latencies.append(now - began)
                replies.append(bytes(reply))
                selector.unregister(connection)
                connection.close()
                active += begin() - 1
    return replied, latencies, replies


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process and its children, also those that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) / TICKS
    return own + sum(map(cpu_seconds, children(pid)))


@contextmanager
def serving(
    home: Path, load: Load, url: str, workers: int, cores: Sequence[int] = ()
) -> Iterator[ServerProcess]:
    """A server with the load's keys on the ledger at a URL, its voucher redeemed.

    Each worker is kept on a core of its own, of these, if any are given.
    """
    data = home / f"data-{secrets.token_hex(4)}"
    shutil.copytree(load.data, data, ignore=shutil.ignore_patterns("ledger*"))
    with closing(urls.open_ledger(url)) as desk:
        desk.add_vouchers([load.voucher])
    os.environ["HPKVD_LEDGER"] = url
    try:
        server = ServerProcess(data, workers=workers, path=data / "socket")
    finally:
        del os.environ["HPKVD_LEDGER"]
    try:
        with server:
            if not isinstance(server.ask(load.redeem), Done):
                raise RuntimeError("the voucher was refused")
            for pid, core in zip(children(server.process.pid), cores, strict=False):
                pin(pid, {core})
            yield server
    finally:
        shutil.rmtree(data)


def played(server: ServerProcess, frames: Sequence[bytes], in_flight: int = IN_FLIGHT) -> Result:
    """What it took to answer these, every one as it should be."""
    before, own = cpu_seconds(server.process.pid), time.process_time()
    replied, latencies, replies = play(server, frames, in_flight)
    own = time.process_time() - own
    used = cpu_seconds(server.process.pid) - before
    if not all(isinstance(decode_reply(reply), Done) for reply in replies):
        raise RuntimeError("not every request was answered as it should be")
    return Result(len(frames), in_flight, used, own, replied, latencies)


def children(pid: int) -> list[int]:
    """Processes that a process started and that live."""
    listed = "".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    return sorted(map(int, listed.split()))


def pin(pid: int, cores: set[int]) -> None:
    """Keep every thread of a process on these cores."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)
