"""Anonymous credentials with an amount: WabiSabi (eprint 2021/206) with one joint proof.

    client   prepare() -> Draft          request ->
    issuer                               parse(), Issuer.verify(), Issuer.issue()
    client   Draft.finish()              <- reply: two credentials

A request presents two credentials (or none) and asks for two, whose amounts satisfy
sum(presented) + delta = sum(requested) as integers. docs/credentials.md has every byte.

Invariants. The issuer computes a statement from the operation; nothing in it comes from the
client's word. Issuance nonces are a function of all that their challenge covers, so the same
nonce never meets two challenges. A client never shows one credential in two requests.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from hpkvfs.protocol import digits
from hpkvfs.protocol.digits import AMOUNT_LIMIT, DigitKey, DigitTable
from hpkvfs.protocol.errors import BadIssuance, BadProof, Malformed
from hpkvfs.protocol.group import (
    GA,
    GS,
    GV,
    GW,
    GWP,
    GX0,
    GX1,
    ORDER,
    POINT_SIZE,
    SCALAR_SIZE,
    FixedBase,
    G,
    Infinity,
    Point,
    Rng,
    add,
    decode_nonzero,
    decode_points,
    decode_scalars,
    encode_points,
    encode_scalar,
    generator_multiple,
    multiexp,
    multiexp_secret,
    multiply,
    multiply_secret,
    random_scalar,
    split,
    wide_scalar,
)
from hpkvfs.protocol.proofs import (
    ISSUANCE_LENGTH,
    SHOW_LENGTH,
    Issued,
    Row,
    Shown,
    Vector,
    Weights,
    attribute_row,
    commit,
    commit_secret,
    fold,
    issuance_rows,
    mix,
    ownership_row,
    recompute,
    respond,
    show_images,
    show_rows,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.protocol.transcript import Transcript

__all__ = [
    "AMOUNT_LIMIT",
    "Credential",
    "CredentialRequest",
    "Draft",
    "Issuer",
    "IssuerParameters",
    "Statement",
    "parse",
    "prepare",
    "request_size",
]

T = TypeVar("T")

REQUESTED: Final = 2
_MAC_SIZE: Final = SCALAR_SIZE + 2 * POINT_SIZE
DELTA_LIMIT: Final = 2**62
CREDENTIAL_SIZE: Final = 4 + 2 * SCALAR_SIZE + 2 * POINT_SIZE
PARAMETERS_SIZE: Final = 2 * POINT_SIZE + digits.TABLE_SIZE
_MACS_SIZE: Final = REQUESTED * _MAC_SIZE
REPLY_SIZE: Final = _MACS_SIZE + (1 + ISSUANCE_LENGTH) * SCALAR_SIZE

_SHOWN: Final = len(Shown._fields)
_REQUESTED_POINTS: Final = 1 + digits.POINTS
_REQUESTED_LENGTH: Final = 1 + digits.LENGTH
_AMOUNT: Final = 3  # the column of a in a show's vector
_PRESENTED: Final = {
    Operation.ISSUE: (0,),
    Operation.REISSUE: (0, 2),
    Operation.LOOK_UP: (2,),
    Operation.INSERT: (2,),
    Operation.DELETE: (2,),
    Operation.STORE_ENTRY: (2,),
}
_WIDE_SIZE: Final = 48
_ISSUER_SIZE: Final = 7 * SCALAR_SIZE
_CREDENTIAL: Final = struct.Struct(">I32s32s33s33s")
_DRAFT: Final = struct.Struct(">32sI32sI32s")


def request_size(presented: int) -> int:
    """Bytes of a credential request: 1,556 presenting two, 906 presenting none."""
    points = presented * _SHOWN + REQUESTED * _REQUESTED_POINTS
    responses = presented * SHOW_LENGTH + REQUESTED * _REQUESTED_LENGTH - 1
    return points * POINT_SIZE + (1 + responses) * SCALAR_SIZE


@dataclass(frozen=True, slots=True)
class Statement:
    """What a request is about, to which its proof is bound.

    `epoch`: 32-byte digest of the epoch's parameters. `context`: what the operation concerns
    (storage key, blob's digest...). `delta`: tokens added to what is presented, |delta| < 2^62;
    the issuer takes it from the tariff. Malformed if these do not hold.
    """

    epoch: bytes
    operation: Operation
    context: bytes
    delta: int

    def __post_init__(self) -> None:
        if len(self.epoch) != 32:
            raise Malformed(f"an epoch's digest has 32 bytes, not {len(self.epoch)}")
        if abs(self.delta) >= DELTA_LIMIT:
            raise Malformed(f"a delta of {self.delta} is out of range")

    def admits(self, presented: int) -> bool:
        """Whether the operation may present so many credentials; all but two is exceptional."""
        return presented in _PRESENTED.get(self.operation, ())

    def transcript(self, domain: str) -> Transcript:
        """A transcript that covers the statement."""
        transcript = Transcript(domain)
        transcript.append("epoch", self.epoch)
        transcript.append("operation", bytes([self.operation]))
        transcript.append("context", self.context)
        transcript.append("delta", self.delta.to_bytes(8, "big", signed=True))
        return transcript

    def binding(self, presented: int, request: bytes) -> bytes:
        """32 bytes that name this request about this statement; a reply answers exactly one."""
        transcript = self.transcript("hpkv/binding/v1")
        transcript.append("presented", bytes([presented]))
        transcript.append("request", request)
        return transcript.digest()[:32]


class IssuerParameters:
    """The public half of an issuer's key; immutable.

    Cw and I commit to the MAC key, the table is the range proof's.
    """

    __slots__ = ("cw", "digest", "encoded", "gv_i", "i", "table")

    def __init__(self, cw: Point, i: Point, table: DigitTable) -> None:
        """Infinity if I = GV, which no honest issuer has."""
        self.cw: Final = cw
        self.i: Final = FixedBase(i)
        self.gv_i: Final = add(GV.point, -i)
        self.table: Final = table
        self.encoded: Final = cw.encode() + i.encode() + table.encoded
        """PARAMETERS_SIZE bytes: Cw, I, table."""
        transcript = Transcript("hpkv/issuer/v1")
        transcript.append("parameters", self.encoded)
        self.digest: Final = transcript.digest()[:32]

    @classmethod
    def decode(cls, encoded: bytes) -> IssuerParameters:
        """Inverse of `encoded`; Malformed if it is none. Does not check the table's proof."""
        if len(encoded) != PARAMETERS_SIZE:
            raise Malformed(f"issuer parameters have {PARAMETERS_SIZE} bytes, not {len(encoded)}")
        points = 2 * POINT_SIZE
        cw, i = decode_points(encoded[:points])
        try:
            return cls(cw, i, DigitTable.decode(encoded[points:]))
        except Infinity as error:
            raise Malformed("issuer parameters are degenerate") from error

    def verify(self) -> None:
        """Check the digit table; BadIssuance if it would betray digits. Cached."""
        self.table.verify()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IssuerParameters) and self.encoded == other.encoded

    def __hash__(self) -> int:
        return hash(self.encoded)


