"""Circuits at a SOCKS port of ours, with a clock of ours: how many connections there are, when.

What tor makes of them is in tests/tor."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hpkvfs import tor
from hpkvfs.address import Address
from hpkvfs.errors import Misbehaviour, Unreachable
from hpkvfs.net import circuits
from hpkvfs.net.circuits import (
    AGES,
    MAX_PENDING,
    MAX_READY,
    RATE_SECONDS,
    WARM_SECONDS,
    Circuits,
    TorSettings,
)
from hpkvfs.net.line import Line
from hpkvfs.net.store import MAX_IN_FLIGHT
from hpkvfs.protocol.codec import REQUEST_SIZE
from tests.net.tors import Socks

ONION = Address.parse("2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion")


@pytest.fixture
async def socks(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Socks]:
    socks = Socks()

    @asynccontextmanager
    async def running(*_: object, **__: object) -> AsyncIterator[Socks]:
        yield socks

    monkeypatch.setattr(tor, "running", running)
    monkeypatch.setattr(circuits, "_connect", socks.connect)
    async with trio.open_nursery() as nursery:
        socks.nursery = nursery
        yield socks
        nursery.cancel_scope.cancel()


def a_way(*, warm: bool = True) -> Circuits:
    numbers = itertools.count(1)

    def rng(size: int) -> bytes:  # as even as can be: a low-discrepancy sequence
        return (next(numbers) * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128).to_bytes(16, "big")[
            :size
        ]

    return Circuits(ONION, TorSettings(tor.OWN, Path("/nonexistent")), rng, warm=warm)


async def use(way: Circuits, times: int) -> None:
    for _ in range(times):
        async with await way.dial() as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"


async def test_as_many_are_made_ahead_as_were_used_and_no_login_twice(
    autojump_clock: MockClock, socks: Socks
) -> None:
    way = a_way()
    async with way.running():
        assert way.ready == 0
        await use(way, 1)
        await trio.sleep(2 * RATE_SECONDS)
        assert way.ready == 1
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(use, way, 20)
        await trio.sleep(1)
        assert (way.making, way.ready) == (0, MAX_READY)
        assert len(socks.asked) == len(set(socks.asked)) == 201 + way.ready


@pytest.mark.parametrize("warm", [True, False])
async def test_a_server_sees_no_more_connections_than_requests_and_as_many_made_ahead(
    autojump_clock: MockClock, socks: Socks, warm: bool
) -> None:
    """However many requests there are. Without any made ahead, the negative control, none are
    idle."""
    way = a_way(warm=warm)
    async with way.running(), trio.open_nursery() as nursery:
        for _ in range(MAX_IN_FLIGHT):
            nursery.start_soon(use, way, 40)
    most = MAX_IN_FLIGHT + (MAX_READY if warm else 0)
    assert MAX_IN_FLIGHT <= socks.most_open <= most <= 32


async def test_what_nobody_takes_is_closed_one_by_one_between_the_ages(
    autojump_clock: MockClock, socks: Socks
) -> None:
    way = a_way()
    async with way.running():
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(use, way, 20)
        await trio.sleep(1)
        left = [way.ready]
        for second in range(2, int(AGES[1]) + 4):
            await trio.sleep(1)
            assert socks.open == way.ready
            left.append(way.ready)
            assert second > AGES[0] or left[-1] == left[0] == MAX_READY
        assert left[-1] == 0
        assert max(before - after for before, after in itertools.pairwise(left)) <= 3


async def test_after_a_while_without_requests_none_is_made(
    autojump_clock: MockClock, socks: Socks
) -> None:
    way = a_way()
    async with way.running():
        await use(way, 3)
        await trio.sleep(AGES[1] + 2)
        made = len(socks.asked)
        await trio.sleep(10 * WARM_SECONDS)
        assert (way.ready, way.making, len(socks.asked), socks.open) == (0, 0, made, 0)


@pytest.mark.parametrize("warm", [False, True])
async def test_no_more_than_32_are_being_made_at_a_time(
    autojump_clock: MockClock, socks: Socks, warm: bool
) -> None:
    socks.holds = True
    way = a_way(warm=warm)
    answered = 0

    async def one() -> None:
        nonlocal answered
        await use(way, 1)
        answered += 1

    async with way.running(), trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(one)
        await trio.sleep(10)
        assert socks.open == len(socks.asked) == MAX_PENDING == 32
        socks.holds = False
        socks.let_go.set()
    assert answered == 100


async def test_who_waits_for_one_that_fails_asks_for_one_himself(
    autojump_clock: MockClock, socks: Socks
) -> None:
    way, said = a_way(), list[str]()

    async def one() -> None:
        with pytest.raises(OSError, match="it cannot be found: it is down") as caught:
            await use(way, 1)
        said.append(str(caught.value))

    async with way.running():
        await use(way, 1)
        await trio.sleep(1)
        await use(way, 1)
        socks.failures = 1_000
        await trio.sleep(AGES[1])
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one)
        assert len(said) == 10
        socks.failures = 0
        await use(way, 3)


async def test_a_failed_request_is_repeated_as_it_was_under_a_new_login(
    autojump_clock: MockClock, socks: Socks
) -> None:
    socks.failures = 3
    way, frame = a_way(warm=False), secrets.token_bytes(REQUEST_SIZE)
    async with way.running():
        with pytest.raises(Misbehaviour):  # what comes back is the request: it got there
            await Line(way, secrets.token_bytes, way.patience).ask(frame)
    assert len(socks.asked) == len(set(socks.asked)) == 4
    assert socks.heard == frame


async def test_a_tor_that_gets_on_is_waited_for_and_one_that_does_not_is_told_of(
    autojump_clock: MockClock, socks: Socks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 seconds at each step of the bootstrap; then what it does is the message."""
    steps = ["tor is at 5 %: connecting to a relay", "tor is at 45 %: loading relay descriptors"]

    async def starting() -> Path:
        await trio.sleep(15)
        if steps:
            socks.phase = steps.pop(0)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(socks, "socks", starting)
    socks.phase = "starting tor"
    way = a_way(warm=False)
    async with way.running():
        start = trio.current_time()
        with pytest.raises(Unreachable) as caught:
            await way.dial()
    assert caught.value.message == "tor is at 45 %: loading relay descriptors"
    assert "try again" in caught.value.hint
    assert trio.current_time() - start == pytest.approx(60, abs=1)
