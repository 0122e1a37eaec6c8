"""Clients that cheat a real handler, and crowds that weary a real process: all in vain.

After each refusal the books are what they were, and the credentials that were misused still pay
for something honest. tests/server/test_handler.py has what happens to requests that are merely
wrong, and tests/protocol what is proven.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from hpkvd.epochs import Epoch, Epochs
from hpkvd.handler import Handler
from hpkvfs.protocol import credential, digits
from hpkvfs.protocol.codec import REQUEST_SIZE
from hpkvfs.protocol.credential import Credential, Issuer
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.group import GV, ORDER, Point, multiply, random_scalar
from hpkvfs.protocol.messages import DeleteRequest, LookUpRequest, Reason, Refused
from hpkvfs.protocol.tariff import Tariff
from tests.server.support import (
    LocalServer,
    Purchase,
    Purse,
    ServerProcess,
    epoch,
    hpkvd,
    identity,
    local_server,
    new_blob,
    new_key,
)

KEY = new_key()
BLOB = new_blob()
DIGEST = hashlib.sha256(BLOB).digest()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LocalServer]:
    async with local_server(tmp_path / "ledger.sqlite") as server:
        yield server


@pytest.fixture
async def purse(server: LocalServer) -> Purse:
    return await server.purse(1_000, credentials=4)


async def refused(server: LocalServer, frame: bytes) -> Reason:
    """Ask, and see that it was refused and changed nothing."""
    before = server.ledger.totals()
    reply = await server.ask(frame)
    assert isinstance(reply, Refused), reply
    assert server.ledger.totals() == before
    return reply.reason


# -- amounts ---------------------------------------------------------------------------------


def hide_anything(
    table: digits.DigitTable, amount: int, rng: Callable[[int], bytes]
) -> tuple[tuple[Point, ...], tuple[int, ...]]:
    """As digits.hide, for any scalar: the last "digit" is whatever makes the sum right."""
    values = (0, 0, 0, amount % ORDER)
    blinds = tuple(random_scalar(rng) for _ in values)
    entries = [table.entries[value % digits.RADIX] for value in values]
    points = tuple(multiply(one, v) for one, v in zip(entries, blinds, strict=True))
    return points, blinds + values


@contextlib.contextmanager
def dishonest() -> Iterator[None]:
    """A prover that claims what is not so, as well as it can."""
    with (
        patch.object(credential, "_check_balance", lambda *_: None),
        patch.object(digits, "hide", hide_anything),
    ):
        yield


CLAIMS = {
    "a token too many": lambda total: (total + 1, 0),
    "all tokens twice": lambda total: (total, total),
    "a negative amount that the other makes up for": lambda total: (ORDER - 1_000, total + 1_000),
    "a negative amount for want of tokens": lambda total: (ORDER - 1, total + 1),
    "amounts that wrap around the order": lambda total: (ORDER // 2 + total, ORDER // 2 + 1),
    "an amount of 2^32": lambda total: (2**32, total - 2**32),
    "an amount of 2^256 - 1": lambda total: (2**256 - 1, total),
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
async def test_amounts_that_nobody_has(
    server: LocalServer, purse: Purse, claim: Callable[[int], tuple[int, int]]
) -> None:
    pair = purse.held[-2:]
    total = sum(one.amount for one in pair) - 1
    with dishonest():
        purchase = purse.buy(LookUpRequest(purse.epoch, KEY.public), claim(total))
    assert await refused(server, purchase.frame) is Reason.BAD_PROOF
    purse.held += pair
    honest = purse.look_up(KEY.public)
    purse.settle(honest, await server.ask(honest.request))


async def test_spending_more_than_one_has(server: LocalServer) -> None:
    """Five tokens do not buy for ten, whatever is said to be left."""
    purse = await server.purse(5)
    with dishonest():
        request = purse.insert(KEY.public, BLOB)
    assert await refused(server, request.frame) is Reason.BAD_PROOF
    assert await server.ledger.read(KEY.public) is None


# -- credentials -----------------------------------------------------------------------------


def richer(one: Credential) -> Credential:
    return replace(one, amount=one.amount + 1_000)


def made_up(one: Credential) -> Credential:
    return Credential(
        1_000,
        random_scalar(secrets.token_bytes),
        random_scalar(secrets.token_bytes),
        multiply(GV.point, random_scalar(secrets.token_bytes)),
        multiply(GV.point, random_scalar(secrets.token_bytes)),
    )


def under_another_serial(one: Credential) -> Credential:
    return replace(one, r=random_scalar(secrets.token_bytes))


def with_another_tag(one: Credential) -> Credential:
    return replace(one, t=one.t + 1)


FORGERIES = [richer, made_up, under_another_serial, with_another_tag]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
async def test_credentials_that_nobody_issued(
    server: LocalServer, purse: Purse, forge: Callable[[Credential], Credential]
) -> None:
    purse.held[-1] = forge(purse.held[-1])
    purchase = purse.look_up(KEY.public)
    assert await refused(server, purchase.frame) is Reason.BAD_PROOF


async def test_one_credential_presented_as_two(server: LocalServer, purse: Purse) -> None:
    purse.held += [purse.held[-1]]
    with dishonest():
        purchase = purse.look_up(KEY.public)
    assert await refused(server, purchase.frame) is Reason.MALFORMED


@cache
def epoch_two() -> Epoch:
    issuer = Issuer.generate(secrets.token_bytes)
    parameters = EpochParameters(2, Tariff(), issuer.parameters, epoch().parameters.digest)
    return Epoch(parameters, issuer)


async def test_credentials_of_one_epoch_in_another(server: LocalServer, purse: Purse) -> None:
    """By name only, by proof only, and by both."""
    handler = Handler(Epochs([epoch(), epoch_two()], identity()), server.ledger, server.clock)
    server.handler = handler
    pair = purse.held[-2:]
    old, new = purse.parameters, epoch_two().parameters

    def bought(parameters: EpochParameters, named: EpochParameters) -> Purchase:
        purse.held[-2:] = pair
        purse.parameters = parameters
        purchase = purse.look_up(KEY.public)
        purse.held += pair
        purchase.request = replace(purchase.request, epoch=named.digest)
        return purchase

    for parameters, named in ((old, new), (new, old), (new, new)):
        assert await refused(server, bought(parameters, named).frame) is Reason.BAD_PROOF
    assert not isinstance(await server.ask(bought(old, old).frame), Refused)


# -- deletions -------------------------------------------------------------------------------


async def test_a_deletion_signed_by_another_key(server: LocalServer, purse: Purse) -> None:
    """Also when the signer's own key is that of a blob with the same content."""
    mine = new_key()
    for key in (KEY, mine):
        stored = purse.insert(key.public, BLOB)
        purse.settle(stored, await server.ask(stored.request))
    purchase = purse.buy(DeleteRequest(purse.epoch, KEY.public, DIGEST))
    signed = replace(purchase.request, signature=mine.sign(purchase.request.signed))
    assert await refused(server, signed.encode()) is Reason.BAD_SIGNATURE
    assert await server.ledger.read(KEY.public) == BLOB


