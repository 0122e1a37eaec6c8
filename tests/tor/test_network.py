"""Through a private Tor network: what our half of it does, and what can be seen of it."""

from __future__ import annotations

from pathlib import Path

import trio

from hpkvfs import tor
from tests.tor.network import Network


async def test_a_tor_that_died_is_noticed_and_found_again(network: Network) -> None:
    told: list[str] = []
    client = network.control("client")
    async with tor.running(client, Path("/nonexistent"), tell=told.append) as found:
        assert await found.socks() == network.socks
        network.kill("client")
        while found.is_up:
            await trio.sleep(0.01)
        network.start("client")
        with trio.fail_after(30):
            while not found.is_up:
                await trio.sleep(0.05)
        assert found.starts == 2
    assert "tor stopped" in told
    assert any(phase.startswith("tor is at ") for phase in told)
