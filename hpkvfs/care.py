"""The commands that look after a vault: what it holds, what it costs, whether it is whole."""

from __future__ import annotations

import json

import click

from hpkvfs import ui
from hpkvfs.errors import VaultError
from hpkvfs.settings import Result, Settings, json_option, pass_settings, show, spread_option


@click.command(epilog="Examples: hpkvfs status;  hpkvfs status --json | jq .unpublished_bytes")
@json_option
@pass_settings
def status(settings: Settings, as_json: bool) -> None:
    """Tell what the vault holds, what it costs, and how it is.

    Without asking the server anything. Live, dead and held blobs are together all that the vault
    has there, as fsck counts them; "at least" so many when what tells of older snapshots is not
    on this machine: hpkvfs snapshot list fetches it.
    """
    result = settings.perform("status", {}, "looking")
    server = str(json.loads((settings.path / "vault").read_text())["server"])
    result = {"state": str(settings.path), "server": server, "mounted": None, **result}
    show(result, as_json, lambda r: ui.status(r, str(settings.path), server))


@click.command(
    epilog="""\b
Examples:
  hpkvfs gc --dry-run
  hpkvfs gc
  hpkvfs gc --spread 6h            so that the server does not see them go together
"""
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be deleted and regained.")
@spread_option
@json_option
@pass_settings
def gc(settings: Settings, dry_run: bool, spread: float, as_json: bool) -> None:
    """Delete what is no longer needed at the server, for tokens.

    Blobs deleted together belong together. With --spread they are deleted at random times, so
    that others' deletions come in between. It can be interrupted at any time; the next one goes
    on. A mounted vault does it by itself.
    """
    result = settings.perform("gc", {"dry_run": dry_run, "spread": spread}, "deleting")
    show(result, as_json, _would_collect if dry_run else _collected)


def _would_collect(result: Result) -> str:
    return (
        f"{result['would_delete']:,} blobs would be deleted, for {result['would_regain']:,} tokens;"
        f" snapshots hold {result['blobs_held']:,} more"
    )


def _collected(result: Result) -> str:
    return (
        f"{result['deleted']:,} blobs deleted, {result['regained']:,} tokens regained;"
        f" {result['held']:,} in all"
    )


@click.command(
    epilog="""\b
Examples:
  hpkvfs fsck
  hpkvfs fsck --full --max-tokens 1000       a random sample of all blobs
  hpkvfs fsck --full --json | jq .damaged
  hpkvfs fsck --repair                       of a vault that is not mounted
"""
)
@click.option("--full", is_flag=True, help="Also fetch and verify every blob (costs tokens).")
@click.option("--max-tokens", type=click.IntRange(min=0), metavar="N",
              help="Spend no more on looking at blobs.")  # fmt: skip
@click.option("--repair", is_flag=True, help="Put right what can be.")
@json_option
@pass_settings
@click.pass_context
def fsck(
    context: click.Context,
    settings: Settings,
    full: bool,
    max_tokens: int | None,
    repair: bool,
    as_json: bool,
) -> None:
    """Check the vault at the server, and its snapshots; name the files that are damaged.

    Exit code 0 when all is well, or was put right and nothing lost; 3 otherwise.
    """
    arguments = {"full": full, "max_tokens": max_tokens, "repair": repair}
    result = settings.perform("fsck", arguments, "checking")
    show(result, as_json, _checked)
    if result["problems"] or result["damaged"]:
        context.exit(VaultError.exit_code)


def _checked(result: Result) -> str:
    lines = [
        f"generation {result['generation']}: {result['files']:,} files, {result['nodes']:,} nodes,"
        f" {result['extents']:,} extents, {result['dead']:,} dead blobs,"
        f" {result['snapshots']:,} snapshots that hold {result['blobs_held']:,} more;"
        f" {result['blobs']:,} blobs in all"
    ]
    if result["verified"] or result["unchecked"]:
        left = result["unchecked"]
        lines.append(
            f"{result['verified']:,} blobs fetched and verified"
            + (f", {left:,} left out: they would cost more tokens than allowed" if left else "")
        )
    lines += (f"repaired: {ui.printable(text)}" for text in result["repaired"])
    lines += map(ui.printable, result["problems"])
    lines += map(_damage, result["damaged"])
    if result["problems"] and result["repairable"]:
        lines.append("hpkvfs fsck --repair can put some of this right")
    if not (result["problems"] or result["damaged"]):
        lines.append("no problems")
    return "\n".join(lines)


def _damage(damage: Result) -> str:
    where = f"snapshot {damage['snapshot']}: " if damage["snapshot"] else ""
    ranges = ", ".join(f"{start}-{end - 1}" for start, end in damage["ranges"])
    path = ui.printable(damage["path"])
    return f"{where}{path} is damaged: " + (f"bytes {ranges}" if ranges else "all of it")


@click.command(
    epilog="""\b
Examples:
  hpkvfs keepalive                       run this every day or so: see --install-timer
  hpkvfs keepalive --now                 do not wait for the time that was drawn
  hpkvfs keepalive --install-timer       have systemd run it
"""
)
@click.option("--now", is_flag=True, help="Store the entry now, whatever its time is.")
@click.option("--install-timer", is_flag=True, help="Install and start a systemd user timer.")
@json_option
@pass_settings
def keepalive(settings: Settings, now: bool, install_timer: bool, as_json: bool) -> None:
    """Keep the tokens safe to recover from the words.

    Stores the vault's breakglass entry once in each epoch of the server, at a time drawn at
    random. A mounted vault does so by itself; this is for those that are rarely mounted.
    """
    if install_timer:
        from hpkvfs import timer

        for line in timer.install(settings):
            click.echo(line)
        return
    result = settings.perform("keepalive", {"now": now}, "keeping alive")
    show(result, as_json, _kept_alive)


def _kept_alive(result: Result) -> str:
    done = "the breakglass entry was stored" if result["stored"] else "nothing was due"
    return f"{done}; {ui.recovery(result)}"


COMMANDS = (status, gc, fsck, keepalive)
