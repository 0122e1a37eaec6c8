"""Snapshots through the kernel and the command: made, read, compared, restored, let go."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.mounted.client import Client, Server, tree
from tests.mounted.test_life import furnish


def refused(code: int, operation: object, *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        operation(*arguments)  # type: ignore[operator]
    assert caught.value.errno == code, caught.value


def changes(client: Client, *arguments: str) -> set[tuple[str, str, str]]:
    found = client.json("diff", *arguments)["changes"]
    return {(change["kind"], change["path"], change["old"]) for change in found}


def test_a_snapshot_is_what_was_there_and_stays_so(mount: Client) -> None:
    root = mount.directory
    furnish(root)
    before = tree(root)
    mount.run("snapshot", "create", "first")
    shelf = root / ".snapshots"
    assert ".snapshots" not in os.listdir(root)
    assert os.listdir(shelf) == ["first"]
    assert tree(shelf / "first") == before

    (root / "docs" / "small").write_text("changed")
    (root / "docs" / "big").rename(root / "docs" / "large")
    shutil.rmtree(root / "docs" / "deep")
    (root / "new").mkdir()
    assert tree(shelf / "first") == before
    mount.run("gc")
    mount.run("snapshot", "create", "second")
    assert set(os.listdir(shelf)) == {"first", "second"}, "the kernel's listing is not an old one"
    assert tree(shelf / "first") == before
    between = changes(mount, "first", "second")
    assert between & {("M", "docs/small", ""), ("M", "hard", "")}, "two names of one file"
    assert {
        ("R", "docs/large", "docs/big"), ("+", "new", ""), ("-", "docs/deep", ""),
        ("-", "docs/deep/0", ""),
    } <= between  # fmt: skip
    assert len(between) == 1 + 3 + 300
    assert not any(path.startswith("sparse") for _, path, _ in between)
    assert changes(mount, "first") == between

    (root / "docs" / "large").unlink()
    assert mount.json("gc")["deleted"] < 60
    mount.umount()
    mount.mount("--snapshot", "first")
    assert tree(root) == before
    refused(errno.EROFS, (root / "x").write_text, "x")
    mount.umount()
    mount.run("snapshot", "delete", "first", "second")
    assert mount.json("gc")["deleted"] > 60, "the big file, which nobody has any more"
    assert mount.json("fsck", "--full")["blobs_held"] == 0
    mount.mount()
    assert os.listdir(root / ".snapshots") == []


def test_a_snapshot_is_mounted_beside_its_vault(mount: Client, tmp_path: Path) -> None:
    """It costs nothing, changes nothing, outlives the vault's own mount, and is unmounted alone."""
    root, beside = mount.directory, tmp_path / "beside"
    beside.mkdir()
    furnish(root)
    before = tree(root)
    mount.run("snapshot", "create", "first")
    shutil.rmtree(root / "docs")
    mount.run("sync")
    tokens = mount.json("balance")["total"]

    said = mount.run("mount", "--snapshot", "none", beside, code=2).stderr
    assert "there is no snapshot 'none'" in said
    mount.run("mount", "--snapshot", "first", beside)
    try:
        assert tree(beside) == before
        assert not (root / "docs").exists()
        refused(errno.EROFS, (beside / "x").write_text, "x")
        assert mount.json("balance")["total"] == tokens, "what is here is not paid for again"
        mount.run("umount", beside)
        assert not beside.is_mount()
        mount.run("mount", "--snapshot", "first", beside)  # with nothing in memory
        (root / "new").write_text("goes on")
        mount.umount()
        refused(errno.EHOSTDOWN, (beside / "docs" / "big").read_bytes)
        mount.mount()
        assert tree(beside) == before
    finally:
        mount.run("umount", beside)
    assert (root / "new").read_text() == "goes on"


