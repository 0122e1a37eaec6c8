"""A vault's life: unmounted and mounted, lost and recovered, without server, without tokens."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from hpkvfs.types import BlobId
from hpkvfs.volume.keys import VaultKeys
from tests import commands
from tests.mounted.client import Client, Server, eventually, forget_everything, tree

MIB = 1 << 20


def furnish(root: Path) -> None:
    """One of everything."""
    (root / "docs" / "deep").mkdir(parents=True)
    (root / "docs" / "small").write_text("small")
    (root / "docs" / "tail").write_bytes(os.urandom(16_384 + 100))
    (root / "docs" / "big").write_bytes(os.urandom(MIB + 17))
    (root / "docs" / "empty").touch()
    with (root / "sparse").open("wb") as file:
        file.seek(5 * MIB)
        file.write(b"end")
    os.link(root / "docs" / "small", root / "hard")
    (root / "soft").symlink_to("docs/small")
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    if os.geteuid() == 0:
        os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.chown(root / "docs" / "empty", 1234, 4321)
    os.setxattr(root / "docs", "user.note", b"on a directory")
    os.setxattr(root / "hard", "user.note", os.urandom(2_000))
    (root / "hard").chmod(0o640)
    for number in range(300):
        (root / "docs" / "deep" / f"{number}").write_bytes(b"%d" % number)
    os.utime(root / "docs" / "deep", ns=(1, 1_000_000_007))


@contextmanager
def held_open(path: Path, flags: int) -> Iterator[int]:
    """A descriptor that may outlive its filesystem."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


# -- unmounting ------------------------------------------------------------------------------


def test_all_is_as_it_was_after_unmounting_with_nothing_cached(mount: Client) -> None:
    furnish(mount.directory)
    before = tree(mount.directory)
    mount.remount(cold=True)
    assert tree(mount.directory) == before


def test_changes_upon_what_was_published_are_kept(mount: Client) -> None:
    furnish(mount.directory)
    mount.run("sync")
    root = mount.directory
    with (root / "docs" / "big").open("r+b") as file:
        file.seek(500_000)
        file.write(b"changed")
    os.truncate(root / "docs" / "tail", 10)
    (root / "hard").unlink()
    (root / "docs" / "deep").rename(root / "moved")
    for number in range(0, 300, 2):
        (root / "moved" / str(number)).unlink()
    before = tree(root)
    mount.remount(cold=True)
    assert tree(root) == before


def test_unmounting_publishes_and_ends_the_process(mount: Client) -> None:
    (mount.directory / "file").write_text("content")
    mount.umount()
    assert not (mount.state / "control").exists()
    assert mount.json("status")["unpublished_bytes"] == 0


def test_plain_umount_publishes_too(mount: Client) -> None:
    (mount.directory / "file").write_text("content")
    assert os.system(f"fusermount3 -u {mount.directory}") == 0
    mount._wait_for_exit()
    assert mount.json("status")["unpublished_bytes"] == 0


def test_sigterm_publishes_and_unmounts(mount: Client) -> None:
    (mount.directory / "file").write_text("content")
    mount.terminate()
    assert not mount.directory.is_mount()
    assert mount.json("status")["unpublished_bytes"] == 0


def test_a_filesystem_in_use_is_not_unmounted_unless_forced(mount: Client) -> None:
    path = mount.directory / "file"
    with held_open(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"content")
        done = mount.run("umount", mount.directory, code=2)
        assert "in use" in done.stderr
        assert path.read_text() == "content"
        mount.run("umount", "--force", mount.directory)
    mount._wait_for_exit()
    assert not mount.directory.is_mount()
    mount.mount()
    assert path.read_text() == "content"


