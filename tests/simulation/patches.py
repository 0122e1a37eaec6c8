"""What is replaced around the real code so that a seed decides everything.

    trio's order of tasks        its generator is seeded, its batches sorted before they shuffle
    threads.in_thread, trio.to_thread.run_sync   inline, after a simulated pause
    the journal's writer thread  a task (client.SimulatedJournal)
    the module os of redo log and kept copies  a disk in memory (disk.DiskOs)
    credentials                  cheap ones, unless `real`
    calls at a time              2, 4 or 16, so that many seeds have short lives
    insert, delete, save_known   pass the points of publication and collection

Everything else runs as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, cast
from unittest.mock import patch

import trio
import trio._core._run

from hpkvfs import threads
from hpkvfs.net.store import RemoteStore
from hpkvfs.protocol.credential import Draft, Issuer, IssuerParameters
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.session.records import LocalRecords
from hpkvfs.types import ANCHOR_BIT, BlobRef
from hpkvfs.volume.volume import Known
from tests.simulation import money
from tests.simulation.client import SimulatedJournal
from tests.simulation.disk import as_os
from tests.simulation.points import SIDE, Point
from tests.simulation.server import Server

Replacement = tuple[object, str, object]


@contextmanager
def simulated(seed: str, *, real: bool) -> Iterator[None]:
    """Replace all of it, for one run."""
    order = random.Random(f"{seed}/order")
    inline = _inline(random.Random(f"{seed}/threads"))
    replacements: list[Replacement] = [
        (trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        (trio._core._run, "_r", order),
        (threads, "in_thread", inline),
        (trio.to_thread, "run_sync", inline),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        for path, value in _NAMES.items():
            stack.enter_context(patch(path, value))
        if not real:
            for path, value in _CHEAP.items():
                stack.enter_context(patch(path, value))
        at_once = {"max_in_flight": order.choice([2, 4, 4, 4, 16])}
        stack.enter_context(patch.dict(cast(Any, RemoteStore.__init__).__kwdefaults__, at_once))
        _pass_points(stack)
        yield


_OS = as_os()
_NAMES: dict[str, Any] = {
    "hpkvfs.session.opening.Journal": SimulatedJournal,
    "hpkvfs.fs.redolog.os": _OS,
    "hpkvfs.kept.os": _OS,
}
_CHEAP: dict[str, Any] = {
    "hpkvfs.net.proving.prepare": money.prepare,
    "hpkvd.handler.parse": money.parse,
    f"{Issuer.__module__}.Issuer.verify": money.verify,
    f"{Issuer.__module__}.Issuer.issue": money.issue,
    f"{Draft.__module__}.Draft.finish": money.finish,
    f"{IssuerParameters.__module__}.IssuerParameters.verify": lambda _: None,
    # there are few, each read many times, and reading one takes a millisecond
    f"{EpochParameters.__module__}.EpochParameters.decode": staticmethod(
        cache(EpochParameters.decode)
    ),
}


def _inline(chance: random.Random) -> Callable[..., Any]:
    async def run_sync(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.sleep(chance.choice([0.0, 0.001, 0.02]))
        side = SIDE.get()
        side.check()
        if isinstance(side, Server):
            return side.commit(function, *arguments)
        return function(*arguments)

    return run_sync


def _pass_points(stack: ExitStack) -> None:
    insert, delete, save_known = RemoteStore.insert, RemoteStore.delete, LocalRecords.save_known

    async def passing_insert(self: RemoteStore, key: bytes, blob: bytes, memo: bytes) -> None:
        is_anchor = bool(memo) and bool(BlobRef.decode(memo).id & ANCHOR_BIT)
        if is_anchor:
            SIDE.get().at(Point.ANCHOR_BEFORE)
        await insert(self, key, blob, memo)
        if is_anchor:
            SIDE.get().at(Point.ANCHOR_AFTER)

    async def passing_delete(self: RemoteStore, *arguments: Any) -> None:
        await delete(self, *arguments)
        SIDE.get().at(Point.DELETED)

    async def passing_save_known(self: LocalRecords, known: Known) -> None:
        SIDE.get().at(Point.KNOWN_BEFORE)
        await save_known(self, known)
        SIDE.get().at(Point.KNOWN_AFTER)

    for owner, name, value in (
        (RemoteStore, "insert", passing_insert),
        (RemoteStore, "delete", passing_delete),
        (LocalRecords, "save_known", passing_save_known),
    ):
        stack.enter_context(patch.object(owner, name, value))
