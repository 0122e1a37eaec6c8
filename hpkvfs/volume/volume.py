"""A vault as seen from one client: the newest generation it knows, and its blobs in memory.

Reads are synchronous. What is not in memory raises MissingNode or MissingExtent; `load`
fetches it (local cache first, then the server, verified against its reference) and the
caller reads again. So every operation above is atomic without a lock, and what it needs
from the network is fetched in parallel.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import trio

from hpkvfs.errors import CorruptBlob, HpkvError
from hpkvfs.parallel import each
from hpkvfs.tree import btree
from hpkvfs.tree.node import CorruptNode, Node
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, BlobStore, Generation, Missing, anchor_id
from hpkvfs.volume.ahead import Ahead
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.blob import CODES, Kind, Opened, Sealer
from hpkvfs.volume.deadlist import Dead, DeadList, read_page
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.snapshots import Snapshot, decode_table

log = logging.getLogger(__name__)

MEMORY = 96 << 20
LEAST_NODES = 512
"""One operation (200 entries listed with their inodes, what is fetched ahead) may need more than
half as many at once; with fewer it would push out what it needs, load it, and so on for ever."""
NODE_COST = 48 << 10
"""Bytes of memory that a decoded node takes, about: its items are objects."""
FETCHES_AT_ONCE = 16

V = TypeVar("V")


class MissingNode(Missing):
    """Tree nodes that are not in memory."""


class MissingExtent(Missing):
    """Extents that are not in memory."""


class MissingPage(Missing):
    """Pages of the dead list that are not in memory."""


class MissingTable(Missing):
    """Tables of snapshots that are not in memory."""


_KINDS = {
    MissingNode: Kind.NODE,
    MissingExtent: Kind.EXTENT,
    MissingPage: Kind.PAGE,
    MissingTable: Kind.TABLE,
}


class Cache(Protocol):
    """What the volume needs of a local cache of blobs; any of it may forget at any time."""

    def get(self, ref: BlobRef) -> bytes | None:
        """The opened blob (volume/blob.py), or None."""
        ...

    def payloads(self, refs: Iterable[BlobRef], kind: bytes) -> list[bytes | None]:
        """The payloads of opened blobs that begin with this byte; None for one not there."""
        ...

    def __contains__(self, ref: BlobRef) -> bool:
        """Whether it is probably there."""
        ...

    def put(self, ref: BlobRef, blob: bytes) -> None:
        """Remember an opened blob, which was found to be what its reference promises."""
        ...

    def drop(self, ref: BlobRef) -> None:
        """Forget a blob."""
        ...


class Lru(Generic[V]):
    """The most recently used values, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[BlobRef, V] = OrderedDict()

    def get(self, ref: BlobRef) -> V | None:
        """The value, which becomes the most recently used; or None."""
        value = self._values.get(ref)
        if value is not None:
            self._values.move_to_end(ref)
        return value

    def some(self, refs: Iterable[BlobRef]) -> dict[BlobRef, V]:
        """The values of those that are here; the order of use stays."""
        values = self._values
        return {ref: values[ref] for ref in refs if ref in values}

    def put(self, ref: BlobRef, value: V) -> None:
        """Remember a value."""
        self._values[ref] = value
        self._values.move_to_end(ref)
        if len(self._values) > self._size:
            self._values.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Known:
    """A published generation: its anchor and the anchor's own reference."""

    anchor: Anchor
    ref: BlobRef