def test_a_lazy_unmount_ends_after_the_last_close_and_loses_nothing(mount: Client) -> None:
    root, path = mount.directory, mount.directory / "file"
    (root / "other").write_text("closed before")
    with held_open(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"before, ")
        assert os.system(f"fusermount3 -u -z {root}") == 0
        assert not root.is_mount()
        os.write(fd, b"synced after, ")
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"before, synced after, "
        os.write(fd, b"and never")
        assert "no longer" in mount.run("status").stdout
        assert "taken when they sync or close" in mount.run("sync", code=3).stderr
        assert "still have files" in mount.run("mount", root, code=3).stderr
        assert "unmounted before" in mount.run("umount", code=2).stderr
        assert os.pread(fd, 100, 0).endswith(b"and never"), "it is served on"
    mount._wait_for_exit()
    assert mount.json("status")["unpublished_bytes"] == 0
    mount.mount()
    assert path.read_text() == "before, synced after, and never"
    assert (root / "other").read_text() == "closed before"


def test_what_was_fsynced_after_a_lazy_unmount_survives_kill_9(mount: Client) -> None:
    path = mount.directory / "file"
    with held_open(path, os.O_RDWR | os.O_CREAT) as fd:
        assert os.system(f"fusermount3 -u -z {mount.directory}") == 0
        os.write(fd, b"synced after")
        os.fsync(fd)
        mount.kill()
    mount.mount()
    assert path.read_text() == "synced after"


def test_umount_of_another_directory_is_refused(mount: Client, tmp_path: Path) -> None:
    done = mount.run("umount", tmp_path, code=2)
    assert str(mount.directory) in done.stderr


# -- who may mount where ---------------------------------------------------------------------


