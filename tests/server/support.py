"""What server tests have in common: a client's purse, a server in this process or in its own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from hpkvd.epochs import Epoch, Epochs, first_epoch
from hpkvd.handler import Handler
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvfs.protocol.codec import REPLY_SIZE
from hpkvfs.protocol.credential import Credential, Draft, prepare
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.group import SigningKey
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.messages import (
    UNOPENED,
    CredentialedRequest,
    DeleteRequest,
    Done,
    InsertRequest,
    IssueRequest,
    LookUpRequest,
    OpenEntryRequest,
    Parameters,
    ParametersRequest,
    ReissueRequest,
    Reply,
    Request,
    StoreEntryRequest,
    decode_reply,
)
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.protocol.voucher import Voucher
from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE
from tests import commands
from tests.doubles import Clock

ROOT = Path(__file__).parents[2]


def new_blob() -> bytes:
    return os.urandom(BLOB_SIZE)


def new_key() -> SigningKey:
    return SigningKey(os.urandom(32))


def new_value() -> bytes:
    return os.urandom(ENTRY_SIZE)


@cache
def epoch() -> Epoch:
    """One epoch for all tests of a process: making its digit table takes a while."""
    return first_epoch(Tariff(), secrets.token_bytes)


@cache
def identity() -> Identity:
    """One identity for all tests of a process."""
    return Identity(secrets.token_bytes(32))


@dataclass
class Purchase:
    """A request that was made, and what finishing it takes."""

    request: Any
    draft: Draft
    parameters: EpochParameters

    @property
    def frame(self) -> bytes:
        frame: bytes = self.request.encode()
        return frame

    def finish(self, reply: Reply) -> tuple[Credential, Credential]:
        assert isinstance(reply, Done), reply
        return self.draft.finish(self.parameters.issuer, reply.issued)


@dataclass
class Purse:
    """Makes requests with real credentials; keeps no journal, so not an example for clients."""

    parameters: EpochParameters
    held: list[Credential] = field(default_factory=list)

    @property
    def epoch(self) -> bytes:
        return self.parameters.digest

    @property
    def amount(self) -> int:
        return sum(credential.amount for credential in self.held)

    def buy(self, request: CredentialedRequest, amounts: tuple[int, int] | None = None) -> Purchase:
        """Pay for a request with two credentials that are no longer held after this."""
        statement = request.statement(self.parameters.tariff)
        presented = [self.held.pop() for _ in range(request.presented)]
        total = sum(one.amount for one in presented) + statement.delta
        halves = amounts or (total // 2, total - total // 2)
        rng = secrets.token_bytes
        draft = prepare(self.parameters.issuer, statement, presented, halves, rng)
        return Purchase(replace(request, credentials=draft.request), draft, self.parameters)

    def redeem(self, voucher: Voucher) -> Purchase:
        return self.buy(IssueRequest(self.epoch, voucher.secret, voucher.amount))

    def more(self) -> Purchase:
        return self.buy(ReissueRequest(self.epoch, 0))

    def reissue(self) -> Purchase:
        return self.buy(ReissueRequest(self.epoch, 2))

    def move(self, into: EpochParameters) -> Purchase:
        """Two credentials for two of another epoch."""
        request = ReissueRequest(self.epoch, 2, into.digest)
        presented = [self.held.pop() for _ in range(2)]
        amounts = (sum(one.amount for one in presented), 0)
        about = request.statement(self.parameters.tariff)
        draft = prepare(
            self.parameters.issuer, about, presented, amounts, secrets.token_bytes, into.issuer
        )
        return Purchase(replace(request, credentials=draft.request), draft, into)

    def look_up(self, key: bytes) -> Purchase:
        return self.buy(LookUpRequest(self.epoch, key))

    def insert(self, key: bytes, blob: bytes) -> Purchase:
        return self.buy(InsertRequest(self.epoch, key, blob))

    def delete(self, key: SigningKey, digest: bytes) -> Purchase:
        purchase = self.buy(DeleteRequest(self.epoch, key.public, digest))
        signature = key.sign(purchase.request.signed)
        purchase.request = replace(purchase.request, signature=signature)
        return purchase

    def store_entry(self, key: SigningKey, counter: int, value: bytes) -> Purchase:
        purchase = self.buy(StoreEntryRequest(self.epoch, key.public, counter, value))
        signature = key.sign(purchase.request.signed)
        purchase.request = replace(purchase.request, signature=signature)
        return purchase

    def settle(self, purchase: Purchase, reply: Reply) -> Done:
        """Hold what was issued."""
        self.held += purchase.finish(reply)
        assert isinstance(reply, Done)
        return reply


def open_entry(key: SigningKey, entry: bytes = UNOPENED) -> OpenEntryRequest:
    """A signed request to open an entry, or to ask which there is."""
    request = OpenEntryRequest(key.public, entry)
    return replace(request, signature=key.sign(request.signed))


@dataclass
class LocalServer:
    """Handler and ledger in this process."""

    handler: Handler
    ledger: SqliteLedger
    clock: Clock

    async def ask(self, request: Request | bytes) -> Reply:
        frame = request if isinstance(request, bytes) else request.encode()
        return decode_reply(await self.handler.answer(frame))

    async def purse(self, amount: int, credentials: int = 2) -> Purse:
        """A purse that bought this amount with a voucher."""
        voucher = Voucher.generate(amount, secrets.token_bytes)
        self.ledger.add_vouchers([voucher])
        purse = Purse(epoch().parameters)
        purchase = purse.redeem(voucher)
        purse.settle(purchase, await self.ask(purchase.request))
        while len(purse.held) < credentials:
            purchase = purse.more()
            purse.settle(purchase, await self.ask(purchase.request))
            await self._share_out(purse)
        return purse

    async def _share_out(self, purse: Purse) -> None:
        """Two rich and two poor credentials become four of about the same amount."""
        purse.held.sort(key=lambda credential: credential.amount)
        shared: list[Credential] = []
        for _ in range(2):
            purse.held.append(purse.held.pop(0))
            purchase = purse.reissue()
            shared += purchase.finish(await self.ask(purchase.request))
        purse.held += shared


@asynccontextmanager
async def local_server(path: Path, *, reserve: int = 0) -> AsyncIterator[LocalServer]:
    SqliteLedger.create(path)
    ledger = SqliteLedger(path, reserve=reserve)
    try:
        async with ledger.serving():
            clock = Clock()
            handler = Handler(Epochs([epoch()], identity()), ledger, clock)
            yield LocalServer(handler, ledger, clock)
    finally:
        ledger.close()


def hpkvd(*arguments: str, data: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with the environment of this moment."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"}
    return commands.run(
        "hpkvd",
        arguments[0],
        "--data",
        data,
        *arguments[1:],
        environment=environment,
        timeout=timeout,
    )


class ServerProcess:
    """`hpkvd serve` in a process of its own, on a port of its own; by default without workers.

    `path`: on a Unix socket there instead.
    """

    def __init__(
        self, data: Path, *options: str, workers: int = 0, path: Path | None = None
    ) -> None:
        self.data = data
        self.path = path
        self._options = ["--workers", str(workers), *options]
        self._start()

    def _start(self) -> None:
        listen = f"unix:{self.path}" if self.path else "127.0.0.1:0"
        command = [sys.executable, "-m", "hpkvd", "serve", "--listen", listen, *self._options]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}",
            "HPKVD_DATA": str(self.data),
        }
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().strip()
        if self.path is None:
            host, _, port = self.line.rpartition(" ")[2].rpartition(":")
            self.address = (host, int(port))

    def connect(self, timeout: float | None = None) -> socket.socket:
        """A connection to it; OSError."""
        if self.path is None:
            return socket.create_connection(self.address, timeout=timeout)
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(timeout)
            connection.connect(str(self.path))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(self, frame: bytes) -> Reply:
        """One request on a connection of its own; OSError or Malformed if that fails."""
        with self.connect(timeout=20) as connection:
            connection.sendall(frame)
            return decode_reply(read_all(connection))

    def parameters(self) -> EpochParameters:
        reply = self.ask(ParametersRequest().encode())
        assert isinstance(reply, Parameters)
        return EpochParameters.decode(reply.parameters)

    def kill(self) -> None:
        """As kill -9 or a power cut to the process would."""
        self._end(signal.SIGKILL)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code and what was told on standard error."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(how)
        _, told = self.process.communicate(timeout=60)
        return self.process.returncode, told

    def restart(self) -> None:
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def read_all(connection: socket.socket) -> bytes:
    """A reply, up to the end of the connection."""
    received = b""
    while len(received) <= REPLY_SIZE and (part := connection.recv(65536)):
        received += part
    return received


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something to come true; AssertionError if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
