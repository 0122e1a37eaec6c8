"""`hpkvd serve`: sockets, parent, workers, signals, and what the service manager is told.

SIGTERM, SIGINT   no new connections; answer what was asked; end with 0
SIGHUP            replace the workers one by one, with new settings and epochs
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, closing
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio

from hpkvd import config as settings
from hpkvd import custody, log, loopback, serving, supervisor, systemd
from hpkvd import identity as identity_file
from hpkvd import onion as onion_service
from hpkvd.commands import (
    Failure,
    data_option,
    failures,
    ledger_option,
    ledger_url,
    open_ledger,
    rotation,
)
from hpkvd.config import Config, ConfigError
from hpkvd.handler import Handler
from hpkvd.ledger import Ledger
from hpkvd.metrics import Board, Meter
from hpkvd.payments import cashier
from hpkvd.serving import Address
from hpkvd.supervisor import Channel, Supervisor
from hpkvfs import tor
from hpkvfs.tor import Limits, Throttle

INTRODUCTIONS: Final = Throttle(250, 2500)
"""At each of three introduction points, so three times what proof of work lets in by default: of
those, the ones who worked most are taken. tor's own 25 is for sites where one introduction carries
a whole visit; here it carries one request."""


@click.command(
    short_help="Serve until SIGTERM or SIGINT.",
    epilog="Examples: hpkvd serve;  hpkvd serve --onion;  hpkvd serve --listen 127.0.0.1:0",
)
@data_option
@ledger_option
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Instead of the settings'; port 0 picks one; or unix:PATH.",
)
@click.option("--onion", is_flag=True, help="Publish an onion service, whose address it tells.")
@click.option(
    "--tor",
    "where",
    default=tor.AUTO,
    show_default=True,
    metavar="auto|own|PORT|SOCKET",
    help="Which tor publishes it: one that runs, or else one of its own; its own; by control port.",
)
@click.option(
    "--pow/--no-pow",
    "proof_of_work",
    default=True,
    show_default=True,
    help="Ask clients for proof of work while too many come (the onion service).",
)
@click.option(
    "--pow-rate",
    type=click.IntRange(1, 2**31 - 1),
    default=250,
    show_default=True,
    help="With --pow: requests a second that are let in; those that did most work first.",
)
@click.option(
    "--pow-burst",
    type=click.IntRange(1, 2**31 - 1),
    default=2500,
    show_default=True,
    help="With --pow: requests that are let in at once.",
)
@click.option(
    "--intro-rate",
    type=click.IntRange(0, 2**31 - 1),
    metavar="N",
    help=f"Requests a second that each introduction point (there are three) lets through; it drops"
    f" what is more. Takes a tor of our own, which has {INTRODUCTIONS.rate} by default. 0: all.",
)
@click.option(
    "--intro-burst",
    type=click.IntRange(2, 2**31 - 1),
    default=INTRODUCTIONS.burst,
    show_default=True,
    help="With --intro-rate: requests that each lets through at once.",
)
@click.option(
    "--max-streams",
    type=click.IntRange(0, 65_535),
    default=1,
    show_default=True,
    help="Connections at a time on one Tor circuit; clients have one. 0: any number.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    help="Processes that answer; by default as many as there are cores. 0: this one, which"
    " nobody restarts.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Counts for Prometheus; loopback only.")
@click.option("--ready-fd", type=int, metavar="N", help="Write the addresses to this descriptor.")
@failures
def serve(
    data: Path,
    ledger: str | None,
    listen: str | None,
    onion: bool,
    where: str,
    proof_of_work: bool,
    pow_rate: int,
    pow_burst: int,
    intro_rate: int | None,
    intro_burst: int,
    max_streams: int,
    workers: int | None,
    metrics: str | None,
    ready_fd: int | None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being answered.

    SIGHUP brings new settings and epochs into use without a pause. Sockets of systemd are used
    instead of --listen when it passes any.
    """
    config = settings.load(data)
    log.start(as_json=config.log == "json")
    if ledger is not None:
        os.environ["HPKVD_LEDGER"] = ledger  # for the workers; not in their command lines
    _look_over(data, config, ledger)
    page_address = _metrics_address(metrics or config.metrics)
    limits = Limits(
        streams=max_streams,
        work=_throttle("pow", pow_rate, pow_burst) if proof_of_work else None,
        introductions=_introductions(intro_rate, intro_burst),
        insist=bool(intro_rate),
    )
    service = _service(data, where, limits) if onion else None
    sockets = _passed() or _bind(listen or config.listen)
    publishing = partial(_publish, data, service, sockets[0])
    announce = partial(_announce, ready_fd, [serving.name(one) for one in sockets])
    count = config.workers or supervisor.cores() if workers is None else workers
    if count == 0:
        trio.run(_alone, data, config, ledger, sockets, page_address, announce, publishing)
    else:
        trio.run(_supervise, data, config, sockets, count, page_address, announce, publishing)
    log.tell("stopped")


