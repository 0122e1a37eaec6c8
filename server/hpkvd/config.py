"""hpkvd.toml in the data directory: written by `hpkvd init`, edited by the operator.

Anything unknown or of the wrong type in it is an error: a setting that is misspelt must not be
one that is silently ignored.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Final, TypeVar

from hpkvd.epochs import Schedule
from hpkvd.payments import LONGEST_EXPIRY, Mints, Node, Prices
from hpkvd.service import Limits
from hpkvfs.protocol.messages import MAX_DELTA, MAX_EPOCHS, MAX_PLACE, MAX_PLACES
from hpkvfs.protocol.tariff import Tariff

FILE: Final = "hpkvd.toml"
LEDGER: Final = "ledger.sqlite"
EPOCHS: Final = "epochs"
IDENTITY: Final = "identity"
TOR: Final = "tor"
LONGEST_EPOCH: Final = 100_000  # days
UNIX: Final = "unix:"  # before the path of a socket, where else HOST:PORT is

TEMPLATE: Final = """\
# hpkvd: settings, read when the server starts.

# Where to listen: HOST:PORT, or unix:PATH. Keep it on loopback, behind a Tor onion service.
listen = "{listen}"

# Processes that answer; 0: as many as there are cores.
workers = {workers}

# Counts for Prometheus, as "127.0.0.1:9387"; "": none. docs/operator.md says what they leak.
metrics = "{metrics}"

# Where the ledger is: "": the file ledger.sqlite here; "sqlite:///DIR/FILE"; or
# "postgresql://USER@HOST,STANDBY/DATABASE", for several servers and for fail-over.
ledger = "{ledger}"

# GiB of blobs at which insertions stop; 0: only when the disk is full.
max_gib = {max_gib}

# "json": what is told on standard error is one JSON object a line.
log = "{log}"

# Free disk space, in MiB, that insertions leave for look-ups, deletions and refunds.
reserve_mib = {reserve_mib}

# An epoch is the time of one issuer key and one tariff; tokens belong to one, and clients move
# theirs to the newest. Read also while serving.
[epochs]
keep = {keep}               # so many can be presented; tokens of older ones are worth nothing
days = {days}            # from one epoch to the next; 0: only by `hpkvd epoch rotate`

# Prices in tokens. They belong to an epoch: a change takes effect with the next one.
[tariff]
look_up = {look_up}
insert = {insert}
refund = {refund}
entry = {entry}              # a breakglass entry; a byte of it at least 10 times that of a blob
entry_hours = {entry_hours}       # how long it can be opened after it was first opened

[limits]
connections = {connections}      # at a time, of each worker
queue = {queue}            # requests in work at a time; whoever comes then is told "busy"
seconds = {seconds}            # for a request to arrive, and for a reply to leave
stop_seconds = {stop_seconds}       # for the last answers when the server is stopped

# Vouchers that customers pay for themselves (`hpkvfs buy`); docs/operator.md.
[payments]
tokens_per_ksat = {payments_tokens_per_ksat}   # what 1,000 sat buy
least = {payments_least}               # tokens at a time
most = {payments_most}
open = {payments_open}              # payments not settled at a time; a quarter for ecash alone
socks = "{payments_socks}"  # tor's SOCKS port, for mints and nodes with .onion addresses
socks_always = {payments_socks_always}     # true: for all mints and nodes but those on this machine

# Mints whose ecash is taken: you hold it until you take it out (`hpkvd takings`).
[cashu]
mints = {cashu_mints}              # ["https://mint.example"]

# Who makes Lightning invoices: "cln" (clnrest), "lnd" (REST), "mint" (a Cashu mint), "": nobody.
[lightning]
kind = "{lightning_kind}"
url = "{lightning_url}"
secret_file = "{lightning_secret_file}"        # the rune (text) or macaroon (as LND wrote it)
ca_file = "{lightning_ca_file}"            # the node's certificate, if it signed that itself
expiry = {lightning_expiry}           # seconds for an invoice to be paid
"""

T = TypeVar("T", Tariff, Limits, Schedule, Prices, Mints, Node)
_PLAIN: Final = ("listen", "workers", "metrics", "ledger", "max_gib", "log", "reserve_mib")


class ConfigError(Exception):
    """The settings cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """What hpkvd.toml says."""

    listen: str = "127.0.0.1:7387"
    workers: int = 0
    metrics: str = ""
    ledger: str = field(default="", repr=False)  # it may have a password
    max_gib: int = 0
    log: str = "text"
    reserve_mib: int = 64
    epochs: Schedule = field(default_factory=Schedule)
    tariff: Tariff = field(default_factory=Tariff)
    limits: Limits = field(default_factory=Limits)
    payments: Prices = field(default_factory=Prices)
    cashu: Mints = field(default_factory=Mints)
    lightning: Node = field(default_factory=Node)

    def render(self) -> str:
        """The file that load reads as this."""
        tables = {one.name: getattr(self.tariff, one.name) for one in fields(Tariff)}
        tables |= {one.name: getattr(self.limits, one.name) for one in fields(Limits)}
        tables |= {one.name: getattr(self.epochs, one.name) for one in fields(Schedule)}
        for section in ("payments", "cashu", "lightning"):
            values = getattr(self, section)
            for one in fields(values):
                value = getattr(values, one.name)
                tables[f"{section}_{one.name}"] = (
                    json.dumps(value)[1:-1] if isinstance(value, str) else json.dumps(value)
                )
        plain = {name: getattr(self, name) for name in _PLAIN}
        plain["ledger"] = json.dumps(self.ledger)[1:-1]
        return TEMPLATE.format(**plain, **tables)