async def test_a_replayed_deletion(server: LocalServer, purse: Purse) -> None:
    """The blob is stored again under its key; the old request and the old signature are worth
    nothing, neither as they are nor with somebody else's credentials."""
    for purchase in (purse.insert(KEY.public, BLOB),):
        purse.settle(purchase, await server.ask(purchase.request))
    deletion = purse.delete(KEY, DIGEST)
    done = await server.ask(deletion.request)
    purse.settle(deletion, done)
    again = purse.insert(KEY.public, BLOB)
    purse.settle(again, await server.ask(again.request))
    assert await server.ask(deletion.request) == done
    assert await server.ledger.read(KEY.public) == BLOB
    thief = await server.purse(10)
    theft = thief.buy(DeleteRequest(thief.epoch, KEY.public, DIGEST))
    theft.request = replace(theft.request, signature=deletion.request.signature)
    assert await refused(server, theft.frame) is Reason.BAD_SIGNATURE
    assert await server.ledger.read(KEY.public) == BLOB


async def test_a_refund_that_is_redirected_on_its_way(server: LocalServer, purse: Purse) -> None:
    """Whoever carries a deletion cannot have the refund issued to himself."""
    stored = purse.insert(KEY.public, BLOB)
    purse.settle(stored, await server.ask(stored.request))
    deletion = purse.delete(KEY, DIGEST)
    thief = await server.purse(10)
    own = thief.buy(DeleteRequest(thief.epoch, KEY.public, DIGEST))
    theft = replace(deletion.request, credentials=own.request.credentials)
    assert await refused(server, theft.encode()) is Reason.BAD_SIGNATURE
    purse.settle(deletion, await server.ask(deletion.request))


