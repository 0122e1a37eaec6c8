"""The cache: it may forget anything at any time, and never tells a lie."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpkvfs.cache import SLOT_SIZE, BlobCache
from hpkvfs.types import OPENED_SIZE, PAYLOAD_SIZE, BlobId, BlobRef
from tests.examples import examples

KEY = bytes(range(32))


def blob(number: int) -> bytes:
    return hashlib.shake_256(str(number).encode()).digest(OPENED_SIZE)


def ref(number: int) -> BlobRef:
    return BlobRef(BlobId(number), hashlib.sha256(blob(number)).digest())


def room(blobs: int) -> int:
    return 4096 + blobs * SLOT_SIZE


def opened(path: Path, blobs: int = 4, key: bytes = KEY) -> BlobCache:
    return BlobCache(path, key, room(blobs))


def payload(cache: BlobCache, number: int) -> bytes | None:
    return cache.payloads([ref(number)], blob(number)[:1])[0]


@pytest.mark.parametrize("aes", [True, False])
def test_a_payload_alone_is_that_of_the_blob_and_of_its_kind(tmp_path: Path, aes: bool) -> None:
    cache = BlobCache(tmp_path / "cache", KEY, room(4), aes=aes)
    cache.put(ref(1), blob(1))
    assert cache.get(ref(1)) == blob(1)
    assert payload(cache, 1) == blob(1)[-PAYLOAD_SIZE:]
    assert payload(cache, 2) is None
    other = bytes([blob(1)[0] ^ 1])
    assert cache.payloads([ref(1)], other) == [None], "a blob was read as one of another kind"


def test_a_payload_that_was_damaged_is_not_there(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    cache.put(ref(1), blob(1))
    with (tmp_path / "cache").open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(bytes(8_000))
    assert payload(cache, 1) is None and ref(1) not in cache


def test_a_file_of_another_cipher_starts_afresh(tmp_path: Path) -> None:
    for aes in (True, False, True):
        cache = BlobCache(tmp_path / "cache", KEY, room(4), aes=aes)
        assert len(cache) == 0 and cache.get(ref(1)) is None
        cache.put(ref(1), blob(1))
        cache.close()


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    assert cache.get(ref(1)) is None
    cache.put(ref(1), blob(1))
    cache.put(ref(1), blob(1))
    assert cache.get(ref(1)) == blob(1) and len(cache) == 1
    cache.close()
    assert opened(tmp_path / "cache").get(ref(1)) == blob(1)


def test_the_least_recently_used_leaves_first(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache", 3)
    for number in (1, 2, 3):
        cache.put(ref(number), blob(number))
    cache.get(ref(1))
    cache.put(ref(4), blob(4))
    assert [cache.get(ref(number)) is not None for number in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert (tmp_path / "cache").stat().st_size <= room(3)


def test_what_is_dropped_is_gone(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    cache.put(ref(1), blob(1))
    cache.drop(ref(1))
    cache.drop(ref(2))
    assert cache.get(ref(1)) is None
    cache.close()
    assert opened(tmp_path / "cache").get(ref(1)) is None


def test_the_file_tells_nothing(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    cache.put(ref(1), blob(1))
    raw = (tmp_path / "cache").read_bytes()
    assert blob(1)[:16] not in raw and ref(1).digest[:16] not in raw
    assert hashlib.sha256(ref(1).encode()).digest()[:16] not in raw
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o600


FIRST_SLOT = room(0) + 4 * 16


@pytest.mark.parametrize("at", [room(0) + 16, FIRST_SLOT, FIRST_SLOT + 9_000, FIRST_SLOT + 16_450])
def test_damage_is_absence(tmp_path: Path, at: int) -> None:
    """A bit of a name, of a nonce, of a payload, of what makes the blob again."""
    path = tmp_path / "cache"
    cache = opened(path)
    for number in range(4):
        cache.put(ref(number), blob(number))
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    cache.close()
    cache = opened(path)
    found = [cache.get(ref(number)) for number in range(4)]
    assert found.count(None) == 1
    assert all(one in (None, blob(number)) for number, one in enumerate(found))


def test_slots_cannot_be_moved(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache = opened(path, 2)
    cache.put(ref(1), blob(1))
    cache.put(ref(2), blob(2))
    raw = path.read_bytes()
    names, first, second = raw[4096:4128], raw[4128 : 4128 + 16_494], raw[4128 + 16_494 :]
    path.write_bytes(raw[:4096] + names + second + first)
    assert payload(cache, 1) is None and cache.get(ref(2)) is None


@pytest.mark.parametrize("size", [0, 10, 4_100, 5_000, 30_000])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    cache = opened(tmp_path / "cache")
    for number in range(4):
        cache.put(ref(number), blob(number))
    cache.close()
    os.truncate(tmp_path / "cache", size)
    cache = opened(tmp_path / "cache")
    assert all(cache.get(ref(n)) in (None, blob(n)) for n in range(4))
    cache.put(ref(9), blob(9))
    assert cache.get(ref(9)) == blob(9)


def test_another_key_or_size_starts_afresh(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    cache.put(ref(1), blob(1))
    cache.close()
    assert opened(tmp_path / "cache", key=bytes(32)).get(ref(1)) is None
    assert opened(tmp_path / "cache", 9).get(ref(1)) is None


def test_a_full_disk_is_only_a_smaller_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    cache = opened(tmp_path / "cache")
    monkeypatch.setattr(os, "pwrite", full)
    cache.put(ref(1), blob(1))
    cache.drop(ref(1))
    assert cache.get(ref(1)) is None


@examples(30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "drop", "restart"]), st.integers(0, 7)),
        max_size=40,
    )
)
def test_it_never_gives_another_blob(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        live(Path(directory) / "cache", steps)


def live(path: Path, steps: list[tuple[str, int]]) -> None:
    cache = opened(path, 5)
    recent: list[int] = []  # what must be there, the last used last
    for step, number in steps:
        others = [one for one in recent if one != number]
        match step:
            case "put":
                cache.put(ref(number), blob(number))
                recent = [*others, number][-5:]
            case "drop":
                cache.drop(ref(number))
                recent = others
            case "restart":
                cache.close()
                cache, recent = opened(path, 5), []
            case "get":
                found = cache.get(ref(number))
                assert found in (None, blob(number))
                if number in recent:
                    assert found is not None
                    recent = [*others, number]
    cache.close()
