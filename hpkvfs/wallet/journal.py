"""The wallet's journal: persist, then speak.

A request leaves only after `begin` returned, so whatever reached the server is found again after
a crash. What a server answered need not be durable before it is used: `settle` is ordered
before every later `begin`, and a settlement that a crash undoes is a pending again, which is
resolved to the same outcome.

Statements run on the trio thread, a batch at a time, and only COMMIT, which waits for the disk,
runs on the writer thread. (A thread that ran the statements would fight the proofs for the
interpreter lock, several times per statement.) While one batch is being committed the next one
collects: group commit. A batch that nobody waits for is committed with the next `begin`, or by
`nudge`, `flush` or `close`.

A commit that finds the disk full fails whoever waits for it, and nothing else: what was to be
written stays in the batch, the database is as it was, and the next `flush` or `begin` writes all of
it. Any other failure, such as one of fsync, after which nobody knows what the disk has, breaks the
journal for good: every later call says so, and opening it again finds the last durable state.

The database, user_version 4 (those before had shorter rows, see rows.py). Every `sealed` is a
random 12-byte nonce and the row in ChaCha20-Poly1305 under the journal's key, with "table/name of
the row" as associated data.

    credentials(number, sealed)   held, or an input of a pending
    pendings(number, sealed)      inputs, attempts, memo, place
    receipts(seq, sealed)         performed with a memo, and not yet forgotten
    meta(name, sealed)            "book", "reserve" (see wallet.py), and whatever the caller keeps
                                  under other names
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from hpkvfs.errors import AlreadyInUse, DiskFull, NewerFormat, VaultError
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet import rows
from hpkvfs.wallet.wallet import Book, Held, Pending, Settled, Wallet

log = logging.getLogger(__name__)

FORMAT: Final = 4
_READABLE: Final = 3
"""The oldest format whose rows can be read as they are."""
_DAMAGE: Final = (sqlite3.DatabaseError, UnicodeDecodeError)
"""What SQLite raises of a damaged file; the latter when it quotes what is not UTF-8."""
_NONCE: Final = 12
_WAL_BYTES: Final = 5 << 20
"""Somewhat more than the WAL grows to before SQLite begins it again: 1,000 pages."""
_NO_ROOM: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)
"""A write that was refused (ENOSPC, a quota), before any fsync: the transaction is not there."""
KNOWN: Final = "known"
"""The name under which the newest known generation is kept."""
PURCHASE: Final = "purchase/"
"""A purchase of tokens is kept under this and the hexadecimal digest of its voucher; it is
forgotten in the transaction that has the voucher's credentials."""
_BOOK: Final = "book"
_RESERVE: Final = "reserve"
_SCHEMA: Final = f"""
CREATE TABLE credentials(number INTEGER PRIMARY KEY, sealed BLOB NOT NULL) STRICT;
CREATE TABLE pendings(number INTEGER PRIMARY KEY, sealed BLOB NOT NULL) STRICT;
CREATE TABLE receipts(seq INTEGER PRIMARY KEY, sealed BLOB NOT NULL) STRICT;
CREATE TABLE meta(name TEXT PRIMARY KEY, sealed BLOB NOT NULL) STRICT, WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""

_ADD_PENDING: Final = "INSERT OR REPLACE INTO pendings VALUES (?, ?)"
_ADD_CREDENTIAL: Final = "INSERT INTO credentials VALUES (?, ?)"
_ADD_RECEIPT: Final = "INSERT INTO receipts VALUES (?, ?)"
_PUT_META: Final = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
_DROP_PENDING: Final = "DELETE FROM pendings WHERE number = ?"
_DROP_CREDENTIAL: Final = "DELETE FROM credentials WHERE number = ?"
_DROP_RECEIPTS: Final = "DELETE FROM receipts WHERE seq <= ?"
_DROP_META: Final = "DELETE FROM meta WHERE name = ?"

# All rows of one statement of a batch are written together, in this order: within a batch a row
# may be written and then dropped, and is never dropped and then written.
_ORDER: Final = (
    _ADD_PENDING,
    _ADD_CREDENTIAL,
    _ADD_RECEIPT,
    _PUT_META,
    _DROP_PENDING,
    _DROP_CREDENTIAL,
    _DROP_RECEIPTS,
    _DROP_META,
)


@dataclass(frozen=True, slots=True)
class Receipt:
    """An insert or a delete that was performed, told to the volume until it is forgotten."""

    seq: int
    operation: Operation
    memo: bytes


@dataclass(slots=True)
class _Batch:
    rows: dict[str, list[tuple[object, ...]]] = field(
        default_factory=lambda: {statement: [] for statement in _ORDER}
    )
    book: Book | None = None
    wanted: bool = False
    done: trio.Event = field(default_factory=trio.Event)
    failure: VaultError | None = None

    @property
    def empty(self) -> bool:
        return self.book is None and not any(self.rows.values())

    def then(self, later: _Batch) -> _Batch:
        """Both as one, that nobody waits for yet. No number is used twice: see _ORDER."""
        rows = {name: values + later.rows[name] for name, values in self.rows.items()}
        return _Batch(rows, later.book or self.book)

    def end(self, failure: VaultError | None = None) -> None:
        """Wake who waits for it."""
        self.failure = failure
        self.done.set()


class Journal:
    """One sqlite file, held by one process."""

    def __init__(self, path: Path, key: bytes, rng: Callable[[int], bytes]) -> None:
        """Open or create; `key` has 32 bytes, `rng(n)` gives n random bytes.

        AlreadyInUse when another process holds it, NewerFormat, and VaultError when it is
        damaged or was made with another key.
        """
        self._cipher = ChaCha20Poly1305(key)
        self._rng = rng
        self._batch = _Batch()
        self._committing: _Batch | None = None
        self._broken: VaultError | None = None
        self._jobs: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._path = path
        self._full: DiskFull | None = None
        self._database = _connect(path)
        try:
            self._meta: dict[str, bytes] = dict(self._read("meta"))
            self._receipts = {seq: Receipt(seq, *one) for seq, one in self._read_receipts()}
        except BaseException:
            self._database.close()
            raise
        self._performed = {(one.operation, one.memo) for one in self._receipts.values()}
        self._last_receipt = max(self._receipts, default=0)

    @property
    def trouble(self) -> VaultError | None:
        """Why nothing can be written: DiskFull, which may pass, or another, which will not."""
        return self._broken or self._full

    def reserve_room(self) -> None:
        """Take from the disk now what commits need later, so that they go on when it is full.

        The write-ahead log is written over and over; what is behind its last valid frame says
        nothing. (https://www.sqlite.org/fileformat2.html#the_write_ahead_log)
        """
        wal = self._path.with_name(self._path.name + "-wal")
        with suppress(OSError):
            descriptor = os.open(wal, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.posix_fallocate(descriptor, 0, _WAL_BYTES)
            finally:
                os.close(descriptor)

    # Reading.

    def load(self) -> Wallet:
        """The wallet as the journal found it when opened; VaultError when it is damaged."""
        book, reserve = self._meta.get(_BOOK), self._meta.get(_RESERVE)
        try:
            held = {
                number: rows.unpack_held(number, row) for number, row in self._read("credentials")
            }
            pending = [rows.unpack_pending(*row, held) for row in self._read("pendings")]
            return Wallet(
                held.values(),
                pending,
                rows.unpack_book(book) if book else Book(),
                rows.unpack_reserve(reserve) if reserve else (),
            )
        except (ProtocolError, ValueError, LookupError, TypeError) as error:
            raise _damaged() from error

    @property
    def receipts(self) -> list[Receipt]:
        """What was performed with a memo and is not forgotten, oldest first."""
        return list(self._receipts.values())

    def has_receipt(self, operation: Operation, memo: bytes) -> bool:
        """Whether there is a receipt for this operation with this memo."""
        return (operation, memo) in self._performed

    def meta(self, name: str) -> bytes | None:
        """What `put_meta` kept under this name."""
        return self._meta.get(name)

    def names(self, prefix: str) -> list[str]:
        """The names, beginning so, under which something is kept."""
        return sorted(name for name in self._meta if name.startswith(prefix))

    # Writing. Everything joins the batch; only `begin` and `flush` wait for it.

    async def begin(self, pending: Pending) -> None:
        """Record a pending, or its second attempt; returns when it is on the disk."""
        self._add(_ADD_PENDING, "pendings", pending.number, rows.pack_pending(pending))
        await self.flush()

    async def begin_claim(self, pending: Pending, taken: Held, book: Book) -> None:
        """As `begin`, for a pending with a credential that the journal does not have yet."""
        self._add(_ADD_CREDENTIAL, "credentials", taken.number, rows.pack_held(taken))
        self._batch.book = book
        await self.begin(pending)

    def write_off(self, pending: Pending, book: Book) -> None:
        """Forget a pending and its inputs, which somebody else had spent."""
        self._drop(pending, *pending.inputs)
        self._batch.book = book

    def reserve(self, reserve: Sequence[Held]) -> None:
        """These, if they are still held when the journal is opened again, are the reserve."""
        self.put_meta(_RESERVE, rows.pack_reserve(reserve))

    def settle(self, settled: Settled, book: Book) -> None:
        """Outputs take the place of a pending and its inputs; `book` is the book after it."""
        self._drop(settled.pending, *settled.pending.inputs)
        for held in settled.outputs:
            self._add(_ADD_CREDENTIAL, "credentials", held.number, rows.pack_held(held))
        self._batch.book = book
        self._performed_now(settled.attempt.operation, settled.pending.memo)

    def release(self, pending: Pending) -> None:
        """Forget a pending; its inputs are held again."""
        self._drop(pending)

    def expire(self, held: Sequence[Held], book: Book) -> None:
        """Forget what expired with an epoch; `book` is the book after it."""
        self._batch.rows[_DROP_CREDENTIAL].extend((one.number,) for one in held)
        self._batch.book = book

    def conclude(self, pending: Pending, book: Book, *, done: bool) -> None:
        """Forget a pending of an ended epoch with its inputs, in one step with what is known of it
        instead: a receipt if what it asked for is so, and the book after it."""
        self._drop(pending, *pending.inputs)
        self._batch.book = book
        if done:
            self._performed_now(pending.attempts[0].operation, pending.memo)

    def forget_receipts(self, up_to: int) -> None:
        """Forget the receipts with seq <= up_to: a published anchor has them."""
        for seq in [seq for seq in self._receipts if seq <= up_to]:
            receipt = self._receipts.pop(seq)
            self._performed.discard((receipt.operation, receipt.memo))
        self._batch.rows[_DROP_RECEIPTS].append((up_to,))

    def put_meta(self, name: str, value: bytes) -> None:
        """Keep a value under a name in place of the one before."""
        if name == _BOOK:
            raise ValueError("the book is not the caller's to write")
        self._add(_PUT_META, "meta", name, value)
        self._meta[name] = value

    def drop_meta(self, name: str) -> None:
        """Forget what is kept under a name, if anything is.

        Nothing is to be kept under it again before the next `flush`: see _ORDER.
        """
        if name in self._meta:
            self._check()
            del self._meta[name]
            self._batch.rows[_DROP_META].append((name,))

    async def flush(self) -> None:
        """Return when everything so far is on the disk; VaultError if it cannot be.

        DiskFull: it is not there, and a later call may put it there.
        """
        batch = self._committing if self._batch.empty else self._batch
        self.nudge()
        if batch is not None:
            await batch.done.wait()
            if batch.failure is not None:
                raise batch.failure
        self._check()

    def nudge(self) -> None:
        """See that everything so far is committed soon, without waiting for it."""
        self._check()
        if not self._batch.empty:
            self._batch.wanted = True
            if self._committing is None:
                self._start()

    def close(self) -> None:
        """Commit what is left and close. Nothing may be waiting in `begin` or `flush`.

        What cannot be committed any more was not promised to anyone.
        """
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join()
        with closing(self._database), suppress(sqlite3.Error):
            if self._broken is None and not self._batch.empty:
                self._execute(self._batch)
                self._database.execute("COMMIT")

    # Inside: batches.

    def _add(self, statement: str, table: str, name: int | str, row: bytes) -> None:
        self._check()
        self._batch.rows[statement].append((name, self._seal(table, name, row)))

    def _drop(self, pending: Pending, *inputs: Held) -> None:
        self._batch.rows[_DROP_PENDING].append((pending.number,))
        self._batch.rows[_DROP_CREDENTIAL].extend((one.number,) for one in inputs)

    def _performed_now(self, operation: Operation, memo: bytes) -> None:
        if memo and operation in (Operation.INSERT, Operation.DELETE):
            self._keep_receipt(operation, memo)
        elif operation is Operation.ISSUE:
            self.drop_meta(PURCHASE + memo.hex())

    def _keep_receipt(self, operation: Operation, memo: bytes) -> None:
        self._last_receipt += 1
        receipt = Receipt(self._last_receipt, operation, memo)
        self._add(_ADD_RECEIPT, "receipts", receipt.seq, rows.pack_receipt(operation, memo))
        self._receipts[receipt.seq] = receipt
        self._performed.add((operation, memo))

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _start(self) -> None:
        self._committing, self._batch = self._batch, _Batch()
        try:
            self._execute(self._committing)
        except sqlite3.Error as error:
            self._committed(self._committing, error)
        else:
            self._hand_over(self._committing)

    def _hand_over(self, batch: _Batch) -> None:
        """Have what was executed committed elsewhere, and `_committed` called here after."""
        if self._writer is None:
            token = trio.lowlevel.current_trio_token()
            self._writer = threading.Thread(target=self._write, args=(token,), daemon=True)
            self._writer.start()
        self._jobs.put(batch)

    def _execute(self, batch: _Batch) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        if batch.book is not None:
            sealed = self._seal("meta", _BOOK, rows.pack_book(batch.book))
            self._database.execute(_PUT_META, (_BOOK, sealed))
        for statement, values in batch.rows.items():
            if values:
                self._database.executemany(statement, values)

    def _write(self, token: trio.lowlevel.TrioToken) -> None:
        while (batch := self._jobs.get()) is not None:
            failure = self._commit()
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._committed, batch, failure)

    def _commit(self) -> sqlite3.Error | None:
        try:
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            return error
        return None

    def _committed(self, batch: _Batch, failure: sqlite3.Error | None) -> None:
        self._committing = None
        if failure is not None:
            self._failed(batch, _unwritable(failure))
            return
        batch.end()
        if self._full is not None:
            log.warning("the wallet's journal can be written again")
            self._full = None
        if self._batch.wanted:
            self._start()

    def _failed(self, batch: _Batch, error: VaultError) -> None:
        """Tell who waits, also for what was to follow; keep all of it if it can be tried again."""
        if self.trouble is None:
            log.error("%s; %s", error.message, error.hint)
        later = self._batch
        if isinstance(error, DiskFull):
            self._full, self._batch = error, batch.then(later)
            with suppress(sqlite3.Error):  # SQLite may have done it already
                self._database.execute("ROLLBACK")
        else:
            self._broken = error
        batch.end(error)
        later.end(error)

    # Inside: rows.

    def _read(self, table: str) -> Iterator[tuple[Any, bytes]]:
        try:
            for name, sealed in self._database.execute(f"SELECT * FROM {table} ORDER BY 1"):
                yield name, self._open(table, name, sealed)
        except _DAMAGE as error:
            raise _damaged() from error

    def _read_receipts(self) -> Iterator[tuple[int, tuple[Operation, bytes]]]:
        return ((seq, rows.unpack_receipt(row)) for seq, row in self._read("receipts"))

    def _seal(self, table: str, name: int | str, row: bytes) -> bytes:
        nonce = self._rng(_NONCE)
        return nonce + self._cipher.encrypt(nonce, row, f"{table}/{name}".encode())

    def _open(self, table: str, name: int | str, sealed: bytes) -> bytes:
        associated = f"{table}/{name}".encode()
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], associated)
        except (InvalidTag, ValueError) as error:
            raise _damaged() from error


def reseal(
    source: Path, key: bytes, target: Path, target_key: bytes, rng: Callable[[int], bytes]
) -> None:
    """Copy a journal, sealed with another key, to a file that is replaced; durable on return.

    The two must never both be used. As for Journal, AlreadyInUse, NewerFormat, VaultError; also
    VaultError when the journal knows of a generation, since it then belongs to a vault.
    """
    for suffix in ("", "-wal", "-shm"):
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    old, new = Journal(source, key, rng), Journal(target, target_key, rng)
    with closing(old), closing(new):
        if old.meta(KNOWN) is not None:
            raise VaultError("this wallet belongs to a vault", "name another with --state")
        new._database.execute("BEGIN IMMEDIATE")
        for table in ("credentials", "pendings", "receipts", "meta"):
            rows_ = [(name, new._seal(table, name, row)) for name, row in old._read(table)]
            new._database.executemany(f"INSERT INTO {table} VALUES (?, ?)", rows_)
        new._database.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database)
    except sqlite3.OperationalError as error:
        database.close()
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise AlreadyInUse("another process has this wallet open", "stop it first") from error
        raise _unwritable(error) from error
    except _DAMAGE as error:
        database.close()
        raise _damaged() from error
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection) -> None:
    # Exclusive locking before WAL keeps the WAL's index in memory and others out of the file.
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
        database.execute(f"PRAGMA {pragma}").fetchall()
    database.execute("BEGIN IMMEDIATE")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    database.execute("ROLLBACK")
    if version > FORMAT:
        raise NewerFormat(
            f"the wallet's journal has format {version}; this program knows {FORMAT}",
            "install the newer hpkvfs",
        )
    if version == 0:
        database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    elif version < _READABLE:
        raise VaultError(
            f"the wallet's journal has format {version}, from before the first release",
            "recover the vault from its words",
        )
    elif version < FORMAT:
        database.execute(f"PRAGMA user_version = {FORMAT}")  # before any row is written anew


def _unwritable(error: sqlite3.Error) -> VaultError:
    """What to tell of a failed write."""
    if getattr(error, "sqlite_errorcode", None) in _NO_ROOM:
        return DiskFull(
            "the wallet's journal cannot be written, the disk is full",
            "nothing is lost: make room on it, and it goes on by itself",
        )
    return VaultError(
        f"the wallet's journal cannot be written: {error}",
        "nothing is lost: see to the disk, then unmount and mount again",
    )


def _damaged() -> VaultError:
    return VaultError(
        "the wallet's journal is damaged, or of another vault",
        "restore the state directory, or recover the vault from its words",
    )
