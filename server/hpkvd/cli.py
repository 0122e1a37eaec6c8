"""The command `hpkvd`: set up, serve, make vouchers, tell how things are.

Exit codes, as in sysexits.h: 0 done; 64-78 not done, the one sentence on standard error says
why and what to do (69 the address cannot be used, 73 something is in the way, 74 the disk
failed, 75 try again, 78 no or wrong settings); 2 the command line was wrong.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final

import click
import platformdirs
import trio

from hpkvd import config as settings
from hpkvd import epochs as epoch_files
from hpkvd import identity as identity_file
from hpkvd import log
from hpkvd.config import Config, ConfigError
from hpkvd.epochs import EpochError, Epochs
from hpkvd.handler import Handler
from hpkvd.identity import IdentityError
from hpkvd.ledger import LedgerBusy, LedgerError, Totals
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.payments import vouchers
from hpkvd.service import Service
from hpkvfs.protocol.credential import AMOUNT_LIMIT
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.types import BLOB_SIZE

MIB: Final = 2**20


class Failure(click.ClickException):
    """One sentence for the operator, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: Any = None) -> None:
        """As every other line of ours, on standard error."""
        click.echo(f"hpkvd: {self.message}", err=True)


def _failures(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command raises into one sentence and an exit code."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (ConfigError, EpochError, IdentityError) as error:
            raise Failure(str(error), os.EX_CONFIG) from error
        except LedgerBusy as error:
            raise Failure(str(error), os.EX_TEMPFAIL) from error
        except LedgerError as error:
            raise Failure(str(error), os.EX_IOERR) from error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise Failure(f"{error.strerror or error}{where}", os.EX_IOERR) from error

    return run


def _default_data() -> Path:
    return platformdirs.user_data_path("hpkvd")


_data = click.option(
    "--data",
    metavar="DIR",
    envvar="HPKVD_DATA",
    type=click.Path(path_type=Path, file_okay=False),
    default=_default_data,
    show_default="$HPKVD_DATA or ~/.local/share/hpkvd",
    help="Directory of settings, keys and the ledger.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: hpkvd init && hpkvd voucher --amount 1000 && hpkvd serve",
)
def main() -> None:
    """A server of blobs that does not know whose they are."""
    os.umask(0o077)


@main.command(
    short_help="Make a data directory.",
    epilog="Examples: hpkvd init;  hpkvd init --data /srv/hpkvd --insert 20 --refund 15",
)
@_data
@click.option("--look-up", type=int, default=1, show_default=True, help="Tokens for a look-up.")
@click.option("--insert", type=int, default=10, show_default=True, help="Tokens for a blob stored.")
@click.option("--refund", type=int, default=8, show_default=True, help="Tokens back for deleting.")
@click.option("--entry", type=int, show_default="as an insert",
              help="Tokens for a breakglass entry; it has no refund.")  # fmt: skip
@click.option("--entry-hours", type=int, default=72, show_default=True,
              help="How long an entry can be opened after it was first opened.")  # fmt: skip
@_failures
def init(
    data: Path, look_up: int, insert: int, refund: int, entry: int | None, entry_hours: int
) -> None:
    """Make a data directory: settings, identity, the first epoch's keys, an empty ledger.

    Back up the whole directory: whoever has it can be this server, and nobody can without it.
    """
    try:
        entry = insert if entry is None else entry
        config = Config(tariff=Tariff(look_up, insert, refund, entry, entry_hours))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _make_empty(data)
    identity_file.create(data / settings.IDENTITY, secrets.token_bytes)
    SqliteLedger.create(data / settings.LEDGER)
    epoch = epoch_files.first_epoch(config.tariff, secrets.token_bytes)
    epoch_files.save(data / settings.EPOCHS, epoch)
    (data / settings.FILE).write_text(config.render())
    click.echo(f"{data} is ready; edit {data / settings.FILE} or run `hpkvd serve`")


def _make_empty(data: Path) -> None:
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(data.iterdir()):
        raise Failure(f"{data} is not empty; choose another with --data", os.EX_CANTCREAT)


@main.command(
    short_help="Serve until SIGTERM or SIGINT.",
    epilog="Examples: hpkvd serve;  hpkvd serve --listen 127.0.0.1:0 --data /srv/hpkvd",
)
@_data
@click.option("--listen", metavar="HOST:PORT", help="Instead of the settings'; port 0 picks one.")
@click.option("--ready-fd", type=int, metavar="N", help="Write the address to this descriptor.")
@_failures
def serve(data: Path, listen: str | None, ready_fd: int | None) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being answered."""
    log.start()
    config = settings.load(data)
    host, port = settings.address(listen or config.listen)
    epochs = _load_epochs(data)
    if epochs.newest.tariff != config.tariff:
        log.tell("the tariff in the settings differs from the epoch's, which stays until the next")
    ledger = SqliteLedger(data / settings.LEDGER, reserve=config.reserve_mib * MIB)
    try:
        trio.run(_serve, config, epochs, ledger, host, port, partial(_announce, ready_fd))
    finally:
        ledger.close()


async def _serve(
    config: Config,
    epochs: Epochs,
    ledger: SqliteLedger,
    host: str,
    port: int,
    announce: Callable[[str], None],
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        listeners = await _listen(host, port)
        stop = trio.Event()
        handler = Handler(epochs, ledger)
        async with ledger.serving(), trio.open_nursery() as clockwork:
            clockwork.start_soon(handler.keep_time)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(Service(handler.answer, config.limits).run, listeners, stop)
                gc.freeze()  # what lives as long as the server is not worth looking at again
                announce(_name(listeners[0]))
                await anext(signals)
                log.tell("stopping; the last requests are being answered")
                stop.set()
            clockwork.cancel_scope.cancel()
    log.tell("stopped")


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot listen on {host}:{port} ({reason}); choose another with --listen"
        raise Failure(message, os.EX_UNAVAILABLE) from error


def _name(listener: trio.SocketListener) -> str:
    host, port, *_ = listener.socket.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _announce(ready_fd: int | None, address: str) -> None:
    click.echo(f"hpkvd: listening on {address}")
    if ready_fd is not None:
        with open(ready_fd, "w") as ready:
            ready.write(f"{address}\n")


@main.command(
    short_help="Make vouchers.",
    epilog="Examples: hpkvd voucher --amount 1000;  hpkvd voucher --amount 50 --count 20",
)
@_data
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
@_json
@_failures
def voucher(data: Path, amount: int, count: int, as_json: bool) -> None:
    """Make vouchers, one on each line; also while the server runs.

    A voucher is money to whoever reads it first, and cannot be shown again.
    """
    ledger = _open(data)
    try:
        made = vouchers.make(ledger, amount, count, secrets.token_bytes)
    finally:
        ledger.close()
    if as_json:
        texts = [{"amount": one.amount, "voucher": str(one)} for one in made]
        click.echo(json.dumps({"vouchers": texts}))
    else:
        click.echo("\n".join(map(str, made)))


@main.command(
    short_help="Tell how much is stored and spent.",
    epilog="Examples: hpkvd status;  hpkvd status --json | jq .tokens.outstanding",
)
@_data
@_json
@_failures
def status(data: Path, as_json: bool) -> None:
    """Tell how much is stored and spent; also while the server runs."""
    ledger = _open(data)
    try:
        report = _report(_load_epochs(data), ledger.totals())
    finally:
        ledger.close()
    click.echo(json.dumps(report) if as_json else _text(report))


def _load_epochs(data: Path) -> Epochs:
    identity = identity_file.load(data / settings.IDENTITY)
    return epoch_files.load(data / settings.EPOCHS, identity)


def _open(data: Path) -> SqliteLedger:
    settings.load(data)
    return SqliteLedger(data / settings.LEDGER)


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
