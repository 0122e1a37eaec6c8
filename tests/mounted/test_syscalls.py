"""The errno and the side effects of each system call, as pjdfstest and Linux have them.

Root is needed to be other users; without it, only what one user can see is tried.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mounted.client import Client, Server

ROOT = os.geteuid() == 0
NOBODY, SOMEBODY = 65_534, 4_242
GIB = 1 << 30


@pytest.fixture(scope="module")
def mount(server: Server) -> Iterator[Client]:
    """A vault that every user gets to; pytest's own directories let nobody in."""
    with tempfile.TemporaryDirectory(prefix="hpkvfs-syscalls-") as base:
        Path(base).chmod(0o755)
        client = Client.at(Path(base) / "client")
        client.init(server)
        client.mount(*(["--allow-other"] if ROOT else []))
        client.directory.chmod(0o777)
        yield client
        try:
            client.umount()
            client.fsck()
        finally:
            client.discard()


@pytest.fixture
def here(mount: Client, request: pytest.FixtureRequest) -> Path:
    directory = mount.directory / str(abs(hash(request.node.name)))
    directory.mkdir()
    directory.chmod(0o777)
    return directory


def outcome(call: Callable[..., Any], *arguments: Any) -> int:
    """0, or the errno."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def as_user(
    uid: int, call: Callable[..., Any], *arguments: Any, groups: tuple[int, ...] = ()
) -> int:
    """The outcome of a call that another user makes, in a process of its own."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            code = outcome(call, *arguments)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make(path: Path, kind: str) -> Path:
    """Something of a kind."""
    match kind:
        case "file":
            path.write_bytes(b"content")
        case "dir":
            path.mkdir()
        case "full":
            path.mkdir()
            (path / "in it").touch()
        case "link":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
    return path


def touch(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "open": touch,
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "symlink": lambda path: os.symlink("x", path),
    "mknod": lambda path: os.mknod(path, stat.S_IFREG | 0o644),
}
USERS: dict[str, Callable[[Path], Any]] = {
    **MAKERS,
    "stat": os.stat,
    "chmod": lambda path: os.chmod(path, 0o600),
    "chown": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "truncate": lambda path: os.truncate(path, 3),
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "link": lambda path: os.link(path, path.parent / "linked"),
    "rename": lambda path: os.rename(path, path.parent / "renamed"),
    "utime": os.utime,
    "listdir": os.listdir,
    "read": lambda path: os.open(path, os.O_RDONLY),
}


@pytest.mark.parametrize("call", USERS)
def test_errors_that_a_path_gives_to_every_call(here: Path, call: str) -> None:
    do = USERS[call]
    make(here / "file", "file")
    make(here / "loop", "loop")
    assert outcome(do, here / "file" / "x") == errno.ENOTDIR
    assert outcome(do, here / "none" / "x") == errno.ENOENT
    assert outcome(do, here / ("n" * 256)) == errno.ENAMETOOLONG
    assert outcome(do, here / ("n" * 255) / "x") == errno.ENOENT
    assert outcome(do, here / "loop" / "x") == errno.ELOOP
    assert outcome(do, here.joinpath(*["d" * 200] * 21)) == errno.ENAMETOOLONG
    if call not in MAKERS:
        assert outcome(do, here / "none") == errno.ENOENT


@pytest.mark.parametrize("call", MAKERS)
@pytest.mark.parametrize("kind", ["file", "dir", "link", "fifo"])
def test_what_is_there_is_not_made_again(here: Path, call: str, kind: str) -> None:
    make(here / "it", kind)
    if call == "open":
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        assert outcome(os.open, here / "it", flags) == errno.EEXIST
    else:
        assert outcome(MAKERS[call], here / "it") == errno.EEXIST


@pytest.mark.parametrize("call", MAKERS)
def test_making_stamps_the_new_thing_and_its_directory(here: Path, call: str) -> None:
    os.utime(here, (1, 1))
    before = time.time_ns() - 10_000_000
    MAKERS[call](here / "it")
    new, directory = os.lstat(here / "it"), os.lstat(here)
    for stamp in (new.st_atime_ns, new.st_mtime_ns, new.st_ctime_ns):
        assert before <= stamp <= time.time_ns()
    assert before <= directory.st_mtime_ns == directory.st_ctime_ns <= time.time_ns()
    assert new.st_nlink == (2 if call == "mkdir" else 1)
    assert directory.st_nlink == (3 if call == "mkdir" else 2)


