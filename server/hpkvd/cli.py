"""The command `hpkvd`: set up, serve, make vouchers, tell how things are.

Exit codes, as in sysexits.h: 0 done; 64-78 not done, the one sentence on standard error says
why and what to do (69 the address cannot be used, 73 something is in the way, 74 the disk
failed, 75 try again, 78 no or wrong settings); 2 the command line was wrong.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hpkvd import config as settings
from hpkvd import epochs as epoch_files
from hpkvd import identity as identity_file
from hpkvd.commands import (
    Failure,
    data_option,
    failures,
    json_option,
    ledger_option,
    ledger_url,
    load_epochs,
    open_ledger,
)
from hpkvd.commands.care import backup, check, income, migrate, restore
from hpkvd.commands.serve import serve, worker
from hpkvd.config import Config
from hpkvd.epochs import Epochs
from hpkvd.ledger import Totals, urls
from hpkvd.payments import vouchers
from hpkvfs.protocol.credential import AMOUNT_LIMIT
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.types import BLOB_SIZE


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: hpkvd init && hpkvd voucher --amount 1000 && hpkvd serve",
)
def main() -> None:
    """A server of blobs that does not know whose they are."""
    os.umask(0o077)


for _command in (serve, worker, check, backup, restore, migrate, income):
    main.add_command(_command)


@main.command(
    short_help="Make a data directory.",
    epilog="Examples: hpkvd init;  hpkvd init --data /srv/hpkvd --insert 20 --refund 15",
)
@data_option
@ledger_option
@click.option("--look-up", type=int, default=1, show_default=True, help="Tokens for a look-up.")
@click.option("--insert", type=int, default=10, show_default=True, help="Tokens for a blob stored.")
@click.option("--refund", type=int, default=8, show_default=True, help="Tokens back for deleting.")
@click.option("--entry", type=int, show_default="as an insert",
              help="Tokens for a breakglass entry; it has no refund.")  # fmt: skip
@click.option("--entry-hours", type=int, default=72, show_default=True,
              help="How long an entry can be opened after it was first opened.")  # fmt: skip
@failures
def init(
    data: Path,
    ledger: str | None,
    look_up: int,
    insert: int,
    refund: int,
    entry: int | None,
    entry_hours: int,
) -> None:
    """Make a data directory: settings, identity, the first epoch's keys, an empty ledger.

    Back up the whole directory: whoever has it can be this server, and nobody can without it.
    """
    try:
        entry = insert if entry is None else entry
        config = Config(
            ledger=ledger or "", tariff=Tariff(look_up, insert, refund, entry, entry_hours)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    url = ledger_url(data, config)
    urls.sqlite_path(url)  # say now if it is none
    _make_empty(data)
    identity_file.create(data / settings.IDENTITY, secrets.token_bytes)
    urls.create(url)
    epoch = epoch_files.first_epoch(config.tariff, secrets.token_bytes)
    epoch_files.save(data / settings.EPOCHS, epoch)
    (data / settings.FILE).write_text(config.render())
    click.echo(f"{data} is ready; edit {data / settings.FILE} or run `hpkvd serve`")


def _make_empty(data: Path) -> None:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(data.iterdir()):
        raise Failure(f"{data} is not empty; choose another with --data", os.EX_CANTCREAT)


@main.command(
    short_help="Make vouchers.",
    epilog="Examples: hpkvd voucher --amount 1000;  hpkvd voucher --amount 50 --count 20",
)
@data_option
@click.option(
    "--amount", type=click.IntRange(1, AMOUNT_LIMIT - 1), required=True, help="Tokens each."
)
@click.option(
    "--count",
    type=click.IntRange(1, vouchers.MAX_COUNT),
    default=1,
    help="How many.",
    show_default=True,
)
@json_option
@ledger_option
@failures
def voucher(data: Path, ledger: str | None, amount: int, count: int, as_json: bool) -> None:
    """Make vouchers, one on each line; also while the server runs.

    A voucher is money to whoever reads it first, and cannot be shown again.
    """
    desk = open_ledger(data, settings.load(data), ledger)
    try:
        made = vouchers.make(desk, amount, count, secrets.token_bytes)
    finally:
        desk.close()
    if as_json:
        texts = [{"amount": one.amount, "voucher": str(one)} for one in made]
        click.echo(json.dumps({"vouchers": texts}))
    else:
        click.echo("\n".join(map(str, made)))


@main.command(
    short_help="Tell how much is stored and spent.",
    epilog="Examples: hpkvd status;  hpkvd status --json | jq .tokens.outstanding",
)
@data_option
@json_option
@ledger_option
@failures
def status(data: Path, ledger: str | None, as_json: bool) -> None:
    """Tell how much is stored and spent; also while the server runs."""
    desk = open_ledger(data, settings.load(data), ledger)
    try:
        report = _report(load_epochs(data), desk.totals())
    finally:
        desk.close()
    click.echo(json.dumps(report) if as_json else _text(report))


def _report(epochs: Epochs, totals: Totals) -> dict[str, Any]:
    newest = epochs.newest
    return {
        "epoch": {"number": newest.number, "digest": newest.parameters.digest.hex()},
        "tariff": asdict(newest.tariff),
        "blobs": totals.blobs,
        "bytes": totals.blobs * BLOB_SIZE,
        "entries": totals.entries,
        "requests": totals.requests,
        "serials": totals.serials,
        "tokens": {
            "issued": totals.issued,
            "charged": totals.charged,
            "refunded": totals.refunded,
            "outstanding": totals.outstanding,
        },
        "vouchers": {"unspent": totals.vouchers, "tokens": totals.voucher_amount},
    }


def _text(report: dict[str, Any]) -> str:
    epoch, tariff = report["epoch"], report["tariff"]
    tokens, unspent = report["tokens"], report["vouchers"]
    rows = {
        "epoch": f"{epoch['number']} ({epoch['digest'][:16]})",
        "tariff": f"look-up {tariff['look_up']}, insert {tariff['insert']},"
        f" refund {tariff['refund']}, breakglass entry {tariff['entry']}"
        f" ({tariff['entry_hours']} hours)",
        "blobs": f"{report['blobs']:,} ({report['bytes']:,} bytes)",
        "breakglass entries": f"{report['entries']:,}",
        "requests": f"{report['requests']:,}",
        "spent serials": f"{report['serials']:,}",
        "tokens issued": f"{tokens['issued']:,}",
        "charged": f"{tokens['charged']:,}",
        "refunded": f"{tokens['refunded']:,}",
        "outstanding": f"{tokens['outstanding']:,}",
        "unspent vouchers": f"{unspent['unspent']:,} ({unspent['tokens']:,} tokens)",
    }
    return "\n".join(f"{name:<20}{value}" for name, value in rows.items())
