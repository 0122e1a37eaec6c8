"""Blobs that were fetched or written once, kept on disk, opened (volume/blob.py).

The file is a table of names and then slots of one size; both are written in place and never
waited for:

    header   4096 bytes: magic "hpkvcach", u32 version, u32 slots, zeros
    names    slots x 16 bytes: HMAC-SHA256(key, BlobRef.encode())[:16], or zeros for a free slot
    slots    slots x 16,478 bytes: nonce (12) || ChaCha20-Poly1305 of the opened blob, AAD = name

An opened blob is its payload and what it takes to make the very same blob again. So what is read
here needs no second decryption, no digest and above all no ECDH: it was checked before it was
put, and this file's own seal says that it is what was put.

Nothing in it can be matched with what a server holds: names are keyed hashes, and each blob is
sealed under the cache's own key, which derives from the root key as the blobs' own do: whoever
has it could open the blobs as well. Nothing in it is trusted either: a torn write, a flipped
bit, a slot under another's name all fail to open and count as not being there, so a crash needs
no recovery. A file with another header, or another number of slots, is started afresh.

The order of use is kept in memory only: after a start, blobs leave in the order of their slots.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from hpkvfs.types import OPENED_SIZE, BlobRef

_HEADER: Final = struct.Struct(">8sII")
_MAGIC: Final = b"hpkvcach"
_VERSION: Final = 2
_HEADER_SIZE: Final = 4096
_NAME: Final = 16
_NONCE: Final = 12
_SEALED: Final = _NONCE + OPENED_SIZE + 16
SLOT_SIZE: Final = _NAME + _SEALED


class BlobCache:
    """At most `max_bytes` of blobs on disk, the least recently used leaving first.

    Every call is synchronous and quick (two system calls at most), and none fails: what cannot
    be written or read is simply not there.
    """

    def __init__(
        self, path: Path, key: bytes, max_bytes: int, rng: Callable[[int], bytes] = os.urandom
    ) -> None:
        """Open or create the file (mode 0600); `key` has 32 bytes. OSError when it cannot be."""
        self._slots = max(1, (max_bytes - _HEADER_SIZE) // SLOT_SIZE)
        self._name_key = hmac.digest(key, b"name", hashlib.sha256)
        self._cipher = ChaCha20Poly1305(hmac.digest(key, b"seal", hashlib.sha256))
        self._rng = rng
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._order, self._free = self._start()
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, ref: BlobRef) -> bool:
        """Whether it was put and has not left; not whether the file still has it."""
        return self._name(ref) in self._order

    def get(self, ref: BlobRef) -> bytes | None:
        """The opened blob, or None if it is not there or no longer what was put."""
        name = self._name(ref)
        slot = self._order.get(name)
        if slot is None:
            return None
        blob = self._read(name, slot)
        if blob is None:
            self._discard(name)
        else:
            self._order.move_to_end(name)
        return blob

    def put(self, ref: BlobRef, blob: bytes) -> None:
        """Keep an opened blob (16,450 bytes), in place of the least recently used if need be."""
        if len(blob) != OPENED_SIZE:
            raise ValueError(f"an opened blob has {OPENED_SIZE} bytes, not {len(blob)}")
        name = self._name(ref)
        if name in self._order:
            self._order.move_to_end(name)
            return
        slot = self._free.pop() if self._free else self._order.popitem(last=False)[1]
        if self._write(name, slot, blob):
            self._order[name] = slot
        else:
            self._free.append(slot)

    def drop(self, ref: BlobRef) -> None:
        """Forget a blob, if it is there."""
        self._discard(self._name(ref))

    def close(self) -> None:
        """Close the file; what was put stays for the next time."""
        os.close(self._file)

    def _name(self, ref: BlobRef) -> bytes:
        return hmac.digest(self._name_key, ref.encode(), hashlib.sha256)[:_NAME]

    def _read(self, name: bytes, slot: int) -> bytes | None:
        try:
            sealed = memoryview(os.pread(self._file, _SEALED, self._place(slot)))
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], name)
        except (OSError, ValueError, InvalidTag):
            return None

    def _write(self, name: bytes, slot: int, blob: bytes) -> bool:
        nonce = self._rng(_NONCE)
        sealed = nonce + self._cipher.encrypt(nonce, blob, name)
        try:
            written = os.pwrite(self._file, sealed, self._place(slot))
            os.pwrite(self._file, name, _HEADER_SIZE + _NAME * slot)
        except OSError:
            return False
        return written == _SEALED

    def _discard(self, name: bytes) -> None:
        slot = self._order.pop(name, None)
        if slot is None:
            return
        self._free.append(slot)
        try:
            os.pwrite(self._file, bytes(_NAME), _HEADER_SIZE + _NAME * slot)
        except OSError:
            return  # the name stays, over a slot that will not open

    def _place(self, slot: int) -> int:
        return _HEADER_SIZE + _NAME * self._slots + _SEALED * slot

    def _start(self) -> tuple[OrderedDict[bytes, int], list[int]]:
        header = _HEADER.pack(_MAGIC, _VERSION, self._slots)
        if os.pread(self._file, _HEADER.size, 0) != header:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, header, 0)
        table = os.pread(self._file, _NAME * self._slots, _HEADER_SIZE)
        table = table.ljust(_NAME * self._slots, b"\0")
        names = [table[at : at + _NAME] for at in range(0, len(table), _NAME)]
        used = {name: slot for slot, name in enumerate(names) if any(name)}
        free = sorted(set(range(self._slots)) - set(used.values()), reverse=True)
        return OrderedDict(used), free