@dataclass(frozen=True, slots=True, repr=False)
class Credential:
    """An amount that an issuer's MAC (t, U, V) vouches for; 0 is an amount like any other.

    All of it is secret: whoever knows r can spend it, whoever knows t, U or V can link it.
    `m`: the M that V is a MAC on, if it is at hand already; it follows from the amount and r.
    """

    amount: int
    r: int
    t: int
    U: Point
    V: Point
    m: Point | None = field(default=None, compare=False)

    def encode(self) -> bytes:
        """134 bytes: u32 amount, r, t, U, V."""
        r, t = encode_scalar(self.r), encode_scalar(self.t)
        return _CREDENTIAL.pack(self.amount, r, t, self.U.encode(), self.V.encode())

    @classmethod
    def decode(cls, encoded: bytes) -> Credential:
        """Inverse of encode; Malformed for anything else."""
        if len(encoded) != CREDENTIAL_SIZE:
            raise Malformed(f"a credential has {CREDENTIAL_SIZE} bytes, not {len(encoded)}")
        amount, r, t, *points = _CREDENTIAL.unpack(encoded)
        return cls(amount, decode_nonzero(r), decode_nonzero(t), *map(Point.decode, points))


class Requested(NamedTuple):
    """What of a requested credential the issuer sees: M and the range proof's points."""

    m: Point
    digits: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class CredentialRequest:
    """A request as the issuer decoded it; nothing in it is proven yet."""

    encoded: bytes
    shown: tuple[Shown, ...]
    requested: tuple[Requested, ...]
    challenge: int
    responses: Vector

    @property
    def points(self) -> bytes:
        """The encoding of all points: the part that the transcript covers."""
        return self.encoded[: _points_size(len(self.shown))]

    @property
    def serials(self) -> tuple[bytes, ...]:
        """33 bytes for each credential presented: what makes a second spending visible."""
        ends = range(
            _SHOWN * POINT_SIZE, (len(self.shown) * _SHOWN + 1) * POINT_SIZE, _SHOWN * POINT_SIZE
        )
        return tuple(self.encoded[end - POINT_SIZE : end] for end in ends)


