"""The command `hpkvfs`. Exit codes: errors.py; 2 also for a wrong command line.

Heavy rooms are imported inside the commands that need them, so that asking a mounted vault
something, or for help, takes no time. Secrets are read from files, standard input or the
terminal; a voucher may also be an argument, for those who have no one to hide it from.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpkvfs import care, mounting, past, tokens, ui
from hpkvfs.address import DEFAULT_SERVER
from hpkvfs.errors import UserError, VaultError
from hpkvfs.guard import guard_memory
from hpkvfs.settings import (
    Commands,
    Result,
    Settings,
    default_state,
    file_path,
    json_option,
    pass_settings,
    prompt,
    read_secret,
    show,
)

if TYPE_CHECKING:
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
        context.invoke(mounting.mount_, directory=directory)


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


for _command in (*mounting.COMMANDS, *tokens.COMMANDS, *care.COMMANDS, *past.COMMANDS):
    main.add_command(_command)
