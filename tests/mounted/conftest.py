"""Fixtures: servers, funded vaults, mounts. Whatever a test does, fsck finds nothing after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.client import Client, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that do not hurt it."""
    server = Server(tmp_path_factory.mktemp("server") / "data")
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """One for this test alone, which may stop it and read its books."""
    server = Server(tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture
def vault(tmp_path: Path, server: Server) -> Iterator[Client]:
    """A funded vault, not mounted."""
    client = Client.at(tmp_path / "client")
    client.init(server)
    yield client
    client.discard()


@pytest.fixture
def own_vault(tmp_path: Path, own_server: Server) -> Iterator[Client]:
    """A funded vault, not mounted, on a server of its own."""
    client = Client.at(tmp_path / "client")
    client.init(own_server)
    yield client
    client.discard()


@pytest.fixture
def mount(vault: Client) -> Iterator[Client]:
    """A mounted vault; the test may unmount it."""
    vault.mount()
    yield vault
    if vault.pid is not None:
        vault.umount()
    vault.fsck()


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Client]:
    client = Client.at(tmp_path_factory.mktemp("shared"))
    client.init(server)
    client.mount()
    yield client
    try:
        client.umount()
        client.fsck()
    finally:
        client.discard()


@pytest.fixture
def here(shared_mount: Client, request: pytest.FixtureRequest) -> Path:
    """An empty directory of this test's own in a mounted vault."""
    directory: Path = shared_mount.directory / request.node.name
    directory.mkdir()
    return directory
