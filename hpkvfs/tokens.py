"""The commands about tokens: redeeming a voucher, buying, and what there is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from hpkvfs import ui
from hpkvfs.errors import UserError
from hpkvfs.settings import (
    Result,
    Settings,
    file_path,
    json_option,
    pass_settings,
    prompt,
    read_secret,
    show,
)

voucher_file = click.option(
    "--voucher-file", metavar="FILE", type=file_path, help="Read the voucher here."
)


@click.command(
    epilog="""\b
Examples:
  hpkvfs redeem                            asks for the voucher
  hpkvfs redeem - < voucher.txt
  hpkvfs redeem --voucher-file voucher.txt
  hpkvfs redeem hpkv1-1000-...             others on this machine may see it in the list of processes
"""  # noqa: E501
)
@click.argument("voucher", required=False)
@voucher_file
@json_option
@pass_settings
def redeem(
    settings: Settings, voucher: str | None, voucher_file: Path | None, as_json: bool
) -> None:
    """Turn a voucher into tokens.

    When it was cut short, run it again: no token is lost.
    """
    if voucher is not None and voucher_file is not None:
        raise click.UsageError("give the voucher once")
    if voucher_file is not None or voucher == "-":
        voucher = read_secret(voucher_file or Path("-"), "voucher")
    if voucher is None:
        voucher = prompt("voucher", "--voucher-file")
    result = settings.perform("redeem", {"voucher": voucher}, "redeeming")
    show(result, as_json, lambda r: f"{r['amount']:,} tokens redeemed; {r['held']:,} in all")


@click.command(epilog="Examples: hpkvfs balance;  hpkvfs balance --json | jq .held")
@json_option
@pass_settings
def balance(settings: Settings, as_json: bool) -> None:
    """Tell how many tokens there are.

    Pending ones are in requests whose answer has not come yet; they are settled when the
    server can be reached.
    """
    result = settings.perform("balance", {}, "looking")
    show(result, as_json, ui.balance)


@click.command(
    epilog="""\b
Examples:
  hpkvfs buy                               goes on with what was begun, or shows the prices
  hpkvfs buy --tokens 10000 --lightning
  hpkvfs buy --cashu - < token             a token on the command line can be seen by others here
  hpkvfs buy --tokens 500 --lightning --no-wait --json | jq -r .invoice
"""
)
@click.option("--tokens", type=click.IntRange(1, 2**32 - 1), metavar="N", help="How many.")
@click.option("--lightning", is_flag=True, help="Pay a Lightning invoice.")
@click.option("--cashu", metavar="TOKEN|-", help="Pay with Cashu ecash; - reads standard input.")
@click.option("--cashu-file", metavar="FILE", type=file_path, help="Read the ecash here.")
@click.option("--no-wait", is_flag=True, help="Show the invoice, and go on another time.")
@click.option("--abandon", is_flag=True,
              help="Give up what was begun and not paid; what is paid later is lost.")  # fmt: skip
@json_option
@pass_settings
def buy(
    settings: Settings,
    tokens: int | None,
    lightning: bool,
    cashu: str | None,
    cashu_file: Path | None,
    no_wait: bool,
    abandon: bool,
    as_json: bool,
) -> None:
    """Buy tokens: with Cashu ecash, or by a Lightning invoice.

    What is bought has nothing to do with what it is used for later: neither the server nor
    whoever saw the payment can tell. Interrupted at any point, run it again: it goes on.
    """
    if sum((lightning, cashu is not None, cashu_file is not None, abandon)) > 1:
        raise click.UsageError("pay in one way at a time")
    if abandon:
        result = settings.perform("abandon-purchases", {}, "giving up")
        show(result, as_json, _abandoned)
        return
    orders = _orders(settings, tokens, lightning, _token(cashu, cashu_file))
    if not orders:
        if tokens is not None:
            raise click.UsageError("say how to pay: --lightning or --cashu")
        show(settings.perform("offers", {}, "asking for the prices"), as_json, _offers)
    for order in orders:
        _pay(settings, order, not no_wait, as_json)


def _token(text: str | None, path: Path | None) -> str | None:
    if path is not None or text == "-":
        return read_secret(path or Path("-"), "token").strip()
    return text


def _orders(
    settings: Settings, tokens: int | None, lightning: bool, token: str | None
) -> list[Result]:
    """What is to be asked for: something new, or to go on with what was begun."""
    if token is not None:
        if tokens is not None:
            raise click.UsageError("a token of ecash buys what it is worth; leave --tokens out")
        return [{"method": "cashu", "token": token}]
    begun = settings.perform("purchases", {}, "looking")["purchases"]
    if not lightning:
        return [] if tokens is not None else [{"id": one["id"]} for one in begun]
    begun = [one for one in begun if one["method"] == "lightning"]
    if begun and tokens in (None, begun[0]["tokens"]):
        return [{"id": begun[0]["id"]}]
    if begun:
        raise UserError(
            f"a purchase of {begun[0]['tokens']:,} tokens is not finished",
            "go on with it: hpkvfs buy; or give it up, if it was not paid: hpkvfs buy --abandon",
        )
    if tokens is None:
        raise click.UsageError("say how many: --tokens N")
    return [{"method": "lightning", "tokens": tokens}]


def _pay(settings: Settings, order: Result, wait: bool, as_json: bool) -> None:
    result = settings.perform("buy", order, "asking")
    if result["state"] == "open":
        _show_bill(result, as_json)
        if not wait:
            return
        waiting = {"id": result["id"], "seconds": result["seconds"]}
        try:
            result = settings.perform("await-purchase", waiting, "waiting for the payment")
        except KeyboardInterrupt:
            click.echo("hpkvfs: nothing is lost, paid or not; go on with it: hpkvfs buy", err=True)
            raise
    show(result, as_json, lambda r: f"{r['tokens']:,} tokens bought; {r['held']:,} in all")


def _abandoned(result: Result) -> str:
    number = result["abandoned"]
    told = "1 purchase was given up" if number == 1 else f"{number:,} purchases were given up"
    if result["tokens"]:
        told += f"; {result['tokens']:,} tokens were paid for already, and are here"
    return told


def _show_bill(bill: Result, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(bill))
        return
    minutes = bill["seconds"] // 60
    click.echo(f"{bill['tokens']:,} tokens for {bill['sats']:,} sat, within {minutes} minutes:")
    click.echo(bill["invoice"])
    if sys.stdout.isatty():
        ui.qr(bill["invoice"].upper())  # which makes a smaller code, and is the same invoice
    sys.stdout.flush()


def _offers(result: Result) -> str:
    if not result["offers"]:
        return "this server sells nothing here; ask its operator for a voucher"
    return "\n".join(_offer(one) for one in result["offers"])


def _offer(offer: Result) -> str:
    how = {"cashu": "Cashu ecash", "lightning": "Lightning"}[offer["method"]]
    line = (
        f"{how}: {offer['tokens_per_ksat']:,} tokens for 1,000 sat,"
        f" from {offer['least']:,} to {offer['most']:,} at a time"
    )
    mints = [f"  of {ui.printable(mint)}" for mint in offer["mints"]]
    option = "--cashu - < FILE" if mints else "--tokens N --lightning"
    return "\n".join([line, *mints, f"  hpkvfs buy {option}"])


COMMANDS = (redeem, buy, balance)