def load(data: Path) -> Config:
    """The settings of a data directory; ConfigError if it has none or they are wrong."""
    path = data / FILE
    try:
        table = tomllib.loads(path.read_text())
        return _config(table)
    except FileNotFoundError:
        raise ConfigError(f"{data} has no {FILE}; run `hpkvd init --data {data}` first") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT` (brackets around an IPv6 host) in two; ConfigError for other text."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"`{text}` is not an address; write HOST:PORT, as in 127.0.0.1:7387")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _config(table: dict[str, Any]) -> Config:
    defaults = Config()
    config = Config(
        **{name: _take(table, name, getattr(defaults, name)) for name in _PLAIN},
        epochs=_section(table, "epochs", defaults.epochs),
        tariff=_section(table, "tariff", defaults.tariff),
        limits=_section(table, "limits", defaults.limits),
        payments=_section(table, "payments", defaults.payments),
        cashu=_section(table, "cashu", defaults.cashu),
        lightning=_section(table, "lightning", defaults.lightning),
    )
    _refuse_rest(table)
    if not config.listen.startswith(UNIX):
        address(config.listen)
    if config.log not in ("text", "json"):
        raise ConfigError('`log` must be "text" or "json"')
    if config.workers < 0 or config.max_gib < 0:
        raise ConfigError("workers and max_gib cannot be negative")
    if (
        config.reserve_mib < 0
        or min(config.limits.connections, config.limits.queue) < 1
        or not 0 < config.limits.seconds < inf
        or not 0 <= config.limits.stop_seconds < inf
    ):
        raise ConfigError("reserve_mib cannot be negative, nor any limit zero or endless")
    if not 1 <= config.epochs.keep <= MAX_EPOCHS or not 0 <= config.epochs.days <= LONGEST_EPOCH:
        raise ConfigError(
            f"keep from 1 to {MAX_EPOCHS} epochs; their days are 0 to {LONGEST_EPOCH:,}"
        )
    _check_payments(config)
    return config


def _check_payments(config: Config) -> None:
    prices, node = config.payments, config.lightning
    if not (1 <= prices.least <= prices.most <= MAX_DELTA and prices.open >= 1):
        raise ConfigError(f"payments: 1 <= least <= most <= {MAX_DELTA}, and some may be open")
    if not 1 <= prices.tokens_per_ksat <= MAX_DELTA:
        raise ConfigError("payments.tokens_per_ksat must be positive")
    if node.kind not in ("", "cln", "lnd", "mint"):
        raise ConfigError('lightning.kind must be "cln", "lnd", "mint" or ""')
    if node.kind and not 60 <= node.expiry <= LONGEST_EXPIRY:
        raise ConfigError("an invoice can be paid for from a minute to a week (lightning.expiry)")
    if node.kind in ("cln", "lnd") and not node.secret_file:
        raise ConfigError("lightning.secret_file must name the file of the rune or macaroon")
    urls = [*config.cashu.mints, *([node.url] if node.kind else [])]
    if len(config.cashu.mints) > MAX_PLACES or any(
        not isinstance(url, str) or len(url.encode()) > MAX_PLACE for url in urls
    ):
        raise ConfigError(f"at most {MAX_PLACES} mints, each a URL of at most {MAX_PLACE} bytes")
    if not urls:
        return
    from hpkvd.payments.web import check_url  # not before it is needed: it loads an HTTP client

    for url in urls:
        try:
            check_url(url)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _section(table: dict[str, Any], name: str, defaults: T) -> T:
    section: dict[str, Any] = _take(table, name, {})
    names = [one.name for one in fields(defaults)]
    values = {one: _take(section, one, getattr(defaults, one)) for one in names}
    _refuse_rest(section)
    return type(defaults)(**values)


def _take(table: dict[str, Any], name: str, default: Any) -> Any:
    value = table.pop(name, default)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f"`{name}` must be of type {type(default).__name__}")
    return value


def _refuse_rest(table: dict[str, Any]) -> None:
    if table:
        raise ConfigError(f"there is no setting `{next(iter(table))}`; remove it")
