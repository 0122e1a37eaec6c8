"""What is asked and answered; PROTOCOL.md has every byte.

A client makes a request in three steps, since the proof in it covers the rest of it:

    request = InsertRequest(epoch, key, blob)
    draft = prepare(parameters, request.statement(tariff), ...)
    request = replace(request, credentials=draft.request)

and a deletion in four: its signature covers the credential request (`delete_digest`); so does
that of a breakglass entry (`store_entry_digest`).

One request is one purchase: it is recognised by its fingerprint, and repeating it performs
nothing and gives the stored answer. A refusal spends nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cached_property
from typing import Any, ClassVar, Final, TypeAlias

from hpkvfs.protocol import codec, identity
from hpkvfs.protocol.codec import array, integer, octets, optional
from hpkvfs.protocol.credential import AMOUNT_LIMIT, Statement
from hpkvfs.protocol.epoch import parameters_digest
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import tagged_hash
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.tariff import HOURS_LIMIT, Operation, Tariff
from hpkvfs.protocol.voucher import SECRET_SIZE, voucher_digest
from hpkvfs.types import BLOB_SIZE, ENTRY_SIZE

KEY_SIZE: Final = 33
DIGEST_SIZE: Final = 32
SIGNATURE_SIZE: Final = 64
MAX_CREDENTIALS: Final = 2_000
MAX_ISSUED: Final = 500
MAX_PARAMETERS: Final = 9_000
MAX_EPOCHS: Final = 200
MAX_RETRY_AFTER: Final = 3_600
MAX_DELTA: Final = AMOUNT_LIMIT - 1
MAX_COUNTER: Final = 2**63 - 1
MAX_PROOF: Final = 16_384
MAX_INVOICE: Final = 4_096
MAX_SATS: Final = 2**51
MAX_SECONDS: Final = 2**31 - 1
MAX_OFFERS: Final = 8
MAX_PLACES: Final = 32
MAX_PLACE: Final = 256
UNOPENED: Final = bytes(DIGEST_SIZE)
"""What a request to open an entry names when it only asks which entry there is."""

_digest = octets(DIGEST_SIZE)
_credentials = octets(1, MAX_CREDENTIALS)
_issued = octets(1, MAX_ISSUED)
_blob = octets(BLOB_SIZE)
_entry = octets(ENTRY_SIZE)
_counter = integer(1, MAX_COUNTER)


def _key(value: object) -> bytes:
    key = octets(KEY_SIZE)(value)
    if key[0] not in (2, 3):
        raise Malformed("a storage key is not a compressed point")
    return key


def delete_digest(key: bytes, blob_digest: bytes, credential_request: bytes) -> bytes:
    """The 32 bytes that the blob's key signs (BIP340) to delete it.

    They cover the credential request, or whoever intercepts a deletion could have its refund.
    """
    request_digest = hashlib.sha256(credential_request).digest()
    return tagged_hash("hpkv/delete/v1", key + blob_digest + request_digest)


def store_entry_digest(context: bytes, credential_request: bytes) -> bytes:
    """The 32 bytes that a breakglass entry's key signs (BIP340) to store it.

    `context` is the statement's: key, value and counter. The credential request is covered, or
    whoever intercepts a request could pay for an older value with credentials of his own.
    """
    request_digest = hashlib.sha256(credential_request).digest()
    return tagged_hash("hpkv/entry/store/v1", context + request_digest)


def open_entry_digest(key: bytes, entry: bytes) -> bytes:
    """The 32 bytes that a breakglass entry's key signs (BIP340) to open it.

    They cover the entry's digest, or an old request could start the timer of a newer entry.
    """
    return tagged_hash("hpkv/entry/open/v1", key + entry)


@dataclass(frozen=True)  # without slots: a digest is kept once it was computed
class _Request:
    operation: ClassVar[Operation]
    _read: ClassVar[codec.Reader[tuple[Any, ...]]]

    def body(self) -> bytes:
        """The canonical encoding; ValueError when a field is not what it should be."""
        values = [getattr(self, one.name) for one in fields(self)]
        try:
            type(self)._read(values)
        except Malformed as error:
            raise ValueError(f"this request is not complete: {error}") from error
        return codec.pack([self.operation, *values])

    def encode(self) -> bytes:
        """The frame to send: REQUEST_SIZE bytes."""
        return codec.REQUEST.wrap(self.body())

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the body: the 32 bytes by which the request is recognised."""
        return hashlib.sha256(self.body()).digest()


