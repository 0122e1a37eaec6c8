"""Front end of the simulator: `tools/simulate [SEED | FIRST-LAST]...`."""

from __future__ import annotations

import logging
import sys

import click

from tests.simulation.mutations import MUTATIONS
from tests.simulation.points import Point
from tests.simulation.rival_mutations import RIVAL_MUTATIONS
from tests.simulation.rivals import Rivals
from tests.simulation.world import Outcome, World, run


@click.command(
    "simulate",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples: tools/simulate 4711 --trace;  tools/simulate 0-99;"
    "  tools/simulate 0-99 --mutation 'serial not recorded';  tools/simulate 47 --rivals",
)
@click.argument("seeds", nargs=-1, required=True)
@click.option("--trace", is_flag=True, help="Show all that happens.")
@click.option("--real", is_flag=True, help="With real credentials, which take longer.")
@click.option("--rivals", is_flag=True, help="Two writers and a follower of one vault.")
@click.option(
    "--mutation",
    type=click.Choice([*MUTATIONS, *RIVAL_MUTATIONS]),
    help="With a planted bug; those about several clients need --rivals.",
)
@click.option("--at", type=click.Choice([one.name for one in Point]), help="Die there once.")
def main(
    seeds: tuple[str, ...],
    trace: bool,
    real: bool,
    rivals: bool,
    mutation: str | None,
    at: str | None,
) -> None:
    """Play seeds of the simulation; each is always the same.

    Ends with 1 if one failed.
    """
    logging.disable(logging.CRITICAL)
    point = Point[at] if at else None
    bug = (MUTATIONS | RIVAL_MUTATIONS)[mutation] if mutation else None
    plays = Rivals if rivals else World
    failures = 0
    for seed in _numbers(seeds):
        outcome = run(seed, real=real, keep=trace, mutation=bug, at=point, plays=plays)
        failures += bool(outcome.failure)
        _show(outcome)
    sys.exit(bool(failures))


def _numbers(seeds: tuple[str, ...]) -> list[int]:
    numbers: list[int] = []
    for text in seeds:
        first, _, last = text.partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise click.UsageError(f"`{text}` is neither a seed nor FIRST-LAST") from None
    return numbers


def _show(outcome: Outcome) -> None:
    for line in outcome.lines:
        click.echo(line)
    died = ", ".join(point.name for point in outcome.struck) or "nowhere"
    click.echo(f"{outcome.seed}: {outcome.failure or 'ok'}; died at {died}; {outcome.trace[:16]}")


if __name__ == "__main__":
    main(prog_name="tools/simulate")
