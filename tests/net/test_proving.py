"""Helper processes: what they make is as good, and none of them is missed."""

from __future__ import annotations

import os
import resource
import secrets
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from hpkvfs.net.proving import NICENESS, Helpers, Here
from hpkvfs.protocol.credential import Issuer, Statement, parse
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.tariff import Operation
from tests.net.harness import World, running

BLOB = bytes(16_433)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


@pytest.fixture
async def helpers() -> AsyncIterator[Helpers]:
    with closing(Helpers(Here(secrets.token_bytes), 2)) as helpers:
        yield helpers


def processes() -> list[int]:
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"hpkvfs.net.proving" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


async def store_some(world: World, helpers: Helpers, count: int = 6) -> None:
    store = world.client(prover=helpers)
    await store.redeem(world.voucher(1_000))

    async def insert(number: int) -> None:
        await store.insert(bytes([2, number]) + bytes([1]) * 31, BLOB, b"%d" % number)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(insert, number)
    for number in range(count):
        assert await store.look_up(bytes([2, number]) + bytes([1]) * 31) == BLOB
    world.assert_conserved(store)


async def test_they_pay_for_requests_and_end_with_their_owner(
    world: World, helpers: Helpers
) -> None:
    await store_some(world, helpers)
    assert 1 <= len(processes()) <= 2
    for process in processes():
        assert os.getpriority(os.PRIO_PROCESS, process) >= min(19, NICENESS)
        assert resource.prlimit(process, resource.RLIMIT_CORE) == (0, 0)
        assert len(Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")) == 5, "no secrets"
    helpers.close()
    assert processes() == []


async def test_one_that_is_killed_is_not_missed(world: World, helpers: Helpers) -> None:
    store = world.client(prover=helpers)
    await store.redeem(world.voucher(1_000))
    for number in range(3):
        await store.insert(bytes([2, number]) + bytes([1]) * 31, BLOB, b"%d" % number)
        for process in processes():
            os.kill(process, 9)
    await store.look_up(bytes([2, 0]) + bytes([1]) * 31)
    world.assert_conserved(store)


async def test_a_reply_that_proves_nothing_is_refused_by_them_too(helpers: Helpers) -> None:
    issuer, other = (Issuer.generate(secrets.token_bytes) for _ in "12")
    about = Statement(bytes(32), Operation.REISSUE, b"", 0)
    draft = await helpers.prepare(issuer.parameters, about, (), (0, 0))
    reply = issuer.issue(about, parse(draft.request, 0))
    assert [one.amount for one in await helpers.finish(issuer.parameters, draft, reply)] == [0, 0]
    for parameters, bad in ((other.parameters, reply), (issuer.parameters, reply[:-1])):
        with pytest.raises(ProtocolError):
            await helpers.finish(parameters, draft, bad)
    with pytest.raises(ValueError, match="balance"):
        await helpers.prepare(issuer.parameters, about, (), (1, 0))