@dataclass(frozen=True, slots=True)
class ParametersRequest(_Request):
    """Free: an epoch's parameters. `epoch` is the digest wanted, None for the newest."""

    operation = Operation.PARAMETERS
    _read = codec.fields(optional(_digest))

    epoch: bytes | None = None


@dataclass(frozen=True, slots=True)
class IssueRequest(_Request):
    """A voucher's secret (20 bytes) and its amount, exchanged for two credentials."""

    operation = Operation.ISSUE
    presented: ClassVar = 0
    _read = codec.fields(_digest, octets(SECRET_SIZE), integer(1, MAX_DELTA), _credentials)

    epoch: bytes
    voucher: bytes = field(repr=False)
    amount: int
    credentials: bytes = field(default=b"", repr=False)

    def statement(self, tariff: Tariff) -> Statement:
        """What the proof is about. The issuer must have compared `amount` to the voucher's."""
        return Statement(self.epoch, self.operation, voucher_digest(self.voucher), self.amount)


def _presented(value: object) -> int:
    if integer(0, 2)(value) == 1:
        raise Malformed("one credential alone is never presented")
    return 2 if value else 0


_reissue = codec.fields(_digest, _presented, optional(_digest), _credentials)


def _moving(value: object) -> tuple[Any, ...]:
    epoch, presented, into, credentials = _reissue(value)
    if into is not None and (into == epoch or not presented):
        raise Malformed("what is moved is moved to another epoch, and is something")
    return epoch, presented, into, credentials


@dataclass(frozen=True, slots=True)
class ReissueRequest(_Request):
    """Free: 2 credentials for 2 others of the same sum, or 2 of no value for none.

    `into`: digest of the later epoch that the new ones shall be of; None for that of the old.
    """

    operation = Operation.REISSUE
    _read = _moving

    epoch: bytes
    presented: int
    into: bytes | None = None
    credentials: bytes = field(default=b"", repr=False)

    def statement(self, tariff: Tariff) -> Statement:
        """What the proof is about."""
        return Statement(self.epoch, self.operation, self.into or b"", tariff.delta(self.operation))


@dataclass(frozen=True, slots=True)
class LookUpRequest(_Request):
    """The blob under a storage key (33 bytes). An absent key costs as much as a present one."""

    operation = Operation.LOOK_UP
    presented: ClassVar = 2
    _read = codec.fields(_digest, _key, _credentials)

    epoch: bytes
    key: bytes
    credentials: bytes = field(default=b"", repr=False)

    def statement(self, tariff: Tariff) -> Statement:
        """What the proof is about."""
        return Statement(self.epoch, self.operation, self.key, tariff.delta(self.operation))


@dataclass(frozen=True, slots=True)
class InsertRequest(_Request):
    """Store a blob (16,433 bytes) under a key that is not in use."""

    operation = Operation.INSERT
    presented: ClassVar = 2
    _read = codec.fields(_digest, _key, _blob, _credentials)

    epoch: bytes
    key: bytes
    blob: bytes = field(repr=False)
    credentials: bytes = field(default=b"", repr=False)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the blob."""
        return hashlib.sha256(self.blob).digest()

    def statement(self, tariff: Tariff) -> Statement:
        """What the proof is about."""
        context = self.key + self.digest
        return Statement(self.epoch, self.operation, context, tariff.delta(self.operation))


@dataclass(frozen=True, slots=True)
class DeleteRequest(_Request):
    """Delete the blob whose SHA-256 is `digest`, for a refund; see `delete_digest`."""

    operation = Operation.DELETE
    presented: ClassVar = 2
    _read = codec.fields(_digest, _key, _digest, octets(SIGNATURE_SIZE), _credentials)

    epoch: bytes
    key: bytes
    digest: bytes
    signature: bytes = b""
    credentials: bytes = field(default=b"", repr=False)

    @property
    def signed(self) -> bytes:
        """The 32 bytes that `signature` signs."""
        return delete_digest(self.key, self.digest, self.credentials)

    def statement(self, tariff: Tariff) -> Statement:
        """What the proof is about."""
        context = self.key + self.digest
        return Statement(self.epoch, self.operation, context, tariff.delta(self.operation))


@dataclass(frozen=True, slots=True)
class StoreEntryRequest(_Request):
    """Store a breakglass entry (1,024 bytes), in place of one with a smaller counter, if any.

    Of the entry in its place nothing remains, nor of its timer. See `store_entry_digest`.
    """

    operation = Operation.STORE_ENTRY
    presented: ClassVar = 2
    _read = codec.fields(_digest, _key, _counter, _entry, octets(SIGNATURE_SIZE), _credentials)

    epoch: bytes
    key: bytes
    counter: int
    value: bytes = field(repr=False)
    signature: bytes = b""
    credentials: bytes = field(default=b"", repr=False)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the value: the 32 bytes by which opening names this entry."""
        return hashlib.sha256(self.value).digest()

    @property
    def signed(self) -> bytes:
        """The 32 bytes that `signature` signs."""
        return store_entry_digest(self._context, self.credentials)

    @property
    def _context(self) -> bytes:
        return self.key + self.digest + self.counter.to_bytes(8, "big")

    def statement(self, tariff: Tariff) -> Statement:
        """What the proof is about."""
        return Statement(self.epoch, self.operation, self._context, tariff.delta(self.operation))


