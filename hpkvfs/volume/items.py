"""Tree items: the 17-byte keys and the values under them (FORMAT.md, "Items").

A key is inode number (u64), kind (u8), offset (u64), big-endian, so a file's items lie
together and in order. Inode 0 is the volume itself: its items are not part of any file.

A block is 16,384 bytes of a file at a multiple of that. Trimmed of trailing zeros it is a
hole (empty), inline pieces of PIECE bytes (up to INLINE_LIMIT), or an extent of its own.
Never two of these at once: that is what fsck checks first.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from hashlib import blake2b
from typing import Any, NamedTuple

import msgpack

from hpkvfs.errors import CorruptBlob
from hpkvfs.types import PAYLOAD_SIZE, BlobRef

BLOCK = PAYLOAD_SIZE
PIECE = 2_048
INLINE_LIMIT = 4 * PIECE
ROOT_INO = 1
MAX_NAME = 255
MAX_XATTR = 7_500
MAX_SYMLINK = 4_095
MAX_OFFSET = (1 << 63) - 1
MIN_TIME, MAX_TIME = -(1 << 63), (1 << 63) - 1  # ns since 1970: the years 1677 to 2262
CHAIN = 128

_KEY = struct.Struct(">QBQ")
_FIELDS = struct.Struct(">4IQ3qIQ")  # what an inode's fields can hold; only ever packed, to see


class ItemKind(IntEnum):
    """The kind byte of a key; within an inode items sort in this order."""

    INODE = 1
    XATTR = 2
    SYMLINK = 3
    DIRENT = 4
    EXTENT = 5
    INLINE = 6
    ORPHAN = 16  # under inode 0 only


def key(ino: int, kind: ItemKind, offset: int = 0) -> bytes:
    """The 17 bytes of a tree key."""
    return _KEY.pack(ino, kind, offset)


def split_key(raw: bytes) -> tuple[int, int, int]:
    """(ino, kind, offset) of a tree key; CorruptBlob when it is none."""
    try:
        ino, kind, offset = _KEY.unpack(raw)
    except struct.error:
        raise CorruptBlob(f"a tree key of {len(raw)} bytes") from None
    return ino, kind, offset


def kind_range(ino: int, kind: ItemKind, start: int = 0) -> tuple[bytes, bytes]:
    """[lo, hi) of one inode's items of one kind, from an offset on."""
    return _KEY.pack(ino, kind, start), _KEY.pack(ino, kind + 1, 0)


def inode_range(ino: int) -> tuple[bytes, bytes]:
    """[lo, hi) of everything under one inode."""
    return _KEY.pack(ino, 0, 0), _KEY.pack(ino + 1, 0, 0)


class Inode(NamedTuple):
    """What stat(2) tells. Times in ns since 1970; `parent` is set for directories only."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    atime: int
    mtime: int
    ctime: int
    rdev: int = 0
    parent: int = 0

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file."""
        return stat.S_ISREG(self.mode)

    def encode(self) -> bytes:
        """The item's value; the number is in its key."""
        return _pack(self[1:])

    @classmethod
    def decode(cls, ino: int, raw: bytes) -> Inode:
        """Inverse of encode; CorruptBlob on anything else."""
        fields = _unpack(raw, _INODE, "an inode")
        try:
            _FIELDS.pack(*fields)  # one call for all ten: inodes are decoded a lot
        except struct.error:
            raise CorruptBlob("an inode is damaged") from None
        if fields[4] > MAX_OFFSET:
            raise CorruptBlob("an inode is damaged")
        return cls(ino, *fields)


class Dirent(NamedTuple):
    """One name in a directory. `cookie` is its place: stable for as long as it exists."""

    name: bytes
    ino: int
    type: int
    cookie: int = 0

    def encode(self) -> bytes:
        """The item's value; the cookie is in its key."""
        return _pack([self.ino, self.type, self.name])

    @classmethod
    def decode(cls, cookie: int, raw: bytes) -> Dirent:
        """Inverse of encode; CorruptBlob on anything else."""
        ino, kind, name = _unpack(raw, _DIRENT, "a directory entry")
        if not (ino > 0 and 0 <= kind < 16 and 0 < len(name) <= MAX_NAME):
            raise CorruptBlob("a directory entry is damaged")
        return cls(name, ino, kind, cookie)


def encode_xattr(name: bytes, value: bytes) -> bytes:
    """The value of an XATTR item."""
    return _pack([name, value])


def decode_xattr(raw: bytes) -> tuple[bytes, bytes]:
    """(name, value) of an XATTR item; CorruptBlob on anything else."""
    name, value = _unpack(raw, _XATTR, "an extended attribute")
    if not 0 < len(name) <= MAX_NAME or len(name) + len(value) > MAX_XATTR:
        raise CorruptBlob("an extended attribute is damaged")
    return name, value


def encode_extent(ref: BlobRef) -> bytes:
    """The value of an EXTENT item."""
    return ref.encode()


def decode_extent(raw: bytes) -> BlobRef:
    """The blob of an EXTENT item; CorruptBlob on anything else."""
    try:
        return BlobRef.decode(raw)
    except ValueError as error:
        raise CorruptBlob(f"an extent is damaged: {error}") from None


def file_type(mode: int) -> int:
    """The d_type nibble of a mode."""
    return stat.S_IFMT(mode) >> 12


class NameHash:
    """Places names in a directory: 56 keyed bits, and 7 more to tell collisions apart.

    Keyed, so that nobody can make names collide; the chain of one hash holds at most 128.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._last = (b"", (0, 0))

    def slots(self, name: bytes) -> tuple[int, int]:
        """[first, last) cookies that this name can have; all are below 2^63."""
        last, places = self._last
        if name != last or not last:  # the kernel looks a name up before it makes it
            places = self._slots(name)
            self._last = (name, places)
        return places

    def _slots(self, name: bytes) -> tuple[int, int]:
        digest = blake2b(name, digest_size=7, key=self._secret).digest()
        first = int.from_bytes(digest, "big") * CHAIN
        return first, first + CHAIN


def trim(block: bytes) -> bytes:
    """The block without its trailing zeros."""
    return bytes(block).rstrip(b"\0")


_pack: Callable[[Sequence[Any]], bytes] = msgpack.Packer(use_bin_type=True).pack
_INODE: list[type] = [int] * 10
_DIRENT: list[type] = [int, int, bytes]
_XATTR: list[type] = [bytes, bytes]


def _unpack(raw: bytes, shape: list[type], what: str) -> list[Any]:
    """The fields, of these types, if this is the one encoding of them; CorruptBlob."""
    try:
        fields: list[Any] = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException):
        raise CorruptBlob(f"{what} is damaged") from None
    # the types before packing, which not everything that can be unpacked survives
    if type(fields) is not list or list(map(type, fields)) != shape or _pack(fields) != raw:
        raise CorruptBlob(f"{what} is damaged")
    return fields


Clock = Callable[[], int]
