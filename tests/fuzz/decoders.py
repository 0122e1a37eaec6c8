"""The decoders, with valid encodings to start from and the only errors each may raise.

A decoder whose encoding is canonical has `encode`: what it decodes is encoded to the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hpkvd import config as settings
from hpkvd import epochs as epoch_files
from hpkvd.config import Config, ConfigError
from hpkvd.epochs import EpochError
from hpkvd.ledger import LedgerError
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.payments.cashu import Order
from hpkvfs import breakglass as notes
from hpkvfs.address import Address
from hpkvfs.cache import BlobCache
from hpkvfs.errors import CorruptBlob, HpkvError, NewerFormat, UserError, VaultError
from hpkvfs.fs.layer import Effect, Gone, Put, Usage, Write
from hpkvfs.fs.redolog import RedoLog
from hpkvfs.net.purchases import Purchase
from hpkvfs.protocol import codec
from hpkvfs.protocol.credential import Credential, Draft, Issuer, IssuerParameters, parse, prepare
from hpkvfs.protocol.ecash import Token
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.errors import Malformed, ProtocolError
from hpkvfs.protocol.group import Point, SigningKey
from hpkvfs.protocol.messages import (
    DeleteRequest,
    Done,
    Fact,
    InsertRequest,
    IssueRequest,
    LookUpRequest,
    Method,
    Offer,
    Offers,
    OffersRequest,
    Outcome,
    Parameters,
    ParametersRequest,
    Payment,
    PayRequest,
    Reason,
    Refused,
    ReissueRequest,
    Spent,
    StoredFact,
    decode_reply,
    decode_request,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.voucher import Voucher
from hpkvfs.state import StateDirectory
from hpkvfs.tree.node import CorruptNode, Node
from hpkvfs.types import BLOB_SIZE, OPENED_SIZE, BlobId, BlobRef, Generation, anchor_id
from hpkvfs.volume import deadlist, items
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.blob import Kind, Sealer
from hpkvfs.volume.deadlist import Dead, DeadList
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.snapshots import Snapshot, decode_table, encode_tables
from hpkvfs.wallet import breakglass, rows
from hpkvfs.wallet.journal import Journal
from hpkvfs.wallet.wallet import Attempt, Book, Held, Pending
from tests.server.support import epoch, identity

CHANCE = random.Random("fuzz")
KEY = bytes(range(32))
REFS = [BlobRef(BlobId(n), hashlib.sha256(bytes([n])).digest()) for n in range(6)]


@dataclass(frozen=True)
class Decoder:
    """`samples` are valid; `errors` is all that `decode` may raise; `encode` inverts it.

    `packed`: where in an encoding a msgpack value begins (so that it can be changed by structure),
    and the bytes around it: unwrap and wrap.
    """

    samples: tuple[bytes, ...]
    decode: Callable[[bytes], Any]
    errors: tuple[type[Exception], ...]
    encode: Callable[[Any], bytes] | None = None
    unwrap: Callable[[bytes], bytes] | None = None
    wrap: Callable[[bytes], bytes] | None = None


def _same(raw: bytes) -> bytes:
    return raw


# -- the wire --------------------------------------------------------------------------------


@cache
def _money() -> tuple[bytes, bytes, bytes, Credential, Draft]:
    """A request for none, one with two shown, a reply, a credential, a draft."""
    one, rng = epoch(), secrets.token_bytes
    request = IssueRequest(one.parameters.digest, bytes(20), 100)
    statement = request.statement(one.tariff)
    draft = prepare(one.parameters.issuer, statement, (), (60, 40), rng)
    reply = one.issuer.issue(statement, parse(draft.request, 0))
    held = draft.finish(one.parameters.issuer, reply)
    look_up = LookUpRequest(one.parameters.digest, SigningKey(KEY).public)
    second = prepare(one.parameters.issuer, look_up.statement(one.tariff), held, (50, 49), rng)
    return draft.request, second.request, reply, held[0], draft


def _requests() -> tuple[bytes, ...]:
    none, two, *_ = _money()
    digest, key = epoch().parameters.digest, SigningKey(KEY).public
    requests = (
        ParametersRequest(),
        ParametersRequest(digest),
        IssueRequest(digest, bytes(20), 100, none),
        ReissueRequest(digest, 0, None, none),
        ReissueRequest(digest, 2, None, two),
        ReissueRequest(digest, 2, bytes(32), two),
        LookUpRequest(digest, key, two),
        InsertRequest(digest, key, CHANCE.randbytes(BLOB_SIZE), two),
        DeleteRequest(digest, key, bytes(32), bytes(64), two),
        OffersRequest(),
        PayRequest(Method.CASHU, bytes(32), 990, b"cashuB"),
        PayRequest(Method.LIGHTNING, bytes(32), 1),
    )
    return tuple(one.encode() for one in requests)


def _replies() -> tuple[bytes, ...]:
    issued = _money()[2]
    found = Fact(Operation.LOOK_UP, Outcome.FOUND, -1)
    stored = StoredFact(bytes(32), Fact(Operation.INSERT, Outcome.INSERTED, -10), issued)
    digest = epoch().parameters.digest
    replies = (
        Refused(Reason.BUSY),
        Parameters.signed(epoch().parameters.encode(), (digest,), identity()),
        Done(found, issued, CHANCE.randbytes(BLOB_SIZE)),
        Done(stored.fact, issued),
        Spent((stored,)),
        Spent((stored, replace(stored, fingerprint=bytes([1]) * 32))),
        Offers((Offer(Method.CASHU, 10_000, 1, 100, (b"https://mint",)),)),
        Payment(0, 990, 99, b"lnbc1", 600),
    )
    return tuple(one.encode() for one in replies)


def _wire() -> dict[str, Decoder]:
    none, two, reply, held, draft = _money()
    issuer = epoch().parameters.issuer
    return {
        "requests": Decoder(
            _requests(),
            decode_request,
            (Malformed,),
            lambda one: one.encode(),
            codec.REQUEST.unwrap,
            codec.REQUEST.wrap,
        ),
        "replies": Decoder(
            _replies(),
            decode_reply,
            (Malformed,),
            lambda one: one.encode(),
            codec.REPLY.unwrap,
            codec.REPLY.wrap,
        ),
        "bodies": Decoder(
            (codec.pack([1, b"a", None, [2, [3]], -5]), codec.pack([])),
            codec.unpack,
            (Malformed,),
            lambda value: codec.pack(value),
            _same,
            _same,
        ),
        "credential requests of none": Decoder(
            (none,), lambda raw: parse(raw, 0), (Malformed,), lambda one: one.encoded
        ),
        "credential requests of two": Decoder(
            (two,), lambda raw: parse(raw, 2), (Malformed,), lambda one: one.encoded
        ),
        "issuers' replies": Decoder(
            (reply,), lambda raw: draft.finish(issuer, raw), (ProtocolError,)
        ),
        "credentials": Decoder(
            (held.encode(),), Credential.decode, (Malformed,), lambda one: one.encode()
        ),
        "drafts": Decoder((draft.encode(),), Draft.decode, (Malformed,), lambda one: one.encode()),
        "issuers": Decoder(
            (epoch().issuer.to_bytes(),),
            Issuer.from_bytes,
            (ProtocolError,),
            lambda one: one.to_bytes(),
        ),
        "issuer parameters": Decoder(
            (issuer.encoded,), IssuerParameters.decode, (Malformed,), lambda one: one.encoded
        ),
        "epoch parameters": Decoder(
            (epoch().parameters.encode(),),
            EpochParameters.decode,
            (Malformed,),
            lambda one: one.encode(),
        ),
        "points": Decoder(
            (SigningKey(KEY).public,), Point.decode, (Malformed,), lambda one: one.encode()
        ),
        "vouchers": Decoder(
            (str(Voucher(1_234, bytes(range(20)))).encode(),),
            lambda raw: Voucher.parse(raw.decode("latin-1")),
            (ValueError,),
        ),
        "cashu tokens": Decoder(
            _tokens(), lambda raw: Token.decode(raw.decode("latin-1")), (Malformed,)
        ),
        "cashu tokens, inside": Decoder(
            tuple(_inside(text) for text in _tokens()),
            lambda raw: Token.decode(f"cashu{'A' if raw[:1] == b'{' else 'B'}{_outside(raw)}"),
            (Malformed,),
        ),
        "purchases": Decoder(
            (Purchase(Method.LIGHTNING, bytes(20), 7).encode(),),
            Purchase.decode,
            (Malformed,),
            lambda one: one.encode(),
            _same,
            _same,
        ),
        "cashu orders": Decoder(
            (Order("https://mint", "00ad", 99, bytes(32), "cashuB").encode(),),
            Order.decode,
            (Malformed, UnicodeDecodeError),
            lambda one: one.encode(),
            _same,
            _same,
        ),
    }


def _tokens() -> tuple[bytes, ...]:
    coin = {"amount": 4, "id": "00ad268c4d1f5826", "secret": "a secret", "C": "02" + "ab" * 32}
    form = {"token": [{"mint": "https://mint", "proofs": [coin]}], "unit": "sat"}
    third = "cashuA" + base64.urlsafe_b64encode(json.dumps(form).encode()).decode()
    return third.encode(), Token.decode(third).encode().encode()


def _inside(text: bytes) -> bytes:
    return base64.urlsafe_b64decode(text[6:] + b"=" * (-len(text[6:]) % 4))


def _outside(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()


# -- blobs -----------------------------------------------------------------------------------


def _anchors() -> tuple[bytes, ...]:
    dead = tuple(Dead(ref, Generation(3)) for ref in REFS)
    fields: dict[str, Any] = {
        "generation": Generation(5),
        "writer": b"writer00",
        "redo": 7,
        "time": 10**18,
        "root": REFS[0],
        "kept": (BlobRef(anchor_id(Generation(0)), bytes(32)),),
        "next_id": BlobId(9),
        "next_ino": 12,
        "live": 3,
        "size": 99,
        "files": 4,
        "dead": DeadList(dead, ((REFS[1],),), 7),
    }
    return (Anchor(**fields).encode(), Anchor(**fields | {"root": None, "kept": ()}).encode())


def _length_prefixed(raw: bytes) -> bytes:
    return raw[4 : 4 + int.from_bytes(raw[:4], "big")]


def _with_length(body: bytes) -> bytes:
    return (len(body).to_bytes(4, "big") + body).ljust(16_384, b"\0")


def _tables() -> tuple[bytes, ...]:
    held = DeadList((Dead(REFS[0], Generation(3)),), (), 1)
    root, next_id, none = REFS[1], BlobId(9), DeadList()
    one = Snapshot("daily-1", Generation(4), 10**18, b"writer00", root, next_id, 3, 99, 4, held)
    two = Snapshot("empty", Generation(5), 10**18, b"writer00", None, next_id, 0, 0, 0, none)
    return encode_tables([one, two])[0], encode_tables([two])[0]


def _pages() -> tuple[bytes, ...]:
    pages: list[bytes] = []

    def write(payload: bytes) -> BlobRef:
        pages.append(payload)
        return REFS[0]

    DeadList().add([Dead(REFS[n % 6], Generation(n)) for n in range(14_000)], write)
    return pages[0], pages[-1]


def _blobs() -> dict[str, Decoder]:
    sealer = Sealer(VaultKeys(KEY), CHANCE.randbytes)
    ref, blob = sealer.seal(BlobId(5), Kind.NODE, bytes(16_384))
    inode = items.Inode(4, 0o100644, 1, 0, 0, 77, 10**18, 10**18, 10**18)
    entry = items.Dirent(b"name", 4, 8, 123)
    keys = [items.key(n, items.ItemKind.INODE) for n in range(1, 5)]
    leaf = Node(0, tuple(keys), tuple(inode.encode() for _ in keys))
    inner = Node(1, tuple(keys), tuple(ref.encode() for ref in REFS[:4]))
    contents = breakglass.Contents(Generation(4), (_money()[3],))
    sealed = breakglass.seal(contents, KEY, bytes(32), CHANCE.randbytes)
    return {
        "nodes": Decoder(
            (leaf.encode(), inner.encode()), Node.decode, (CorruptNode,), lambda one: one.encode()
        ),
        "anchors": Decoder(
            _anchors(),
            Anchor.decode,
            (CorruptBlob, VaultError),
            lambda one: one.encode(),
            _length_prefixed,
            _with_length,
        ),
        "snapshot tables": Decoder(
            _tables(),
            decode_table,
            (CorruptBlob,),
            lambda table: encode_tables(table)[0],
            _length_prefixed,
            _with_length,
        ),
        "dead pages": Decoder(
            _pages(), lambda raw: deadlist.read_page(raw, raw[0] if raw else 1), (CorruptBlob,)
        ),
        "blobs": Decoder((blob,), lambda raw: sealer.open(ref, Kind.NODE, raw), (CorruptBlob,)),
        "unreferenced blobs": Decoder(
            (blob,), lambda raw: sealer.open_unreferenced(ref.id, Kind.NODE, raw), (CorruptBlob,)
        ),
        "inodes": Decoder(
            (inode.encode(),),
            lambda raw: items.Inode.decode(4, raw),
            (CorruptBlob,),
            lambda one: one.encode(),
            _same,
            _same,
        ),
        "directory entries": Decoder(
            (entry.encode(),),
            lambda raw: items.Dirent.decode(1, raw),
            (CorruptBlob,),
            lambda one: one.encode(),
            _same,
            _same,
        ),
        "attributes": Decoder(
            (items.encode_xattr(b"user.a", b"value"),),
            items.decode_xattr,
            (CorruptBlob,),
            lambda one: items.encode_xattr(*one),
            _same,
            _same,
        ),
        "extents": Decoder(
            (REFS[0].encode(),), items.decode_extent, (CorruptBlob,), items.encode_extent
        ),
        "tree keys": Decoder((keys[0],), items.split_key, (CorruptBlob,)),
        "breakglass entries": Decoder(
            (sealed,),
            lambda raw: breakglass.unseal(raw, KEY, bytes(32)),
            (CorruptBlob, NewerFormat),
        ),
    }


# -- what is on a disk -----------------------------------------------------------------------


def _in_directory(name: str, use: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Put the bytes where a file of ours is, then use the directory."""

    def decode(raw: bytes) -> Any:
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / name).write_bytes(raw)
            return use(Path(directory))

    return decode


