"""The commands about the past: snapshots, generations, what changed, getting it back."""

from __future__ import annotations

from typing import Any

import click

from hpkvfs import keep, ui
from hpkvfs.settings import Result, Settings, json_option, pass_settings, show


@click.group(
    epilog="""\b
Examples:
  hpkvfs snapshot create before-the-move
  ls ~/vault/.snapshots/before-the-move      where it is, while the vault is mounted
  hpkvfs snapshot list
  hpkvfs snapshot delete before-the-move && hpkvfs gc
"""
)
def snapshot() -> None:
    """Keep the vault as it is, and let go of what was kept.

    A snapshot costs what changes after it. It can be read under .snapshots of the mounted
    vault (which is not listed), or mounted by itself.
    """


@snapshot.command(
    epilog="Examples: hpkvfs snapshot create;  hpkvfs snapshot create before-the-move"
)
@click.argument("name", required=False)
@json_option
@pass_settings
def create(settings: Settings, name: str | None, as_json: bool) -> None:
    """Keep the vault as it is now, as NAME or by the time (UTC)."""
    result = settings.perform("create-snapshot", {"name": name}, "publishing")
    show(result, as_json, lambda r: f"{r['name']}: generation {r['generation']} is kept")


@snapshot.command("list", epilog="Examples: hpkvfs snapshot list;  hpkvfs snapshot list --json")
@json_option
@pass_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the snapshots, oldest first.

    HOLDS is how many blobs died between a snapshot and the next and are kept for it.
    """
    result = settings.perform("snapshots", {}, "looking")
    show(result, as_json, _listed)


def _listed(result: Result) -> str:
    rows = [
        (s["name"], f"{s['generation']:,}", keep.timestamp(s["time"]), f"{s['files']:,}",
         ui.size(s["bytes"]), f"{s['blobs_held']:,}")
        for s in result["snapshots"]
    ]  # fmt: skip
    head = ("NAME", "GENERATION", "TIME", "FILES", "SIZE", "HOLDS")
    return ui.table([head, *rows]) if rows else "no snapshots"


@snapshot.command(epilog="Examples: hpkvfs snapshot delete before-the-move")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@json_option
@pass_settings
def delete(settings: Settings, names: tuple[str, ...], as_json: bool) -> None:
    """Let go of snapshots; hpkvfs gc then deletes what nobody else needs."""
    result = settings.perform("delete-snapshots", {"names": list(names)}, "publishing")
    show(
        result,
        as_json,
        lambda r: (
            f"{len(r['deleted'])} deleted; hpkvfs gc gives {r['regain']:,} tokens for"
            f" {r['freed']:,} blobs"
        ),
    )


@snapshot.command(epilog="Examples: hpkvfs snapshot auto --keep hourly=24,daily=7,weekly=4")
@click.option("--keep", "policy", metavar="POLICY", required=True,
              help="Which to keep: hourly=N,daily=N,weekly=N,monthly=N,yearly=N.")  # fmt: skip
@json_option
@pass_settings
def auto(settings: Settings, policy: str, as_json: bool) -> None:
    """Make an automatic snapshot if one is due, delete those that are not to be kept.

    What mount --keep does by itself. Only names that begin with auto- are ever deleted.
    """
    keep.parse(policy)
    result = settings.perform("keep-snapshots", {"keep": policy}, "publishing")
    show(result, as_json, lambda r: f"{r['created'] or 'none'} made, {len(r['deleted'])} deleted")


@click.command(
    epilog="""\b
Examples:
  hpkvfs diff before-the-move                what changed since
  hpkvfs diff before-the-move after          between two snapshots
"""
)
@click.argument("old", metavar="SNAPSHOT")
@click.argument("new", metavar="[SNAPSHOT]", default="live")
@json_option
@pass_settings
def diff(settings: Settings, old: str, new: str, as_json: bool) -> None:
    """Tell which files differ between a snapshot and another, or what is there now.

    + new, - gone, M changed, R renamed.
    """
    result = settings.perform("diff", {"old": old, "new": new}, "comparing")
    show(result, as_json, lambda r: "\n".join(map(_changed, r["changes"])) or "no differences")


def _changed(change: Any) -> str:
    was = f"{ui.printable(change['old'])} -> " if change["old"] else ""
    return f"{change['kind']} {was}{ui.printable(change['path'])}"


@click.command(epilog="Examples: hpkvfs log;  hpkvfs log --json | jq '.generations[0]'")
@json_option
@pass_settings
def log(settings: Settings, as_json: bool) -> None:
    """List the generations that are still known, newest first.

    Of the older ones only a few anchors are kept, to find the newest by; their files are there
    if a snapshot has them.
    """
    result = settings.perform("log", {}, "looking")
    show(result, as_json, _logged)


def _logged(result: Result) -> str:
    rows = [
        (f"{g['generation']:,}", keep.timestamp(g["time"]), f"{g['files']:,}", ui.size(g["bytes"]),
         "here" if g["here"] else g["writer"], " ".join(g["snapshots"]))
        for g in result["generations"]
    ]  # fmt: skip
    head = ("GENERATION", "TIME", "FILES", "SIZE", "WRITER", "SNAPSHOTS")
    return ui.table([head, *rows]) if rows else "no generations"


@click.command(
    epilog="""\b
Examples:
  hpkvfs restore before-the-move docs/thesis.tex             where it was
  hpkvfs restore before-the-move docs docs.old               beside what is there now
  hpkvfs restore --replace before-the-move docs              instead of what is there now
"""
)
@click.argument("snapshot", metavar="SNAPSHOT")
@click.argument("path", metavar="PATH")
@click.argument("to", metavar="[TO]", required=False)
@click.option("--replace", is_flag=True, help="Take the place of what is there.")
@json_option
@pass_settings
def restore(
    settings: Settings, snapshot: str, path: str, to: str | None, replace: bool, as_json: bool
) -> None:
    """Copy a file or directory out of a snapshot.

    PATH and TO are paths in the vault, from its root. What is restored appears complete or not
    at all.
    """
    arguments = {"snapshot": snapshot, "path": path, "to": to, "replace": replace}
    result = settings.perform("restore", arguments, "restoring")
    show(result, as_json, lambda r: f"{r['files']:,} files with {ui.size(r['bytes'])} restored")


COMMANDS = (snapshot, diff, log, restore)
