"""The command `hpkvfs`. Exit codes: errors.py; 2 also for a wrong command line.

Heavy rooms are imported inside the commands that need them, so that asking a mounted vault
something, or for help, takes no time. Secrets are read from files, standard input or the
terminal; a voucher may also be an argument, for those who have no one to hide it from.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpkvfs import care, control, keep, past, tokens, ui
from hpkvfs.address import DEFAULT_SERVER
from hpkvfs.errors import AlreadyInUse, HpkvError, UserError, VaultError
from hpkvfs.guard import guard_memory
from hpkvfs.settings import (
    Commands,
    Duration,
    Result,
    Settings,
    default_state,
    file_path,
    json_option,
    pass_settings,
    prompt,
    read_secret,
    show,
    spread_option,
)

if TYPE_CHECKING:
    from hpkvfs.background import Herald
    from hpkvfs.state import StateDirectory
    from hpkvfs.volume.keys import VaultKeys


def _version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from importlib import metadata

    version = "(not installed)"
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version("hpkvfs")
    click.echo(f"hpkvfs {version}")
    context.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Start with:
  hpkvfs init                      write down the words it shows
  hpkvfs redeem                    give it a voucher, or
  hpkvfs buy                       pay for tokens
  hpkvfs mount ~/vault
\b
Completion of commands and options:
  eval "$(hpkvfs completion bash)"
""",
)
@click.option(
    "--state",
    "path",
    metavar="DIR",
    envvar="HPKVFS_STATE",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_state,
    show_default="$HPKVFS_STATE or ~/.local/state/hpkvfs",
    help="Directory of the vault's local state.",
)
@click.option(
    "--password-file",
    metavar="FILE",
    envvar="HPKVFS_PASSWORD_FILE",
    type=file_path,
    help="Read the local password here ($HPKVFS_PASSWORD_FILE).",
)
@click.option(
    "--insecure-direct",
    is_flag=True,
    envvar="HPKVFS_INSECURE_DIRECT",
    help="Allow a server elsewhere, which then learns your address.",
)
@click.option(
    "--tor",
    metavar="auto|own|PORT|PATH",
    envvar="HPKVFS_TOR",
    default="auto",
    show_default=True,
    help="The tor to reach .onion servers with: one that runs or else our own; our own; the one"
    " with this control port or socket.",
)
@click.option(
    "--tor-password-file",
    metavar="FILE",
    envvar="HPKVFS_TOR_PASSWORD_FILE",
    type=file_path,
    help="Read the password of tor's control port here, if it has one.",
)
@click.option("-v", "--verbose", is_flag=True, help="Tell more on standard error.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Show the version.",
)  # fmt: skip
@click.pass_context
def main(
    context: click.Context,
    path: Path,
    password_file: Path | None,
    insecure_direct: bool,
    tor: str,
    tor_password_file: Path | None,
    verbose: bool,
) -> None:
    """A filesystem on a server that does not know you.

    A vault is named by 12 or 24 words, and paid for with tokens that can't be traced.
    """
    os.umask(0o077)
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="hpkvfs: %(message)s",
    )
    context.obj = Settings(
        path.absolute(), password_file, insecure_direct, verbose, tor, tor_password_file
    )


# -- making and recovering vaults ------------------------------------------------------------

_server = click.option(
    "--server",
    metavar="ADDRESS",
    default=DEFAULT_SERVER,
    show_default=True,
    help="The server: ....onion, or HOST:PORT on this machine.",
)
_passphrase = click.option(
    "--passphrase-file", metavar="FILE", type=file_path, help="Read a BIP39 passphrase here."
)
_no_password = click.option(
    "--no-password", is_flag=True, help="Keep the vault's key on this disk without a password."
)


@main.command(
    epilog="""\b
Examples:
  hpkvfs init
  hpkvfs init --words 24 --words-file /media/stick/words
  hpkvfs --state /srv/vault --password-file pw init --server 127.0.0.1:7387
"""
)
@_server
@click.option("--words", type=click.Choice(["12", "24"]), default="12", show_default=True,
              help="How many words.")  # fmt: skip
@click.option("--words-file", metavar="FILE", type=file_path, help="Write the words here, unseen.")
@_passphrase
@_no_password
@pass_settings
def init(
    settings: Settings,
    server: str,
    words: str,
    words_file: Path | None,
    passphrase_file: Path | None,
    no_password: bool,
) -> None:
    """Make a new vault.

    Shows the words once. They are the vault: whoever has them has everything in it, and
    without them nothing can bring it back when this machine is lost.
    """
    settings.address(server)
    state = settings.state
    if state.exists:
        raise VaultError(
            f"there is a vault in {state.path} already", "name another directory with --state"
        )
    from secrets import token_bytes

    from hpkvfs.volume.keys import VaultKeys, make_words

    guard_memory()
    passphrase = _passphrase_in(passphrase_file)
    password = _new_password(settings, no_password)
    text = make_words(int(words), token_bytes)
    if words_file is not None:
        _write_new(words_file, text)
    state.create(VaultKeys.from_words(text, passphrase), server, password, token_bytes, new=True)
    _show_words(text, words_file)


