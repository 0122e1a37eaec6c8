"""Anchors: one small blob per generation that names the root and all that is not in the tree.

Anchor n lives under a key derived from n alone, and inserting it is the moment generation n
exists: the server refuses a second one, which is how two writers find out about each other.

Which anchors stay (the rest are dead and get collected), for newest generation n:
  - every binary prefix of n: n with its low l bits cleared, for each l;
  - every power of two up to n;
  - the last HANDOVERS that another writer published than the one before: whoever published that
    one, and does not know yet that he is not alone, finds the key of his next anchor in use.
So a client with nothing but the words finds n by searching for its highest bit (the powers of
two are present exactly up to it) and then fixing the bits below it, two in a round of three
look-ups: at most 2 log2(n) + 10 look-ups. An absent candidate always means "not reached yet".
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgpack

from hpkvfs.errors import CorruptBlob, NewerFormat, VaultError
from hpkvfs.types import PAYLOAD_SIZE, BlobId, BlobRef, Generation, anchor_id
from hpkvfs.volume.deadlist import DeadList, join_refs, split_refs

FORMAT_VERSION = 3
_LENGTH = 4
_EMPTY = DeadList()
_NO_ID = BlobId(0)
HANDOVERS: Final = 8
_LADDER: Final = (2, 4, 8, 16)

Round: TypeAlias = frozenset[Generation]
Search: TypeAlias = Generator[Round, Round, Generation | None]
_SHAPE = [int, int, bytes, int, int, bytes, bytes, *[int] * 5, list, bytes, int, list, int, list]


@dataclass(frozen=True, slots=True)
class Anchor:
    """One generation of the vault.

    writer: 8 random bytes of the state directory that published it; redo: the last redo log
    whose effects it includes (counted by that writer); live: nodes and extents reachable
    from root; size: sum of file sizes; kept: older anchors that are still stored.

    tables: the snapshots' records (snapshots.py); horizon: next_id of the newest snapshot, 0
    when there is none; held: that snapshot's held list; held_before: entries in those of the
    older ones.

    handovers: at most HANDOVERS generations, the newest last, that another writer published than
    the one before.
    """

    generation: Generation
    writer: bytes
    redo: int
    time: int
    root: BlobRef | None
    kept: tuple[BlobRef, ...]
    next_id: BlobId
    next_ino: int
    live: int
    size: int
    files: int
    dead: DeadList
    tables: tuple[BlobRef, ...] = ()
    horizon: BlobId = _NO_ID
    held: DeadList = _EMPTY
    held_before: int = 0
    handovers: tuple[Generation, ...] = ()

    def encode(self) -> bytes:
        """A 16,384-byte payload; ValueError when it does not fit (spill the dead list)."""
        fields = [
            FORMAT_VERSION,
            self.generation,
            self.writer,
            self.redo,
            self.time,
            self.root.encode() if self.root else b"",
            join_refs(self.kept),
            self.next_id,
            self.next_ino,
            self.live,
            self.size,
            self.files,
            self.dead.encode(),
            join_refs(self.tables),
            self.horizon,
            self.held.encode(),
            self.held_before,
            list(self.handovers),
        ]
        body: bytes = msgpack.packb(fields, use_bin_type=True)
        if len(body) + _LENGTH > PAYLOAD_SIZE:
            raise ValueError(f"an anchor of {len(body)} bytes does not fit a blob")
        return (len(body).to_bytes(_LENGTH, "big") + body).ljust(PAYLOAD_SIZE, b"\0")

    @classmethod
    def decode(cls, payload: bytes) -> Anchor:
        """Inverse of encode; NewerFormat, VaultError (an older one) or CorruptBlob."""
        fields = _unpack(payload)
        if fields[0] != FORMAT_VERSION:
            raise _other_format(fields[0])
        if list(map(type, fields)) != _SHAPE:
            raise CorruptBlob("an anchor is damaged")
        try:
            _, generation, writer, redo, time, root, kept, *rest = fields
            next_id, next_ino, live, size, files, dead, tables, horizon, held, *last = rest
            held_before, handovers = last
            anchor = cls(
                generation,
                writer,
                redo,
                time,
                BlobRef.decode(root) if root else None,
                split_refs(kept),
                next_id,
                next_ino,
                live,
                size,
                files,
                DeadList.decode(dead),
                split_refs(tables),
                horizon,
                DeadList.decode(held),
                held_before,
                _generations(handovers),
            )
            canonical = anchor.encode() == payload and min(f for f in fields if type(f) is int) >= 0
        except (ValueError, TypeError):
            raise CorruptBlob("an anchor is damaged") from None
        if not canonical:
            raise CorruptBlob("an anchor is damaged")
        return anchor


def _other_format(found: object) -> VaultError:
    if isinstance(found, int) and found < FORMAT_VERSION:
        return VaultError(
            f"the vault has format {found}, older than this hpkvfs knows",
            "copy its files out with the hpkvfs that wrote it, into a new vault",
        )
    return NewerFormat(
        f"the vault has format {found}, newer than this hpkvfs knows", "install a newer hpkvfs"
    )


def _unpack(payload: bytes) -> list[Any]:
    length = int.from_bytes(payload[:_LENGTH], "big")
    body = payload[_LENGTH : _LENGTH + length]
    try:
        fields = msgpack.unpackb(body, raw=False)
    except (ValueError, msgpack.UnpackException):
        raise CorruptBlob("an anchor is damaged") from None
    if not isinstance(fields, list) or not fields or any(payload[_LENGTH + length :]):
        raise CorruptBlob("an anchor is damaged")
    return fields


def _generations(numbers: list[Any]) -> tuple[Generation, ...]:
    if len(numbers) > HANDOVERS or any(type(one) is not int or one < 0 for one in numbers):
        raise ValueError("not handovers")
    return tuple(map(Generation, numbers))


def kept_generations(newest: Generation) -> set[Generation]:
    """The generations whose anchors stay while `newest` is the newest, itself included."""
    bits = range(newest.bit_length() + 1)
    prefixes = {Generation(newest >> bit << bit) for bit in bits}
    powers = {Generation(1 << bit) for bit in range(newest.bit_length())}
    return prefixes | powers


def handed_over(previous: Anchor, writer: bytes) -> tuple[Generation, ...]:
    """The handovers once this writer published the generation after `previous`."""
    if writer == previous.writer:
        return previous.handovers
    return (*previous.handovers, Generation(previous.generation + 1))[-HANDOVERS:]


def successors(
    previous: Anchor, ref: BlobRef, handovers: tuple[Generation, ...]
) -> tuple[tuple[BlobRef, ...], list[BlobRef]]:
    """(kept, dead) among the stored anchors once the generation after `previous` exists."""
    newest = Generation(previous.generation + 1)
    stay = {anchor_id(n) for n in kept_generations(newest).union(handovers)}
    stored = [*previous.kept, ref]
    kept = tuple(old for old in stored if old.id in stay)
    return kept, [old for old in stored if old.id not in stay]


def heralds(generation: Generation | None) -> list[Generation]:
    """Generations of which at least one has an anchor if there is any after this one.

    The next one alone does not tell, since it may be collected by now. But of a newer n, that with
    its low bits cleared below the highest bit in which the two differ is kept. Ascending, the next
    one first; about log2(generation) / 2 + 2 of them.
    """
    here = -1 if generation is None else generation
    if here < 0:
        return [Generation(0), Generation(1)]
    places = [place for place in range(here.bit_length() + 1) if not here >> place & 1]
    return [Generation((here >> place | 1) << place) for place in places]


def find_newest(floor: Generation | None = None) -> Search:
    """Search for the newest generation n: yields a round of generations to look up, in parallel
    or not, and is sent those that exist. Returns n, or None when there is none at all.

    `floor`: a generation that existed once, so that n is that or a later one. Then what comes
    out has not always been looked up, and when it is not there the server went back in time.
    """
    reached = Reached(floor)
    top = yield from _highest_bit(reached)
    if top is None:
        return None
    newest = 1 << top if top >= 0 else 0
    for bit in range(top - 1, -1, -2):
        # Two bits in one round cost half a look-up a bit more, and save half of the waiting.
        high, low = 1 << bit, 1 << bit >> 1
        yield from reached.ask(newest | high, newest | low, newest | high | low)
        for value in (high, low):
            if newest | value in reached:
                newest |= value
    return Generation(newest)


def _highest_bit(reached: Reached) -> Generator[Round, Round, int | None]:
    """The place of n's highest bit; -1 when n is 0, None when there is no generation."""
    yield from reached.ask(0, *(1 << place for place in _LADDER))
    if 0 not in reached:
        return None
    low = max((place for place in (*_LADDER, reached.place) if 1 << place in reached), default=-1)
    high = next((place for place in _LADDER if place > low), None)
    step = 1
    while high is None:
        yield from reached.ask(1 << low + step)
        if 1 << low + step in reached:
            low, step = low + step, 2 * step
        else:
            high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        yield from reached.ask(1 << middle)
        low, high = (middle, high) if 1 << middle in reached else (low, middle)
    return low


class Reached:
    """Which generations there are, as far as it is known: those up to `floor`, those found."""

    def __init__(self, floor: Generation | None) -> None:
        self._floor = -1 if floor is None else floor
        self._found: set[int] = set()
        self._asked: set[int] = set()

    @property
    def place(self) -> int:
        """The highest bit of the floor; 0 when that tells nothing."""
        return max(self._floor.bit_length() - 1, 0) if self._floor > 0 else 0

    def __contains__(self, generation: int) -> bool:
        return generation <= self._floor or generation in self._found

    def ask(self, *generations: int) -> Generator[Round, Round, None]:
        """A round of look-ups of those of which it is not known yet."""
        unknown = {n for n in generations if n not in self and n not in self._asked}
        if unknown:
            self._asked |= unknown
            self._found |= yield frozenset(map(Generation, unknown))
