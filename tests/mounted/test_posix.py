"""What programs do to a mounted vault, through the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
NOREPLACE, EXCHANGE = 1, 2
MIB = 1 << 20


def renameat2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2), which Python does not offer."""
    if LIBC.renameat2(AT_FDCWD, bytes(old), AT_FDCWD, bytes(new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def test_reads_what_was_written(here: Path) -> None:
    content = os.urandom(3 * MIB + 123)
    (here / "file").write_bytes(content)
    assert (here / "file").read_bytes() == content
    with (here / "file").open("r+b") as file:
        file.seek(MIB - 7)
        file.write(b"in the middle")
    expected = content[: MIB - 7] + b"in the middle" + content[MIB + 6 :]
    assert (here / "file").read_bytes() == expected


def test_holes_read_as_zeros_and_cost_nothing(here: Path) -> None:
    before = os.statvfs(here).f_bavail
    with (here / "sparse").open("wb") as file:
        file.seek(50 * 1000 * MIB)
        file.write(b"end")
    assert (here / "sparse").stat().st_size == 50 * 1000 * MIB + 3
    with (here / "sparse").open("rb") as file:
        assert file.read(100_000) == bytes(100_000)
        file.seek(-5, os.SEEK_END)
        assert file.read() == b"\0\0end"
    assert before - os.statvfs(here).f_bavail < 20


def test_truncate_cuts_and_extends_with_zeros(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"x" * 100_000)
    os.truncate(path, 50_001)
    os.truncate(path, 120_000)
    assert path.read_bytes() == b"x" * 50_001 + bytes(69_999)
    os.truncate(path, 0)
    assert path.read_bytes() == b""


def test_append_goes_to_the_end_whoever_writes(here: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    first, second = os.open(here / "log", flags), os.open(here / "log", flags)
    for number in range(20):
        os.write(first, b"a%d\n" % number)
        os.write(second, b"b%d\n" % number)
    os.close(first)
    os.close(second)
    lines = (here / "log").read_text().split()
    assert lines == [f"{who}{n}" for n in range(20) for who in "ab"]


def test_hard_links_are_one_file(here: Path) -> None:
    (here / "a").write_text("one")
    os.link(here / "a", here / "b")
    (here / "b").write_text("changed")
    assert (here / "a").read_text() == "changed"
    assert (here / "a").stat().st_ino == (here / "b").stat().st_ino
    assert (here / "a").stat().st_nlink == 2
    (here / "a").unlink()
    assert (here / "b").stat().st_nlink == 1
    assert (here / "b").read_text() == "changed"


def test_symbolic_links(here: Path) -> None:
    (here / "target").write_text("there")
    (here / "link").symlink_to("target")
    (here / "nowhere").symlink_to("/no/such/" + "x" * 4000)
    assert (here / "link").read_text() == "there"
    assert os.readlink(here / "nowhere") == "/no/such/" + "x" * 4000
    assert not (here / "nowhere").exists()


def test_rename_replaces(here: Path) -> None:
    (here / "a").write_text("a")
    (here / "b").write_text("b")
    (here / "a").rename(here / "b")
    assert [p.name for p in here.iterdir()] == ["b"]
    assert (here / "b").read_text() == "a"


def test_rename_noreplace_does_not(here: Path) -> None:
    (here / "a").write_text("a")
    (here / "b").write_text("b")
    with pytest.raises(FileExistsError):
        renameat2(here / "a", here / "b", NOREPLACE)
    assert (here / "b").read_text() == "b"
    renameat2(here / "a", here / "c", NOREPLACE)
    assert (here / "c").read_text() == "a"


def test_rename_exchange_swaps_even_a_file_with_a_directory(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d" / "inside").write_text("inside")
    (here / "other").mkdir()
    (here / "other" / "f").write_text("f")
    renameat2(here / "d", here / "other" / "f", EXCHANGE)
    assert (here / "d").read_text() == "f"
    assert (here / "other" / "f" / "inside").read_text() == "inside"
    assert (here / "other").stat().st_nlink == 3
    with pytest.raises(FileNotFoundError):
        renameat2(here / "d", here / "missing", EXCHANGE)


def test_a_directory_does_not_move_into_itself(here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        (here / "a").rename(here / "a" / "b" / "c")
    assert caught.value.errno == errno.EINVAL


def test_an_unlinked_file_lives_while_it_is_open(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"still here" * 10_000)
    with path.open("r+b") as file:
        path.unlink()
        assert list(here.iterdir()) == []
        file.seek(0, os.SEEK_END)
        file.write(b"!")
        file.flush()
        file.seek(0)
        assert file.read() == b"still here" * 10_000 + b"!"
        assert os.fstat(file.fileno()).st_nlink == 0


def test_attributes_are_kept_to_the_nanosecond(here: Path) -> None:
    path = here / "file"
    path.touch()
    path.chmod(0o4751)
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    facts = path.stat()
    assert stat.S_IMODE(facts.st_mode) == 0o4751
    assert facts.st_atime_ns == 1_234_567_890_123_456_789
    assert facts.st_mtime_ns == 987_654_321_987_654_321


def test_ownership_can_be_given_away_by_root_only(here: Path) -> None:
    path = here / "file"
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, 12_345, 54_321)
        assert (path.stat().st_uid, path.stat().st_gid) == (12_345, 54_321)
    else:
        with pytest.raises(PermissionError):
            os.chown(path, 12_345, -1)


def test_a_change_of_content_changes_mtime_and_one_of_attributes_ctime(here: Path) -> None:
    path = here / "file"
    path.touch()
    before = path.stat()
    time.sleep(0.02)  # the kernel's clock for files is a coarse one
    path.chmod(0o600)
    middle = path.stat()
    assert middle.st_ctime_ns > before.st_ctime_ns
    assert middle.st_mtime_ns == before.st_mtime_ns
    time.sleep(0.02)
    path.write_text("x")
    assert path.stat().st_mtime_ns > middle.st_mtime_ns


def test_extended_attributes(here: Path) -> None:
    path = here / "file"
    path.touch()
    os.setxattr(path, "user.one", b"1")
    os.setxattr(path, "user.binary", bytes(range(256)) * 4)
    assert sorted(os.listxattr(path)) == ["user.binary", "user.one"]
    assert os.getxattr(path, "user.binary") == bytes(range(256)) * 4
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.one", b"2", os.XATTR_CREATE)
    with pytest.raises(OSError) as caught:
        os.setxattr(path, "user.two", b"2", os.XATTR_REPLACE)
    assert caught.value.errno == errno.ENODATA
    os.setxattr(path, "user.one", b"")
    assert os.getxattr(path, "user.one") == b""
    os.removexattr(path, "user.one")
    assert os.listxattr(path) == ["user.binary"]
    with pytest.raises(OSError) as caught:
        os.getxattr(path, "user.one")
    assert caught.value.errno == errno.ENODATA


def test_a_fifo_carries_data(here: Path) -> None:
    os.mkfifo(here / "fifo")
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)
    writer = threading.Thread(target=(here / "fifo").write_text, args=("through",))
    writer.start()
    assert (here / "fifo").read_text() == "through"
    writer.join()


def test_a_socket_is_bound_and_reached(here: Path) -> None:
    os.chdir(here)
    try:
        with (
            socket.socket(socket.AF_UNIX) as listener,
            socket.socket(socket.AF_UNIX) as caller,
        ):
            listener.bind("socket")
            listener.listen()
            caller.connect("socket")
    finally:
        os.chdir("/")
    assert stat.S_ISSOCK((here / "socket").stat().st_mode)


def test_device_nodes_keep_their_numbers(here: Path) -> None:
    if os.geteuid() != 0:
        with pytest.raises(PermissionError):
            os.mknod(here / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        return
    os.mknod(here / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(here / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    assert stat.S_ISCHR((here / "null").stat().st_mode)
    assert (here / "null").stat().st_rdev == os.makedev(1, 3)
    assert (here / "disk").stat().st_rdev == os.makedev(259, 70_000)


def test_a_directory_of_2000_entries(here: Path) -> None:
    names = {f"entry {number:04}" for number in range(2_000)}
    for name in names:
        (here / name).touch()
    assert {p.name for p in here.iterdir()} == names
    with os.scandir(here) as listing:
        for number, entry in enumerate(listing):
            if number % 2:
                os.unlink(entry.path)
    assert len(os.listdir(here)) == 1_000


def test_names_are_bytes_and_long_ones_are_refused(here: Path) -> None:
    odd = os.fsencode(here) + b"/" + bytes(range(0x80, 0xFF)) + b"\n '\""
    with open(odd, "wb") as file:
        file.write(b"odd")
    assert os.listdir(os.fsencode(here)) == [os.path.basename(odd)]
    (here / ("n" * 255)).touch()
    with pytest.raises(OSError) as caught:
        (here / ("n" * 256)).touch()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_errors_are_those_of_any_filesystem(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d" / "f").touch()
    with pytest.raises(OSError) as caught:
        (here / "d").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    with pytest.raises(FileNotFoundError):
        (here / "none").stat()
    with pytest.raises(FileExistsError):
        (here / "d").mkdir()
    with pytest.raises(IsADirectoryError):
        (here / "d").read_bytes()
    with pytest.raises(NotADirectoryError):
        (here / "d" / "f" / "g").stat()


def test_setgid_directories_pass_on_their_group(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d").chmod(0o2775)
    (here / "d" / "sub").mkdir()
    assert (here / "d" / "sub").stat().st_mode & stat.S_ISGID


def test_a_mapped_file_is_written_back(here: Path) -> None:
    import mmap

    path = here / "mapped"
    path.write_bytes(bytes(100_000))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[50_000:50_005] = b"hello"
        memory.flush()
    assert path.read_bytes()[49_999:50_006] == b"\0hello\0"


def test_locks_exclude(here: Path) -> None:
    import fcntl

    with (here / "lock").open("w") as one, (here / "lock").open("w") as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# of Linux's <linux/capability.h>: revision 2, effective; CAP_NET_BIND_SERVICE
CAPABILITY = struct.pack("<5I", 0x0200_0001, 1 << 10, 0, 0, 0)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    "change",
    [append, lambda path: os.truncate(path, 3), lambda path: os.chown(path, 7, 7)],
    ids=["write", "truncate", "chown"],
)
def test_a_file_that_changes_lends_no_rights_any_more(
    here: Path, change: Callable[[Path], None]
) -> None:
    path = here / "tool"
    path.write_bytes(b"content")
    append(path)  # the kernel knows now that there is nothing to take away
    path.chmod(0o6755)
    os.setxattr(path, "security.capability", CAPABILITY)
    os.utime(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o6755
    assert os.getxattr(path, "security.capability") == CAPABILITY
    change(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert "security.capability" not in os.listxattr(path)