def _made(name: str, make: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory))
        return (Path(directory) / name).read_bytes()


def _write_log(directory: Path) -> None:
    log = RedoLog(directory, KEY, CHANCE.randbytes)
    records: list[list[Effect]] = [
        [Put(b"k" * 17, b"v"), Usage(1, 1)],
        [Write(3, 0, b"data", 0)],
        [Gone(3)],
    ]
    for effects in records:
        log.append(effects)
    log.close()


def _write_cache(directory: Path) -> None:
    cache = BlobCache(directory / "cache", KEY, 80_000, CHANCE.randbytes)
    for ref in REFS[:3]:
        cache.put(ref, bytes(OPENED_SIZE))
    cache.close()


def _read_cache(directory: Path) -> None:
    cache = BlobCache(directory / "cache", KEY, 80_000, CHANCE.randbytes)
    for ref in REFS:
        assert cache.get(ref) in (None, bytes(OPENED_SIZE))
    cache.close()


def _write_journal(directory: Path) -> None:
    Journal(directory / "wallet", KEY, CHANCE.randbytes).close()


def _read_journal(directory: Path) -> None:
    journal = Journal(directory / "wallet", KEY, CHANCE.randbytes)
    try:
        journal.load()
    finally:
        journal.close()


def _read_ledger(directory: Path) -> None:
    ledger = SqliteLedger(directory / "ledger")
    try:
        ledger.totals()
    finally:
        ledger.close()