class Volume:
    """The newest known generation and the blobs of it that are in memory."""

    def __init__(
        self,
        keys: VaultKeys,
        sealer: Sealer,
        store: BlobStore,
        cache: Cache,
        known: Known | None,
        memory: int = MEMORY,
    ) -> None:
        """`memory`: bytes of nodes and extents that may be kept, about."""
        self.keys = keys
        self.sealer = sealer
        self.store = store
        self.known = known
        self._cache = cache
        self._nodes: Lru[Node] = Lru(max(LEAST_NODES, memory * 2 // 3 // NODE_COST))
        self._extents: Lru[bytes] = Lru(max(128, memory // 3 // PAYLOAD_SIZE))
        self._ahead = Ahead()
        self._pages: dict[BlobRef, tuple[list[Dead], list[BlobRef]]] = {}
        self._tables: dict[BlobRef, list[Snapshot]] = {}
        self._loading: dict[BlobRef, trio.Event] = {}
        self._slots = trio.CapacityLimiter(FETCHES_AT_ONCE)

    @property
    def state(self) -> object:
        """Another object when it is another generation that is known."""
        return self.known

    @property
    def root(self) -> BlobRef | None:
        """The root of the newest known tree; None when it is empty."""
        return self.known.anchor.root if self.known else None

    @property
    def dead(self) -> DeadList:
        """The dead list of the newest known generation."""
        return self.known.anchor.dead if self.known else DeadList()

    def get(self, key: bytes) -> bytes | None:
        """An item of the newest known tree, or None; MissingNode."""
        return self.get_in(self.root, key)

    def scan(self, low: bytes, high: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Items of the newest known tree with low <= key < high; MissingNode."""
        return self.scan_in(self.root, low, high)

    def get_in(self, root: BlobRef | None, key: bytes) -> bytes | None:
        """An item of another tree, or None; MissingNode."""
        try:
            return btree.get(self, root, key)
        except MissingNode as missing:
            raise self._with_more(missing, root, key) from None

    def scan_in(
        self, root: BlobRef | None, low: bytes, high: bytes
    ) -> Iterator[tuple[bytes, bytes]]:
        """Items of another tree with low <= key < high; MissingNode."""
        try:
            yield from btree.scan(self, root, low, high)
        except MissingNode as missing:
            raise self._with_more(missing, root, low) from None

    def _with_more(self, missing: MissingNode, root: BlobRef | None, key: bytes) -> MissingNode:
        """What is missing, and the leaves beside it that will probably be wanted next."""
        found = missing.refs
        beside = (ref for ref in btree.beside(self, root, key) if not self._has_node(ref))
        more = self._ahead.more(found[0], (ref for ref in beside if ref not in found))
        return MissingNode((*found, *more))

    def _has_node(self, ref: BlobRef) -> bool:
        return self._nodes.get(ref) is not None or ref in self._loading

    def node(self, ref: BlobRef) -> Node:
        """A tree node; MissingNode when it is not in memory."""
        node = self._nodes.get(ref)
        if node is None:
            raise MissingNode((ref,))
        self._ahead.use(ref)
        return node

    def extent(self, ref: BlobRef) -> bytes:
        """The 16,384 bytes of an extent; MissingExtent when it is not on this machine.

        The local cache is read here and now: that takes less time than to come back for it.
        """
        payload = self._extents.get(ref)
        if payload is None:
            payload = self._kept(ref, Kind.EXTENT)
            if payload is None:
                raise MissingExtent((ref,))
            self._extents.put(ref, payload)
        return payload

    def extents(self, refs: Sequence[BlobRef]) -> list[bytes]:
        """Several extents; MissingExtent of all that are not on this machine.

        Those of the local cache do not stay in memory: whoever reads so much keeps it.
        """
        held = self._extents.some(refs)
        if held:
            rest = [ref for ref in refs if ref not in held]
            read = dict(zip(rest, self._cache.payloads(rest, CODES[Kind.EXTENT]), strict=True))
            found = [held.get(ref) or read[ref] for ref in refs]
        else:
            found = self._cache.payloads(refs, CODES[Kind.EXTENT])
        missing = [ref for ref, payload in zip(refs, found, strict=True) if payload is None]
        if missing:
            raise MissingExtent(tuple(missing))
        return cast("list[bytes]", found)

    def has_extent(self, ref: BlobRef) -> bool:
        """Whether an extent is on this machine or being fetched."""
        return self._extents.get(ref) is not None or ref in self._loading or ref in self._cache

    def _kept(self, ref: BlobRef, kind: Kind) -> bytes | None:
        """The payload of a blob in the local cache."""
        return self._cache.payloads((ref,), CODES[kind])[0]

    def entries(self, dead: DeadList) -> tuple[list[Dead], list[BlobRef]]:
        """Every blob on a dead list, and every page of the list; MissingPage."""
        entries, pages = list(dead.entries), []
        work = [(i + 1, ref) for i, refs in enumerate(dead.levels) for ref in refs]
        missing = []
        while work:
            level, ref = work.pop()
            pages.append(ref)
            page = self._pages.get(ref)
            if page is None:
                missing.append(ref)
                continue
            entries += page[0]
            work += [(level - 1, below) for below in page[1]]
        if missing:
            raise MissingPage(tuple(missing))
        return entries, pages

    def snapshots(self, known: Known | None = None) -> list[Snapshot]:
        """The snapshots of a known generation, oldest first; MissingTable if not here."""
        known = known or self.known
        tables = known.anchor.tables if known else ()
        missing = [ref for ref in tables if not self._has_table(ref)]
        if missing:
            raise MissingTable(tuple(missing))
        return [snapshot for ref in tables for snapshot in self._tables[ref]]

    def _has_table(self, ref: BlobRef) -> bool:
        """Whether a table is in memory, perhaps only now: as with extents."""
        if ref not in self._tables and (payload := self._kept(ref, Kind.TABLE)) is not None:
            self._tables[ref] = decode_table(payload)
        return ref in self._tables

    def remember(self, ref: BlobRef, opened: Opened, node: Node | None) -> None:
        """Keep a blob that was just published, so that reading it back costs nothing."""
        self._cache.put(ref, opened.encode())
        if node is not None:
            self._nodes.put(ref, node)

    def forget(self, ref: BlobRef) -> None:
        """Drop a blob from the local cache: it was deleted."""
        self._cache.drop(ref)
        self._pages.pop(ref, None)
        self._tables.pop(ref, None)

    def prefetch(self, refs: Iterable[BlobRef], nursery: trio.Nursery) -> None:
        """Fetch extents in the background; failures show when they are really read."""
        wanted = tuple(ref for ref in refs if not self.has_extent(ref))
        if wanted:
            nursery.start_soon(self._prefetch, MissingExtent(wanted))

    async def _prefetch(self, missing: Missing) -> None:
        try:
            await self.load(missing)
        except HpkvError as error:
            log.debug("read-ahead: %s", error)
        except Exception:  # only a hint: the mount outlives it
            log.exception("read-ahead failed")

    async def load(self, missing: Missing) -> None:
        """Bring what is missing into memory, in parallel; StoreError or CorruptBlob."""
        kind = _KINDS[type(missing)]

        async def load(ref: BlobRef) -> None:
            await self._load_one(ref, kind)

        if len(missing.refs) == 1:
            await load(missing.refs[0])
        else:
            await each(missing.refs, load, FETCHES_AT_ONCE)

    async def _load_one(self, ref: BlobRef, kind: Kind) -> None:
        if (loading := self._loading.get(ref)) is not None:
            await loading.wait()
            return
        event = self._loading[ref] = trio.Event()
        try:
            self._accept(ref, kind, await self.fetch(ref, kind))
        finally:
            self._ahead.loaded(ref)
            del self._loading[ref]
            event.set()

    def _accept(self, ref: BlobRef, kind: Kind, payload: bytes) -> None:
        if kind is Kind.EXTENT:
            self._extents.put(ref, payload)
        elif kind is Kind.NODE:
            try:
                self._nodes.put(ref, Node.decode(payload))
            except CorruptNode as error:
                raise CorruptBlob(f"node {ref!r} is damaged: {error}") from None
        elif kind is Kind.TABLE:
            self._tables[ref] = decode_table(payload)
        else:
            self._pages[ref] = read_page(payload, payload[0])

    async def fetch(self, ref: BlobRef, kind: Kind, *, fresh: bool = False) -> bytes:
        """One blob's payload, verified; from the server alone if `fresh`."""
        kept = None if fresh else self._kept(ref, kind)
        if kept is not None:
            return kept
        async with self._slots:
            blob = await self.store.look_up(self.keys.signer(ref.id).public)
        try:
            if blob is None:
                raise CorruptBlob(f"{ref!r} is missing at the server")
            opened = self.sealer.unseal(ref, kind, blob)
        except CorruptBlob as error:
            log.error("%s (%s)", error, kind.name.lower())
            raise
        self._cache.put(ref, opened.encode())
        return opened.payload

    def cached(self, ref: BlobRef) -> bytes | None:
        """A blob, made again from the local cache, that is what its reference promises; or None."""
        opened = self._cache.get(ref)
        blob = None if opened is None else self.sealer.again(ref.id, Opened.decode(opened))
        return blob if blob is not None and self.sealer.reference(ref.id, blob) == ref else None

    def peek(self, ref: BlobRef, kind: Kind) -> bytes | None:
        """One blob's payload from the local cache alone; None when it is not there.

        It is verified once more: this is for who suspects everything.
        """
        return None if self.cached(ref) is None else self._kept(ref, kind)

    async def find_anchor(self, generation: Generation) -> Known | None:
        """Look up one generation's anchor; CorruptBlob if it is there but not an anchor."""
        blob_id = anchor_id(generation)
        blob = await self.store.look_up(self.keys.signer(blob_id).public)
        if blob is None:
            return None
        return open_anchor(self.sealer, generation, blob)

    async def find_blob(self, blob_id: BlobId) -> BlobRef | None:
        """Look up whatever lies under an id."""
        blob = await self.store.look_up(self.keys.signer(blob_id).public)
        return self.sealer.reference(blob_id, blob) if blob else None

    async def find_own(self, blob_id: BlobId) -> BlobRef | None:
        """As find_blob, for blobs whose digest was lost: what this vault did not make is none."""
        blob = await self.store.look_up(self.keys.signer(blob_id).public)
        if blob is None or not self.sealer.is_ours(blob_id, blob):
            return None
        return self.sealer.reference(blob_id, blob)


def open_anchor(sealer: Sealer, generation: Generation, blob: bytes) -> Known:
    """The anchor in a blob found under its number; CorruptBlob if it is another's."""
    blob_id = anchor_id(generation)
    anchor = Anchor.decode(sealer.open_unreferenced(blob_id, Kind.ANCHOR, blob))
    if anchor.generation != generation:
        raise CorruptBlob(f"the anchor of generation {generation} claims {anchor.generation}")
    return Known(anchor, sealer.reference(blob_id, blob))


def together(misses: Iterable[Missing]) -> Missing:
    """Several misses as one of the first one's kind, so that they are fetched in parallel."""
    first, *rest = misses
    alike = [miss for miss in rest if type(miss) is type(first)]
    refs = dict.fromkeys(ref for miss in (first, *alike) for ref in miss.refs)
    return type(first)(tuple(refs))