def test_a_second_mount_is_refused(mount: Client, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    done = mount.run("mount", tmp_path / "elsewhere", code=3)
    assert f"mounted on {mount.directory} already" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_places_that_can_not_be_mounted_on(vault: Client, tmp_path: Path) -> None:
    assert "No such file" in vault.run("mount", tmp_path / "none", code=2).stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not empty" in vault.run("mount", tmp_path / "full", code=2).stderr
    done = vault.run("mount", tmp_path / "full" / "file", code=2)
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mount_point_of_something_else_is_refused(mount: Client, tmp_path: Path) -> None:
    second = Client.at(tmp_path / "second")
    server = mount.json("status")["server"]
    second.run("init", "--server", server, "--no-password")
    (mount.directory / "file").touch()
    done = second.run("mount", mount.directory, code=2)
    assert "already" in done.stderr


def test_no_secret_is_in_argv_or_environment(own_server: Server, tmp_path: Path) -> None:
    client = Client.at(tmp_path / "c")
    password = tmp_path / "password"
    password.write_text("correct horse\n")
    client.run("--password-file", password, "init", "--server", own_server.address,
               "--words-file", client.words)  # fmt: skip
    voucher = own_server.voucher(1_000)
    client.run("--password-file", password, "redeem", "-", stdin=voucher)
    try:
        client.run("--password-file", password, "mount", client.directory)
        client.pid = client.json("status")["pid"]
        shown = Path(f"/proc/{client.pid}/cmdline").read_bytes()
        shown += Path(f"/proc/{client.pid}/environ").read_bytes()
        for secret in ("correct horse", voucher, client.words.read_text().split()[0] + " "):
            assert secret.encode() not in shown
        client.umount()
    finally:
        client.discard()


def test_keys_in_memory_do_not_get_into_core_dumps(mount: Client) -> None:
    limits = Path(f"/proc/{mount.pid}/limits").read_text()
    (core,) = [line for line in limits.splitlines() if line.startswith("Max core")]
    assert core.split()[4:6] == ["0", "0"]


# -- crashes ---------------------------------------------------------------------------------


def test_what_fsync_returned_for_survives_kill_9(mount: Client) -> None:
    root = mount.directory
    (root / "old").write_text("old")
    mount.run("sync")
    content = os.urandom(300_000)
    with (root / "new").open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    (root / "old").unlink()
    os.mkdir(root / "dir")
    directory = os.open(root / "dir", os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    mount.kill()
    mount.mount()  # the dead mount is in the way, and is taken away
    assert (root / "new").read_bytes() == content
    assert sorted(p.name for p in root.iterdir()) == ["dir", "new"]
    assert "dead mount" not in mount.json("status")


def test_kill_9_again_and_again_while_publishing(own_server: Server, own_vault: Client) -> None:
    root, written = own_vault.directory, dict[str, bytes]()
    own_vault.mount("--publish-interval", "0.1")
    for life in range(4):
        for number in range(12):
            name, content = f"{life}.{number}", os.urandom(20_000)
            with (root / name).open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
            written[name] = content
            time.sleep(0.02 * life)
        own_vault.kill()
        own_vault.mount("--publish-interval", "0.1")
        assert {p.name: p.read_bytes() for p in root.iterdir()} == written
    own_vault.remount(cold=True)
    assert {p.name: p.read_bytes() for p in root.iterdir()} == written
    own_vault.umount()
    own_vault.fsck()
    own_vault.run("gc")
    own_vault.fsck()
    assert own_vault.json("balance")["total"] == own_server.status()["tokens"]["outstanding"]
    expected = own_vault.json("status")
    assert own_server.status()["blobs"] == expected["blobs_live"] + expected["blobs_dead"]


def test_a_file_deleted_while_open_is_gone_after_kill_9(mount: Client) -> None:
    path = mount.directory / "file"
    path.write_bytes(os.urandom(100_000))
    mount.run("sync")
    with held_open(path, os.O_RDONLY):
        path.unlink()
        (mount.directory / "other").touch()
        mount.run("sync")
        mount.kill()
    mount.mount()
    assert [p.name for p in mount.directory.iterdir()] == ["other"]
    mount.umount()
    assert mount.json("status")["bytes"] == 0


# -- without the server ----------------------------------------------------------------------


def test_the_server_goes_away_and_comes_back(own_server: Server, own_vault: Client) -> None:
    root = own_vault.directory
    own_vault.mount("--publish-interval", "0.5")
    (root / "before").write_bytes(b"before" * 10_000)
    own_vault.run("sync")
    own_server.stop()
    with (root / "during").open("wb") as file:
        file.write(b"during" * 10_000)
        os.fsync(file.fileno())
    assert (root / "before").read_bytes() == b"before" * 10_000
    assert (root / "during").read_bytes() == b"during" * 10_000
    own_server.start()
    eventually(lambda: not own_vault.json("status")["unpublished_bytes"], "it to be published")
    own_vault.remount(cold=True)
    assert (root / "during").read_bytes() == b"during" * 10_000
    own_vault.umount()
    own_vault.fsck()


def test_mounting_without_the_server(own_server: Server, own_vault: Client) -> None:
    root = own_vault.directory
    own_vault.mount()
    (root / "before").write_bytes(b"before" * 10_000)
    own_vault.umount()
    own_server.stop()
    said = own_vault.mount("--publish-interval", "0.5")
    assert "cannot be reached" in said and "published later" in said
    status = own_vault.json("status")
    assert not status["connected"] and status["trouble"]
    assert (root / "before").read_bytes() == b"before" * 10_000
    (root / "after").write_text("written without a server")
    done = own_vault.umount(code=4)
    assert "not published" in done.stderr and "kept in" in done.stderr
    own_vault.mount("--publish-interval", "0.5")
    assert (root / "after").read_text() == "written without a server"
    own_server.start()
    eventually(lambda: not own_vault.json("status")["unpublished_bytes"], "it to be published")
    assert own_vault.json("status")["connected"]
    own_vault.umount()
    own_vault.fsck()


def test_a_new_vault_is_mounted_without_its_server(own_server: Server, own_vault: Client) -> None:
    own_server.stop()
    assert "cannot be reached" in own_vault.mount()
    (own_vault.directory / "first").write_text("first")
    assert (own_vault.directory / "first").read_text() == "first"
    own_server.start()
    own_vault.umount()
    own_vault.fsck()


def test_what_is_not_cached_fails_and_does_not_hang(own_server: Server, own_vault: Client) -> None:
    root = own_vault.directory
    own_vault.mount()
    (root / "file").write_bytes(os.urandom(100_000))
    own_vault.remount("--patience", "2", cold=True)
    assert (root / "file").stat().st_size == 100_000
    own_server.stop()
    with pytest.raises(OSError) as caught:
        (root / "file").read_bytes()
    assert caught.value.errno == errno.EHOSTDOWN
    own_server.start()
    assert len((root / "file").read_bytes()) == 100_000
    own_vault.umount()


# -- without tokens --------------------------------------------------------------------------


def test_an_empty_wallet_stops_writing_and_not_reading(own_server: Server, tmp_path: Path) -> None:
    client = Client.at(tmp_path / "c")
    client.init(own_server, tokens=400)
    root = client.directory
    client.mount()
    (root / "kept").write_bytes(b"kept" * 10_000)
    client.run("sync")
    with pytest.raises(OSError) as caught:
        (root / "too much").write_bytes(bytes(range(256)) * 4 * 1024)
    assert caught.value.errno == errno.ENOSPC
    assert (root / "kept").read_bytes() == b"kept" * 10_000
    (root / "too much").unlink()
    client.run("sync")
    client.run("redeem", "-", stdin=own_server.voucher(2_000))
    (root / "enough").write_bytes(bytes(range(256)) * 4 * 1024)
    client.umount()
    client.fsck()
    client.discard()


def test_a_vault_without_any_tokens(own_server: Server, tmp_path: Path) -> None:
    client = Client.at(tmp_path / "c")
    client.init(own_server, tokens=0)
    client.mount()
    try:
        assert os.statvfs(client.directory).f_bavail == 0
        with pytest.raises(OSError) as caught:
            (client.directory / "file").touch()
        assert caught.value.errno == errno.ENOSPC
        client.run("redeem", "-", stdin=own_server.voucher(1_000))
        (client.directory / "file").touch()
        client.umount()
    finally:
        client.discard()


def test_the_room_shrinks_as_tokens_are_spent(mount: Client) -> None:
    before = os.statvfs(mount.directory)
    (mount.directory / "file").write_bytes(os.urandom(MIB))
    mount.run("sync")
    after = os.statvfs(mount.directory)
    assert 64 <= before.f_bavail - after.f_bavail <= 75
    assert after.f_blocks - after.f_bfree >= 64
    assert after.f_files == before.f_files - (before.f_ffree - after.f_ffree) + 1


def test_gc_gives_tokens_back(own_server: Server, own_vault: Client) -> None:
    own_vault.mount()
    (own_vault.directory / "file").write_bytes(os.urandom(MIB))
    own_vault.run("sync")
    (own_vault.directory / "file").unlink()
    own_vault.run("sync")
    blobs = own_server.status()["blobs"]
    result = own_vault.json("gc")
    assert result["deleted"] >= 65 and result["absent"] == 0
    assert result["gained"] > 400
    assert own_server.status()["blobs"] <= blobs - 60
    own_vault.umount()
    own_vault.fsck()
    assert own_vault.json("balance")["total"] == own_server.status()["tokens"]["outstanding"]


def test_vouchers_that_buy_nothing(own_server: Server, own_vault: Client) -> None:
    voucher = own_server.voucher(100)
    own_vault.run("redeem", "-", stdin=voucher)
    before = own_vault.json("balance")
    for text, complaint in (
        (voucher, "redeemed already"),
        ("hpkv1-100-" + "a" * 32, "does not know this voucher"),
        (own_server.voucher(10).replace("-10-", "-20-"), "for another amount"),
    ):
        done = own_vault.run("redeem", "-", stdin=text, code=2)
        assert complaint in done.stderr
        assert text.rpartition("-")[2].strip() not in done.stderr
    assert own_vault.json("balance") == before


# -- servers that do harm --------------------------------------------------------------------


def harm(server: Server, statement: str) -> None:
    """Change a server's disk behind its back."""
    server.stop()
    with closing(sqlite3.connect(server.data / "ledger.sqlite")) as ledger, ledger:
        ledger.execute(statement)
    server.start()


def test_a_changed_blob_is_noticed(own_server: Server, own_vault: Client) -> None:
    """Also shows that fsck, which ends most tests here, can find something."""
    own_vault.mount()
    (own_vault.directory / "file").write_bytes(os.urandom(100_000))
    own_vault.umount()
    own_vault.fsck()
    (own_vault.state / "cache").unlink()
    harm(own_server, "UPDATE blob SET blob = zeroblob(16433)")
    done = own_vault.run("fsck", "--full", code=5)
    assert "Traceback" not in done.stderr
    own_vault.run("mount", own_vault.directory, code=5)


def test_what_a_server_lost_is_put_back_from_the_cache_or_named(
    own_server: Server, own_vault: Client
) -> None:
    root = own_vault.directory
    own_vault.mount()
    content = os.urandom(100_000)
    (root / "dir").mkdir()
    (root / "dir" / "file").write_bytes(content)
    (root / "other").write_text("other")
    number = (root / "dir" / "file").stat().st_ino
    own_vault.run("sync")
    assert own_vault.json("fsck", "--full", "--max-tokens", "2")["unchecked"] > 0
    assert "unmount it first" in own_vault.run("fsck", "--repair", code=3).stderr
    own_vault.umount()
    keys = VaultKeys.from_words(own_vault.words.read_text())
    lost = keys.signer(BlobId(0)).public  # a commit numbers file data first
    statement = f"DELETE FROM blob WHERE key = x'{lost.hex()}'"

    harm(own_server, statement)
    said = own_vault.run("fsck", "--full", "--repair").stdout
    assert "repaired: " in said
    own_vault.fsck()

    harm(own_server, statement)
    (own_vault.state / "cache").unlink()
    report = json.loads(own_vault.run("fsck", "--full", "--json", code=3).stdout)
    (damage,) = report["damaged"]
    assert (damage["ino"], damage["path"]) == (number, "dir/file")
    ((start, end),) = damage["ranges"]
    assert end - start == 16_384
    own_vault.mount()
    with pytest.raises(OSError) as caught:
        (root / "dir" / "file").read_bytes()
    assert caught.value.errno == errno.EIO
    assert (root / "other").read_text() == "other"
    own_vault.umount()

    own_vault.run("fsck", "--full", "--repair", code=3)
    own_vault.fsck()
    own_vault.mount()
    hole = content[:start] + bytes(end - start) + content[end:]
    assert (root / "dir" / "file").read_bytes() == hole
    name = os.getxattr(root / "dir" / "file", "user.hpkvfs.damaged")
    assert name == b"%d-%d" % (start, end - 1)
    own_vault.umount()


def test_a_server_that_was_rolled_back_is_noticed(own_server: Server, own_vault: Client) -> None:
    own_vault.mount()
    (own_vault.directory / "file").write_text("old")
    own_vault.run("sync")
    own_vault.run("gc")
    own_server.stop()
    old = {path: path.read_bytes() for path in own_server.data.glob("ledger*")}
    own_server.start()
    (own_vault.directory / "file").write_text("new")
    own_vault.umount()
    own_server.stop()
    for path in own_server.data.glob("ledger*"):
        path.unlink()
    for path, content in old.items():
        path.write_bytes(content)
    own_server.start()
    done = own_vault.run("mount", own_vault.directory, code=5)
    assert "existed before" in done.stderr
    own_vault.mount("--read-only")
    assert (own_vault.directory / "file").read_text() == "new"
    own_vault.umount()


# -- from the words alone --------------------------------------------------------------------


def test_recovery_from_the_words(own_server: Server, own_vault: Client, tmp_path: Path) -> None:
    own_vault.mount()
    furnish(own_vault.directory)
    before = tree(own_vault.directory)
    own_vault.umount()
    forget_everything(own_vault)
    voucher = tmp_path / "voucher"
    voucher.write_text(own_server.voucher(5_000))
    flags = ("--seed", own_vault.words, "--server", own_server.address, "--no-password")
    done = own_vault.run("recover", *flags, "--voucher-file", voucher, own_vault.directory)
    assert "recovered generation" in done.stdout
    own_vault.pid = own_vault.json("status")["pid"]
    assert tree(own_vault.directory) == before
    (own_vault.directory / "new").write_text("life goes on")
    own_vault.umount()
    own_vault.fsck()


def test_recovery_into_a_second_place_while_the_first_is_there(
    own_server: Server, own_vault: Client, tmp_path: Path
) -> None:
    """Two clients of one vault: the one that comes too late is told, and overwrites nothing."""
    own_vault.mount()
    (own_vault.directory / "file").write_text("first")
    own_vault.run("sync")
    second = Client.at(tmp_path / "second")
    voucher = tmp_path / "voucher"
    voucher.write_text(own_server.voucher(5_000))
    flags = ("--seed", own_vault.words, "--server", own_server.address, "--no-password")
    second.run("recover", *flags, "--voucher-file", voucher)
    try:
        second.mount()
        assert (second.directory / "file").read_text() == "first"
        (second.directory / "file").write_text("second")
        second.umount()
        (own_vault.directory / "file").write_text("first again")
        assert "another client" in own_vault.run("sync", code=3).stderr
        second.mount()
        assert (second.directory / "file").read_text() == "second"
        second.umount()
        second.fsck()
    finally:
        second.discard()


def test_recovery_cut_short_goes_on_when_repeated(
    own_server: Server, own_vault: Client, tmp_path: Path
) -> None:
    own_vault.mount()
    (own_vault.directory / "file").write_text("content")
    own_vault.umount()
    forget_everything(own_vault)
    flags = ("--seed", own_vault.words, "--server", own_server.address, "--no-password")
    assert "tokens" in own_vault.run("recover", *flags, code=6).stderr
    voucher = tmp_path / "voucher"
    voucher.write_text(own_server.voucher(5_000))
    own_vault.run("recover", *flags, "--voucher-file", voucher)
    assert "already" in own_vault.run("recover", *flags, code=2).stderr
    own_vault.mount()
    assert (own_vault.directory / "file").read_text() == "content"
    own_vault.umount()


def test_words_of_which_the_server_has_nothing(server: Server, tmp_path: Path) -> None:
    client = Client.at(tmp_path / "c")
    client.words.write_text("abandon " * 11 + "about\n")
    voucher = tmp_path / "voucher"
    voucher.write_text(server.voucher(500))
    done = client.run("recover", "--seed", client.words, "--server", server.address,
                      "--no-password", "--voucher-file", voucher, code=3)  # fmt: skip
    assert "holds nothing for these words" in done.stderr


# -- options ---------------------------------------------------------------------------------


def test_remote_durability_publishes_at_fsync(vault: Client) -> None:
    vault.mount("--durability", "remote", "--publish-interval", "1000")
    with (vault.directory / "file").open("w") as file:
        file.write("content")
        file.flush()
        generation = vault.json("status")["generation"]
        os.fsync(file.fileno())
    status = vault.json("status")
    assert status["unpublished_bytes"] == 0
    assert status["generation"] == (-1 if generation is None else generation) + 1
    vault.umount()


def test_read_only_means_it(mount: Client) -> None:
    (mount.directory / "file").write_text("content")
    mount.run("snapshot", "create", "then")
    mount.remount("--read-only")
    assert (mount.directory / "file").read_text() == "content"
    with pytest.raises(OSError) as caught:
        (mount.directory / "other").touch()
    assert caught.value.errno == errno.EROFS
    for command in (
        ("gc",), ("snapshot", "create"), ("snapshot", "delete", "then"), ("keepalive",),
        ("snapshot", "auto", "--keep", "hourly=1"), ("restore", "then", "file", "other"),
    ):  # fmt: skip
        assert "to be read only" in mount.run(*command, code=3).stderr, command
    assert mount.json("gc", "--dry-run") and mount.json("sync") and mount.json("fsck")
    assert os.listdir(mount.directory) == ["file"]


def test_in_the_foreground_it_stays_until_sigint(vault: Client) -> None:
    process = subprocess.Popen(
        commands.command(
            "hpkvfs", "--state", vault.state, "mount", "--foreground", vault.directory
        ),
        env=commands.ENVIRONMENT,
        stderr=subprocess.PIPE,
    )
    eventually(vault.directory.is_mount, "the mount")
    (vault.directory / "file").write_text("content")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert b"Traceback" not in said
    assert vault.json("status")["unpublished_bytes"] == 0
