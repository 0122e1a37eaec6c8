"""`hpkvd plan`: what a number of users takes; the arithmetic is in plan.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import click

from hpkvd import config as settings
from hpkvd import measure as measuring
from hpkvd import plan as planning
from hpkvd.commands import USAGE, Failure, data_option, failures, json_option, price_option
from hpkvd.epochs import Schedule
from hpkvd.plan import ENGINES, SOURCES, Constants, Demand, Plan
from hpkvfs.protocol.tariff import Tariff

SCALE: Final = ("100", "10k", "1M", "100M")
_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY: Final = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50}
_NUMBER: Final = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)([kmgtp]?)(i?)(b?)")
PRICES: Final = ("look_up", "insert", "refund", "entry")


@click.command(
    short_help="What a number of users takes, and brings in.",
    epilog="Examples: hpkvd plan;  hpkvd plan --vaults 5000 --bytes 20GiB --operations 500"
    " --price 0.0004 --currency EUR;  hpkvd plan --vaults 100M --json | jq '.plans[0].shards';"
    "  hpkvd plan --measure",
)
@data_option
@click.option("--vaults", multiple=True, metavar="N", help="Users, as 5000, 10k or 1e8; may be"
              " repeated: a column each.  [default: 100, 10k, 1M, 100M]")  # fmt: skip
@click.option("--bytes", "size", default="1GiB", show_default=True, metavar="SIZE",
              help="Of files in a vault, as 500MB or 20GiB.")  # fmt: skip
@click.option("--operations", default="200", show_default=True, metavar="N",
              help="Paid requests of a vault in a day.")  # fmt: skip
@click.option("--inserts", type=float, default=0.3, show_default=True, metavar="SHARE",
              help="Share of them that stores a blob.")  # fmt: skip
@click.option("--deletes", type=float, default=0.25, show_default=True, metavar="SHARE",
              help="Share that deletes one; the rest looks up.")  # fmt: skip
@click.option("--peak", type=float, default=3.0, show_default=True, metavar="TIMES",
              help="The busiest hour over the mean.")  # fmt: skip
@click.option("--busy", type=float, default=0.6, show_default=True, metavar="SHARE",
              help="How busy cores and databases may be then.")  # fmt: skip
@click.option("--engine", type=click.Choice(ENGINES), default="postgresql", show_default=True,
              help="What keeps the ledger.")  # fmt: skip
@click.option("--replicas", type=int, metavar="N", help="Copies of the ledger, the first included."
              "  [default: 2; SQLite: 1]")  # fmt: skip
@click.option("--shard", default="8TiB", show_default=True, metavar="SIZE",
              help="Disk of one database.")  # fmt: skip
@click.option("--look-up", type=int, metavar="TOKENS", help="Instead of the settings' tariff.")
@click.option("--insert", type=int, metavar="TOKENS", help="Likewise.")
@click.option("--refund", type=int, metavar="TOKENS", help="Likewise.")
@click.option("--entry", type=int, metavar="TOKENS", help="Likewise.")
@price_option
@click.option("--currency", default="", help="Of the price; only shown.")
@click.option("--constants", "constants_file", metavar="FILE",
              type=click.Path(path_type=Path, dir_okay=False),
              help="JSON object of constants that were measured elsewhere.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Measure this machine first, and show the constants:"
              " what each is, and the command that measures it.")  # fmt: skip
@json_option
@failures
def plan(
    data: Path,
    vaults: tuple[str, ...],
    size: str,
    engine: str,
    replicas: int | None,
    constants_file: Path | None,
    measure: bool,
    price: float | None,
    currency: str,
    as_json: bool,
    **rest: Any,
) -> None:
    """Tell what a number of users takes (storage, cores, bandwidth, databases) and brings in.

    Nothing is changed, and no server needs to run. Prices and epochs are those of the data
    directory's settings, if there is one. The constants behind it were measured on the machine
    docs/operator.md names; `--measure` takes this one.
    """
    try:
        tariff, schedule = _prices(data, rest)
        constants = _constants(constants_file, measure)
        copies = (1 if engine == "sqlite" else 2) if replicas is None else replicas
        demands = [
            Demand(
                vaults=round(quantity(one)),
                bytes_each=round(quantity(size)),
                operations=quantity(rest["operations"]),
                inserts=rest["inserts"],
                deletes=rest["deletes"],
                peak=rest["peak"],
                busy=rest["busy"],
                replicas=copies,
                keep=schedule.keep,
                days=schedule.days or Schedule().days,
                shard_bytes=round(quantity(rest["shard"])),
            )
            for one in vaults or SCALE
        ]
        plans = [planning.plan(one, tariff, constants, engine) for one in demands]
    except ValueError as error:
        raise Failure(str(error), USAGE) from error
    except OverflowError as error:
        raise Failure("such numbers cannot be added up; give smaller ones", USAGE) from error
    if as_json:
        report = {
            "plans": [asdict(one) | {"money": _money(one, price)} for one in plans],
            "tariff": asdict(tariff),
            "price": price,
            "currency": currency,
            "constants": asdict(constants),
        }
        click.echo(json.dumps(report))
        return
    click.echo(_table(plans, price, currency))
    if measure:
        click.echo("\n" + _constants_table(constants))


def quantity(text: str) -> float:
    """5000, 10k, 1.5M, 1e8, 20GiB, 500MB as a number; ValueError for other text."""
    found = _NUMBER.fullmatch(text.strip().lower())
    number, prefix, binary = found.group(1, 2, 3) if found else ("", "", "")
    if not number or (binary and not prefix):
        raise ValueError(f"`{text}` is no number; write 5000, 10k, 1e8, 500MB or 20GiB")
    return float(number.replace("_", "")) * (_BINARY if binary else _DECIMAL)[prefix]


def _prices(data: Path, given: dict[str, Any]) -> tuple[Tariff, Schedule]:
    """The settings', or the defaults where there are none; with what was given on the line."""
    config = settings.load(data) if (data / settings.FILE).exists() else settings.Config()
    prices = {one.name: getattr(config.tariff, one.name) for one in fields(Tariff)}
    prices |= {name: given[name] for name in PRICES if given[name] is not None}
    if given["insert"] is not None and given["entry"] is None:
        prices["entry"] = max(prices["entry"], given["insert"])
    return Tariff(**prices), config.epochs