def _write_state(directory: Path) -> None:
    StateDirectory(directory).create(
        VaultKeys(KEY), "127.0.0.1:7387", None, CHANCE.randbytes, new=True
    )


def _read_state(directory: Path) -> None:
    state = StateDirectory(directory)
    assert isinstance(state.server, str) and isinstance(state.is_new, bool)
    state.unlock(None)


def _rows() -> dict[str, Decoder]:
    held = Held(3, bytes(32), _money()[3])
    attempt = Attempt(Operation.INSERT, -10, bytes(32), _money()[4].encode())
    pending = Pending(4, bytes(32), (held,), (attempt,), REFS[0].encode())
    note = notes.Note(bytes(32), 1, 2, bytes(32), 100, True, False, True)
    errors = (ValueError, LookupError, TypeError, ProtocolError)
    return {
        "rows of credentials": Decoder(
            (rows.pack_held(held),), lambda raw: rows.unpack_held(3, raw), errors, rows.pack_held
        ),
        "rows of pendings": Decoder(
            (rows.pack_pending(pending),),
            lambda raw: rows.unpack_pending(4, raw, {3: held}),
            errors,
            rows.pack_pending,
            _same,
            _same,
        ),
        "rows of receipts": Decoder(
            (rows.pack_receipt(Operation.INSERT, b"memo"),),
            rows.unpack_receipt,
            errors,
            lambda one: rows.pack_receipt(*one),
            _same,
            _same,
        ),
        "rows of the book": Decoder(
            (rows.pack_book(Book(3, 2, 1)), codec.pack([9, 8, 7, 6, 5])),
            rows.unpack_book,
            errors,
            None,  # one of format 3 is written anew with a field more
            _same,
            _same,
        ),
        "notes of breakglass": Decoder(
            (note.encode(),), notes.Note.decode, errors, lambda one: one.encode(), _same, _same
        ),
    }


