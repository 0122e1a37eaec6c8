"""The commands about a mounted vault: mount, umount, sync.

`mount` starts itself again to go on in the background (background.py), with --foreground and
what was asked already on a descriptor.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hpkvfs import control, keep, ui
from hpkvfs.errors import AlreadyInUse, HpkvError, UserError
from hpkvfs.guard import guard_memory
from hpkvfs.settings import (
    Duration,
    Result,
    Settings,
    json_option,
    pass_settings,
    show,
    spread_option,
)

if TYPE_CHECKING:
    from hpkvfs.background import Herald


@click.command(
    "mount",
    epilog="""\b
Examples:
  hpkvfs mount ~/vault
  hpkvfs mount --publish-interval 2 --durability remote ~/vault
  hpkvfs mount --keep hourly=24,daily=7,weekly=4 ~/vault      snapshots by themselves
  hpkvfs mount --snapshot before-the-move ~/then
  hpkvfs mount --foreground ~/vault        for a service manager; stop it with SIGTERM
  hpkvfs mount --read-only ~/vault         see what another client writes
  hpkvfs mount --takeover ~/vault          go on from what another client wrote
""",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay until it is unmounted.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as permissions allow.")
@click.option("--read-only", is_flag=True, help="Allow no changes.")
@click.option("--publish-interval", type=click.FloatRange(min=0.1), default=10.0, metavar="S",
              show_default=True, help="Seconds until changes are at the server.")  # fmt: skip
@click.option("--durability", type=click.Choice(["local", "remote"]), default="local",
              show_default=True, help="Where data is when fsync returns.")  # fmt: skip
@click.option("--cache-size", type=click.IntRange(min=1), default=1024, metavar="MIB",
              show_default=True, help="Encrypted cache on this disk.")  # fmt: skip
@click.option("--memory", type=click.IntRange(min=64), default=256, metavar="MIB",
              show_default=True, help="Memory to get by with.")  # fmt: skip
@click.option("--log-limit", type=click.IntRange(min=1), default=1024, metavar="MIB",
              show_default=True,
              help="Changes that may wait for the server; past it, writing does.")  # fmt: skip
@click.option("--patience", type=click.FloatRange(min=1), metavar="S",
              show_default="20, over Tor 120", help="Seconds until a read gives up.")  # fmt: skip
@spread_option
@click.option("--takeover", is_flag=True,
              help="Go on from what another client wrote to this vault.")  # fmt: skip
@click.option("--follow-interval", type=click.FloatRange(min=0.1), default=60.0, metavar="S",
              show_default=True,
              help="With --read-only: seconds between looks for new generations.")  # fmt: skip
@click.option("--kept", type=click.IntRange(min=1), metavar="N",
              help="Show, read-only, the changes that a takeover kept aside.")  # fmt: skip
@click.option("--snapshot", metavar="NAME", help="Mount this snapshot alone, to be read.")
@click.option("--keep", "policy", metavar="POLICY", default="",
              help="Make snapshots, and keep so many: hourly=24,daily=7 and the like.")  # fmt: skip
@click.option("--gc-every", type=Duration(), default=6 * 3600.0, metavar="DURATION",
              help="Collect dead blobs, spread over so long (6h); 0: never.")  # fmt: skip
@click.option("--no-snapshots-dir", is_flag=True, help="Have no .snapshots in the vault.")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--password-fd", type=int, hidden=True)
@pass_settings
def mount_(
    settings: Settings,
    directory: Path,
    foreground: bool,
    allow_other: bool,
    read_only: bool,
    publish_interval: float,
    durability: str,
    cache_size: int,
    memory: int,
    log_limit: int,
    patience: float | None,
    spread: float,
    takeover: bool,
    follow_interval: float,
    kept: int | None,
    snapshot: str | None,
    policy: str,
    gc_every: float,
    no_snapshots_dir: bool,
    ready_fd: int | None,
    password_fd: int | None,
) -> None:
    """Mount the vault on DIR, an empty directory.

    Also without its server: what was used before can be read, and what is written now is
    published when the server is back.

    One client writes to a vault at a time. If another one did, yours is told, and keeps its
    changes: with --takeover it goes on from the other's state, with its own changes on top if
    they fit, or else kept aside. A read-only mount, on another machine with the same words,
    hinders nobody; it looks for new generations, for a token each time.

    Snapshots can be read under .snapshots in DIR, which is there and not listed. With --snapshot,
    one is mounted by itself, also beside the mounted vault.
    """
    read_only = read_only or kept is not None
    if takeover and read_only:
        raise click.UsageError("a read-only mount takes nothing over")
    rules = keep.parse(policy) if policy else ()
    settings.password_fd = password_fd
    asks = ready_fd is None or snapshot is not None  # who started us has asked
    status = _mounted_status(settings) if asks else None
    beside = snapshot is not None and status is not None and not status.get("detached")
    if ready_fd is None and status is not None and not beside:
        raise _in_use(settings, status)
    if not foreground:
        flags = ["--publish-interval", str(publish_interval), "--durability", durability,
                 "--cache-size", str(cache_size), "--memory", str(memory),
                 "--spread", str(spread), "--log-limit", str(log_limit)]  # fmt: skip
        flags += ["--patience", str(patience)] if patience is not None else []
        flags += ["--follow-interval", str(follow_interval)]
        flags += ["--allow-other"] * allow_other + ["--read-only"] * read_only
        flags += ["--takeover"] * takeover + (["--kept", str(kept)] if kept else [])
        flags += ["--gc-every", str(gc_every)] + ["--no-snapshots-dir"] * no_snapshots_dir
        flags += ["--snapshot", snapshot] if snapshot is not None else []
        flags += ["--keep", policy] if policy else []
        _mount_in_background(settings, directory, flags)
        return
    from hpkvfs.session import Options

    options = Options(
        publish_interval=publish_interval,
        remote_durability=durability == "remote",
        cache_bytes=cache_size << 20,
        memory=memory << 20,
        log_limit=log_limit << 20,
        patience=patience,
        spread=spread,
        read_only=read_only or snapshot is not None,
        follow_interval=follow_interval if snapshot is None else math.inf,
        takeover=takeover,
        kept=kept,
        snapshots_shown=not no_snapshots_dir,
    )
    if beside:
        _show_here(settings, directory, str(snapshot), options, allow_other, ready_fd)
        return
    how = {
        "read_only": read_only or snapshot is not None,
        "allow_other": allow_other,
        "snapshot": snapshot,
        "policy": rules,
        "collect_every": gc_every,
    }
    _mount_here(settings, directory, options, how, ready_fd)


def _mounted_status(settings: Settings) -> Result | None:
    """What the process says that has the vault mounted; None if there is none."""
    connection = control.reach(settings.socket)
    if connection is None:
        return None
    with connection:
        return control.ask(connection, "status", {})


def _in_use(settings: Settings, status: Result) -> AlreadyInUse:
    """That it is mounted, and where."""
    if status.get("detached"):
        return AlreadyInUse(
            f"the vault in {settings.path} was unmounted from {status['mounted']},"
            " but programs still have files of it open",
            "end them, or let go of it: hpkvfs umount --force",
        )
    shelf = status.get("snapshots_dir")
    return AlreadyInUse(
        f"the vault in {settings.path} is mounted on {status['mounted']} already",
        f"unmount it there first; its snapshots are in {shelf}"
        if shelf
        else "unmount it first: hpkvfs umount",
    )


def _mount_in_background(settings: Settings, directory: Path, flags: list[str]) -> None:
    from hpkvfs import background

    guard_memory()  # the password is here until the vault is mounted
    settings.address(settings.state.server)
    password = settings.password(settings.state)
    arguments = ["--state", str(settings.path)]
    arguments += settings.way_options + ["-v"] * settings.verbose
    arguments += ["mount", "--foreground", *flags]
    with ui.waiting("connecting"):
        background.start(arguments, directory, password, settings.path / "log", ui.notice, ui.phase)


def _mount_here(
    settings: Settings, directory: Path, options: Any, how: dict[str, Any], ready_fd: int | None
) -> None:
    from hpkvfs import background, mount

    herald = background.Herald(ready_fd) if ready_fd is not None else None
    with _heralded(settings, herald):
        vault = settings.open()
        request = mount.Mount(
            directory=directory.absolute(),
            ready=herald.ready if herald else lambda: None,
            notice=herald.notice if herald else ui.notice,
            options=options,
            **how,
        )
        os.chdir("/")
        mount.run(mount.mount, vault, request)


def _show_here(
    settings: Settings, directory: Path, snapshot: str, options: Any, allow_other: bool,
    ready_fd: int | None,
) -> None:  # fmt: skip
    from hpkvfs import background, beside, mount

    herald = background.Herald(ready_fd) if ready_fd is not None else None
    with _heralded(settings, herald):
        vault = settings.open()
        ready = herald.ready if herald else lambda: None
        where = directory.absolute()
        showing = beside.Showing(snapshot, where, ready, allow_other, options.caches)
        os.chdir("/")
        mount.run(beside.show, vault.state.control, vault.keys, mount.now, showing)


@contextmanager
def _heralded(settings: Settings, herald: Herald | None) -> Iterator[None]:
    """A mount's messages go to the log, what ends it to the process that started it, if any."""
    try:
        _log_to_stderr(settings.verbose)
        if herald is not None:
            settings.tell = herald.phase
        yield
    except HpkvError as error:
        if herald is None:
            raise
        logging.getLogger("hpkvfs").error("%s", error)
        herald.failed(error)
        sys.exit(error.exit_code)


