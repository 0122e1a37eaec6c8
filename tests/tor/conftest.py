"""One network for all tests here; they are in one file, since pytest-xdist deals by files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tor.network import Network, private_network


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with private_network(tmp_path_factory.mktemp("tornet")) as network:
        yield network