def _disks() -> dict[str, Decoder]:
    def replay(directory: Path) -> None:
        list(RedoLog(directory, KEY, CHANCE.randbytes).replay(0))

    def make_ledger(directory: Path) -> None:
        SqliteLedger.create(directory / "ledger")

    def make_epoch(directory: Path) -> None:
        epoch_files.save(directory / "epochs", epoch())

    secret = epoch().issuer.to_bytes()

    def load_epoch(directory: Path) -> None:
        (directory / f"{1:08d}.secret").write_bytes(secret)
        epoch_files.load(directory, identity(), keep=4)

    state = _made("vault", _write_state)
    assert json.loads(state)
    return {
        "redo logs": Decoder(
            (_made("redo.1", _write_log),),
            _in_directory("redo.1", replay),
            (VaultError,),
        ),
        "caches": Decoder((_made("cache", _write_cache),), _in_directory("cache", _read_cache), ()),
        "journals": Decoder(
            (_made("wallet", _write_journal),),
            _in_directory("wallet", _read_journal),
            (VaultError,),
        ),
        "ledgers": Decoder(
            (_made("ledger", make_ledger),), _in_directory("ledger", _read_ledger), (LedgerError,)
        ),
        "vault files": Decoder(
            (state,), _in_directory("vault", _read_state), (VaultError, UserError)
        ),
        "server settings": Decoder(
            (Config().render().encode(),),
            _in_directory(settings.FILE, settings.load),
            (ConfigError,),
        ),
        "epochs on disk": Decoder(
            (_made(f"epochs/{1:08d}.parameters", make_epoch),),
            _in_directory(f"{1:08d}.parameters", load_epoch),
            (EpochError,),
        ),
    }


def _texts() -> dict[str, Decoder]:
    def text(parse_text: Callable[[str], Any]) -> Callable[[bytes], Any]:
        return lambda raw: parse_text(raw.decode("utf-8", "surrogateescape"))

    return {
        "addresses of servers": Decoder(
            (b"127.0.0.1:7387", b"[::1]:7387", b"example.org:1"), text(Address.parse), (HpkvError,)
        ),
        "addresses to listen on": Decoder(
            (b"127.0.0.1:7387", b"[::1]:7387"), text(settings.address), (ConfigError,)
        ),
    }


@cache
def decoders() -> dict[str, Decoder]:
    """Every one of them, by name."""
    return _wire() | _blobs() | _rows() | _disks() | _texts()


def check(decoder: Decoder, raw: bytes) -> bool:
    """Decode; whether that went well. AssertionError when the bytes were not the only ones."""
    try:
        value = decoder.decode(raw)
    except decoder.errors:
        return False
    if decoder.encode is not None:
        assert decoder.encode(value) == raw, "what was decoded has another encoding"
    return True
