"""What a mounted vault does for itself: automatic snapshots by a policy, and collection; and
once, taking away what an earlier process left behind.

Collection is spread over its whole interval, so that deletions trickle out at random times
and look like nothing in particular; what a mount was too short for, the next one goes on with.
"""

from __future__ import annotations

import logging

import trio

from hpkvfs import restore
from hpkvfs.errors import HpkvError
from hpkvfs.keep import Policy
from hpkvfs.session import Session
from hpkvfs.timeline import Timeline

log = logging.getLogger(__name__)

LOOK_SECONDS = 30.0
LEAST_DEAD = 64
FIRST_SECONDS = 600.0


async def look_after(
    session: Session, policy: Policy, collect_every: float, turn: trio.Lock
) -> None:
    """Go on until cancelled. `turn` is held while snapshots change; 0 seconds: no collection."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_clear, session, turn)
        if policy:
            nursery.start_soon(_keep_snapshots, session, policy, turn)
        if collect_every:
            nursery.start_soon(_collect, session, collect_every)


async def _clear(session: Session, turn: trio.Lock) -> None:
    """What an earlier process was about when it was killed."""
    try:
        async with turn:
            await restore.clear(session)
    except HpkvError as error:
        log.info("what a restore left behind is taken away another time: %s", error)


async def _keep_snapshots(session: Session, policy: Policy, turn: trio.Lock) -> None:
    timeline = Timeline(session)
    while True:
        if session.trouble is not None:  # told already, and nothing can be published
            await trio.sleep(LOOK_SECONDS)
            continue
        try:
            async with turn:
                made, gone = await timeline.apply(policy)
            if made or gone:
                log.info("snapshots: %s made, %d deleted", made or "none", len(gone))
        except HpkvError as error:
            log.warning("no snapshot was made: %s", error)
        await trio.sleep(LOOK_SECONDS)


async def _collect(session: Session, interval: float) -> None:
    await trio.sleep(min(interval, FIRST_SECONDS))
    while True:
        due = trio.current_time() + interval
        if session.collectable()[0] >= LEAST_DEAD and session.trouble is None:
            try:
                done = await session.gc(spread=interval)
                log.info("%d dead blobs deleted", len(done.deleted))
            except HpkvError as error:
                log.warning("collection stopped: %s", error)
        await trio.sleep_until(max(due, trio.current_time() + 1))
