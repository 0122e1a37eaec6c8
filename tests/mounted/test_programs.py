"""Programs that people use, on a mounted vault; each is its own judge."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest

from tests.mounted.client import Client, Entry, tree

IDENTITY = {
    **os.environ,
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@localhost",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@localhost",
}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=IDENTITY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def kept(top: Path, *, times: bool = True) -> dict[str, Entry]:
    """What an archive keeps of a tree. How large a directory is, each filesystem says itself;
    rsync (of Debian 12) gives new times to all that is not a file, on ext4 too."""
    plain = tree(top)
    for path, entry in plain.items():
        if stat.S_ISDIR(entry.mode):
            plain[path] = entry._replace(size=0)
        if not (times or stat.S_ISREG(entry.mode)):
            plain[path] = plain[path]._replace(mtime=0)
    return plain


@pytest.fixture
def furniture(tmp_path: Path) -> Path:
    """A tree with one of everything that archives keep."""
    top = tmp_path / "furniture"
    (top / "deep" / "deeper").mkdir(parents=True)
    for number in range(60):
        (top / "deep" / f"file {number}").write_bytes(os.urandom(number * 613))
    (top / "deep" / "link").symlink_to("../nowhere")
    (top / "hard").hardlink_to(top / "deep" / "file 7")
    os.mkfifo(top / "deep" / "deeper" / "fifo")
    (top / "deep" / "file 3").chmod(0o751)
    os.utime(top / "deep" / "file 4", ns=(10**18 + 1, 10**18 + 2))
    with (top / "sparse").open("wb") as file:
        file.truncate(3_000_000)
        file.seek(1_000_000)
        file.write(b"island")
    os.setxattr(top / "deep" / "file 5", "user.color", b"blue")
    run("setfacl", "-m", "u:4242:rw,m::rwx", top / "deep" / "file 6")
    run("setfacl", "-m", "d:u:4242:rwx", top / "deep" / "deeper")
    return top


def test_rsync_keeps_everything_and_then_has_nothing_to_do(mount: Client, furniture: Path) -> None:
    copy = mount.directory / "copy"
    run("rsync", "-aHAX", f"{furniture}/", copy)
    assert kept(copy, times=False) == kept(furniture, times=False)
    assert run("rsync", "-aHAXi", "--checksum", f"{furniture}/", copy) == ""
    mount.remount(cold=True)
    assert kept(copy, times=False) == kept(furniture, times=False)


def test_tar_and_cp_keep_everything(mount: Client, furniture: Path) -> None:
    flags = ("--acls", "--xattrs", "--xattrs-include=*", "--sparse")
    run("tar", "-cf", mount.directory / "it.tar", *flags, "-C", furniture, ".")
    (mount.directory / "out").mkdir()
    run("tar", "-xpf", mount.directory / "it.tar", *flags, "-C", mount.directory / "out")
    assert kept(mount.directory / "out") == kept(furniture)
    run("cp", "-a", furniture, mount.directory / "cp")
    assert kept(mount.directory / "cp") == kept(furniture)


def test_git(mount: Client) -> None:
    repository = mount.directory / "repository"
    run("git", "init", "-q", repository)
    for number in range(150):
        directory = repository / f"d{number % 7}"
        directory.mkdir(exist_ok=True)
        (directory / f"f{number}").write_text(f"{number}\n" * number)
    run("git", "add", ".", cwd=repository)
    run("git", "commit", "-qm", "one", cwd=repository)
    run("git", "checkout", "-qb", "side", cwd=repository)
    (repository / "d0" / "f0").write_text("changed")
    run("git", "commit", "-qam", "two", cwd=repository)
    run("git", "checkout", "-q", "-", cwd=repository)
    run("git", "merge", "-q", "side", cwd=repository)
    run("git", "gc", "-q", "--prune=now", cwd=repository)
    mount.remount(cold=True)
    run("git", "fsck", "--strict", cwd=repository)
    assert run("git", "status", "--porcelain", cwd=repository) == ""
    run("git", "clone", "-q", repository, mount.directory / "clone")
    assert (mount.directory / "clone" / "d0" / "f0").read_text() == "changed"


@pytest.mark.parametrize("journal", ["delete", "wal", "truncate"])
def test_sqlite(mount: Client, journal: str) -> None:
    path = mount.directory / "database"
    database = sqlite3.connect(path, isolation_level=None)
    assert database.execute(f"pragma journal_mode = {journal}").fetchone() == (journal,)
    database.execute("create table t (number integer primary key, text)")
    for number in range(60):
        database.execute("insert into t values (?, ?)", (number, f"text {number}" * 50))
    database.execute("begin")
    database.execute("delete from t where number % 2")
    reader = sqlite3.connect(path)
    assert reader.execute("select count(*) from t").fetchone() == (60,)
    reader.close()
    database.execute("commit")
    database.execute("vacuum")
    database.close()
    mount.remount(cold=True)
    database = sqlite3.connect(path)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert database.execute("select count(*) from t").fetchone() == (30,)
    database.close()


def test_a_database_survives_kill_9(mount: Client) -> None:
    """What a transaction returned for is there, also when the filesystem itself was killed."""
    path = mount.directory / "database"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("create table t (number)")
    for number in range(40):
        database.execute("insert into t values (?)", (number,))
    mount.kill()
    database.close()
    mount.mount()
    database = sqlite3.connect(path)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    assert database.execute("select count(*) from t").fetchone() == (40,)
    database.close()
