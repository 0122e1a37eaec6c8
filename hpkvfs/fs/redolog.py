"""The redo log: what changed since the last published generation, on the local disk.

Files `redo.N`, N counting up; a published anchor says up to which N it covers. A file:

    "HPKVREDO" version(1) number(8) previous(8) records(4) salt(16), then records
    record: u32 length || seal(key, nonce = record index, msgpack [effect, ...])
    then zeros, to the end of what was written ahead
    key = HMAC-SHA256(redo key, header)
    seal: ChaCha20-Poly1305 in version 2, AES-256-GCM in version 3, whichever is quicker (aead.py)

`previous` is the file that had the record before this file's first, `records` how many it had.

The zeros are written a step ahead: a sync of small records then overwrites blocks that the
file has, and nothing about the file changes that the disk's filesystem must write down too
(on ext4 a third to a half of the time). A large record is appended as it is.

Invariants
  - one record is one operation: it is there whole or not at all;
  - a record is appended before its effects are visible, and a `syncer` returns only when
    every record appended before it was made is on the disk, those of earlier processes included;
  - what is replayed is a prefix of what was appended: when power fails, a file may lose its end
    and the one after it nothing, and then the latter does not follow and is left out;
  - a nonce is used once: a file is never written to again after a failed append or a restart.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack
from cryptography.exceptions import InvalidTag

from hpkvfs.aead import CIPHERS, Cipher, has_aes
from hpkvfs.errors import NewerFormat, VaultError
from hpkvfs.fs.layer import Cut, Effect, Gone, Put, Usage, Write

log = logging.getLogger(__name__)

_MAGIC = b"HPKVREDO"
_FIRST_VERSION = 2
_VERSIONS = range(_FIRST_VERSION, _FIRST_VERSION + len(CIPHERS))
"""One for each cipher."""
_HEADER = struct.Struct(">8sBQQI16s")
_LENGTH = struct.Struct(">I")
_ZEROS = bytes(1 << 17)
_EFFECTS: tuple[type[Effect], ...] = (Put, Gone, Cut, Write, Usage)
_CODE: dict[type[Effect], int] = {kind: code for code, kind in enumerate(_EFFECTS)}


class Record:
    """An operation in the log, to be read again. Implements fs.layer.Record."""

    __slots__ = ("_log", "at", "index", "number", "size")

    def __init__(self, log: RedoLog, number: int, index: int, at: int, size: int) -> None:
        """Of file `number`, sealed with nonce `index`, `size` bytes from `at` on."""
        self._log = log
        self.number, self.index, self.at, self.size = number, index, at, size

    def written(self, at: int) -> bytes:
        """See fs.layer.Record."""
        effect = self._log.read_again(self)[at]
        assert isinstance(effect, Write)
        return effect.data


class RedoLog:
    """Append-only, encrypted, in numbered files of one directory."""

    def __init__(
        self,
        directory: Path,
        key: bytes,
        rng: Callable[[int], bytes],
        *,
        aes: bool | None = None,
    ) -> None:
        """`aes`: seal with AES; by default if the processor has instructions for it."""
        self._directory = directory
        self._version = _VERSIONS[has_aes() if aes is None else aes]
        self._key = key
        self._rng = rng
        self._fd: int | None = None
        self._retired: dict[int, int] = {}
        self._safe: set[int] = set()  # of those, on the disk
        self._ciphers: dict[int, Cipher] = {}
        self._again: tuple[Record | None, list[Effect]] = None, []
        self._records = 0
        self._size = 0
        self._sizes: dict[int, int] = {}
        self._last = (0, 0)
        self._zeroed = 0
        self.number = 0
        self.failure: OSError | None = None
        """Why an operation could not be added since files were last dropped."""

    @property
    def size(self) -> int:
        """Bytes of all files that no published generation covers."""
        return sum(self._sizes.values()) + self._size

    def replay(self, covered: int) -> Iterator[tuple[Record, list[Effect]]]:
        """Every record after the files that a generation covers, in order; then starts anew."""
        files = [n for n in self._files() if n > covered]
        self._last = (covered, 0)
        for number in files:
            self._adopt(number)
            for record, effects in self._read(number, covered):
                yield record, effects
                self._last = (number, record.index + 1)
        self.number = max([covered, *files])

    def read_again(self, record: Record) -> list[Effect]:
        """What a record says; VaultError when its file was dropped or changed. The last one is
        remembered: blocks written together are read together."""
        if self._again[0] is not record:
            self._again = record, self._load(record)
        return self._again[1]

    def _load(self, record: Record) -> list[Effect]:
        number = record.number
        try:
            sealed = os.pread(self._fd_of(number), record.size, record.at)
            body = self._ciphers[number].decrypt(_nonce(record.index), sealed, None)
        except (OSError, InvalidTag) as error:
            raise VaultError(
                f"redo log {number} cannot be read back: {error or 'it is not what was written'}",
                "see to the disk; what was published is safe",
            ) from error
        return _effects(body)

    def _fd_of(self, number: int) -> int:
        fd = self._retired.get(number, self._fd)
        assert fd is not None
        return fd

    def append(self, effects: Iterable[Effect]) -> Record:
        """Add one operation; OSError (ENOSPC, EIO, ...) and nothing added when it can't."""
        try:
            return self._append(effects)
        except OSError as error:
            self.failure = error
            raise

    def _append(self, effects: Iterable[Effect]) -> Record:
        if self._fd is None:
            self._open()
        assert self._fd is not None
        body = msgpack.packb([(_CODE[type(e)], *e) for e in effects], use_bin_type=True)
        sealed = self._ciphers[self.number].encrypt(_nonce(self._records), body, None)
        size = _LENGTH.size + len(sealed)
        try:
            parts = [_LENGTH.pack(len(sealed)), sealed]
            if self._size + size > self._zeroed and size < len(_ZEROS):
                parts.append(_ZEROS)
                self._zeroed = self._size + size + len(_ZEROS)
            written = os.pwritev(self._fd, parts, self._size)
            if written < size:
                raise _no_room()
        except OSError:
            self._fail(self._fd)
            raise
        start = self._size + _LENGTH.size
        record = Record(self, self.number, self._records, start, len(sealed))
        self._records += 1
        self._size += size
        self._last = (self.number, self._records)
        return record

    def _fail(self, fd: int) -> None:
        """Leave the file as it was before the record that could not be added, and for good."""
        try:
            os.ftruncate(fd, self._size)
        finally:
            self.rotate()

    def syncer(self) -> Callable[[], None]:
        """A function that returns when all appended so far is on the disk; a thread may run it."""
        retired = self._retired.keys() - self._safe
        current = [] if self._fd is None else [self._fd]
        fds = [os.dup(fd) for fd in (*(self._retired[n] for n in sorted(retired)), *current)]

        def sync() -> None:
            try:
                for fd in fds:
                    os.fdatasync(fd)
            finally:
                for fd in fds:
                    os.close(fd)
            self._safe |= retired

        return sync

    def rotate(self) -> int:
        """End the current file: what is appended later goes to the next. Its number."""
        if self._fd is not None:
            self._retired[self.number] = self._fd
            self._sizes[self.number] = self._size
        self._fd = None
        self._size = 0
        return self.number

    def drop(self, covered: int) -> None:
        """Delete the files that a published generation covers."""
        self.failure = None
        self._again = None, []
        for number in [n for n in self._retired if n <= covered]:
            os.close(self._retired.pop(number))
            self._safe.discard(number)
            self._ciphers.pop(number, None)
        for number in self._files():
            if number <= covered:
                self._path(number).unlink(missing_ok=True)
                self._sizes.pop(number, None)

    def close(self) -> None:
        """Sync and close."""
        self.syncer()()
        self.rotate()
        while self._retired:
            os.close(self._retired.popitem()[1])

    def _open(self) -> None:
        """Begin a file; OSError, and none is left behind, when it can't be."""
        self.number += 1
        path = self._path(self.number)
        salt = self._rng(16)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        header = _HEADER.pack(_MAGIC, self._version, self.number, *self._last, salt)
        fd = os.open(path, flags, 0o600)
        try:
            if os.write(fd, header) < len(header):
                raise _no_room()
            _sync_directory(self._directory)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        self._fd, self._ciphers[self.number] = fd, self._cipher_of(header)
        self._records, self._size, self._zeroed = 0, len(header), len(header)

    def _cipher_of(self, header: bytes) -> Cipher:
        kind = CIPHERS[header[len(_MAGIC)] - _FIRST_VERSION]
        return kind(hmac.digest(self._key, header, hashlib.sha256))

    def _adopt(self, number: int) -> None:
        """What an earlier process wrote and did not sync is from now on synced with the rest."""
        if number != self.number and number not in self._retired:
            fd = self._retired[number] = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
            self._sizes[number] = os.fstat(fd).st_size

    def _read(self, number: int, covered: int) -> Iterator[tuple[Record, list[Effect]]]:
        fd = self._fd_of(number)
        if self._follows(number, os.pread(fd, _HEADER.size + _LENGTH.size, 0), covered):
            yield from self._records_of(number, fd)

    def _records_of(self, number: int, fd: int) -> Iterator[tuple[Record, list[Effect]]]:
        cipher = self._ciphers[number] = self._cipher_of(os.pread(fd, _HEADER.size, 0))
        length, at, index = os.fstat(fd).st_size, _HEADER.size, 0
        while at + _LENGTH.size <= length:
            start = at + _LENGTH.size
            (size,) = _LENGTH.unpack(os.pread(fd, _LENGTH.size, at))
            if not size:
                return
            try:
                sealed = os.pread(fd, size, start) if size <= length - start else b""
                body = cipher.decrypt(_nonce(index), sealed, None)
            except InvalidTag:
                if start + size < length:
                    log.warning("redo log %d ends early, at record %d", number, index)
                return
            yield Record(self, number, index, start, size), _effects(body)
            at, index = start + size, index + 1

    def _follows(self, number: int, raw: bytes, covered: int) -> bool:
        """Whether a file that begins like this goes on where the last one that was read ended."""
        if len(raw.rstrip(b"\0")) < _HEADER.size:
            return False  # power failed before anything of it was on the disk
        magic, version, found, *before, _ = _HEADER.unpack_from(raw)
        if magic != _MAGIC:
            raise VaultError(f"redo log {number} is not one of this vault's")
        if version >= _VERSIONS.stop:
            raise NewerFormat(f"redo log {number} was written by a newer hpkvfs")
        if version not in _VERSIONS or found != number:
            raise VaultError(f"redo log {number} is not one that this hpkvfs can read")
        if before[0] <= covered or tuple(before) == self._last:
            return True
        log.warning("redo log %d does not follow what is left of log %d", number, before[0])
        return False

    def _files(self) -> list[int]:
        names = (p.name.removeprefix("redo.") for p in self._directory.glob("redo.*"))
        return sorted(int(name) for name in names if name.isdigit())

    def _path(self, number: int) -> Path:
        return self._directory / f"redo.{number}"


def _no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _nonce(index: int) -> bytes:
    return index.to_bytes(12, "big")


def _effects(body: bytes) -> list[Effect]:
    return [_effect(form) for form in msgpack.unpackb(body, raw=False)]


def _effect(form: list[Any]) -> Effect:
    code, *fields = form
    kind: Any = _EFFECTS[code]
    effect: Effect = kind(*fields)
    return effect


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