def _points_size(presented: int) -> int:
    return (presented * _SHOWN + REQUESTED * _REQUESTED_POINTS) * POINT_SIZE


def parse(request: bytes, presented: int) -> CredentialRequest:
    """Decode a request that presents so many credentials (0 or 2).

    Malformed for wrong lengths, points that are none, infinity, scalars that are not reduced,
    a zero challenge, one serial presented twice, or one M requested twice. Proves nothing.
    """
    if presented not in (0, 2):
        raise Malformed(f"a request presents 0 or 2 credentials, not {presented}")
    if len(request) != request_size(presented):
        raise Malformed(f"a credential request has {request_size(presented)} bytes here")
    size = _points_size(presented)
    points, scalars = tuple(decode_points(request[:size])), decode_scalars(request[size:])
    first = presented * _SHOWN
    parsed = CredentialRequest(
        request,
        tuple(Shown(*group) for group in _groups(points[:first], _SHOWN)),
        tuple(
            Requested(group[0], group[1:]) for group in _groups(points[first:], _REQUESTED_POINTS)
        ),
        scalars[0],
        tuple(scalars[1:]),
    )
    if not parsed.challenge:
        raise Malformed("a challenge is zero")
    if len(set(parsed.serials)) != presented:
        raise Malformed("a serial is presented twice")
    ms = [place + _SHOWN * POINT_SIZE * presented for place in (0, _REQUESTED_POINTS * POINT_SIZE)]
    if len({request[m : m + POINT_SIZE] for m in ms}) != REQUESTED:
        raise Malformed("a commitment is requested twice")
    return parsed


# The joint statement. Its vector is (z z0 t a r) of each credential shown, followed by
# (r v_0..v_3 d_0..d_3) of each requested. The last scalar, the units of the last amount, is
# never sent: the balance determines it.