RENAMES = [
    # what, onto what, outcome
    ("file", "none", 0), ("file", "file", 0), ("file", "link", 0), ("file", "fifo", 0),
    ("file", "dir", errno.EISDIR), ("file", "full", errno.EISDIR),
    ("link", "file", 0), ("fifo", "dir", errno.EISDIR),
    ("dir", "none", 0), ("dir", "dir", 0), ("full", "dir", 0),
    ("dir", "full", errno.ENOTEMPTY), ("dir", "file", errno.ENOTDIR),
    ("dir", "link", errno.ENOTDIR),
]  # fmt: skip


@pytest.mark.parametrize(("what", "onto", "expected"), RENAMES)
def test_rename(here: Path, what: str, onto: str, expected: int) -> None:
    (here / "a").mkdir()
    (here / "b").mkdir()
    make(here / "a" / "old", what)
    if onto != "none":
        make(here / "b" / "new", onto)
    ino = os.lstat(here / "a" / "old").st_ino
    assert outcome(os.rename, here / "a" / "old", here / "b" / "new") == expected
    assert ((here / "b" / "new").is_symlink() or (here / "b" / "new").exists()) or onto == "none"
    moved = what in ("dir", "full") and not expected
    still = what in ("dir", "full") and bool(expected)
    assert os.lstat(here / "a").st_nlink == 2 + still
    assert os.lstat(here / "b").st_nlink == 2 + (moved or onto in ("dir", "full"))
    if not expected:
        assert os.lstat(here / "b" / "new").st_ino == ino
        assert not os.path.lexists(here / "a" / "old")


REMOVALS = [
    ("unlink", "file", 0), ("unlink", "link", 0), ("unlink", "fifo", 0),
    ("unlink", "dir", errno.EISDIR),
    ("rmdir", "dir", 0), ("rmdir", "full", errno.ENOTEMPTY), ("rmdir", "file", errno.ENOTDIR),
    ("rmdir", "link", errno.ENOTDIR), ("link", "dir", errno.EPERM), ("link", "link", 0),
    ("truncate", "dir", errno.EISDIR), ("readlink", "file", errno.EINVAL),
    ("listdir", "file", errno.ENOTDIR),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "expected"), REMOVALS)
def test_what_a_call_says_of_a_kind(here: Path, call: str, kind: str, expected: int) -> None:
    def link(path: Path) -> None:
        os.link(path, here / "other", follow_symlinks=False)

    calls = {**USERS, "readlink": os.readlink, "link": link}
    assert outcome(calls[call], make(here / "it", kind)) == expected


