"""The command `hpkvd`: set up, serve, make vouchers, tell how things are.

Exit codes, as in sysexits.h: 0 done; 64-78 not done, the one sentence on standard error says
why and what to do (69 the address cannot be used, 73 something is in the way, 74 the disk
failed, 75 try again, 78 no or wrong settings); 2 the command line was wrong.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import closing
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
    open_ledger,
)
from hpkvd.commands.care import backup, check, income, migrate, restore
from hpkvd.commands.plan import plan
from hpkvd.commands.serve import serve, worker
from hpkvd.commands.takings import takings
from hpkvd.config import Config
from hpkvd.ledger import Totals, urls
from hpkvd.payments import vouchers
from hpkvd.rotation import SECONDS_PER_DAY
from hpkvfs.guard import guard_memory
from hpkvfs.protocol.credential import AMOUNT_LIMIT
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.types import BLOB_SIZE


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: hpkvd init && hpkvd voucher --amount 1000 && hpkvd serve",
)
@click.version_option(package_name="hpkvfs", prog_name="hpkvd", message="%(prog)s %(version)s")
def main() -> None:
    """A server of blobs that does not know whose they are."""
    os.umask(0o077)
    guard_memory()


for _command in (serve, worker, check, backup, restore, migrate, income, takings, plan):
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
    urls.create(url)  # first: what most often fails leaves nothing behind it to be cleared away
    identity_file.create(data / settings.IDENTITY, secrets.token_bytes)
    first = epoch_files.first_epoch(config.tariff, secrets.token_bytes)
    epoch_files.save(data / settings.EPOCHS, first)
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
    config = settings.load(data)
    desk = open_ledger(data, config, ledger)
    try:
        report = _report(epoch_files.published(data / settings.EPOCHS)[-1], desk.totals())
        report["ledger"] = urls.shown(ledger_url(data, config, ledger))
    finally:
        desk.close()
    click.echo(json.dumps(report) if as_json else _text(report))


@main.group()
def epoch() -> None:
    """Begin epochs, and tell which there are.

    An epoch is the time of one issuer key and one tariff. The last few can be presented (`keep`
    in the settings); clients move their tokens to the newest by themselves, at random times.
    Tokens left in an epoch that ended are worth nothing.
    """


@epoch.command(
    short_help="Begin the next epoch.",
    epilog="Examples: hpkvd epoch rotate;  hpkvd epoch rotate --data /srv/hpkvd",
)
@data_option
@ledger_option
@json_option
@failures
def rotate(data: Path, ledger: str | None, as_json: bool) -> None:
    """Begin the next epoch, with the tariff in the settings; also while the server runs.

    A running server takes it up within seconds. What ends thereby is forgotten in the background,
    or when the server is started next.
    """
    config = settings.load(data)
    directory = data / settings.EPOCHS
    with closing(open_ledger(data, config, ledger)) as desk:
        newest = epoch_files.newest_number(directory) + 1
        oldest = epoch_files.oldest_kept(newest, config.epochs.keep, desk.oldest_epoch)
        rng, claim = secrets.token_bytes, desk.claim_epoch
        begun = epoch_files.rotate(directory, config.tariff, rng, oldest, claim)
    assert begun is not None
    if as_json:
        digest = begun.parameters.digest.hex()
        click.echo(json.dumps({"number": begun.number, "digest": digest, "oldest": oldest}))
    else:
        click.echo(
            f"epoch {begun.number} has begun; tokens of epoch {oldest} and later ones can be"
            " presented"
        )


@epoch.command(
    "list",
    short_help="Tell which epochs there are.",
    epilog="Examples: hpkvd epoch list;  hpkvd epoch list --json | jq '.epochs[-1].tariff'",
)
@data_option
@ledger_option
@json_option
@failures
def list_epochs(data: Path, ledger: str | None, as_json: bool) -> None:
    """Tell which epochs there are, when they began and what they charge, the oldest first.

    The last line is what the settings say of the next one.
    """
    config = settings.load(data)
    directory = data / settings.EPOCHS
    published = epoch_files.published(directory)
    newest = published[-1].number
    with closing(open_ledger(data, config, ledger)) as desk:
        oldest = epoch_files.oldest_kept(newest, config.epochs.keep, desk.oldest_epoch)
    rows = [
        {
            "number": one.number,
            "digest": one.digest.hex(),
            "began": _day(epoch_files.began(directory, one.number)),
            "state": _state(one.number, oldest, newest),
            "tariff": asdict(one.tariff),
        }
        for one in published
    ]
    coming = {
        "number": newest + 1,
        "begins": _begins(config, epoch_files.began(directory, newest)),
        "tariff": asdict(config.tariff),
    }
    click.echo(json.dumps({"epochs": rows, "next": coming}) if as_json else _table(rows, coming))


def _begins(config: Config, newest_began: float) -> str | None:
    """The day on which a server that runs then begins the next epoch; None: by command only."""
    days = config.epochs.days
    return _day(newest_began + days * SECONDS_PER_DAY) if days else None


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _state(number: int, oldest: int, newest: int) -> str:
    if number == newest:
        return "newest"
    return "accepted" if number >= oldest else "ended"


def _table(rows: list[dict[str, Any]], coming: dict[str, Any]) -> str:
    lines = [f"{'epoch':>6}  {'began':<10}  {'state':<8}  {'digest':<16}  prices"]
    lines += [
        f"{row['number']:>6}  {row['began']}  {row['state']:<8}  {row['digest'][:16]}  "
        f"{_prices(row['tariff'])}"
        for row in rows
    ]
    lines.append(
        f"{coming['number']:>6}  {coming['begins'] or 'by command':<10}  {'next':<8}  {'':<16}  "
        f"{_prices(coming['tariff'])}"
    )
    return "\n".join(lines)


def _prices(tariff: dict[str, int]) -> str:
    return (
        f"look-up {tariff['look_up']}, insert {tariff['insert']}, refund {tariff['refund']},"
        f" breakglass entry {tariff['entry']} ({tariff['entry_hours']} hours)"
    )


def _report(newest: EpochParameters, totals: Totals) -> dict[str, Any]:
    return {
        "epoch": {"number": newest.number, "digest": newest.digest.hex()},
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
        "sold": {
            "cashu": {"tokens": totals.cashu_tokens, "sats": totals.cashu_sats},
            "lightning": {"tokens": totals.lightning_tokens, "sats": totals.lightning_sats},
            "unsettled": totals.sales,
        },
        "takings": {"tokens": totals.takings, "sats": totals.takings_sats},
    }


def _text(report: dict[str, Any]) -> str:
    newest, tokens, unspent = report["epoch"], report["tokens"], report["vouchers"]
    rows = {
        "epoch": f"{newest['number']} ({newest['digest'][:16]})",
        "tariff": _prices(report["tariff"]),
        "blobs": f"{report['blobs']:,} ({report['bytes']:,} bytes)",
        "breakglass entries": f"{report['entries']:,}",
        "ledger": report["ledger"],
        "requests": f"{report['requests']:,}",
        "spent serials": f"{report['serials']:,}",
        "tokens issued": f"{tokens['issued']:,}",
        "charged": f"{tokens['charged']:,}",
        "refunded": f"{tokens['refunded']:,}",
        "outstanding": f"{tokens['outstanding']:,}",
        "unspent vouchers": f"{unspent['unspent']:,} ({unspent['tokens']:,} tokens)",
        "paid by ecash": _sold(report["sold"]["cashu"]),
        "paid by Lightning": _sold(report["sold"]["lightning"]),
        "unsettled": f"{report['sold']['unsettled']:,} payments",
        "ecash in the till": f"{report['takings']['sats']:,} sat (hpkvd takings)",
    }
    return "\n".join(f"{name:<20}{value}" for name, value in rows.items())


def _sold(row: dict[str, int]) -> str:
    return f"{row['tokens']:,} tokens for {row['sats']:,} sat"
