"""How things look in a terminal. rich is loaded only when something takes long enough to show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hpkvfs.control import Progress, no_progress

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@contextmanager
def progress(doing: str) -> Iterator[Progress]:
    """A progress bar on standard error while the block runs; nothing when it is no terminal."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(doing, total=None)
        with _telling(lambda text: bars.update(task, description=f"{doing} ({text})")):
            yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """A spinner on standard error while the block runs; nothing when it is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with (
        Console(stderr=True).status(doing) as spinner,
        _telling(lambda text: spinner.update(f"{doing} ({text})")),
    ):
        yield


_tell: list[Callable[[str], None]] = []


@contextmanager
def _telling(tell: Callable[[str], None]) -> Iterator[None]:
    _tell.append(tell)
    try:
        yield
    finally:
        _tell.pop()


def phase(text: str) -> None:
    """Show beside what is going on now how far it got; nothing when nothing is shown."""
    if _tell:
        _tell[-1](text)


def size(count: int) -> str:
    """A number of bytes for people."""
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def facts(rows: Mapping[str, str]) -> str:
    """Names and values, aligned."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def printable(path: str) -> str:
    """A path without anything that a terminal would obey, or could not show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path)


def qr(text: str) -> None:
    """A QR code on standard output."""
    import segno

    segno.make(text, error="l", micro=False).terminal(sys.stdout, border=2, compact=True)


def notice(text: str) -> None:
    """Something the user should know, on standard error."""
    click.echo(f"hpkvfs: {text}", err=True)


def balance(report: Mapping[str, Any]) -> str:
    """`hpkvfs balance` for people."""
    return _tokens(f"{report['held']:,} tokens", report["pending"], report["expired"])


def _tokens(held: str, pending: int, expired: int) -> str:
    text = f"{held} held, {pending:,} pending"
    return f"{text}, {expired:,} expired" if expired else text


def status(report: Mapping[str, Any], state: str, server: str) -> str:
    """`hpkvfs status` for people."""
    mounted = report.get("mounted")
    how = ", read-only" if report.get("read_only") else ""
    where = f"{mounted} (process {report['pid']}{how})" if mounted else "no"
    if report.get("detached"):
        where = f"no longer, but process {report['pid']} serves programs that have files open"
    link = "connected" if report["connected"] else "not connected"
    factor = report["amplification"]
    rows = {
        "vault": state,
        "mounted": where,
        "server": f"{server}, {link}" if mounted else server,
        "reached": report["way"],
        "generation": "none yet" if report["generation"] is None else f"{report['generation']:,}",
        "files": f"{report['files']:,} with {size(report['bytes'])}",
        "at the server": ("" if report["blobs_exact"] else "at least ")
        + f"{report['blobs_live']:,} blobs, {size(report['bytes_stored'])}"
        + (f", {factor} times the data" if factor else ""),
        "dead": f"{report['blobs_dead']:,} blobs; hpkvfs gc gives tokens for them",
        "snapshots hold": f"{report['blobs_held']:,} more blobs",
        "unpublished": size(report["unpublished_bytes"]),
        "tokens": _tokens(
            f"{report['tokens_held']:,}", report["tokens_pending"], report["tokens_expired"]
        ),
        "recovery": ("AT RISK: " if report["recovery"]["at_risk"] else "")
        + recovery(report["recovery"]),
        "room": f"{report['free_blobs']:,} blobs",
    }
    if report["kept"]:
        numbers = ", ".join(map(str, report["kept"]))
        rows["kept"] = f"changes that did not fit another client's: hpkvfs mount --kept {numbers}"
    if report["trouble"]:
        rows["trouble"] = report["trouble"]
    return facts(rows)


def recovery(report: Mapping[str, Any]) -> str:
    """How many tokens the words alone would bring back, for how long, and what to do about it."""
    safe = f"{report['tokens']:,} of {report['held']:,} tokens safe to recover from the words"
    due = report["due"]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(due)) if due else None
    following = f"the next entry is stored from {when} on" if when else "run hpkvfs keepalive"
    match report["state"]:
        case "safe":
            is_stale = report["tokens"] < report["stored_tokens"]
            spent = "; others of the entry were spent since" if is_stale else ""
            return f"{safe}, until epoch {report['epoch']} ends{spent}"
        case "ageing":
            return (
                f"{safe}, until epoch {report['epoch']} ends; epoch {report['newest']} has begun,"
                f" {following}"
            )
        case "opened":
            return f"{safe}: the entry was opened and will be gone; {following}"
        case "expired":
            return f"{safe}: epoch {report['epoch']} is over; {following}"
    return f"{safe}; {following}"