def test_nothing_under_snapshots_can_be_changed_nor_the_name_taken(mount: Client) -> None:
    root, shelf = mount.directory, mount.directory / ".snapshots"
    (root / "file").write_text("kept")
    (root / "dir").mkdir()
    mount.run("snapshot", "create", "s")
    refused(errno.EEXIST, shelf.mkdir)
    refused(errno.EROFS, (shelf / "s" / "file").write_text, "no")
    refused(errno.EROFS, (shelf / "s" / "file").unlink)
    refused(errno.EROFS, (shelf / "new").mkdir)
    refused(errno.EROFS, os.rename, shelf / "s" / "file", root / "moved")
    refused(errno.EROFS, os.link, shelf / "s" / "file", root / "linked")
    refused(errno.EROFS, os.rename, shelf, root / "elsewhere")
    assert not (shelf / "t").exists()
    mount.run("snapshot", "create", "t")
    assert (shelf / "t" / "file").read_text() == "kept"
    mount.run("snapshot", "delete", "t")
    assert not (shelf / "t").exists()
    assert (root / "file").read_text() == "kept"
    said = mount.run("mount", mount.state, code=3).stderr
    assert f"its snapshots are in {shelf}" in said


def test_a_file_of_the_users_by_that_name_is_his_and_he_is_told(vault: Client) -> None:
    root = vault.directory
    vault.mount("--no-snapshots-dir")
    assert not (root / ".snapshots").exists()
    assert "unmount it first" in vault.run("mount", vault.state, code=3).stderr
    (root / ".snapshots").write_text("mine")
    vault.umount()
    said = vault.mount()
    assert "'.snapshots' of its own" in said
    assert (root / ".snapshots").read_text() == "mine"
    vault.umount()
    vault.fsck()


def test_what_is_restored_is_as_it_was_and_the_kernel_sees_it(mount: Client) -> None:
    root = mount.directory
    furnish(root)
    (root / "hard").unlink()
    before = tree(root / "docs")
    mount.run("snapshot", "create", "s")
    shutil.rmtree(root / "docs")
    assert not (root / "docs").exists()
    mount.run("restore", "s", "docs/small")
    assert (root / "docs" / "small").read_text() == "small"
    complaint = mount.run("restore", "s", "docs", code=2).stderr
    assert "there already" in complaint and "--replace" in complaint
    mount.run("restore", "s", "docs", "docs.old")
    (root / "docs" / "small").write_text("newer")
    mount.run("restore", "--replace", "s", "docs")
    assert tree(root / "docs.old") == before
    assert tree(root / "docs") == before
    assert mount.run("restore", "s", "nothing", code=2).stderr
    assert {p.name for p in root.iterdir()} == {
        "docs", "docs.old", "sparse", "soft", "fifo", "socket",
        *(["device"] if os.geteuid() == 0 else []),
    }  # fmt: skip


def test_snapshots_by_a_policy_and_the_log(vault: Client, server: Server, tmp_path: Path) -> None:
    root = vault.directory
    vault.mount("--keep", "hourly=2")
    (root / "file").write_text("one")
    vault.run("sync")
    made = vault.json("snapshot", "auto", "--keep", "hourly=2")
    names = [s["name"] for s in vault.json("snapshot", "list")["snapshots"]]
    assert len(names) == 1 and names[0].startswith("auto-"), "one an hour, whoever makes it"
    assert made == {"created": None, "deleted": []} or made["created"] == names[0]
    vault.run("snapshot", "create", "mine")
    assert vault.json("snapshot", "auto", "--keep", "daily=1")["deleted"] == []
    rows = vault.json("log")["generations"]
    assert [row["generation"] for row in rows] == sorted(
        (row["generation"] for row in rows), reverse=True
    )
    assert {name for row in rows for name in row["snapshots"]} == {"mine", *names}
    assert all(row["here"] for row in rows)
    assert "mine" in vault.run("log").stdout
    vault.umount()
    # the words alone find the snapshots too
    other = Client.at(tmp_path / "other")
    shutil.rmtree(vault.state)
    voucher = tmp_path / "voucher"
    voucher.write_text(server.voucher(2_000))
    flags = ["--no-password", "--server", server.address, "--voucher-file", str(voucher)]
    other.run("recover", "--seed", vault.words, *flags)
    found = {s["name"] for s in other.json("snapshot", "list")["snapshots"]}
    assert found == {"mine", *names}
    other.fsck()
    other.discard()
