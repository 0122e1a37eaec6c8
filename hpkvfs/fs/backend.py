"""What an adapter (FUSE, a test) drives: the filesystem, and the waiting around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from hpkvfs.errors import CorruptBlob
from hpkvfs.fs.filesystem import Filesystem
from hpkvfs.types import BlobRef, Missing

T = TypeVar("T")


class Backend(Protocol):
    """A filesystem whose blobs come from somewhere."""

    @property
    def fs(self) -> Filesystem:
        """The operations; each may raise types.Missing."""
        ...

    async def load(self, missing: Missing) -> None:
        """Bring blobs into memory; StoreError."""
        ...

    def is_crowded(self, size: int) -> bool:
        """Whether `admit` has anything to do before so many more dirty bytes are held."""
        ...

    async def admit(self, size: int) -> None:
        """Wait until so many more dirty bytes may be held; OSError when they can't be."""
        ...

    async def sync(self) -> None:
        """Return when all changes so far are durable."""
        ...

    def prefetch(self, refs: list[BlobRef]) -> None:
        """These extents will probably be read soon."""
        ...

    def space(self) -> tuple[int, int]:
        """(blocks in use, blocks that can still be stored)."""
        ...


async def run(backend: Backend, operation: Callable[[], T]) -> T:
    """Carry out one filesystem operation, loading what it misses.

    A blob that fails to load is given a second chance, since a generation published in the
    meantime may have made the operation independent of it.
    """
    failed: CorruptBlob | None = None
    while True:
        try:
            return operation()
        except Missing as missing:
            try:
                await backend.load(missing)
            except CorruptBlob as error:
                if failed is not None:
                    raise
                failed = error
