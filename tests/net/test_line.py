"""Asking again: how long a client stays away."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock

from hpkvfs.net import line
from hpkvfs.net.line import Line
from hpkvfs.net.transport import Dialer, NoReply
from hpkvfs.protocol.messages import Reason, Refused


@pytest.mark.parametrize("random", [bytes(4), b"\xff" * 4])
async def test_a_busy_server_is_left_alone_for_as_long_as_it_says(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, random: bytes
) -> None:
    asked: list[float] = []
    replies = [Refused(Reason.BUSY, 3), Refused(Reason.BUSY, 7), Refused(Reason.KEY_EXISTS)]

    async def exchange(dialer: Dialer, frame: bytes, seconds: float) -> bytes:
        asked.append(trio.current_time())
        return replies[len(asked) - 1].encode()

    monkeypatch.setattr(line, "exchange", exchange)
    reply = await Line(None, lambda size: random[:size], 30.0).ask(b"")  # type: ignore[arg-type]
    assert reply == Refused(Reason.KEY_EXISTS)
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    # And a random while longer, or all who were turned away would come back together.
    assert 3 < pauses[0] < 4
    assert 7 < pauses[1] < 8


async def test_a_server_busy_for_longer_than_patience_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def exchange(dialer: Dialer, frame: bytes, seconds: float) -> bytes:
        return Refused(Reason.BUSY, 3_600).encode()

    monkeypatch.setattr(line, "exchange", exchange)
    start = trio.current_time()
    with pytest.raises(NoReply, match="too busy"):
        await Line(None, bytes, 20.0).ask(b"")  # type: ignore[arg-type]
    assert trio.current_time() == start
