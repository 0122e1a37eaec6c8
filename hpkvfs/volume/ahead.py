"""Which leaves to fetch with one that is missing, so that a walk over a tree takes few rounds.

A look-up costs a token, so what is fetched ahead has to earn it: at most as many leaves are
fetched ahead as were really used so far, MOST at a time. Who walks the whole tree uses all of
them, and the number doubles from round to round; who reads here and there never pays for more
than twice what he uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from hpkvfs.types import BlobRef

MOST: Final = 32
REMEMBERED: Final = 4_096


class Ahead:
    """What was fetched ahead and not used yet, and how well that went."""

    def __init__(self) -> None:
        self._unused: set[BlobRef] = set()
        self._asked: set[BlobRef] = set()
        self._used = 0

    def use(self, ref: BlobRef) -> None:
        """A node is being read."""
        if ref in self._unused:
            self._unused.discard(ref)
            self._used += 1

    def more(self, ref: BlobRef, beside: Iterable[BlobRef]) -> tuple[BlobRef, ...]:
        """With this missing leaf, fetch these of the ones beside it."""
        if ref in self._asked:
            return ()
        self._asked.add(ref)
        self._used += 1
        room = min(MOST, self._used - len(self._unused))
        if len(self._unused) > REMEMBERED:
            self._unused.clear()
        chosen = tuple(islice((r for r in beside if r not in self._unused), max(0, room)))
        self._unused.update(chosen)
        return chosen

    def loaded(self, ref: BlobRef) -> None:
        """It came, or it did not: it may be asked for again."""
        self._asked.discard(ref)
