"""What several rooms of tests here begin with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.server.postgres import Cluster
from tests.server.support import LocalServer, local_server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One PostgreSQL for all tests of a process."""
    with Cluster() as cluster:
        cluster.make()
        cluster.start()
        yield cluster


@pytest.fixture(autouse=True)
def memory_is_not_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for good, and this process runs other tests too."""
    monkeypatch.setattr("hpkvd.cli.guard_memory", lambda: None)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LocalServer]:
    """A handler with a ledger of its own, in this process."""
    async with local_server(tmp_path / "ledger.sqlite") as server:
        yield server