def _constants(path: Path | None, measure: bool) -> Constants:
    constants = Constants()
    if path is not None:
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise Failure(f"there is no file {path}; check --constants", os.EX_NOINPUT) from None
        except (ValueError, UnicodeError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a JSON object of constants")
        constants = planning.changed(constants, values)
    if measure:
        click.echo("hpkvd: measuring this machine, some seconds", err=True)
        constants = planning.changed(constants, measuring.constants())
    return constants


def _money(one: Plan, price: float | None) -> dict[str, float] | None:
    if price is None:
        return None
    names = ("earned_a_year", "filling", "owed")
    return {name: round(getattr(one.income, name) * price, 2) for name in names}


def _table(plans: Sequence[Plan], price: float | None, currency: str) -> str:
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        ("vaults", lambda p: _count(p.demand.vaults)),
        ("requests/s, mean", lambda p: _count(p.requests.paid + p.requests.upkeep)),
        ("requests/s, peak", lambda p: _count(p.requests.peak)),
        ("blobs", lambda p: _count(p.storage.blobs)),
        ("storage, one copy", lambda p: _bytes(p.storage.each_copy)),
        ("  of it blobs", lambda p: _bytes(p.storage.blob_bytes)),
        ("  spent serials, replies", lambda p: _bytes(p.storage.spent_bytes_most)),
        ("    more each day", lambda p: _bytes(p.storage.spent_bytes_a_day)),
        ("    gone with an epoch", lambda p: _bytes(p.storage.dropped_bytes_an_epoch)),
        ("storage, all copies", lambda p: _bytes(p.storage.all_copies)),
        ("cores, peak", lambda p: _count(p.cores.total)),
        ("  of them proofs", lambda p: _count(p.cores.proofs)),
        ("  the rest of hpkvd", lambda p: _count(p.cores.rest)),
        ("  databases", lambda p: _count(p.cores.database)),
        ("  tor", lambda p: _count(p.cores.tor)),
        ("incoming, peak", lambda p: _bits(p.bandwidth.incoming_peak)),
        ("outgoing, peak", lambda p: _bits(p.bandwidth.outgoing_peak)),
        ("to the copies, peak", lambda p: _bits(p.bandwidth.to_copies_peak)),
        ("databases", lambda p: _count(p.shards.databases)),
        ("  shards by key", lambda p: _count(p.shards.key)),
        ("  shards by serial", lambda p: _count(p.shards.serial)),
        ("  commits a request", lambda p: f"{p.shards.commits_a_request:g}"),
        ("tokens to fill it, once", lambda p: _count(p.income.filling)),
        ("  of them owed as refunds", lambda p: _count(p.income.owed)),
        ("tokens earned a year", lambda p: _count(p.income.earned_a_year)),
    ]
    if price is not None:
        unit = f" {currency}" if currency else ""
        rows.append(
            (f"money earned a year{unit}", lambda p: _count(p.income.earned_a_year * price))
        )
    lines = [f"{name:<28}" + "".join(f"{tell(one):>14}" for one in plans) for name, tell in rows]
    demand = plans[0].demand
    head = (
        f"A vault: {_bytes(demand.bytes_each)} of files, {demand.operations:g} paid requests a"
        f" day, {demand.inserts:.0%} of them insertions and {demand.deletes:.0%} deletions.\n"
        f"Epochs: {demand.keep} of {demand.days:g} days. Copies: {demand.replicas}. Peak:"
        f" {demand.peak:g} times the mean, {demand.busy:.0%} busy. Ledger: {plans[0].engine}.\n"
    )
    return head + "\n" + "\n".join(lines)


def _constants_table(constants: Constants) -> str:
    lines = [f"{'constant':<28}{'value':>12}  {'measured by':<36}what"]
    for name, (what, command) in SOURCES.items():
        lines.append(f"{name:<28}{getattr(constants, name):>12,g}  {command:<36}{what}")
    return "\n".join(lines)


def _count(value: float) -> str:
    return _scaled(value, ("", " k", " M", " G", " T", " P"), 1000)


def _bytes(value: float) -> str:
    return _scaled(value, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"), 1024)


def _bits(value: float) -> str:
    return _scaled(value, (" bit/s", " kbit/s", " Mbit/s", " Gbit/s", " Tbit/s"), 1000)


def _scaled(value: float, units: Sequence[str], step: int) -> str:
    """Three digits and a unit."""
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= step
    return f"{value:,.3g}{units[-1]}"