@dataclass(frozen=True, slots=True)
class OpenEntryRequest(_Request):
    """Free: open the breakglass entry whose value has the SHA-256 `entry`.

    Opening it the first time starts its timer; until that fires it can be opened again. With
    UNOPENED for `entry` it only asks which entry there is, and starts nothing.
    """

    operation = Operation.OPEN_ENTRY
    _read = codec.fields(_key, _digest, octets(SIGNATURE_SIZE))

    key: bytes
    entry: bytes = UNOPENED
    signature: bytes = b""

    @property
    def signed(self) -> bytes:
        """The 32 bytes that `signature` signs."""
        return open_entry_digest(self.key, self.entry)


class Method(IntEnum):
    """How a voucher is paid for; one that an operator sells by hand is paid for already."""

    CASHU = 1
    LIGHTNING = 2


def _method(value: object) -> Method:
    if isinstance(value, Method):
        return value
    try:
        return Method(integer(1, 255)(value))
    except ValueError as error:
        raise Malformed("a way to pay that this version does not have") from error


@dataclass(frozen=True, slots=True)
class OffersRequest(_Request):
    """Free: which ways there are to pay, and at what price."""

    operation = Operation.OFFERS
    _read = codec.fields()


@dataclass(frozen=True, slots=True)
class PayRequest(_Request):
    """Pay for the voucher with this digest (32 bytes), whose secret the client chose.

    `amount`: the tokens it shall be worth; with a proof that has a value of its own, the least
    that are accepted for it. `proof`: what the method asks for, a Cashu token's text or nothing.
    Repeating it takes no second payment, and tells how the first one is getting on.
    """

    operation = Operation.PAY
    _read = codec.fields(_method, _digest, integer(1, MAX_DELTA), octets(0, MAX_PROOF))

    method: Method
    voucher: bytes
    amount: int
    proof: bytes = field(default=b"", repr=False)


CredentialedRequest: TypeAlias = (
    IssueRequest
    | ReissueRequest
    | LookUpRequest
    | InsertRequest
    | DeleteRequest
    | StoreEntryRequest
)
Request: TypeAlias = (
    ParametersRequest | OpenEntryRequest | OffersRequest | PayRequest | CredentialedRequest
)

_REQUESTS: Final[dict[object, type[Request]]] = {
    kind.operation: kind
    for kind in (
        ParametersRequest,
        IssueRequest,
        ReissueRequest,
        LookUpRequest,
        InsertRequest,
        DeleteRequest,
        StoreEntryRequest,
        OpenEntryRequest,
        OffersRequest,
        PayRequest,
    )
}


def decode_request(frame: bytes) -> Request:
    """Inverse of Request.encode; Malformed for any other bytes."""
    kind, values = _tagged(codec.REQUEST.unwrap(frame))
    if kind not in _REQUESTS:
        raise Malformed("a request for no operation of this version")
    request = _REQUESTS[kind]
    return request(*request._read(values))


def _tagged(body: bytes) -> tuple[int, list[object]]:
    value = codec.unpack(body)
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        raise Malformed("a body does not begin with its kind")
    return value[0], value[1:]


class Outcome(IntEnum):
    """What a performed request came to."""

    ISSUED = 1
    REISSUED = 2
    FOUND = 3
    ABSENT = 4
    INSERTED = 5
    DELETED = 6
    STORED = 7