def test_dots_are_refused_and_listed(here: Path) -> None:
    make(here / "d", "dir")
    assert outcome(os.rmdir, f"{here}/d/.") == errno.EINVAL
    assert outcome(os.rmdir, f"{here}/d/..") == errno.ENOTEMPTY
    assert outcome(os.rename, f"{here}/d/.", here / "x") == errno.EBUSY
    listed = subprocess.run(["ls", "-a", here / "d"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [".", ".."]
    assert os.stat(f"{here}/d/..").st_ino == here.stat().st_ino


def test_another_filesystem_is_another_filesystem(here: Path, tmp_path: Path) -> None:
    make(here / "file", "file")
    assert outcome(os.rename, here / "file", tmp_path / "x") == errno.EXDEV
    assert outcome(os.link, here / "file", tmp_path / "x") == errno.EXDEV


def test_links_count_and_stamp(here: Path) -> None:
    make(here / "file", "file")
    os.utime(here, (1, 1))
    before = os.stat(here / "file")
    time.sleep(0.02)
    os.link(here / "file", here / "other")
    after = os.stat(here / "file")
    assert (after.st_nlink, after.st_mtime_ns) == (2, before.st_mtime_ns)
    assert after.st_ctime_ns > before.st_ctime_ns
    assert here.stat().st_mtime > 1
    time.sleep(0.02)
    os.unlink(here / "file")
    assert os.stat(here / "other").st_nlink == 1
    assert os.stat(here / "other").st_ctime_ns > after.st_ctime_ns


def test_access_times_are_relative(here: Path) -> None:
    make(here / "file", "file")
    assert (here / "file").read_bytes() == b"content"
    os.utime(here / "file", (1, 1))  # as old as the content, and far older than the inode
    descriptor = os.open(here / "file", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.read(descriptor, 7)
    os.close(descriptor)
    facts = (here / "file").stat()
    assert facts.st_atime > 1_000
    assert facts.st_mtime == 1


def test_files_beyond_four_gibibytes(here: Path) -> None:
    with (here / "large").open("wb") as file:
        for place in (3 * GIB, 5 * GIB + 77, 1 << 40):
            file.seek(place)
            file.write(b"here")
    assert (here / "large").stat().st_size == (1 << 40) + 4
    with (here / "large").open("rb") as file:
        file.seek(5 * GIB + 70)
        assert file.read(20) == bytes(7) + b"here" + bytes(9)
    os.truncate(here / "large", 5 * GIB + 79)
    os.truncate(here / "large", 6 * GIB)
    with (here / "large").open("rb") as file:
        file.seek(5 * GIB + 75)
        assert file.read(8) == bytes(2) + b"he" + bytes(4)
    assert outcome(os.truncate, here / "large", (1 << 63) - 1) in (0, errno.EFBIG)


def test_listing_goes_on_where_it_was(here: Path) -> None:
    """Each name that stays is listed once, whatever comes and goes meanwhile."""
    stays = {f"stays {number}" for number in range(1_500)}
    for name in stays | {f"goes {number}" for number in range(500)}:
        touch(here / name)
    seen: list[str] = []
    with os.scandir(here) as listing:
        for number, entry in enumerate(listing):
            seen.append(entry.name)
            if number < 500:
                (here / f"goes {number}").unlink()
                touch(here / f"comes {number}")
    assert sorted(name for name in seen if name in stays) == sorted(stays)
    assert len(seen) == len(set(seen))


def test_a_listing_is_sought_in_while_names_come_and_go(here: Path) -> None:
    """What telldir(3) gave leads back to the same names as long as the directory is open."""
    for number in range(600):
        touch(here / f"{number:03}")
    names: list[bytes] = []
    places: list[int] = []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    listing = ctypes.c_void_p(libc.opendir(os.fsencode(here)))
    try:
        while (entry := libc.readdir(listing)) is not None:
            names.append(ctypes.string_at(entry + 19))  # struct dirent of 64-bit Linux: d_name
            places.append(libc.telldir(listing))
        assert len(names) == 602 and len(set(places)) == 602
        gone, stay = set(names[300:600:2]), names[301:600:2]
        for name in gone - {b".", b".."}:
            os.unlink(os.fsencode(here) + b"/" + name)
        touch(here / "new")
        libc.seekdir(listing, ctypes.c_long(places[299]))
        again = []
        while (entry := libc.readdir(listing)) is not None:
            again.append(ctypes.string_at(entry + 19))
        left = [name for name in again if name not in (b"new", *names[600:], *gone)]
        assert left == [name for name in stay if name not in (b".", b"..")]
        assert not gone & set(again)
    finally:
        libc.closedir(listing)


def test_atomic_save(here: Path) -> None:
    make(here / "file", "file")
    for number in range(20):
        (here / ".file.new").write_text(f"version {number}")
        descriptor = os.open(here / ".file.new", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(here / ".file.new", here / "file")
        directory = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)
        assert (here / "file").read_text() == f"version {number}"
    assert os.listdir(here) == ["file"]


def test_truncating_at_open(here: Path) -> None:
    make(here / "file", "file")
    os.close(os.open(here / "file", os.O_WRONLY | os.O_TRUNC))
    assert (here / "file").stat().st_size == 0
    assert (here / "file").read_bytes() == b""


# -- other users -----------------------------------------------------------------------------


def others(test: Any) -> Any:
    """A test for root alone, since nobody else can be somebody else."""
    return test if ROOT else None


@others
def test_permissions_are_checked(here: Path) -> None:
    make(here / "file", "file").chmod(0o640)
    os.chown(here / "file", SOMEBODY, SOMEBODY)
    make(here / "full", "full").chmod(0o700)
    read, write = os.O_RDONLY, os.O_WRONLY
    assert as_user(SOMEBODY, os.open, here / "file", write) == 0
    assert as_user(NOBODY, os.open, here / "file", read) == errno.EACCES
    assert as_user(NOBODY, os.open, here / "file", read, groups=(SOMEBODY,)) == 0
    assert as_user(NOBODY, os.open, here / "file", write, groups=(SOMEBODY,)) == errno.EACCES
    assert as_user(NOBODY, os.stat, here / "full" / "in it") == errno.EACCES
    assert as_user(NOBODY, os.chmod, here / "file", 0o777) == errno.EPERM
    assert as_user(SOMEBODY, os.chown, here / "file", NOBODY, -1) == errno.EPERM
    assert as_user(NOBODY, os.truncate, here / "file", 0) == errno.EACCES
    assert as_user(NOBODY, os.utime, here / "file") == errno.EACCES
    here.chmod(0o755)
    assert as_user(NOBODY, touch, here / "new") == errno.EACCES
    assert as_user(SOMEBODY, os.unlink, here / "file") == errno.EACCES


@others
def test_a_sticky_directory_protects_names(here: Path) -> None:
    here.chmod(0o1777)
    make(here / "mine", "file")
    os.chown(here / "mine", SOMEBODY, SOMEBODY)
    assert as_user(NOBODY, os.unlink, here / "mine") == errno.EPERM
    assert as_user(NOBODY, os.rename, here / "mine", here / "x") == errno.EPERM
    assert as_user(NOBODY, touch, here / "other") == 0
    assert as_user(NOBODY, os.rename, here / "other", here / "mine") == errno.EPERM
    assert as_user(SOMEBODY, os.unlink, here / "mine") == 0


@others
def test_setgid_directories_give_their_group(here: Path) -> None:
    os.chown(here, 0, SOMEBODY)
    here.chmod(0o2777)
    assert as_user(NOBODY, touch, here / "file") == 0
    assert as_user(NOBODY, os.mkdir, here / "dir") == 0
    file, directory = (here / "file").stat(), (here / "dir").stat()
    assert (file.st_uid, file.st_gid) == (NOBODY, SOMEBODY)
    assert directory.st_gid == SOMEBODY and directory.st_mode & stat.S_ISGID


@others
@pytest.mark.parametrize("change", ["write", "truncate", "chown"])
def test_rights_that_a_file_lends_end_when_it_changes(here: Path, change: str) -> None:
    def write(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(b"new")

    calls = {
        "write": write,
        "truncate": lambda path: os.truncate(path, 1),
        "chown": lambda path: os.chown(path, -1, NOBODY),
    }
    path = make(here / "file", "file")
    os.chown(path, NOBODY, SOMEBODY)
    path.chmod(0o6777)
    assert as_user(NOBODY, calls[change], path, groups=(NOBODY,)) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


@others
def test_setgid_is_for_members(here: Path) -> None:
    path = make(here / "file", "file")
    os.chown(path, NOBODY, SOMEBODY)
    assert as_user(NOBODY, os.chmod, path, 0o2755) == 0
    assert path.stat().st_mode & stat.S_ISGID == 0
    assert as_user(NOBODY, os.chmod, path, 0o2755, groups=(SOMEBODY,)) == 0
    assert path.stat().st_mode & stat.S_ISGID


# -- access control lists --------------------------------------------------------------------


def setfacl(*arguments: str | Path) -> None:
    subprocess.run(["setfacl", *map(str, arguments)], check=True)


def getfacl(path: Path) -> list[str]:
    command = ["getfacl", "-cpE", "--numeric", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@others
def test_access_control_lists_are_obeyed(here: Path) -> None:
    path = make(here / "file", "file")
    path.chmod(0o600)
    assert as_user(SOMEBODY, os.open, path, os.O_RDONLY) == errno.EACCES
    setfacl("-m", f"u:{SOMEBODY}:r", path)
    assert as_user(SOMEBODY, os.open, path, os.O_RDONLY) == 0
    assert as_user(SOMEBODY, os.open, path, os.O_WRONLY) == errno.EACCES
    assert as_user(NOBODY, os.open, path, os.O_RDONLY) == errno.EACCES
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)  # the mask
    assert as_user(SOMEBODY, os.open, path, os.O_RDONLY) == errno.EACCES
    assert "mask::---" in getfacl(path)
    setfacl("-b", path)
    assert getfacl(path) == ["user::rw-", "group::---", "other::---"]


def test_a_directory_hands_its_default_list_on(here: Path) -> None:
    setfacl("-m", f"d:u:{SOMEBODY}:rwx,d:g::rx,d:o::-", here)
    (here / "sub").mkdir()
    touch(here / "sub" / "file")
    assert f"default:user:{SOMEBODY}:rwx" in getfacl(here / "sub")
    assert f"user:{SOMEBODY}:rwx" in getfacl(here / "sub" / "file")
    assert "other::---" in getfacl(here / "sub" / "file")


def test_lists_that_are_none_are_refused(here: Path) -> None:
    path = make(here / "file", "file")
    for value in (b"", b"\2\0\0\0\1", b"\2\0\0\0\1\0\7\0\xff\xff\xff\xff", b"\3\0\0\0"):
        assert outcome(os.setxattr, path, "system.posix_acl_access", value) != 0
    assert outcome(os.setxattr, path, "system.other", b"x") == errno.EOPNOTSUPP