def _introductions(rate: int | None, burst: int) -> Throttle | None:
    if rate == 0:
        return None
    return _throttle("intro", INTRODUCTIONS.rate if rate is None else rate, burst)


def _throttle(name: str, rate: int, burst: int) -> Throttle:
    try:
        return Throttle(rate, burst)
    except ValueError as error:
        raise click.UsageError(
            f"{error}; give --{name}-rate and --{name}-burst together"
        ) from error


def _service(data: Path, where: str, limits: Limits) -> onion_service.Service:
    own = data / settings.TOR
    try:
        tor_to_use = tor.parse_where(where)
        more = tor.further_settings(own)
    except ValueError as error:
        raise click.UsageError(f"{error}; write auto, own, a control port or a socket") from error
    except tor.TorError as error:
        raise ConfigError(f"{error.message}, which {error.hint.removeprefix('it ')}") from error
    if limits.insist and tor_to_use not in (tor.AUTO, tor.OWN):
        raise click.UsageError(
            "--intro-rate takes a tor of our own: give --tor own, or leave it out"
        )
    return onion_service.Service(tor_to_use, own, limits, more)


async def _publish(
    data: Path, service: onion_service.Service | None, listening: socket.socket
) -> None:
    if service is not None:
        identity = identity_file.load(data / settings.IDENTITY)
        await onion_service.publish(service, identity, listening, _announce_onion)


def _announce_onion(address: str) -> None:
    click.echo(f"hpkvd: onion service at {address}")
    if sys.stdout.isatty():
        import segno

        segno.make(address, error="l", micro=False).terminal(sys.stdout, border=2, compact=True)
    sys.stdout.flush()


def _look_over(data: Path, config: Config, url: str | None) -> None:
    """Say now what is wrong with the ledger or the epochs, and once."""
    ledger = open_ledger(data, config, url)
    try:
        epochs = rotation(data, ledger).load(config)
    finally:
        ledger.close()
    if epochs.newest.tariff != config.tariff:
        log.tell("the tariff in the settings differs from the epoch's, which stays until the next")


@click.command(hidden=True)
@data_option
@ledger_option
@click.option("--socket", "fds", type=int, multiple=True, required=True)
@click.option("--channel", "channel_fd", type=int, required=True)
@failures
def worker(data: Path, ledger: str | None, fds: Sequence[int], channel_fd: int) -> None:
    """One of the processes of `hpkvd serve`; not for people."""
    config = settings.load(data)
    log.start(as_json=config.log == "json")
    sockets = [socket.socket(fileno=fd) for fd in fds]
    trio.run(_work, data, config, ledger, sockets, channel_fd)


async def _supervise(
    data: Path,
    config: Config,
    sockets: Sequence[socket.socket],
    count: int,
    page_address: Address | None,
    announce: Callable[[], None],
    publishing: Callable[[], Awaitable[None]],
) -> None:
    patience = config.limits.stop_seconds + 5
    command = supervisor.command("worker", "--data", str(data))
    parent = Supervisor(command, sockets, count, stop_seconds=patience)
    stop = trio.Event()

    def ready() -> None:
        announce()
        _tell_ready(f"{count} workers")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_signals, stop, parent.reload)
        nursery.start_soon(_watchdog)
        nursery.start_soon(_metrics, page_address, parent.board, lambda: parent.workers)
        nursery.start_soon(publishing)
        failure = await parent.run(stop, ready)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _alone(
    data: Path,
    config: Config,
    url: str | None,
    sockets: Sequence[socket.socket],
    page_address: Address | None,
    announce: Callable[[], None],
    publishing: Callable[[], Awaitable[None]],
) -> None:
    meter, board, stop = Meter(), Board(), trio.Event()

    def ready() -> None:
        announce()
        _tell_ready("no workers")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_signals, stop, None)
        nursery.start_soon(_watchdog)
        nursery.start_soon(_metrics, page_address, board, lambda: 1, meter)
        nursery.start_soon(publishing)
        await _answer(data, config, url, sockets, meter, stop, ready)
        nursery.cancel_scope.cancel()