OUTCOMES: Final = {
    Operation.ISSUE: (Outcome.ISSUED,),
    Operation.REISSUE: (Outcome.REISSUED,),
    Operation.LOOK_UP: (Outcome.FOUND, Outcome.ABSENT),
    Operation.INSERT: (Outcome.INSERTED,),
    Operation.DELETE: (Outcome.DELETED,),
    Operation.STORE_ENTRY: (Outcome.STORED,),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """What happened, once and for all; `delta` is what it added to the credentials."""

    operation: Operation
    outcome: Outcome
    delta: int

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES.get(self.operation, ()):
            raise ValueError(f"{self.operation.name} cannot come to {self.outcome.name}")


@dataclass(frozen=True, slots=True)
class StoredFact:
    """What a server keeps of a request: its fingerprint, its fact and the issuer's reply."""

    fingerprint: bytes
    fact: Fact
    issued: bytes = field(repr=False)

    @property
    def operation(self) -> Operation:
        """What the request asked for."""
        return self.fact.operation

    @property
    def outcome(self) -> Outcome:
        """What it came to."""
        return self.fact.outcome


class Reason(IntEnum):
    """Why nothing was performed, and nothing spent."""

    MALFORMED = 1
    BUSY = 2
    FULL = 3
    INTERNAL = 4
    UNKNOWN_EPOCH = 5
    BAD_PROOF = 6
    UNKNOWN_VOUCHER = 7
    VOUCHER_SPENT = 8
    VOUCHER_AMOUNT = 9
    KEY_EXISTS = 10
    KEY_ABSENT = 11
    DIGEST_MISMATCH = 12
    BAD_SIGNATURE = 13
    OLD_COUNTER = 14
    EPOCH_ENDED = 15
    NOT_OFFERED = 16
    BAD_TOKEN = 17
    OTHER_MINT = 18
    OTHER_UNIT = 19
    TOO_LITTLE = 20
    TOO_MUCH = 21
    TOKEN_SPENT = 22
    PAYMENT_UNSETTLED = 23
    INVOICE_EXPIRED = 24
    OTHER_AMOUNT = 25
    MINT_LIES = 26


def _fact(value: object) -> Fact:
    operation, outcome, delta = _fact_fields(value)
    try:
        return Fact(Operation(operation), Outcome(outcome), delta)
    except ValueError as error:
        raise Malformed("a fact that cannot be") from error


def _stored_fact(value: object) -> StoredFact:
    return StoredFact(*_stored_fact_fields(value))


def _reason(value: object) -> Reason:
    try:
        return Reason(integer(0, 255)(value))
    except ValueError as error:
        raise Malformed("a refusal without a reason of this version") from error


_fact_fields = codec.fields(integer(1, 255), integer(1, 255), integer(-MAX_DELTA, MAX_DELTA))
_stored_fact_fields = codec.fields(_digest, _fact, _issued)


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was performed and nothing spent; ask again after `retry_after` seconds, if at all."""

    _kind: ClassVar = 0
    _read: ClassVar = codec.fields(_reason, integer(0, MAX_RETRY_AFTER))

    reason: Reason
    retry_after: int = 0

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        return _reply(self._kind, self.reason, self.retry_after)


@dataclass(frozen=True, slots=True)
class Parameters:
    """An epoch's parameters, the digests of all epochs in use, the newest last, and who says so.

    `identity` (32 bytes) is the server's, and `signature` its over all of this.
    """

    _kind: ClassVar = 1
    _domain: ClassVar = "hpkv/parameters/v1"
    _read: ClassVar = codec.fields(
        octets(1, MAX_PARAMETERS),
        array(_digest, 1, MAX_EPOCHS),
        octets(identity.IDENTITY_SIZE),
        octets(identity.SIGNATURE_SIZE),
    )

    parameters: bytes
    digests: tuple[bytes, ...]
    identity: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def signed(cls, parameters: bytes, digests: tuple[bytes, ...], by: Identity) -> Parameters:
        """What a server says of its epochs."""
        signature = by.sign(cls._domain, _parameters_message(parameters, digests))
        return cls(parameters, digests, by.public, signature)

    @property
    def is_genuine(self) -> bool:
        """Whether `identity` signed it; whose identity that is, is another question."""
        message = _parameters_message(self.parameters, self.digests)
        return identity.verify(self.identity, self._domain, message, self.signature)

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        return _reply(self._kind, self.parameters, self.digests, self.identity, self.signature)


def _parameters_message(parameters: bytes, digests: tuple[bytes, ...]) -> bytes:
    return parameters_digest(parameters) + b"".join(digests)


@dataclass(frozen=True, slots=True)
class Done:
    """Performed, now or when the same request first came.

    `value` is the blob a look-up found; None also when it was deleted between the look-up and
    its repetition.
    """

    _kind: ClassVar = 2
    _read: ClassVar = codec.fields(_fact, _issued, optional(_blob))

    fact: Fact
    issued: bytes = field(repr=False)
    value: bytes | None = field(default=None, repr=False)

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        return _reply(self._kind, _packable(self.fact), self.issued, self.value)


@dataclass(frozen=True, slots=True)
class Spent:
    """A serial was spent by another request: the facts of the one or two that spent them."""

    _kind: ClassVar = 3
    _read: ClassVar = codec.fields(array(_stored_fact, 1, 2))

    facts: tuple[StoredFact, ...]

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        facts = [[one.fingerprint, _packable(one.fact), one.issued] for one in self.facts]
        return _reply(self._kind, facts)


@dataclass(frozen=True, slots=True)
class Entry:
    """A breakglass entry: its counter, the SHA-256 of its value, and the value if it was opened.

    `hours`: for how long it can still be opened, in whole hours, rounded up; None while no
    timer runs.
    """

    _kind: ClassVar = 4
    _read: ClassVar = codec.fields(
        _counter, _digest, optional(_entry), optional(integer(0, HOURS_LIMIT + 1))
    )

    counter: int
    digest: bytes
    value: bytes | None = field(default=None, repr=False)
    hours: int | None = None

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        return _reply(self._kind, self.counter, self.digest, self.value, self.hours)


@dataclass(frozen=True, slots=True)
class Offer:
    """A way to pay: `rate` tokens for 1,000 sat, from `least` to `most` tokens at a time.

    `places`: the URLs of the mints whose tokens are taken; none for Lightning.
    """

    method: Method
    rate: int
    least: int
    most: int
    places: tuple[bytes, ...] = ()

    def price(self, tokens: int) -> int:
        """What so many tokens cost, in sat, rounded up."""
        return -(-tokens * 1_000 // self.rate)

    def tokens(self, sats: int) -> int:
        """What so many sat buy, in tokens, rounded down."""
        return sats * self.rate // 1_000


_offer_fields = codec.fields(
    _method,
    integer(1, MAX_DELTA),
    integer(1, MAX_DELTA),
    integer(1, MAX_DELTA),
    array(octets(1, MAX_PLACE), 0, MAX_PLACES),
)


def _offer(value: object) -> Offer:
    return Offer(*_offer_fields(value))


@dataclass(frozen=True, slots=True)
class Offers:
    """All ways to pay that a server offers beside vouchers sold by hand."""

    _kind: ClassVar = 5
    _read: ClassVar = codec.fields(array(_offer, 0, MAX_OFFERS))

    offers: tuple[Offer, ...]

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        rows = [[getattr(one, name.name) for name in fields(one)] for one in self.offers]
        return _reply(self._kind, rows)


@dataclass(frozen=True, slots=True)
class Payment:
    """How a payment is getting on: the voucher will be, or if `paid` is, worth so many tokens.

    `sats`: what it costs, 0 once it is paid; `seconds`: for how long `invoice` can be paid.
    """

    _kind: ClassVar = 6
    _read: ClassVar = codec.fields(
        integer(0, 1),
        integer(1, MAX_DELTA),
        integer(0, MAX_SATS),
        octets(0, MAX_INVOICE),
        integer(0, MAX_SECONDS),
    )

    paid: bool | int
    tokens: int
    sats: int = 0
    invoice: bytes = b""
    seconds: int = 0

    def encode(self) -> bytes:
        """The frame to send: REPLY_SIZE bytes."""
        return _reply(
            self._kind, int(self.paid), self.tokens, self.sats, self.invoice, self.seconds
        )


Reply: TypeAlias = Refused | Parameters | Done | Spent | Entry | Offers | Payment

_REPLIES: Final[dict[int, type[Reply]]] = {
    kind._kind: kind for kind in (Refused, Parameters, Done, Spent, Entry, Offers, Payment)
}


def decode_reply(frame: bytes) -> Reply:
    """Inverse of Reply.encode; Malformed for any other bytes."""
    kind, values = _tagged(codec.REPLY.unwrap(frame))
    if kind not in _REPLIES:
        raise Malformed("a reply of no kind of this version")
    reply = _REPLIES[kind](*_REPLIES[kind]._read(values))
    if isinstance(reply, Done) and reply.value and reply.fact.outcome is not Outcome.FOUND:
        raise Malformed("a blob that was not looked up")
    return reply


def _packable(fact: Fact) -> list[int]:
    return [fact.operation, fact.outcome, fact.delta]


def _reply(kind: int, *values: object) -> bytes:
    return codec.REPLY.wrap(codec.pack([kind, *values]))
