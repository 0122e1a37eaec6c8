"""One mint for all tests of a process; servers that take its ecash, and a node's invoices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.payments.mint import MintProcess
from tests.payments.nodes import Cln, change_settings, take_invoices
from tests.payments.shop import hpkvd
from tests.server.postgres import Cluster
from tests.server.support import ServerProcess


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


@pytest.fixture
def node() -> Iterator[Cln]:
    with Cln() as node:
        yield node


@pytest.fixture
def data(mint: MintProcess, node: Cln, tmp_path: Path) -> Path:
    """A data directory whose server takes ecash of the mint, and invoices of the node."""
    data = tmp_path / "data"
    assert hpkvd("init", data=data).exit_code == 0
    take_invoices(data, node.url)
    change_settings(data, {"mints = []": f'mints = ["{mint.url}"]'})
    return data


@pytest.fixture
def server(data: Path) -> Iterator[ServerProcess]:
    with ServerProcess(data) as server:
        yield server
