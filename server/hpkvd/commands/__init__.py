"""What every command has: the data directory, and failures of one sentence with an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click
import platformdirs
from click.core import ParameterSource

from hpkvd import config as settings
from hpkvd import identity as identity_file
from hpkvd.config import Config, ConfigError
from hpkvd.epochs import EpochError
from hpkvd.identity import IdentityError
from hpkvd.ledger import Engine, LedgerBusy, LedgerError, urls
from hpkvd.rotation import Rotation
from hpkvd.supervisor import WorkerFailed
from hpkvfs.types import BLOB_SIZE

MIB: Final = 2**20
GIB: Final = 2**30
USAGE: Final = 2  # what click ends with when the command line is wrong
PRICE_LIMIT: Final = 1e9


class Failure(click.ClickException):
    """One sentence for the operator, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: Any = None) -> None:
        """As every other line of ours, on standard error."""
        click.echo(f"hpkvd: {self.message}", err=True)


def failures(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one sentence and an exit code."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except Exception as error:
            failure = _failure(_alone(error))
            if failure is None:
                raise
            raise failure from error

    return run


def _alone(error: Exception) -> Exception:
    """Out of the groups that nurseries put it into, unless there are others in them."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        (error,) = error.exceptions
    return error


def _failure(error: Exception) -> Failure | None:
    """None for what nobody foresaw."""
    match error:
        case ConfigError() | EpochError() | IdentityError() | urls.UnknownLedger():
            return Failure(str(error), os.EX_CONFIG)
        case LedgerBusy():
            return Failure(str(error), os.EX_TEMPFAIL)
        case LedgerError():
            return Failure(str(error), os.EX_IOERR)
        case WorkerFailed(code=code):
            return Failure(str(error), code if code > 0 else os.EX_SOFTWARE)
        case OSError(strerror=reason, filename=name):
            where = f" ({name})" if name else ""
            return Failure(f"{reason or error}{where}", os.EX_IOERR)
    return None


def _default_data() -> Path:
    return platformdirs.user_data_path("hpkvd")


data_option = click.option(
    "--data",
    metavar="DIR",
    envvar="HPKVD_DATA",
    type=click.Path(path_type=Path, file_okay=False),
    default=_default_data,
    show_default="$HPKVD_DATA or ~/.local/share/hpkvd",
    help="Directory of settings, keys and the ledger.",
)


def _no_password(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Everybody on a machine can read command lines."""
    source = context.get_parameter_source(option.name or "")
    if value and source is ParameterSource.COMMANDLINE and urls.has_password(value):
        raise click.UsageError(
            "others can read a password on the command line: give the URL in $HPKVD_LEDGER or in"
            " hpkvd.toml, or keep the password in ~/.pgpass"
        )
    return value


ledger_option = click.option(
    "--ledger",
    metavar="URL",
    envvar="HPKVD_LEDGER",
    callback=_no_password,
    help="sqlite:///DIR/FILE or postgresql://USER@HOST/DATABASE, instead of the settings'.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


def _price(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """Nothing negative, infinite or NaN: the last two are no JSON."""
    if value is not None and not 0 <= value < PRICE_LIMIT:
        raise Failure("a token's price is 0 or more, and below a thousand million", USAGE)
    return value


price_option = click.option(
    "--price", type=float, metavar="P", callback=_price, help="What a token is sold for."
)


def rotation(data: Path, ledger: Engine) -> Rotation:
    """What keeps the epochs of a data directory, signed with its identity; IdentityError."""
    return Rotation(data, identity_file.load(data / settings.IDENTITY), ledger)


def ledger_url(data: Path, config: Config, given: str | None = None) -> str:
    """Where the ledger is: as given, else as the settings say, else a file beside them."""
    return given or config.ledger or f"sqlite://{(data / settings.LEDGER).absolute()}"


def open_ledger(data: Path, config: Config, given: str | None = None) -> Engine:
    """The ledger of a data directory; LedgerError."""
    return urls.open_ledger(
        ledger_url(data, config, given),
        reserve=config.reserve_mib * MIB,
        max_blobs=config.max_gib * GIB // BLOB_SIZE,
    )
