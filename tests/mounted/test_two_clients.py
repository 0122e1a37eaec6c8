"""Two clients of one vault, each the real command, and a machine lost with all but its words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.client import Client, Server, eventually, forget_everything


def flags(server: Server, client: Client) -> tuple[str | Path, ...]:
    return ("--seed", client.words, "--server", server.address, "--no-password")


@pytest.fixture
def other(own_server: Server, own_vault: Client, tmp_path: Path) -> Iterator[Client]:
    """Another machine, with the same words and a file that the first one wrote."""
    own_vault.mount()
    (own_vault.directory / "file").write_text("first")
    (own_vault.directory / "aside").write_text("first")
    own_vault.run("sync")
    other = Client.at(tmp_path / "other")
    voucher = tmp_path / "voucher"
    voucher.write_text(own_server.voucher(5_000))
    other.run("recover", *flags(own_server, own_vault), "--voucher-file", voucher)
    yield other
    other.discard()


# -- losing the machine ----------------------------------------------------------------------


def test_the_words_alone_bring_files_and_tokens_back(
    own_server: Server, own_vault: Client, tmp_path: Path
) -> None:
    own_vault.mount()
    (own_vault.directory / "file").write_text("content")
    assert "0 of " in own_vault.run("status").stdout
    assert "was stored" in own_vault.run("keepalive", "--now").stdout
    status = own_vault.json("status")
    assert status["recovery"]["state"] == "safe"
    assert status["recovery"]["tokens"] > status["tokens_held"] / 2
    assert "nothing was due" in own_vault.run("keepalive").stdout
    own_vault.umount()
    lost = own_vault.json("balance")["held"]
    forget_everything(own_vault)
    done = own_vault.run("recover", *flags(own_server, own_vault), own_vault.directory)
    assert "tokens came from the breakglass entry" in done.stdout
    own_vault.pid = own_vault.json("status")["pid"]
    assert (own_vault.directory / "file").read_text() == "content"
    assert own_vault.json("balance")["held"] > lost / 2
    assert "the entry was opened" in own_vault.run("status").stdout
    _recover_once_more(own_server, own_vault, tmp_path)
    assert "was stored" in own_vault.run("keepalive", "--now").stdout
    own_vault.umount()
    own_vault.fsck()


def _recover_once_more(server: Server, vault: Client, directory: Path) -> None:
    """From an entry whose tokens were claimed on another machine."""
    second = Client.at(directory / "second")
    refused = second.run("recover", *flags(server, vault), code=6)
    assert "spent since" in refused.stderr and "--voucher-file" in refused.stderr
    voucher = directory / "voucher"
    voucher.write_text(server.voucher(500))
    done = second.run("recover", *flags(server, vault), "--voucher-file", voucher)
    assert "recovered generation" in done.stdout


def test_a_voucher_given_with_a_mistyped_passphrase_is_not_lost(
    own_server: Server, own_vault: Client, tmp_path: Path
) -> None:
    own_vault.mount()
    (own_vault.directory / "file").write_text("content")
    own_vault.umount()
    other = Client.at(tmp_path / "other")
    voucher, passphrase = tmp_path / "voucher", tmp_path / "passphrase"
    voucher.write_text(own_server.voucher(500))
    passphrase.write_text("mistyped")
    common = flags(own_server, own_vault)
    wrong = (*common, "--passphrase-file", passphrase)
    done = other.run("recover", *wrong, "--voucher-file", voucher, code=3)
    assert "holds nothing" in done.stderr and "tokens are kept" in done.stderr
    assert len(done.stderr.splitlines()) == 3  # with the word about --no-password
    again = other.run("recover", *common, other.directory)
    try:
        assert "recovered generation" in again.stdout
        other.pid = other.json("status")["pid"]
        assert (other.directory / "file").read_text() == "content"
        other.umount()
        other.fsck()
        refused = other.run("recover", *wrong, code=3)  # a vault is never given other words
        assert "other words" in refused.stderr
    finally:
        other.discard()


# -- reading beside a writer -----------------------------------------------------------------


def test_a_read_only_mount_follows_what_another_client_writes(
    own_server: Server, own_vault: Client, other: Client
) -> None:
    own_vault.run("snapshot", "create", "s")
    other.mount("--snapshot", "s")
    (own_vault.directory / "later").write_text("later")
    own_vault.run("sync")
    assert not (other.directory / "later").exists()
    assert (other.directory / "file").read_text() == "first"
    other.umount()

    other.mount("--read-only", "--follow-interval", "0.2")
    seen = other.directory / "file"
    with seen.open() as held:
        assert held.read() == "first"
        for round_, content in enumerate(["second", "third, which is longer"]):
            (own_vault.directory / "file").write_text(content)
            (own_vault.directory / f"new-{round_}").mkdir()
            own_vault.run("sync")
            eventually(lambda content=content: seen.read_text() == content, content)  # type: ignore[misc]
            eventually((other.directory / f"new-{round_}").is_dir, "the directory")
            held.seek(0)
            assert held.read() == content
    (own_vault.directory / "file").unlink()
    own_vault.run("gc")  # what the reader knows is collected, anchors too
    eventually(lambda: not seen.exists(), "the file to go")
    with pytest.raises(OSError, match="Read-only"):
        seen.write_text("mine")
    spent = own_server.status()["blobs"]
    other.umount()
    assert own_server.status()["blobs"] == spent  # it published nothing
    own_vault.umount()
    own_vault.fsck()


# -- taking over -----------------------------------------------------------------------------


def lose(client: Client) -> None:
    """Find out that another client was quicker, and leave."""
    refused = client.run("sync", code=3)
    assert "another client" in refused.stderr and "--takeover" in refused.stderr
    client.umount(code=4)
    assert "--takeover" in client.run("mount", client.directory, code=3).stderr


def test_taking_over_puts_changes_on_top_if_they_fit_and_else_aside(
    own_vault: Client, other: Client
) -> None:
    other.mount()
    with (other.directory / "file").open("r+") as file:
        file.write("SECOND")
    other.umount()
    with (own_vault.directory / "aside").open("r+") as file:
        file.write("FIRST")
    lose(own_vault)
    assert "on top" in own_vault.mount("--takeover")
    assert (own_vault.directory / "file").read_text() == "SECOND"
    assert (own_vault.directory / "aside").read_text() == "FIRST"
    own_vault.kill()
    own_vault.mount()  # it is all in the log, which lies upon the other client's generation
    assert (own_vault.directory / "aside").read_text() == "FIRST"
    own_vault.run("sync")
    assert "took over" not in other.mount("--takeover")  # nothing was changed there
    assert (other.directory / "aside").read_text() == "FIRST"
    (other.directory / "theirs").write_text("theirs")
    (other.directory / "file").write_text("theirs too")
    other.umount()
    (own_vault.directory / "mine").write_bytes(content := os.urandom(100_000))
    (own_vault.directory / "file").write_text("mine, and longer")
    lose(own_vault)
    _check_kept(own_vault, content)
    own_vault.fsck()


def _check_kept(client: Client, content: bytes) -> None:
    said = client.mount("--takeover")
    assert "kept aside" in said and "--kept 1" in said
    assert sorted(os.listdir(client.directory)) == ["aside", "file", "theirs"]
    assert (client.directory / "file").read_text() == "theirs too"
    (client.directory / "later").write_text("life goes on")
    client.umount()
    assert client.json("status")["kept"] == [1]
    assert "kept under 7" in client.run("mount", "--kept", "7", client.directory, code=2).stderr
    client.mount("--kept", "1")
    assert (client.directory / "mine").read_bytes() == content
    assert (client.directory / "file").read_text() == "mine, and longer"
    assert (client.directory / "aside").read_text() == "FIRST"
    with pytest.raises(OSError, match="Read-only"):
        (client.directory / "mine").unlink()
    client.umount()
    client.mount()
    assert (client.directory / "later").read_text() == "life goes on"
    client.umount()
