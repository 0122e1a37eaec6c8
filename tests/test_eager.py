"""Waiting for the kernel: nobody starves, and nothing is polled in vain for long."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest
import trio

from hpkvfs.eager import HOLD, LINGER, MISSES, Pending, Trio

pytestmark = pytest.mark.trio
SECONDS = 10


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The kernel's end of a line, and ours."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        yield theirs, ours


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the processor was offered to others, which each look in vain does."""
    times: list[float] = []
    offer = os.sched_yield

    def counted() -> None:
        times.append(time.monotonic())
        offer()

    monkeypatch.setattr(os, "sched_yield", counted)
    return times


async def _after(seconds: float, theirs: socket.socket) -> None:
    await trio.sleep(seconds)
    theirs.send(b"request")


async def _wait(lowlevel: Trio, theirs: socket.socket, ours: socket.socket) -> None:
    """Wait for a request that comes late."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_after, 20 * LINGER, theirs)
        await lowlevel.lowlevel.wait_readable(ours.fileno())
    assert ours.recv(10) == b"request"


async def test_other_tasks_get_their_turn_while_requests_keep_coming(
    line: tuple[socket.socket, socket.socket],
) -> None:
    theirs, ours = line
    theirs.send(b"request")  # is never taken, so there always is one
    eager, turns = Trio(Pending()), 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        end = time.monotonic() + 20 * HOLD
        while time.monotonic() < end:
            await eager.lowlevel.wait_readable(ours.fileno())
        nursery.cancel_scope.cancel()
    assert turns >= 3


async def test_polling_ends_when_nothing_comes(
    line: tuple[socket.socket, socket.socket], polls: list[float]
) -> None:
    eager = Trio(Pending())
    await _wait(eager, *line)
    assert polls
    assert polls[-1] - polls[0] <= LINGER


async def test_a_program_that_thinks_for_long_is_not_polled_for(
    line: tuple[socket.socket, socket.socket], polls: list[float]
) -> None:
    eager = Trio(Pending())
    for _ in range(MISSES):
        await _wait(eager, *line)
    assert polls
    polls.clear()
    for _ in range(MISSES):
        await _wait(eager, *line)
    assert not polls


async def test_nothing_is_polled_while_an_answer_waits(
    line: tuple[socket.socket, socket.socket], polls: list[float]
) -> None:
    pending = Pending()
    eager = Trio(pending)
    with pending:
        await _wait(eager, *line)
        assert not polls
    await _wait(eager, *line)
    assert polls


async def test_a_descriptor_that_is_closed_while_it_is_polled_ends_the_wait(
    line: tuple[socket.socket, socket.socket],
) -> None:
    """In the turn of the loop that others get meanwhile: of two that are due, trio draws one."""
    _, ours = line
    for _ in range(20):
        eager = Trio(Pending())

        async def close(eager: Trio = eager) -> None:
            eager.lowlevel.notify_closing(ours.fileno())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with trio.fail_after(SECONDS), pytest.raises(trio.ClosedResourceError):
                await eager.lowlevel.wait_readable(ours.fileno())


async def test_a_closed_descriptor_ends_the_wait(
    line: tuple[socket.socket, socket.socket],
) -> None:
    _, ours = line
    eager = Trio(Pending())

    async def close() -> None:
        await trio.sleep(20 * LINGER)
        trio.lowlevel.notify_closing(ours.fileno())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with trio.fail_after(SECONDS), pytest.raises(trio.ClosedResourceError):
            await eager.lowlevel.wait_readable(ours.fileno())
