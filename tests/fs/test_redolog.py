"""The redo log when power fails: what is replayed is a prefix of what was appended."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from hpkvfs.errors import NewerFormat, VaultError
from hpkvfs.fs.layer import Gone
from hpkvfs.fs.redolog import RedoLog

KEY = bytes(range(32))


def opened(directory: Path, aes: bool | None = None) -> RedoLog:
    return RedoLog(directory, KEY, secrets.token_bytes, aes=aes)


def replayed(directory: Path, covered: int = 0) -> list[int]:
    """The records that a new process finds, by what they say."""
    found = (effect for _, (effect,) in opened(directory).replay(covered))
    return [effect.ino for effect in found if isinstance(effect, Gone)]


def written(directory: Path, *files: range, aes: bool | None = None) -> None:
    """A log of so many files, each with its records."""
    log = opened(directory, aes)
    list(log.replay(0))
    for records in files:
        for number in records:
            log.append([Gone(number)])
        log.rotate()
    log.close()


def test_records_come_back_in_order_over_restarts(tmp_path: Path) -> None:
    written(tmp_path, range(3), range(3, 5))
    written(tmp_path, range(5, 9))
    assert replayed(tmp_path) == list(range(9))
    assert replayed(tmp_path, covered=1) == list(range(3, 9))


def test_a_log_goes_on_on_a_machine_that_prefers_another_cipher(tmp_path: Path) -> None:
    written(tmp_path, range(3), aes=False)
    written(tmp_path, range(3, 5), aes=True)
    written(tmp_path, range(5, 9), aes=False)
    versions = [path.read_bytes()[8] for path in sorted(tmp_path.iterdir())]
    assert versions == [2, 3, 2]
    assert replayed(tmp_path) == list(range(9))


@pytest.mark.parametrize("aes", [False, True])
def test_a_record_that_was_changed_ends_its_file(tmp_path: Path, aes: bool) -> None:
    written(tmp_path, range(3), aes=aes)
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    raw[-(len(raw) - len(raw.rstrip(b"\0"))) - 1] ^= 1
    path.write_bytes(raw)
    assert replayed(tmp_path) == [0, 1]


@pytest.mark.parametrize(("version", "error"), [(4, NewerFormat), (1, VaultError)])
def test_a_file_of_another_version_is_told(
    tmp_path: Path, version: int, error: type[VaultError]
) -> None:
    written(tmp_path, range(3))
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    raw[8] = version
    path.write_bytes(raw)
    with pytest.raises(error):
        replayed(tmp_path)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_file_that_lost_its_end_is_not_followed_by_the_next(tmp_path: Path, cut: int) -> None:
    """Power may fail when the older file is not on the disk and the newer one is."""
    written(tmp_path, range(3), range(3, 5))
    path = tmp_path / "redo.1"
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-cut])
    found = replayed(tmp_path)
    assert found == list(range(len(found))) and len(found) < 3


def test_what_is_written_after_a_loss_is_replayed_in_place_of_what_was_lost(tmp_path: Path) -> None:
    written(tmp_path, range(3), range(3, 5))
    path = tmp_path / "redo.1"
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-1])
    written(tmp_path, range(10, 12))
    assert replayed(tmp_path) == [0, 1, 10, 11]


@pytest.mark.parametrize("left", [0, 8, 30, 44])
def test_a_header_that_never_reached_the_disk_is_no_damage(tmp_path: Path, left: int) -> None:
    """A file system may give zeros for what it had not written."""
    written(tmp_path, range(3), range(3, 5))
    path = tmp_path / "redo.2"
    path.write_bytes(path.read_bytes()[:left] + bytes(100))
    assert replayed(tmp_path) == [0, 1, 2]


def test_another_file_under_the_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "redo.1").write_bytes(b"not a redo log, but long enough to be taken for one ....")
    with pytest.raises(VaultError):
        replayed(tmp_path)


def test_what_an_earlier_process_wrote_is_synced_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process leaves records that are in the page cache only."""
    written(tmp_path, range(3))
    log = opened(tmp_path)
    list(log.replay(0))
    log.append([Gone(3)])
    synced = list[str]()
    monkeypatch.setattr(
        "hpkvfs.fs.redolog.os.fdatasync",
        lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name),
    )
    log.syncer()()
    assert synced == ["redo.1", "redo.2"]
    synced.clear()
    log.append([Gone(4)])
    log.syncer()()
    assert synced == ["redo.2"]  # nothing is added to the other any more
    log.rotate()
    log.syncer()()
    log.syncer()()
    assert synced == ["redo.2", "redo.2"]
    log.drop(2)
    log.close()
    assert list(tmp_path.iterdir()) == []
