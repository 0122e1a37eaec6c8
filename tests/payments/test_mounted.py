"""`hpkvfs buy` of a vault that is mounted: the mounting process buys, asked at its socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.client import Client, run
from tests.payments.nodes import Cln
from tests.server.support import ServerProcess


@pytest.fixture
def vault(data: Path, server: ServerProcess, tmp_path: Path) -> Iterator[Client]:
    """Mounted, with enough tokens for its first generation."""
    client = Client.at(tmp_path / "client")
    host, port = server.address
    address = f"{host}:{port}"
    client.run("init", "--server", address, "--no-password", "--words-file", client.words)
    voucher = run("hpkvd", "voucher", "--data", data, "--amount", "1000").stdout.strip()
    client.run("redeem", "-", stdin=voucher)
    client.mount()
    yield client
    client.discard()


def test_a_mounted_vault_buys_through_its_socket_and_writes_with_what_it_bought(
    vault: Client, node: Cln
) -> None:
    assert vault.json("status")["pid"] == vault.pid
    before = vault.json("balance")["held"]
    bill = vault.json("buy", "--tokens", "500", "--lightning", "--no-wait")
    assert bill["invoice"] == node.only.text
    node.only.pay()
    assert vault.run("buy").stdout == f"500 tokens bought; {before + 500:,} in all\n"
    (vault.directory / "file").write_bytes(b"paid for")
    vault.run("sync")
    vault.umount()  # which would not end cleanly if two processes had written its journal
    assert before < vault.json("balance")["held"] < before + 500
    vault.fsck()
