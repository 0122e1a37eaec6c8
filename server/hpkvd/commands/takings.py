"""`hpkvd takings`: the ecash that customers paid with, handed to the operator."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import click

from hpkvd import config as settings
from hpkvd import files
from hpkvd.commands import (
    Failure,
    data_option,
    failures,
    json_option,
    ledger_option,
    open_ledger,
)


@click.command(
    short_help="Take out the ecash that came in.",
    epilog="Examples: hpkvd takings;  hpkvd takings --out today && cashu receive $(head -1 today)",
)
@data_option
@ledger_option
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path),
              help="Write the tokens to this new file, one a line.")  # fmt: skip
@click.option("--again", is_flag=True, help="Also those that were taken out before.")
@json_option
@failures
def takings(data: Path, ledger: str | None, out: Path | None, again: bool, as_json: bool) -> None:
    """Tell how much ecash is in the till, or take it out; also while the server runs.

    Receive the tokens in a wallet soon: until then, who has a copy of the ledger can, too. They
    are written before they count as taken out; --again writes those of a file that was lost.
    """
    with closing(open_ledger(data, settings.load(data), ledger)) as desk:
        found = desk.takings(again=again)
        if out is not None:
            try:
                files.write_new(out, "".join(f"{one.text}\n" for one in found).encode())
            except FileExistsError:
                raise Failure(f"{out} exists; name a new file", os.EX_CANTCREAT) from None
            files.sync(out.absolute().parent)
            desk.mark_taken(found)
    sats = sum(one.sats for one in found)
    if as_json:
        click.echo(json.dumps({"tokens": len(found), "sats": sats, "file": out and str(out)}))
    elif out is None:
        click.echo(f"{len(found):,} tokens of ecash, {sats:,} sat; take them out with --out FILE")
    else:
        click.echo(f"{len(found):,} tokens of ecash, {sats:,} sat, are in {out}")