async def _work(
    data: Path, config: Config, url: str | None, sockets: Sequence[socket.socket], channel_fd: int
) -> None:
    meter, stop, ready = Meter(), trio.Event(), trio.Event()
    channel = Channel(channel_fd, meter.snapshot)

    async def follow_parent() -> None:
        await channel.parent_gone()
        stop.set()

    async def report() -> None:
        await ready.wait()
        await channel.report()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_signals, stop, None, True)
        nursery.start_soon(follow_parent)
        nursery.start_soon(report)
        await _answer(data, config, url, sockets, meter, stop, ready.set)
        nursery.cancel_scope.cancel()


async def _answer(
    data: Path,
    config: Config,
    url: str | None,
    sockets: Sequence[socket.socket],
    meter: Meter,
    stop: trio.Event,
    ready: Callable[[], None],
) -> None:
    # In this order: whoever moves the ledger away does so before it is opened, or not at all.
    with (
        custody.in_use(ledger_url(data, config, url)),
        closing(open_ledger(data, config, url)) as ledger,
    ):
        async with (
            ledger.serving(),
            _cashier(data, config, ledger) as desk,
            trio.open_nursery() as nursery,
        ):
            keeper = rotation(data, ledger)
            epochs = keeper.load(config)
            queue = config.limits.queue
            handler = Handler(epochs, ledger, meter=meter, queue=queue, cashier=desk)
            await nursery.start(keeper.run, handler, epochs)
            await serving.answer(sockets, handler, config.limits, stop, ready)
            nursery.cancel_scope.cancel()


def _cashier(
    data: Path, config: Config, ledger: Ledger
) -> AbstractAsyncContextManager[cashier.Cashier]:
    return cashier.opened(
        data,
        config.payments,
        config.cashu,
        config.lightning,
        ledger,
        secrets.token_bytes,
        time.time,
    )


async def _signals(
    stop: trio.Event, reload: Callable[[], Awaitable[None]] | None, quiet: bool = False
) -> None:
    signals = trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with signals as received:
        async with trio.open_nursery() as reloading:
            async for number in received:
                if number != signal.SIGHUP:
                    break
                if reload is not None:
                    reloading.start_soon(_reload, reload)
            reloading.cancel_scope.cancel()
        if not quiet:
            log.tell("stopping; the last requests are being answered")
            systemd.notify("STOPPING=1")
        stop.set()
        async for _ in received:  # asking once is enough; what is not taken here would end us
            pass


async def _reload(reload: Callable[[], Awaitable[None]]) -> None:
    systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
    await reload()
    systemd.notify("READY=1")


async def _watchdog() -> None:
    every = systemd.watchdog_seconds()
    while every is not None:
        systemd.notify("WATCHDOG=1")
        await trio.sleep(every)


async def _metrics(
    address: Address | None, board: Board, workers: Callable[[], int], own: Meter | None = None
) -> None:
    def page() -> str:
        if own is not None:
            board.update(os.getpid(), own.snapshot())
        return board.page({"hpkvd_workers": workers()})

    if address is not None:
        await loopback.serve_page(address.host, address.port, page)


def _metrics_address(text: str) -> Address | None:
    if not text:
        return None
    address = Address(*settings.address(text))
    if not loopback.is_loopback(address.host):
        raise ConfigError(
            f"metrics are served on loopback only, not on {text}; write 127.0.0.1:9387"
        )
    return address


def _passed() -> list[socket.socket]:
    try:
        return systemd.take_sockets()
    except (OSError, ValueError) as error:
        message = (
            "what the service manager passed ($LISTEN_FDS) are no listening sockets; its .socket"
            " unit takes ListenStream= and no Accept=yes"
        )
        raise ConfigError(message) from error


def _bind(address: str) -> list[socket.socket]:
    try:
        if address.startswith(settings.UNIX):
            return [serving.bind_unix(Path(address.removeprefix(settings.UNIX)))]
        return serving.bind(Address(*settings.address(address)))
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot listen on {address} ({reason}); choose another with --listen"
        raise Failure(message, os.EX_UNAVAILABLE) from error


def _announce(ready_fd: int | None, addresses: Sequence[str]) -> None:
    for address in addresses:
        click.echo(f"hpkvd: listening on {address}")
    if ready_fd is not None:
        with open(ready_fd, "w") as ready:
            ready.writelines(f"{address}\n" for address in addresses)


def _tell_ready(status: str) -> None:
    systemd.notify("READY=1", f"STATUS=answering, {status}")
