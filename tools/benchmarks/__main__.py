"""Front end of the benchmarks: `tools/bench NAME [--json]`.

A benchmark is a module beside this one with `run(as_json) -> {key: figure}`. It may print
while it works; the figures are printed here, last.
"""

from __future__ import annotations

import importlib
import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BENCHMARKS = {
    "credentials": "proofs, issuance and their sizes, without disk or network",
    "store": "blobs inserted, looked up and deleted at a local server, per second",
    "server": "paid requests a second, 1 and 2 workers, on SQLite and PostgreSQL",
    "preload": "the same on full ledgers (10 million serials, 1 million blobs) and on empty ones",
    "load": "minutes of load while workers and the database are killed: what is lost (nothing)",
    "fs": "what programs do, beside gocryptfs, cryfs, s3ql and a pass-through (root; minutes)",
    "tor": "paid requests over Tor, each on its own circuit, on a private network",
    "space": "blobs that real trees cost: doc_ratio (at most 1.15), small_blobs (at most 100)",
    "soak": "an hour of random system calls, kill -9 each minute: failures (must be 0)",
    "memory": "peak memory of a mount whose tree of a million inodes is walked (--memory)",
    "simulate": "10,000 simulated lives of a client and its server: failures (must be 0)",
    "recover": "look-ups and rounds from the words to the first ls, at most 2 log2(commits) + 10",
}
OPTIONS = {
    "only": ("fs",),
    "engine": ("load", "preload"),
    "minutes": ("load", "soak"),
    "scale": ("preload",),
}
HELP = "\b\n" + "\n".join(f"{name:<13}{what}" for name, what in BENCHMARKS.items())


@click.command(
    "bench",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Measure one of:\n\n{HELP}",
    epilog="Examples: tools/bench space;  tools/bench store --json | tail -n 1 | jq .;  "
    "tools/bench fs --only hpkvfs --only s3ql --only untar;  tools/bench load --minutes 10 --json",
)
@click.argument("name", type=click.Choice(list(BENCHMARKS)))
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON, not a table.")
@click.option("--only", multiple=True, help="fs: a peer, or the beginning of a row.")
@click.option(
    "--engine", type=click.Choice(["sqlite", "postgres"]), help="load, preload: this one."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.05),
    help="load: how long on each engine (10); soak: how long (60).",
)
@click.option("--scale", type=click.FloatRange(1e-4, 1), help="preload: of all those rows (1).")
def main(name: str, as_json: bool, **given: object) -> None:
    """Run one benchmark and print its figures."""
    options = {option: value for option, value in given.items() if value}
    for option in options:
        if name not in OPTIONS[option]:
            raise click.UsageError(f"--{option} is of {' and '.join(OPTIONS[option])}")
    module = importlib.import_module(f"tools.benchmarks.{name}")
    figures = module.run(as_json, **options)
    if as_json:
        click.echo(json.dumps(figures))
    else:
        _print_table(name, figures)


def _print_table(name: str, figures: dict[str, object]) -> None:
    table = Table(title=name, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in figures.items():
        table.add_row(key, escape(f"{value:,}" if isinstance(value, int | float) else str(value)))
    Console().print(table)


if __name__ == "__main__":
    main(prog_name="tools/bench")
