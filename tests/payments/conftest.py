"""One mint for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.payments.mint import MintProcess
from tests.server.postgres import Cluster


@pytest.fixture(scope="session")
def mint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MintProcess]:
    with MintProcess(tmp_path_factory.mktemp("mint")) as mint:
        yield mint


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        cluster.make()
        cluster.start()
        yield cluster