def _groups(items: tuple[T, ...], size: int) -> list[tuple[T, ...]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _sections(presented: int, vector: Vector) -> tuple[list[Vector], list[Vector]]:
    first = presented * SHOW_LENGTH
    return _groups(vector[:first], SHOW_LENGTH), _groups(vector[first:], _REQUESTED_LENGTH)


def _complete(presented: int, partial: Sequence[int], surplus: int) -> Vector:
    """Append the scalar for which sum(a presented) + surplus = sum(a requested)."""
    shows, requests = _sections(presented, (*partial, 0))
    total = sum(show[_AMOUNT] for show in shows) - sum(digits.value(x[1:]) for x in requests)
    return (*partial, (total + surplus) % ORDER)


def _request_transcript(
    statement: Statement,
    parameters: IssuerParameters,
    presented: int,
    points: bytes,
    into: IssuerParameters | None = None,
) -> Transcript:
    transcript = statement.transcript("hpkv/request/v1")
    transcript.append("issuer", parameters.digest)
    if into is not None:
        transcript.append("into", into.digest)
    transcript.append("presented", bytes([presented]))
    transcript.append("points", points)
    return transcript


def _claims(
    i: FixedBase, shown: Sequence[Shown], vector: Vector, weights: Weights
) -> tuple[Row, ...]:
    """Every row but those of the range proofs; a function of nonces or of responses."""
    shows, requests = _sections(len(shown), vector)
    first, second = (attribute_row(digits.value(x[1:]), x[0]) for x in requests)
    folded = tuple(
        (base, x + weights.m * y) for (base, x), (_, y) in zip(first, second, strict=True)
    )
    rows = [row for one, x in zip(shown, shows, strict=True) for row in show_rows(one, x)]
    return *((ownership_row(i, shows, weights),) if shows else ()), *rows, folded


def _challenge(transcript: Transcript, commitments: Iterable[Point]) -> int:
    transcript.append("commitments", encode_points(commitments))
    return transcript.challenge()


# Client.


def prepare(
    parameters: IssuerParameters,
    statement: Statement,
    presented: Sequence[Credential],
    amounts: tuple[int, int],
    rng: Rng,
    into: IssuerParameters | None = None,
) -> Draft:
    """Prove that `presented` (0 or 2 credentials) pay for two of `amounts`, under `statement`.

    `into`: the issuer of the new ones, if it is not that of the presented; the reply is then
    finished with its parameters.

    ValueError when the amounts do not balance or are out of range, or when the operation does
    not allow that many credentials; BadIssuance when the parameters' digit table is false,
    which is checked on first use (7 ms). The draft must be durable before its request is sent.
    """
    _check_balance(statement, presented, amounts)
    target = into or parameters
    target.verify()
    shows = [_show(credential, rng) for credential in presented]
    requests = [_request(target.table, amount, rng) for amount in amounts]
    request = _prove(parameters, statement, shows, requests, rng, into)
    wanted = tuple((amount, x[0]) for amount, (_, x) in zip(amounts, requests, strict=True))
    ms = [requested.m for requested, _ in requests]
    return Draft(request, statement.binding(len(presented), request), wanted, ms)


def _prove(
    parameters: IssuerParameters,
    statement: Statement,
    shows: Sequence[tuple[Shown, Vector]],
    requests: Sequence[tuple[Requested, Vector]],
    rng: Rng,
    into: IssuerParameters | None = None,
) -> bytes:
    """The request's bytes from its points and their witness."""
    points = b"".join(encode_points(shown) for shown, _ in shows)
    points += b"".join(encode_points((m, *vs)) for (m, vs), _ in requests)
    secrets = tuple(x for _, vector in (*shows, *requests) for x in vector)
    transcript = _request_transcript(statement, parameters, len(shows), points, into)
    nonces = _nonces(transcript, len(shows), secrets, rng)
    weights = Weights(*transcript.weights())
    rows = list(_claims(parameters.i, [shown for shown, _ in shows], nonces, weights))
    for (requested, _), vector in zip(requests, _sections(len(shows), nonces)[1], strict=True):
        rows += digits.rows(requested.digits, vector[1:])
    challenge = _challenge(transcript, commit(rows))
    responses = respond(nonces, secrets, challenge)[:-1]
    return points + b"".join(map(encode_scalar, (challenge, *responses)))


def _check_balance(
    statement: Statement, presented: Sequence[Credential], amounts: Sequence[int]
) -> None:
    if not statement.admits(len(presented)):
        raise ValueError(f"{statement.operation.name} does not present {len(presented)}")
    if len(amounts) != REQUESTED or not all(0 <= amount < AMOUNT_LIMIT for amount in amounts):
        raise ValueError("a request is for two amounts of 0..2^32-1")
    if sum(c.amount for c in presented) + statement.delta != sum(amounts):
        raise ValueError("what is presented and requested does not balance")
    if len({c.r for c in presented}) != len(presented):
        raise ValueError("one credential is presented twice")


def _show(credential: Credential, rng: Rng) -> tuple[Shown, Vector]:
    """Blind a credential: what the issuer sees, and the witness (z z0 t a r)."""
    amount, r, t = credential.amount, credential.r, credential.t
    z = random_scalar(rng)
    m = credential.m or multiexp(attribute_row(amount, r))
    shown = Shown(
        ca=multiexp(((GA, z),), m),
        cx0=multiexp(((GX0, z),), credential.U),
        cx1=multiexp(((GX1, z), (credential.U, t))),
        cv=multiexp(((GV, z),), credential.V),
        serial=multiexp(((GS, r),)),
    )
    return shown, (z, -t * z % ORDER, t, amount, r)


def _request(table: DigitTable, amount: int, rng: Rng) -> tuple[Requested, Vector]:
    """Commit to an amount: what the issuer sees, and the witness (r v_0..v_3 d_0..d_3)."""
    r = random_scalar(rng)
    points, witness = digits.hide(table, amount, rng)
    return Requested(multiexp(attribute_row(amount, r)), points), (r, *witness)


def _nonces(transcript: Transcript, presented: int, secrets: Vector, rng: Rng) -> Vector:
    """Fresh nonces, hedged: should the rng repeat itself, statement and secrets still differ."""
    seed = rng(32) + transcript.digest() + b"".join(map(encode_scalar, secrets))
    return _complete(presented, _expand(b"hpkv/nonces/v1" + seed, len(secrets) - 1), 0)


def _expand(seed: bytes, count: int) -> Vector:
    """Scalars in 1..n-1 from a secret seed."""
    stream = hashlib.shake_256(seed).digest(_WIDE_SIZE * count)
    return tuple(map(wide_scalar, split(stream, _WIDE_SIZE)))


class Draft:
    """A request that was made and what is needed to make use of its reply; has no repr."""

    __slots__ = ("_binding", "_ms", "_wanted", "request")

    def __init__(
        self,
        request: bytes,
        binding: bytes,
        wanted: Sequence[tuple[int, int]],
        ms: Sequence[Point | None] = (None,) * REQUESTED,
    ) -> None:
        """`wanted`: amount and r of each credential; `ms`: the M that commits to them, if known."""
        self.request: Final = request
        """The bytes to send; empty in a draft that was decoded."""
        self._binding = binding
        self._wanted = tuple(wanted)
        self._ms = tuple(ms)

    def encode(self) -> bytes:
        """104 secret bytes: the binding to the request, then u32 amount and r, twice."""
        wanted = [part for a, r in self._wanted for part in (a, encode_scalar(r))]
        return _DRAFT.pack(self._binding, *wanted)

    @classmethod
    def decode(cls, encoded: bytes, request: bytes = b"") -> Draft:
        """Inverse of encode, but for `request`, which is not in it; Malformed otherwise."""
        if len(encoded) != _DRAFT.size:
            raise Malformed(f"a draft has {_DRAFT.size} bytes, not {len(encoded)}")
        binding, a1, r1, a2, r2 = _DRAFT.unpack(encoded)
        return cls(request, binding, ((a1, decode_nonzero(r1)), (a2, decode_nonzero(r2))))

    def finish(self, parameters: IssuerParameters, reply: bytes) -> tuple[Credential, Credential]:
        """The two credentials of a reply made with these parameters' key.

        Malformed when the reply is not even shaped like one, BadIssuance when its MACs are
        not made with the key that everybody else's are made with.
        """
        macs, challenge, responses = _parse_reply(reply)
        parts = zip(self._wanted, macs, self._ms, strict=True)
        first, second = (Credential(a, r, *mac, m) for (a, r), mac, m in parts)
        transcript = _issuance_transcript(parameters, self._binding, reply[:_MACS_SIZE])
        weight = transcript.weights()[0]
        amount, r = (
            weight * one + (1 - weight) * other
            for one, other in ((first.amount, second.amount), (first.r, second.r))
        )
        issued = Issued(first.t, first.U, 1), Issued(second.t, second.U, 1)
        rows = issuance_rows(issued, attribute_row(amount, r), weight, responses)
        try:
            images = mix(first.V, second.V, weight), parameters.gv_i, parameters.cw
            commitments = recompute(rows, images, challenge)
        except Infinity as error:
            raise BadIssuance("the proof of issuance is degenerate") from error
        if _challenge(transcript, commitments) != challenge:
            raise BadIssuance("the proof of issuance does not hold")
        return first, second


class Mac(NamedTuple):
    """What the issuer makes of an M: (t, U, V)."""

    t: int
    U: Point
    V: Point


def _parse_reply(reply: bytes) -> tuple[list[Mac], int, Vector]:
    if len(reply) != REPLY_SIZE:
        raise Malformed(f"a reply has {REPLY_SIZE} bytes, not {len(reply)}")
    macs = [
        Mac(decode_nonzero(mac[:SCALAR_SIZE]), *decode_points(mac[SCALAR_SIZE:]))
        for mac in split(reply[:_MACS_SIZE], _MAC_SIZE)
    ]
    if len({mac.t for mac in macs}) != REQUESTED:
        raise Malformed("t is repeated")
    challenge, *responses = decode_scalars(reply[_MACS_SIZE:])
    if not challenge:
        raise Malformed("a challenge is zero")
    return macs, challenge, tuple(responses)


def _issuance_transcript(parameters: IssuerParameters, binding: bytes, macs: bytes) -> Transcript:
    transcript = Transcript("hpkv/issuance/v1")
    transcript.append("issuer", parameters.digest)
    transcript.append("request", binding)
    transcript.append("macs", macs)
    return transcript


def _encode_macs(macs: Iterable[Mac]) -> bytes:
    return b"".join(encode_scalar(t) + encode_points((u, v)) for t, u, v in macs)


# Issuer.


class _MacKey(NamedTuple):
    w: int
    wp: int
    x0: int
    x1: int
    ya: int


class Issuer:
    """An epoch's secret key: verifies requests and issues credentials; has no repr."""

    __slots__ = ("_digit_key", "_key", "_minus_w_gw", "_prf_key", "_w_gw", "_y", "parameters")

    def __init__(self, key: Sequence[int], y: int, prf_key: bytes) -> None:
        """Of (w, w', x0, x1, ya) and y, all non-zero, and 32 bytes; see generate()."""
        self._key = _MacKey(*key)
        self._y = y
        self._prf_key = prf_key
        self._digit_key = DigitKey(y)
        self._w_gw = multiply_secret(GW, self._key.w)
        self._minus_w_gw = -self._w_gw
        self.parameters: Final = self._publish()
        """The public half, always the same for the same key."""

    @classmethod
    def generate(cls, rng: Rng) -> Issuer:
        """A new key; about 30 ms."""
        return cls([random_scalar(rng) for _ in _MacKey._fields], random_scalar(rng), rng(32))

    def to_bytes(self) -> bytes:
        """224 secret bytes: w, w', x0, x1, ya, y, then the key of the PRF."""
        return b"".join(map(encode_scalar, (*self._key, self._y))) + self._prf_key

    @classmethod
    def from_bytes(cls, encoded: bytes) -> Issuer:
        """Inverse of to_bytes; Malformed for wrong lengths and scalars not in 1..n-1."""
        if len(encoded) != _ISSUER_SIZE:
            raise Malformed(f"an issuer's key has {_ISSUER_SIZE} bytes, not {len(encoded)}")
        *scalars, prf_key = split(encoded, SCALAR_SIZE)
        *key, y = map(decode_nonzero, scalars)
        return cls(key, y, prf_key)

    def _publish(self) -> IssuerParameters:
        w, wp, x0, x1, ya = self._key
        cw = multiexp_secret(((GW, w), (GWP, wp)))
        i = multiexp_secret(((GX0, -x0), (GX1, -x1), (GA, -ya)), GV.point)
        (nonce,) = self._prf("table", encode_scalar(self._y), 1)
        table = self._digit_key.table(nonce)
        return IssuerParameters(cw, i, table)

    def _prf(self, label: str, data: bytes, count: int) -> Vector:
        """Scalars in 1..n-1 that only this issuer can compute."""
        return _expand(self._prf_key + bytes([len(label)]) + label.encode() + data, count)

    def verify(
        self, statement: Statement, request: CredentialRequest, into: Issuer | None = None
    ) -> None:
        """Check every claim of the request about this statement; BadProof if one is false.

        `into`: who shall issue what is requested, if not this issuer.
        """
        presented = len(request.shown)
        if not statement.admits(presented):
            raise BadProof(f"{statement.operation.name} does not present {presented}")
        try:
            transcript = _request_transcript(
                statement,
                self.parameters,
                presented,
                request.points,
                None if into is None else into.parameters,
            )
            weights = Weights(*transcript.weights())
            digit_key = (into or self)._digit_key
            commitments = self._recompute(statement.delta, request, weights, digit_key)
        except Infinity as error:
            raise BadProof("the request's proof is degenerate") from error
        if _challenge(transcript, commitments) != request.challenge:
            raise BadProof("the request's proof does not hold")

    def _recompute(
        self, delta: int, request: CredentialRequest, weights: Weights, digit_key: DigitKey
    ) -> list[Point]:
        e, shown = request.challenge, request.shown
        vector = _complete(len(shown), request.responses, e * delta)
        rows = _claims(self.parameters.i, shown, vector, weights)
        first, second = request.requested
        images = [image for one in shown for image in show_images(one)]
        images.append(fold(first.m, second.m, weights.m))
        if shown:
            images.insert(0, self._ownership(shown, weights))
        commitments = recompute(rows, images, e)
        for requested, x in zip(request.requested, _sections(len(shown), vector)[1], strict=True):
            commitments += digit_key.recompute(requested.digits, x[1:], e)
        return commitments

    def _ownership(self, shown: Sequence[Shown], weights: Weights) -> Point:
        """The image of ownership_row().

        Z = CV - w Gw - x0 Cx0 - x1 Cx1 - ya Ca, which is z I if the MAC is ours; Z is linear, so
        that of two credentials the points are folded before they meet the key.
        """
        key, (first, second) = self._key, shown
        cx0, cx1, ca = (
            fold(getattr(first, c), getattr(second, c), weights.z) for c in ("cx0", "cx1", "ca")
        )
        return multiexp_secret(
            ((cx0, -key.x0), (cx1, -key.x1), (ca, -key.ya)),
            first.cv,
            self._minus_w_gw,
            multiply(add(second.cv, self._minus_w_gw), weights.z),
            multiply(first.serial, weights.serial),
            multiply(second.serial, weights.serial2),
        )

    def issue(self, statement: Statement, request: CredentialRequest) -> bytes:
        """The reply (388 bytes) with two credentials and the proof that they are sound.

        Verifies nothing: verify() first. A function of the arguments and the key alone, so
        that a request repeated is answered by the same bytes.
        """
        binding = statement.binding(len(request.shown), request.encoded)
        first, second = (r.m for r in request.requested)
        issued = self._draw(binding)
        pairs = zip(issued, (first, second), strict=True)
        macs = _encode_macs(self._mac(c, m) for c, m in pairs)
        transcript = _issuance_transcript(self.parameters, binding, macs)
        # From all that the challenge will cover: equal nonces mean an equal challenge.
        nonces = self._prf("nonce", transcript.digest(), ISSUANCE_LENGTH)
        weight = transcript.weights()[0]
        rows = issuance_rows(issued, ((mix(first, second, weight), 1),), weight, nonces)
        challenge = _challenge(transcript, commit_secret(rows))
        responses = respond(nonces, self._key, challenge)
        return macs + b"".join(map(encode_scalar, (challenge, *responses)))

    def _draw(self, binding: bytes) -> tuple[Issued, Issued]:
        """t, and u, which is as secret as the key: knowing it of a few MACs, one could forge."""
        t1, u1, t2, u2 = self._prf("macs", binding, 2 * REQUESTED)
        return Issued(t1, G, u1), Issued(t2, G, u2)

    def _mac(self, c: Issued, m: Point) -> Mac:
        """U = u G and V = w Gw + (x0 + x1 t) U + ya M."""
        key = self._key
        terms = (G, c.u * (key.x0 + key.x1 * c.t)), (m, key.ya)
        return Mac(c.t, generator_multiple(c.u), multiexp_secret(terms, self._w_gw))
