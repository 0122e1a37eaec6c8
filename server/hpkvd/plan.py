"""What a number of users takes: storage, cores, bandwidth, income, shards; arithmetic only.

Everything is derived from a Demand, a Tariff and the Constants below, which were measured; who
has another machine measures his own (`hpkvd plan --measure`, `tools/bench server`). Rates are
means over a day unless they are called peaks. Bytes are bytes, seconds are seconds, tokens are
tokens; a year has 365 days.

Sharded ledgers are a plan, not a program: docs/sharding.md has the protocol that Shards counts
the commits of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias

from hpkvfs.protocol.codec import CELL_DATA, REPLY_SIZE, REQUEST_SIZE
from hpkvfs.protocol.tariff import Tariff

SECONDS_PER_DAY: Final = 86_400
DAYS_PER_YEAR: Final = 365
PAYLOAD_SIZE: Final = 16_384  # of a blob, in bytes

# What a mounted vault does besides its user's operations (docs/architecture.md, "Breakglass",
# "Epochs"): in each epoch one entry, and reissues that move 32 credentials and fill the reserve;
# in a day, four times, the parameters over three connections.
ENTRIES_PER_EPOCH: Final = 1
REISSUES_PER_EPOCH: Final = 18
PARAMETERS_PER_DAY: Final = 12

# Tor: bytes on the wire for CELL_DATA bytes of ours, with TLS, TCP and IP; cells of a circuit
# besides (introduction, rendezvous, building both, closing).
CELL_SIZE: Final = 514
TOR_FRAMING: Final = 1.06
CIRCUIT_CELLS: Final = 24


@dataclass(frozen=True, slots=True)
class Constants:
    """Figures that were measured; SOURCES says how each is measured again."""

    proof_ms: float = 1.9
    sqlite_rest_ms: float = 0.4
    postgresql_rest_ms: float = 0.4
    postgresql_database_ms: float = 0.15
    sqlite_transactions_s: float = 7_000.0
    postgresql_transactions_s: float = 5_500.0
    sqlite_blob_bytes: float = 17_040.0
    postgresql_blob_bytes: float = 17_370.0
    sqlite_request_bytes: float = 690.0
    postgresql_request_bytes: float = 946.0
    sqlite_entry_bytes: float = 1_590.0
    postgresql_entry_bytes: float = 1_280.0
    log_bytes: float = 18_840.0
    space_ratio: float = 1.05
    tor_ms: float = 2.5


SOURCES: Final = {
    "proof_ms": ("CPU to check one proof and issue", "hpkvd plan --measure"),
    "sqlite_rest_ms": ("other CPU of a worker for a request", "tools/bench server"),
    "postgresql_rest_ms": ("the same, ledger in PostgreSQL", "tools/bench server"),
    "postgresql_database_ms": ("CPU of PostgreSQL for a request", "tools/bench server"),
    "sqlite_transactions_s": ("transactions of one ledger, no proofs", "tools/bench server"),
    "postgresql_transactions_s": ("transactions of one ledger, no proofs", "tools/bench server"),
    "sqlite_blob_bytes": ("disk for one blob with its index", "hpkvd plan --measure"),
    "postgresql_blob_bytes": ("the same in PostgreSQL", "tools/bench server"),
    "sqlite_request_bytes": ("disk for one request and its serials", "hpkvd plan --measure"),
    "postgresql_request_bytes": ("the same in PostgreSQL", "tools/bench server"),
    "sqlite_entry_bytes": ("disk for one breakglass entry", "hpkvd plan --measure"),
    "postgresql_entry_bytes": ("the same in PostgreSQL", "tools/bench server"),
    "log_bytes": ("write-ahead log that an insertion sends a standby", "tools/bench server"),
    "space_ratio": ("bytes stored for a byte of files", "tools/bench space"),
    "tor_ms": ("CPU of the server's tor, taken as a third of all tors'", "tools/bench tor"),
}
assert set(SOURCES) == {one.name for one in fields(Constants)}


@dataclass(frozen=True, slots=True)
class Demand:
    """What users do. `bytes_each`: of files in a vault; `operations`: paid requests of a vault
    in a day, of which these shares insert and delete, and the rest look up.

    `peak`: the busiest hour over the mean; `busy`: how much of a core or a database may be used
    then; `replicas`: copies of the ledger; `keep` epochs of `days` days can be presented.
    ValueError for what cannot be.
    """

    vaults: int
    bytes_each: int = 2**30
    operations: float = 200.0
    inserts: float = 0.3
    deletes: float = 0.25
    peak: float = 3.0
    busy: float = 0.6
    replicas: int = 2
    keep: int = 4
    days: float = 90.0
    shard_bytes: int = 8 * 2**40

    def __post_init__(self) -> None:
        if not (self.vaults >= 1 and self.bytes_each >= 0 and 0 <= self.operations < 1e9):
            raise ValueError("vaults are 1 or more, bytes and operations 0 or more")
        if not (min(self.inserts, self.deletes) >= 0 and self.inserts + self.deletes <= 1):
            raise ValueError("the shares of insertions and deletions are 0 to 1, together too")
        if not (1 <= self.peak < 1e6 and 0 < self.busy <= 1):
            raise ValueError("a peak is 1 or more, and what may be busy more than 0, at most 1")
        if not (self.replicas >= 1 and self.keep >= 1 and self.days > 0):
            raise ValueError("copies, epochs and their days are 1 or more")
        if self.shard_bytes < 2**30:
            raise ValueError("a shard has 1 GiB or more")


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests a second: `paid` by their users' operations; `upkeep` of what vaults do by
    themselves and prove too; `free` ones, which prove nothing."""

    paid: float
    upkeep: float
    free: float
    peak: float


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes. `each_copy` has blobs, entries, and the requests and serials of every epoch that
    can be presented, at the most, just before the oldest ends; `dropped` is what ends with it."""

    blobs: int
    blob_bytes: int
    entry_bytes: int
    spent_bytes_a_day: int
    spent_bytes_most: int
    serials_most: int
    dropped_bytes_an_epoch: int
    each_copy: int
    all_copies: int


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores, at the peak, none busier than allowed."""

    proofs: float
    rest: float
    database: float
    tor: float
    total: int


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bits a second, with Tor's cells around them, and from a primary to all its copies."""

    incoming: float
    outgoing: float
    incoming_peak: float
    outgoing_peak: float
    to_copies_peak: float


