"""Front end of the coverage-guided fuzzer: `tools/fuzz NAME [--seconds N]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # installed by tools/fuzz
import click

with atheris.instrument_imports(include=["hpkvfs", "hpkvd"], enable_loader_override=False):
    from tests.fuzz.decoders import check, decoders


@click.command("fuzz", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", metavar="NAME")
@click.option("--seconds", type=int, default=60, show_default=True, help="For how long.")
def main(name: str, seconds: int) -> None:
    """Feed one decoder with bytes that reach ever more of it, from valid ones on.

    NAME is one of those that `tools/fuzz list` shows. What is not declared, or has two
    encodings, stops it, and the bytes are written to ./crash-*.
    """
    if name == "list":
        click.echo("\n".join(decoders()))
        return
    if name not in decoders():
        raise click.UsageError(f"there is no decoder `{name}`; tools/fuzz list shows them")
    decoder = decoders()[name]
    with tempfile.TemporaryDirectory() as corpus:
        for number, sample in enumerate(decoder.samples):
            (Path(corpus) / str(number)).write_bytes(sample)
        longest = max(map(len, decoder.samples))
        options = [f"-max_total_time={seconds}", f"-max_len={longest + 100}", corpus]
        atheris.Setup([sys.argv[0], *options], lambda raw: _one(name, raw))
        atheris.Fuzz()


def _one(name: str, raw: bytes) -> None:
    check(decoders()[name], raw)


if __name__ == "__main__":
    main(prog_name="tools/fuzz")
