"""Commands for whoever looks after a server: check, backup, restore, migrate, income."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import click

from hpkvd import config as settings
from hpkvd import custody
from hpkvd.commands import (
    Failure,
    data_option,
    failures,
    json_option,
    ledger_option,
    ledger_url,
    open_ledger,
    price_option,
)
from hpkvd.ledger import check as checking
from hpkvd.ledger import urls

PROGRESS_SECONDS: Final = 2.0
PAGES: Final = "looking at every page and index of the file, which takes long for a large one"
FORGETS: Final = (
    "Credentials spent since this backup was made can be spent again at the restored server, and"
    " blobs stored since are lost. Restore only when the ledger itself is lost, and never while"
    " the server it was made from still serves."
)


class _Progress:
    """A line every PROGRESS_SECONDS, on standard error; none for what is quick."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS and total:
            self._told = now
            click.echo(f"hpkvd: {self._what}, {100 * done // total} %", err=True)


@click.command(
    short_help="Check the ledger.",
    epilog="Examples: hpkvd check;  hpkvd check --quick --json",
)
@data_option
@ledger_option
@click.option(
    "--quick", is_flag=True, help="Leave out the blobs' digests, and SQLite's pages and indexes."
)
@json_option
@failures
def check(data: Path, ledger: str | None, quick: bool, as_json: bool) -> None:
    """Check the books against requests, vouchers and payments, and every blob against its digest.

    Also while a server runs: what is looked at is of one moment. Ends with 65 if something is
    wrong.
    """
    url = ledger_url(data, settings.load(data), ledger)
    with closing(custody.rows_of(url)) as rows:
        progress = _Progress("checking")
        if not quick and urls.sqlite_path(url) is not None and sys.stderr.isatty():
            click.echo(f"hpkvd: {PAGES}", err=True)
        found = list(checking.problems(rows, blobs=not quick, progress=progress))
    if as_json:
        click.echo(json.dumps({"problems": found}))
    else:
        click.echo("\n".join(found) if found else "the ledger is as it should be")
    if found:
        sys.exit(os.EX_DATAERR)


@click.command(
    short_help="Copy keys and ledger, also while serving.",
    epilog="Examples: hpkvd backup /mnt/safe/hpkvd-monday;  hpkvd backup --data /srv/hpkvd copy",
)
@data_option
@ledger_option
@click.argument("target", type=click.Path(path_type=Path))
@failures
def backup(data: Path, ledger: str | None, target: Path) -> None:
    """Copy everything a server needs into the new directory TARGET; also while it serves.

    The copy can be this server to everybody: keep it as safe as the original.
    """
    config = settings.load(data)
    if target.exists():
        raise Failure(f"{target} exists; name a directory that does not", os.EX_CANTCREAT)
    if target.resolve().is_relative_to(data.resolve()):
        raise Failure(f"{target} is in what is copied; name one outside", os.EX_CANTCREAT)
    custody.backup(data, ledger_url(data, config, ledger), target, _Progress("copying"))
    click.echo(f"{target} has the settings, the keys and the ledger")


@click.command(
    short_help="Make a server of a backup.",
    epilog="Examples: hpkvd restore /mnt/safe/hpkvd-monday --data /srv/hpkvd --yes",
)
@data_option
@ledger_option
@click.argument("saved", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--yes", is_flag=True, help="Do not ask.")
@failures
def restore(data: Path, ledger: str | None, saved: Path, yes: bool) -> None:
    """Make a data directory, and a ledger, of the backup in the directory SAVED."""
    if data.exists() and any(data.iterdir()):
        raise Failure(f"{data} is not empty; choose another with --data", os.EX_CANTCREAT)
    if not (saved / settings.LEDGER).is_file():
        raise Failure(f"{saved} is no backup made by `hpkvd backup`; name one", os.EX_NOINPUT)
    config = settings.load(saved)
    click.echo(f"hpkvd: {FORGETS}", err=True)
    if not yes:
        click.confirm("Restore?", abort=True, err=True)
    url = ledger_url(data, config, ledger)
    custody.restore(saved, data, url, _Progress("restoring"))
    hint = "" if url == ledger_url(data, config) else "; set `ledger` in hpkvd.toml"
    click.echo(f"{data} is ready; its ledger is in {urls.shown(url)}{hint}")


@click.command(
    short_help="Move the ledger to another engine.",
    epilog="Examples: hpkvd migrate sqlite:///srv/hpkvd/ledger.sqlite postgresql://hpkvd@db/hpkvd;"
    "  hpkvd migrate env:OLD env:NEW",
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@failures
def migrate(source: str, target: str) -> None:
    """Move a ledger FROM one URL TO another; the server must be stopped.

    Interrupted, run it again: it goes on. At the end counts, sums and books are compared, and
    the old ledger can no longer be served. `env:NAME` takes a URL from the environment, for
    those with a password.
    """
    custody.migrate(_url(source), _url(target), _Progress("moving"))
    click.echo(f"the ledger is in {urls.shown(_url(target))}; set `ledger` in hpkvd.toml")


def _url(text: str) -> str:
    if text.startswith("env:"):
        name = text.removeprefix("env:")
        if not os.environ.get(name):
            raise click.UsageError(f"${name} is not set")
        return os.environ[name]
    if urls.has_password(text):
        raise click.UsageError(
            "others can read a password on the command line: put the URL into the environment"
            " and write env:NAME"
        )
    return text


@click.command(
    short_help="What was sold, earned and is still owed.",
    epilog="Examples: hpkvd income;  hpkvd income --price 0.0004 --currency EUR --json",
)
@data_option
@ledger_option
@price_option
@click.option("--currency", default="", help="Of the price; only shown.")
@json_option
@failures
def income(
    data: Path, ledger: str | None, price: float | None, currency: str, as_json: bool
) -> None:
    """Tell what was sold, what of it is earned, and what is still owed in service.

    Earned is what was charged less what was refunded. Owed are the tokens customers hold, and
    those that deleting every blob would give back. What was paid by ecash or Lightning is counted
    when it is paid, and sold when its voucher is redeemed.
    """
    with closing(open_ledger(data, settings.load(data), ledger)) as desk:
        totals = desk.totals()
    rows = {
        "sold": totals.issued,
        "earned": totals.charged - totals.refunded,
        "owed": totals.outstanding,
        "vouchers_unredeemed": totals.voucher_amount,
    }
    paid = {
        "cashu": (totals.cashu_tokens, totals.cashu_sats),
        "lightning": (totals.lightning_tokens, totals.lightning_sats),
    }
    if as_json:
        report: dict[str, object] = {name: {"tokens": tokens, "money": _money(tokens, price)}
                  for name, tokens in rows.items()}  # fmt: skip
        report["paid"] = {name: {"tokens": n, "sats": sats} for name, (n, sats) in paid.items()}
        click.echo(json.dumps(report | {"currency": currency}))
        return
    for name, tokens in rows.items():
        money = "" if price is None else f"  {_money(tokens, price):>14,.2f} {currency}"
        click.echo(f"{name.replace('_', ' '):<22}{tokens:>16,} tokens{money}")
    for name, (tokens, sats) in paid.items():
        click.echo(f"{'paid by ' + name:<22}{tokens:>16,} tokens  {sats:>14,} sat")


def _money(tokens: int, price: float | None) -> float | None:
    return None if price is None else round(tokens * price, 2)