def _show_words(text: str, words_file: Path | None) -> None:
    if words_file is not None:
        ui.notice(f"the words are in {words_file}: keep it where only you find it")
        return
    ui.notice("these words are the vault: write them down, they are not shown again")
    words = text.split()
    for start in range(0, len(words), 4):
        row = (f"{n + 1:>3} {words[n]:<9}" for n in range(start, start + 4))
        click.echo("".join(row).rstrip())


@main.command(
    epilog="""\b
Examples:
  hpkvfs recover ~/vault                   asks for the words, then mounts
  hpkvfs recover --seed words.txt
  hpkvfs recover --seed words.txt --voucher-file voucher.txt
  hpkvfs --state /tmp/second recover --seed - --no-password < words.txt
"""
)
@click.option("--seed", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True),
              help="Read the words here, or - for standard input.")  # fmt: skip
@tokens.voucher_file
@_passphrase
@_server
@_no_password
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@json_option
@pass_settings
@click.pass_context
def recover(
    context: click.Context,
    settings: Settings,
    seed: Path | None,
    voucher_file: Path | None,
    passphrase_file: Path | None,
    server: str,
    no_password: bool,
    directory: Path | None,
    as_json: bool,
) -> None:
    """Bring a vault back from its words, into a state directory that has none.

    The tokens that it takes come from the vault's breakglass entry; when that is gone, or empty,
    give a voucher. When it was cut short, run it again. With DIR, the vault is then mounted there.
    """
    address = settings.address(server)
    from hpkvfs import mount
    from hpkvfs.volume.keys import VaultKeys

    guard_memory()
    words = read_secret(seed, "words") if seed else prompt("words", "--seed")
    keys = VaultKeys.from_words(words, _passphrase_in(passphrase_file))
    voucher = read_secret(voucher_file, "voucher") if voucher_file else None
    state = settings.state
    _create_or_resume(settings, state, keys, server, no_password)
    vault = settings.vault(keys, address)
    with ui.waiting("looking for the newest generation"):
        result = mount.run(mount.recover, vault, voucher)
    show(result, as_json, _recovered)
    if directory is not None:
        context.invoke(mount_, directory=directory)


def _create_or_resume(
    settings: Settings, state: StateDirectory, keys: VaultKeys, server: str, no_password: bool
) -> None:
    if not state.exists:
        from secrets import token_bytes

        password = _new_password(settings, no_password)
        state.create(keys, server, password, token_bytes, new=False)
    elif state.fingerprint != keys.fingerprint:
        _take_along(settings, state, keys)
    elif state.server != server:
        state.set_server(server)


def _take_along(settings: Settings, state: StateDirectory, keys: VaultKeys) -> None:
    """Other words than last time: go on with these, if there was no vault for those."""
    from hpkvfs import mount

    try:
        if state.is_new:
            raise VaultError("a vault began here")
        password = settings.password(state)
        mount.take_along(state, state.unlock(password), keys, password)
    except VaultError as error:
        raise VaultError(
            f"the vault in {state.path} has other words, or another passphrase",
            "name another directory with --state",
        ) from error


def _recovered(result: Result) -> str:
    orphans = result["orphans"]
    found = f"; {orphans} blobs of an unfinished publication will be collected" if orphans else ""
    lines = [
        f"recovered generation {result['generation']}: {result['files']:,} files with"
        f" {ui.size(result['bytes'])}{found}"
    ]
    if result["tokens_gained"]:
        lines.append(f"{result['tokens_gained']:,} tokens came from the breakglass entry")
    if result["tokens_lost"]:
        lines.append(
            f"{result['tokens_lost']:,} tokens of the breakglass entry were spent since: by the"
            " machine that is lost, or where the vault was recovered before"
        )
    return "\n".join(lines)


# -- mounting --------------------------------------------------------------------------------


@main.command(
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


@main.command(
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


@main.command(epilog="Examples: hpkvfs sync;  hpkvfs sync && rsync -a ~/vault/ /mnt/copy/")
@json_option
@pass_settings
def sync(settings: Settings, as_json: bool) -> None:
    """Publish all changes so far, and return when they are at the server.

    Also what programs wrote to files that they still have open.
    """
    result = settings.perform("sync", {}, "publishing")
    show(result, as_json, lambda r: f"generation {r['generation']} is at the server")


@main.command(
    epilog="""\b
Examples:
  eval "$(hpkvfs completion bash)"
  hpkvfs completion fish > ~/.config/fish/completions/hpkvfs.fish
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Write a shell's commands that complete ours."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "hpkvfs", "_HPKVFS_COMPLETE").source())


# -- secrets ---------------------------------------------------------------------------------


def _passphrase_in(path: Path | None) -> str:
    return read_secret(path, "passphrase") if path else ""


def _new_password(settings: Settings, none: bool) -> str | None:
    if none:
        ui.notice("without a password, whoever reads this disk reads the vault")
        return None
    if settings.password_file is not None:
        password = read_secret(settings.password_file, "password")
    else:
        option = "--password-file or --no-password"
        password = prompt("new password for this machine", option, twice=True)
    settings.new_password = password
    return password


def _write_new(path: Path, text: str) -> None:
    """Write to a file that does not exist yet, for this user alone; UserError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"can't write the words to {path}: {error.strerror}", "name a new file"
        ) from None


for _command in (*tokens.COMMANDS, *care.COMMANDS, *past.COMMANDS):
    main.add_command(_command)