async def test_keys_that_are_no_points(server: LocalServer, purse: Purse) -> None:
    """A signature under one is refused, not a crash; the blob stays with who stored it there."""
    key = b"\2" + b"\xff" * 32
    stored = purse.insert(key, BLOB)
    purse.settle(stored, await server.ask(stored.request))
    purchase = purse.buy(DeleteRequest(purse.epoch, key, DIGEST))
    forged = replace(purchase.request, signature=bytes(64))
    assert await refused(server, forged.encode()) is Reason.BAD_SIGNATURE


# -- crowds ----------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    settings = data / "hpkvd.toml"
    text = settings.read_text().replace("connections = 512", "connections = 64")
    settings.write_text(text)
    assert "connections = 64" in text
    with ServerProcess(data) as server:
        yield server


def resident(server: ServerProcess) -> int:
    """Bytes of memory that the process has now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


PARTIAL = b"hpkq" + secrets.token_bytes(REQUEST_SIZE - 5)


def test_a_crowd_that_sends_slowly_costs_no_more_than_its_frames(process: ServerProcess) -> None:
    """600 connections with all but one byte of a frame, of which 64 are let in."""
    process.parameters()
    before = resident(process)
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(process.address)
            with contextlib.suppress(OSError):
                connection.send(PARTIAL)
        for _ in range(20):
            time.sleep(0.05)
            assert resident(process) - before < 64 * 4 * REQUEST_SIZE + 4 * 2**20
    process.parameters()


def test_a_flood_is_not_read(process: ServerProcess) -> None:
    """Who goes on sending after a whole frame gets one answer, and no memory."""
    process.parameters()
    before = resident(process)
    flood = socket.create_connection(process.address, timeout=10)
    with flood as connection, contextlib.suppress(OSError):
        for _ in range(400):
            connection.sendall(secrets.token_bytes(65_536))
    assert resident(process) - before < 4 * 2**20
    process.parameters()


def test_frames_that_break_off_are_forgotten(process: ServerProcess) -> None:
    process.parameters()
    before = resident(process)
    for size in (0, 1, 4, 10, 11, 1_000, REQUEST_SIZE - 1) * 60:
        with socket.create_connection(process.address, timeout=10) as connection:
            connection.sendall(PARTIAL[:size])
    assert resident(process) - before < 4 * 2**20
    process.parameters()


def test_noise_of_the_right_size_is_refused(process: ServerProcess) -> None:
    process.parameters()
    before = resident(process)
    for start in (b"", b"hpkq", b"hpkq\0\1\0\0\0\5"):
        for _ in range(30):
            frame = start + secrets.token_bytes(REQUEST_SIZE - len(start))
            assert process.ask(frame) == Refused(Reason.MALFORMED)
    assert resident(process) - before < 4 * 2**20
