"""Something nobody foresaw fails in the middle of a publication: the next is as any other."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpkvfs.errors import VaultError
from hpkvfs.fs import publisher as publishing
from hpkvfs.fs.publisher import _Attempt
from hpkvfs.types import ANCHOR_BIT, BlobRef
from tests.fs.harness import Client, Machine

CONTENT = bytes(range(250)) * 24_000  # more blocks than are stored in one step
PLACES: dict[str, tuple[Callable[[Client], object], str, tuple[int, ...]]] = {
    "planning": (lambda client: client, "mark", (0,)),
    "freezing": (lambda client: client.log, "rotate", (0,)),
    "sealing": (lambda client: client.volume.sealer, "make", (0, 5, 300, 366, 367)),
    "loading": (lambda client: client.volume, "load", (0,)),
    "storing": (lambda client: client.machine.store, "insert", (0, 40, 300, 367)),
    "remembering": (lambda client: client.volume, "remember", (0, 40, 300, 367)),
    "syncing the log": (lambda client: client, "sync_log", (0,)),
    "noting the generation": (lambda client: client, "save_known", (0,)),
    "forgetting the layer": (lambda client: client.fs, "published", (0,)),
    "forgetting the log": (lambda client: client.log, "drop", (0,)),
    "settling": (lambda client: client, "settle", (0,)),
}


def fail_once(
    patch: pytest.MonkeyPatch, target: object, name: str, after: int
) -> Callable[[], int]:
    """Have the method raise at one call; how often it was called is what is returned."""
    real, calls = getattr(target, name), 0

    def method(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise RuntimeError("a bug")
        return real(*args)

    patch.setattr(type(target), name, lambda _, *args: method(*args))
    return lambda: calls


async def with_a_generation(directory: Path) -> tuple[Client, int]:
    """A client that has published one file and written much to another; the number of this one.

    It was started anew after that, so it has no node in memory.
    """
    machine = Machine(directory)
    first = machine.boot()
    first.fs.make(1, b"first", stat.S_IFREG | 0o644, 0, 0)
    await first.publish()
    first.close()
    client = machine.boot()
    made = await client.do(client.fs.make, 1, b"second", stat.S_IFREG | 0o644, 0, 0)
    client.fs.write(made.ino, 0, CONTENT)
    client.close()
    return machine.boot(), made.ino


async def assert_nothing_lost_or_leaked(client: Client, ino: int) -> None:
    assert await client.do(client.fs.read, ino, 0, len(CONTENT)) == CONTENT
    report = await client.check()
    assert report.problems == []
    accounted = {client.volume.keys.signer(one).public for one in report.stored}
    assert set(client.machine.store.blobs) == accounted


@pytest.mark.parametrize(
    ("place", "after"), [(place, after) for place, (*_, all) in PLACES.items() for after in all]
)
async def test_the_next_publication_loses_and_leaks_nothing(
    tmp_path: Path, place: str, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    client, ino = await with_a_generation(tmp_path)
    target, name, _ = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_once(patch, target(client), name, after)
        with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="a bug"):
            await client.publish()
        assert calls() > after
        await client.do(client.fs.make, 1, b"third", stat.S_IFREG | 0o644, 0, 0)
        await client.publish()
    assert not client.publisher.pending
    assert [one for one in caplog.messages if "begins anew" in one] == caplog.messages
    assert len(caplog.messages) == (place == "sealing")
    await assert_nothing_lost_or_leaked(client, ino)
    client.close()
    again = client.machine.boot()
    assert (await again.do(again.fs.lookup, 1, b"third")) is not None
    await assert_nothing_lost_or_leaked(again, ino)
    again.close()


async def test_after_the_anchor_it_stops_with_a_sentence_and_keeps_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, ino = await with_a_generation(tmp_path)
    real = _Attempt.advance

    def advance(attempt: _Attempt) -> None:
        real(attempt)
        if attempt.done is not None:
            attempt.done = None
            raise RuntimeError("a bug")

    monkeypatch.setattr(publishing._Attempt, "advance", advance)
    with pytest.raises(RuntimeError):
        await client.publish()
    assert any(BlobRef.decode(memo).id & ANCHOR_BIT for _, memo in client.machine.store.outcomes)
    for _ in range(2):
        with pytest.raises(VaultError, match="stops here"):
            await client.publish()
    assert client.publisher.pending
    assert client.publisher.orphans == set()
    assert await client.do(client.fs.read, ino, 0, len(CONTENT)) == CONTENT
    client.close()
