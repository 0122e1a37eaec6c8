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
    """Tell what the vault holds, what it costs, and how it is."""
    result = settings.perform("status", {}, "looking")
    server = str(json.loads((settings.path / "vault").read_text())["server"])
    result = {"state": str(settings.path), "server": server, "mounted": None, **result}
    show(result, as_json, lambda r: ui.status(r, str(settings.path), server))


@click.command(
    epilog="Examples: hpkvfs gc;  hpkvfs gc --spread 7200;  hpkvfs gc --json | jq .gained"
)
@spread_option
@json_option
@pass_settings
def gc(settings: Settings, spread: float, as_json: bool) -> None:
    """Delete what is no longer needed at the server, for tokens.

    Blobs deleted together belong together. With --spread they are deleted at random times, so
    that others' deletions come in between.
    """
    result = settings.perform("gc", {"spread": spread}, "deleting")
    show(
        result,
        as_json,
        lambda r: f"{r['deleted']:,} blobs deleted, {r['gained']:+,} tokens; {r['held']:,} in all",
    )


@click.command(epilog="Examples: hpkvfs fsck;  hpkvfs fsck --full --json")
@click.option("--full", is_flag=True, help="Also fetch and verify all file data (costs tokens).")
@json_option
@pass_settings
@click.pass_context
def fsck(context: click.Context, settings: Settings, full: bool, as_json: bool) -> None:
    """Check the vault at the server. Exit code 3 when something is wrong with it."""
    result = settings.perform("fsck", {"full": full}, "checking")
    show(result, as_json, _checked)
    if result["problems"] or result["damaged"]:
        context.exit(VaultError.exit_code)


def _checked(result: Result) -> str:
    found = (
        f"generation {result['generation']}: {result['files']:,} files, {result['nodes']:,} nodes,"
        f" {result['extents']:,} extents, {result['dead']:,} dead blobs"
    )
    problems = result["problems"] + [_damage(damage) for damage in result["damaged"]]
    return "\n".join([found, *problems, "" if problems else "no problems"]).rstrip()


def _damage(damage: Result) -> str:
    where = f"snapshot {damage['snapshot']}: " if damage["snapshot"] else ""
    ranges = ", ".join(f"{start}-{end - 1}" for start, end in damage["ranges"])
    return f"{where}{damage['path']} is damaged: " + (f"bytes {ranges}" if ranges else "all of it")


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
