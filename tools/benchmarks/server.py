"""Paid requests a second: one and two workers, on SQLite and on PostgreSQL.

Every request is real: a proof of its own, a connection of its own over loopback, a durable
commit; half insert, half look up. Requests are made before the clock starts and answers looked
at after it stops, so that the load costs little (epoll, no parsing); what it does cost is
printed, since it has to share the machine with the server.

Figures, of `--json`: rps_ENGINE_WORKERS by the clock, core_ENGINE_WORKERS for each second of the
server's own CPU (the database's not counted), p50_ms_64 and p99_ms_64 with 64 requests in flight
at two workers on SQLite, and of a request's CPU in a worker (one, SQLite) the shares of proofs,
codec and ledger, each measured alone; what is left is the loop and the kernel.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hpkvd import config, epochs, identity
from hpkvd.epochs import Epoch
from hpkvd.ledger import Read, Transaction, urls
from hpkvfs.protocol.codec import REPLY_SIZE
from hpkvfs.protocol.credential import Credential, Statement, parse, prepare
from hpkvfs.protocol.messages import Done, decode_reply, decode_request
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from tests.server import ledgers
from tests.server.postgres import Cluster
from tests.server.support import Purse, ServerProcess, hpkvd, new_blob, new_key

WORTH = 100
REQUESTS = 1200
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
    """One run: by the clock, by CPU, and each request's seconds."""

    requests: int
    seconds: float
    server: float
    client: float
    latencies: list[float] = field(repr=False)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

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
    address: tuple[str, int], frames: Sequence[bytes], in_flight: int
) -> tuple[float, list[float], list[bytes]]:
    """Send every frame on a connection of its own, so many at a time.

    The seconds it took, those of each request, and the replies.
    """
    waiting, latencies, replies = iter(frames), [], []
    with selectors.DefaultSelector() as selector:

        def begin() -> bool:
            frame = next(waiting, None)
            if frame is None:
                return False
            connection = socket.create_connection(address)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
            connection.sendall(frame)
            connection.setblocking(False)
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
                latencies.append(time.perf_counter() - began)
                replies.append(bytes(reply))
                selector.unregister(connection)
                connection.close()
                active += begin() - 1
        seconds = time.perf_counter() - start
    return seconds, latencies, replies


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process and its children that live."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / TICKS
    children = "".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    return own + sum(cpu_seconds(int(child)) for child in children.split())


def measure(home: Path, name: str, load: Load, url: str, workers: int) -> Result:
    """One run on a fresh ledger."""
    data = home / name
    shutil.copytree(load.data, data, ignore=shutil.ignore_patterns("ledger*"))
    urls.create(url)
    with closing(urls.open_ledger(url)) as desk:
        desk.add_vouchers([load.voucher])
    os.environ["HPKVD_LEDGER"] = url
    try:
        with ServerProcess(data, workers=workers) as server:
            if not isinstance(server.ask(load.redeem), Done):
                raise RuntimeError("the voucher was refused")
            before, own = cpu_seconds(server.process.pid), time.process_time()
            seconds, latencies, replies = play(server.address, load.frames, IN_FLIGHT)
            own = time.process_time() - own
            used = cpu_seconds(server.process.pid) - before
    finally:
        del os.environ["HPKVD_LEDGER"]
    if not all(isinstance(decode_reply(reply), Done) for reply in replies):
        raise RuntimeError(f"{name}: not every request was answered as it should be")
    return Result(len(load.frames), seconds, used, own, latencies)


def each(work: Callable[[bytes], object], frames: Sequence[bytes]) -> float:
    """Seconds of CPU for each frame."""
    start = time.process_time()
    for frame in frames:
        work(frame)
    return (time.process_time() - start) / len(frames)


def ledger_seconds(home: Path, transactions: int = 600) -> float:
    """Seconds of CPU that SQLite and the queue before it take for each transaction."""
    url = f"sqlite://{home}/alone.sqlite"
    urls.create(url)
    inserts = [
        ledgers.transaction(f"{i}", ledgers.insert(f"{i}"), f"s{i}", f"t{i}")
        for i in range(transactions // 2)
    ]
    reads = [
        ledgers.transaction(f"r{i}", Read(ledgers.key(f"{i}")), f"u{i}", f"v{i}")
        for i in range(transactions // 2)
    ]

    async def measure() -> float:
        async with ledgers.opened(url) as ledger:
            await ledgers.fund(ledger)
            limit = trio.CapacityLimiter(IN_FLIGHT)

            async def apply(one: Transaction) -> None:
                async with limit:
                    await ledger.recall(one.fingerprint, one.serials)
                    await ledger.refusal(one.change)
                    await ledger.apply(one)

            start = time.process_time()
            for group in (inserts, reads):
                async with trio.open_nursery() as nursery:
                    for one in group:
                        nursery.start_soon(apply, one)
            return time.process_time() - start

    return trio.run(measure) / transactions


def shares(home: Path, load: Load, cpu: float) -> dict[str, float]:
    """Of the `cpu` seconds of one request: how much are proofs, how much encoding."""
    frames = load.frames[:200]
    issuer = load.epoch.issuer

    def prove(frame: bytes) -> None:
        request = decode_request(frame)
        statement = request.statement(load.epoch.tariff)  # type: ignore[union-attr]
        credentials = parse(request.credentials, 2)  # type: ignore[union-attr]
        issuer.verify(statement, credentials)
        issuer.issue(statement, credentials)

    codec = 2 * each(decode_request, frames)  # and as much again to encode the reply
    proofs = each(prove, frames) - codec / 2
    ledger = ledger_seconds(home)
    return {
        "share_proofs": round(proofs / cpu, 3),
        "share_codec": round(codec / cpu, 3),
        "share_ledger": round(ledger / cpu, 3),
        "share_rest": round(1 - (proofs + codec + ledger) / cpu, 3),
    }


def run(as_json: bool) -> dict[str, object]:
    """Measure; the figures."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(Cluster())
        cluster.make()
        cluster.start()
        load = make_load(home, REQUESTS)
        results: dict[str, Result] = {}
        for workers in (1, 2):
            for engine in ("sqlite", "postgres"):
                name = f"{engine}_{workers}"
                url = f"sqlite://{home}/{name}.sqlite" if engine == "sqlite" else cluster.new_url()
                results[name] = result = measure(home, name, load, url, workers)
                if not as_json:
                    print(
                        f"{name:<11} {result.rate:6.0f} requests/s, {result.per_core:6.0f} for"
                        f" each second of CPU; the load took {result.client / result.seconds:.0%}"
                        " of a core",
                        flush=True,
                    )
        return _figures(home, load, results)


def _figures(home: Path, load: Load, results: dict[str, Result]) -> dict[str, object]:
    figures: dict[str, object] = {}
    for name, result in results.items():
        figures[f"rps_{name}"] = round(result.rate)
        figures[f"core_{name}"] = round(result.per_core)
    for engine in ("sqlite", "postgres"):
        one, two = results[f"{engine}_1"], results[f"{engine}_2"]
        figures[f"scaling_{engine}"] = round(two.rate / one.rate, 2)
    hundredths = statistics.quantiles(results["sqlite_2"].latencies, n=100)
    figures["p50_ms_64"] = round(1000 * hundredths[49], 1)
    figures["p99_ms_64"] = round(1000 * hundredths[98], 1)
    return figures | shares(home, load, 1 / results["sqlite_1"].per_core)