def _log_to_stderr(verbose: bool) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", force=True)


@click.command(
    epilog="""\b
Examples:
  hpkvfs umount ~/vault
  hpkvfs --state /srv/vault umount
"""
)
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Also when programs use it.")
@pass_settings
def umount(settings: Settings, directory: Path | None, force: bool) -> None:
    """Publish what is left, and unmount the vault.

    When the server is away, it is unmounted without: what is left stays in the state directory
    and is published after the next mount. Exit code 4 then.
    """
    if directory is not None and _take_away_snapshot(directory.resolve(), force):
        return
    connection = control.reach(settings.socket)
    if connection is None:
        raise UserError(
            f"the vault in {settings.path} is not mounted", "name its state directory with --state"
        )
    with connection:
        if directory is not None:
            _check_mounted_on(settings, directory.resolve())
        with ui.progress("publishing") as progress:
            result = control.ask(connection, "unmount", {"force": force}, progress)
        control.wait_for_end(connection)
    if result["trouble"]:
        error = HpkvError(
            f"unmounted, but {ui.size(result['unpublished_bytes'])} are not published:"
            f" {result['trouble']}",
            f"they are kept in {settings.path}; mount again when that is settled",
        )
        error.exit_code = 4
        raise error


def _take_away_snapshot(directory: Path, force: bool) -> bool:
    """Unmount a snapshot that is mounted beside its vault, if that is what is there."""
    from hpkvfs.mountpoint import BESIDE, check_detached, detaching, is_mounted

    if not is_mounted(directory, BESIDE):
        return False
    done = subprocess.run(detaching(directory, force=force), check=False, capture_output=True)
    check_detached(directory, done.returncode, done.stderr)
    return True


def _check_mounted_on(settings: Settings, directory: Path) -> None:
    status = _mounted_status(settings)
    if status is not None and status["mounted"] != str(directory):
        raise UserError(
            f"the vault in {settings.path} is mounted on {status['mounted']}, not on {directory}",
            "name the other one's state directory with --state",
        )


@click.command(epilog="Examples: hpkvfs sync;  hpkvfs sync && rsync -a ~/vault/ /mnt/copy/")
@json_option
@pass_settings
def sync(settings: Settings, as_json: bool) -> None:
    """Publish all changes so far, and return when they are at the server.

    Also what programs wrote to files that they still have open.
    """
    result = settings.perform("sync", {}, "publishing")
    show(result, as_json, lambda r: f"generation {r['generation']} is at the server")


COMMANDS: Final = (mount_, umount, sync)