@dataclass(frozen=True, slots=True)
class Income:
    """Tokens. `earned`: charged less refunded; `filling`: charged once, for what is stored, of
    which `owed` comes back to whoever deletes it."""

    charged_a_day: int
    refunded_a_day: int
    earned_a_year: int
    filling: int
    owed: int


@dataclass(frozen=True, slots=True)
class Shards:
    """Databases. With one of each, one database has it all and nothing crosses.

    `commits_a_request`: on the way to one answer, all shards together.
    """

    key: int
    serial: int
    databases: int
    commits_a_request: float
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it for one demand."""

    demand: Demand
    engine: str
    requests: Requests
    storage: Storage
    cores: Cores
    bandwidth: Bandwidth
    income: Income
    shards: Shards


Engine: TypeAlias = str
ENGINES: Final = ("sqlite", "postgresql")


def plan(demand: Demand, tariff: Tariff, constants: Constants, engine: Engine) -> Plan:
    """The plan; ValueError if SQLite, which is one file on one machine, is too little."""
    requests = _requests(demand)
    blobs = math.ceil(demand.vaults * demand.bytes_each * constants.space_ratio / PAYLOAD_SIZE)
    storage = _storage(demand, constants, engine, requests, blobs)
    shards = _shards(demand, constants, engine, requests, storage)
    if engine == "sqlite" and (shards.databases > 1 or demand.replicas > 1):
        raise ValueError(
            "SQLite is one file on one machine, without a copy that takes over, and that is not"
            " enough for this: plan for postgresql, or with --replicas 1 for fewer vaults"
        )
    return Plan(
        demand=demand,
        engine=engine,
        requests=requests,
        storage=storage,
        cores=_cores(demand, constants, engine, requests),
        bandwidth=_bandwidth(demand, constants, requests),
        income=_income(demand, tariff, blobs),
        shards=shards,
    )


def _requests(demand: Demand) -> Requests:
    paid = demand.vaults * demand.operations / SECONDS_PER_DAY
    per_epoch = ENTRIES_PER_EPOCH + REISSUES_PER_EPOCH
    upkeep = demand.vaults * per_epoch / (demand.days * SECONDS_PER_DAY)
    free = demand.vaults * PARAMETERS_PER_DAY / SECONDS_PER_DAY
    return Requests(paid, upkeep, free, demand.peak * (paid + upkeep + free))


def _storage(
    demand: Demand, constants: Constants, engine: Engine, requests: Requests, blobs: int
) -> Storage:
    blob_bytes = blobs * _of(constants, engine, "blob_bytes")
    entries = demand.vaults * demand.keep * ENTRIES_PER_EPOCH
    entry_bytes = entries * _of(constants, engine, "entry_bytes")
    recorded = (requests.paid + requests.upkeep) * SECONDS_PER_DAY  # a day; each has two serials
    a_day = recorded * _of(constants, engine, "request_bytes")
    kept_days = demand.keep * demand.days
    each = blob_bytes + entry_bytes + a_day * kept_days
    return Storage(
        blobs=blobs,
        blob_bytes=round(blob_bytes),
        entry_bytes=round(entry_bytes),
        spent_bytes_a_day=round(a_day),
        spent_bytes_most=round(a_day * kept_days),
        serials_most=round(2 * recorded * kept_days),
        dropped_bytes_an_epoch=round(a_day * demand.days),
        each_copy=round(each),
        all_copies=round(each * demand.replicas),
    )


def _cores(demand: Demand, constants: Constants, engine: Engine, requests: Requests) -> Cores:
    factor = demand.peak / demand.busy / 1_000  # of milliseconds a second
    proving = requests.paid + requests.upkeep
    every = proving + requests.free
    proofs = proving * constants.proof_ms * factor
    rest = every * _of(constants, engine, "rest_ms") * factor
    database = 0.0
    if engine == "postgresql":
        database = proving * constants.postgresql_database_ms * factor * demand.replicas
    tor = every * constants.tor_ms * factor
    return Cores(proofs, rest, database, tor, math.ceil(proofs + rest + database + tor))


def _bandwidth(demand: Demand, constants: Constants, requests: Requests) -> Bandwidth:
    every = requests.paid + requests.upkeep + requests.free
    incoming, outgoing = every * 8 * _wire(REQUEST_SIZE), every * 8 * _wire(REPLY_SIZE)
    inserted = requests.paid * demand.inserts * 8 * constants.log_bytes
    return Bandwidth(
        incoming=incoming,
        outgoing=outgoing,
        incoming_peak=incoming * demand.peak,
        outgoing_peak=outgoing * demand.peak,
        to_copies_peak=inserted * demand.peak * (demand.replicas - 1),
    )


def _wire(frame: int) -> float:
    """Bytes of a frame and half of its circuit's cells on the line of the server's tor."""
    return (frame / CELL_DATA + CIRCUIT_CELLS / 2) * CELL_SIZE * TOR_FRAMING


def _income(demand: Demand, tariff: Tariff, blobs: int) -> Income:
    operations = demand.vaults * demand.operations  # a day
    looked_up = operations * (1 - demand.inserts - demand.deletes)
    entries = demand.vaults * ENTRIES_PER_EPOCH / demand.days
    charged = (
        looked_up * tariff.look_up
        + operations * demand.inserts * tariff.insert
        + entries * tariff.entry
    )
    refunded = operations * demand.deletes * tariff.refund
    return Income(
        charged_a_day=round(charged),
        refunded_a_day=round(refunded),
        earned_a_year=round((charged - refunded) * DAYS_PER_YEAR),
        filling=blobs * tariff.insert,
        owed=blobs * tariff.refund,
    )


def _shards(
    demand: Demand, constants: Constants, engine: Engine, requests: Requests, storage: Storage
) -> Shards:
    """One database while it does; else those of keys and of serials, each for bytes and commits."""
    proving = (requests.paid + requests.upkeep) * demand.peak
    most = _of(constants, engine, "transactions_s") * demand.busy
    if proving <= most and storage.each_copy <= demand.shard_bytes:
        return Shards(1, 1, 1, 1.0, "one database does")
    proving = max(proving, 1e-9)
    writing = requests.paid * demand.peak * (demand.inserts + demand.deletes)
    # A request begins and ends at its home among the serial shards and is at one more; at the key
    # shard what changes a blob is reserved, then performed (docs/sharding.md).
    commits = 3 + 2 * writing / proving
    for_key_bytes = math.ceil((storage.blob_bytes + storage.entry_bytes) / demand.shard_bytes)
    for_key_commits = math.ceil(2 * writing / most)
    for_serial_bytes = math.ceil(storage.spent_bytes_most / demand.shard_bytes)
    for_serial_commits = math.ceil(3 * proving / most)
    key = max(1, for_key_bytes, for_key_commits)
    serial = max(1, for_serial_bytes, for_serial_commits)
    why = (
        f"key shards for {_reason(for_key_bytes, for_key_commits)},"
        f" serial shards for {_reason(for_serial_bytes, for_serial_commits)}"
    )
    return Shards(key, serial, key + serial, round(commits, 2), why)


def _reason(for_bytes: int, for_commits: int) -> str:
    return "their bytes" if for_bytes >= for_commits else "their commits"


def _of(constants: Constants, engine: Engine, name: str) -> float:
    value: float = getattr(constants, f"{engine}_{name}")
    return value


def changed(constants: Constants, values: dict[str, Any]) -> Constants:
    """Constants with these in place of some; ValueError for a name or value that is none."""
    known = {one.name: getattr(constants, one.name) for one in fields(Constants)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"there is no constant `{name}`")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"`{name}` is a number above 0")
        known[name] = float(value)
    return Constants(**known)
