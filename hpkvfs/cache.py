"""Blobs that were fetched or written once, kept on disk, opened (volume/blob.py).

The file is a table of names and then slots of one size; both are written in place and never
waited for:

    header   4096 bytes: magic "hpkvcach", u32 version, u32 cipher, u32 slots, zeros
    names    slots x 16 bytes: BLAKE2b-128(key, BlobRef.encode()), or zeros for a free slot
    slots    slots x 16,494 bytes: nonce (12) || payload (16,384 + 16) || kind, point, key (66 + 16)

An opened blob is its payload and what it takes to make the very same blob again. So what is read
here needs no second decryption, no digest and above all no ECDH: it was checked before it was
put, and this file's own seal says that it is what was put. Payload and rest are sealed each for
itself, under a key of its own, since only the payload is wanted when a file is read. Additional
data is the name, for a payload and the kind.

The cipher is AES-256-GCM where the processor has instructions for it (a quarter of the time), else
ChaCha20-Poly1305; `cipher` in the header tells which. A nonce is random: 2^32 blobs may be put.

Nothing in it can be matched with what a server holds: names are keyed hashes, and each blob is
sealed under the cache's own key, which derives from the root key as the blobs' own do: whoever
has it could open the blobs as well. Nothing in it is trusted either: a torn write, a flipped
bit, a slot under another's name all fail to open and count as not being there, so a crash needs
no recovery. A file with another header (number of slots, cipher) is started afresh.

The order of use is kept in memory only: after a start, blobs leave in the order of their slots.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag

from hpkvfs.aead import CIPHERS, has_aes
from hpkvfs.types import OPENED_SIZE, PAYLOAD_SIZE, BlobRef

_HEADER: Final = struct.Struct(">8sIII")
_MAGIC: Final = b"hpkvcach"
_VERSION: Final = 3
_HEADER_SIZE: Final = 4096
_NAME: Final = 16
_NONCE: Final = 12
_TAG: Final = 16
_REST: Final = OPENED_SIZE - PAYLOAD_SIZE
_BODY: Final = _NONCE + PAYLOAD_SIZE + _TAG
_SEALED: Final = _BODY + _REST + _TAG
SLOT_SIZE: Final = _NAME + _SEALED
_NAMES_AT_HAND: Final = 4_096


class BlobCache:
    """At most `max_bytes` of blobs on disk, the least recently used leaving first.

    Every call is synchronous and quick (two system calls at most), and none fails: what cannot
    be written or read is simply not there.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        max_bytes: int,
        rng: Callable[[int], bytes] = os.urandom,
        *,
        aes: bool | None = None,
    ) -> None:
        """Open or create the file (mode 0600); `key` has 32 bytes. OSError when it cannot be.

        `aes`: seal with AES; by default if the processor has instructions for it.
        """
        self._slots = max(1, (max_bytes - _HEADER_SIZE) // SLOT_SIZE)
        self._first = _HEADER_SIZE + _NAME * self._slots
        self._name_key = hmac.digest(key, b"name", hashlib.sha256)
        self._name = lru_cache(_NAMES_AT_HAND)(self._make_name)
        self._number = int(has_aes() if aes is None else aes)
        cipher = CIPHERS[self._number]
        self._body = cipher(hmac.digest(key, b"payload", hashlib.sha256))
        self._rest = cipher(hmac.digest(key, b"rest", hashlib.sha256))
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
        try:
            blob = self._read(name, slot)
        except (OSError, ValueError, InvalidTag):
            self._discard(name)
            return None
        self._order.move_to_end(name)
        return blob

    def payloads(self, refs: Iterable[BlobRef], kind: bytes) -> list[bytes | None]:
        """As get for each of them, the payload alone (16,384 bytes) if it was put as of this kind.

        One loop with no calls of our own: half of what reading a large file takes is here.
        """
        found: list[bytes | None] = []
        order, file, first, decrypt = self._order, self._file, self._first, self._body.decrypt
        for ref in refs:
            name = self._name(ref)
            slot = order.get(name)
            if slot is None:
                found.append(None)
                continue
            try:
                sealed = memoryview(os.pread(file, _BODY, first + _SEALED * slot))
                found.append(decrypt(sealed[:_NONCE], sealed[_NONCE:], name + kind))
                order.move_to_end(name)
            except (OSError, ValueError, InvalidTag):
                self._discard(name)
                found.append(None)
        return found

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

    def _make_name(self, ref: BlobRef) -> bytes:
        return hashlib.blake2b(ref.encode(), digest_size=_NAME, key=self._name_key).digest()

    def _read(self, name: bytes, slot: int) -> bytes:
        sealed = memoryview(os.pread(self._file, _SEALED, self._place(slot)))
        rest = self._rest.decrypt(sealed[:_NONCE], sealed[_BODY:], name)
        aad = name + rest[:1]
        return rest + self._body.decrypt(sealed[:_NONCE], sealed[_NONCE:_BODY], aad)

    def _write(self, name: bytes, slot: int, blob: bytes) -> bool:
        nonce, kind = self._rng(_NONCE), blob[:1]
        body = self._body.encrypt(nonce, memoryview(blob)[_REST:], name + kind)
        sealed = b"".join((nonce, body, self._rest.encrypt(nonce, blob[:_REST], name)))
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
        return self._first + _SEALED * slot

    def _start(self) -> tuple[OrderedDict[bytes, int], list[int]]:
        header = _HEADER.pack(_MAGIC, _VERSION, self._number, self._slots)
        if os.pread(self._file, _HEADER.size, 0) != header:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, header, 0)
        table = os.pread(self._file, _NAME * self._slots, _HEADER_SIZE)
        table = table.ljust(_NAME * self._slots, b"\0")
        names = [table[at : at + _NAME] for at in range(0, len(table), _NAME)]
        used = {name: slot for slot, name in enumerate(names) if any(name)}
        free = sorted(set(range(self._slots)) - set(used.values()), reverse=True)
        return OrderedDict(used), free
