"""A systemd user timer that runs `hpkvfs keepalive`, for vaults that are rarely mounted.

    ~/.config/systemd/user/hpkvfs-keepalive[-NAME].{service,timer}

NAME is there for a state directory other than the default one, and made from its path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from hpkvfs.errors import UserError
from hpkvfs.settings import Settings, default_state

SERVICE: Final = """\
[Unit]
Description=Keep the tokens of the hpkvfs vault in {state} safe to recover

[Service]
Type=oneshot
ExecStart={command}
"""

# Once a day at a random time, so that a server cannot tell the machine by the hour. The entry
# itself is stored once in an epoch, at a time that was drawn when the epoch began.
TIMER: Final = """\
[Unit]
Description=Keep the tokens of the hpkvfs vault in {state} safe to recover

[Timer]
OnCalendar=daily
RandomizedDelaySec=24h
Persistent=true

[Install]
WantedBy=timers.target
"""


def units(settings: Settings) -> dict[str, str]:
    """Names and contents of the unit files; UserError when the timer could not unlock the vault."""
    words = [shutil.which("hpkvfs") or f"{sys.executable} -m hpkvfs", "--state", str(settings.path)]
    if settings.state.needs_password:
        if settings.password_file is None:
            raise UserError(
                "a timer cannot type the vault's password",
                "give --password-file FILE, which it will read, or keep the vault mounted",
            )
        words += ["--password-file", str(settings.password_file.absolute())]
    words += [*settings.way_options, "keepalive"]
    first, *rest = words
    command = " ".join([first, *map(_quoted, rest)])
    name = _name(settings.path)
    state = str(settings.path).replace("%", "%%")
    return {
        f"{name}.service": SERVICE.format(state=state, command=command),
        f"{name}.timer": TIMER.format(state=state),
    }


def install(settings: Settings) -> list[str]:
    """Write the unit files and start the timer; what was done, or is left to do, in lines."""
    files, directory = units(settings), _directory()
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)
    told = [f"{directory / name} is written" for name in files]
    timer = next(name for name in files if name.endswith(".timer"))
    if _systemctl("daemon-reload") and _systemctl("enable", "--now", timer):
        return [*told, f"{timer} is started; see systemctl --user list-timers"]
    command = f"systemctl --user daemon-reload && systemctl --user enable --now {timer}"
    return [*told, f"systemd does not answer here; when it does: {command}"]


def _directory() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "systemd" / "user"


def _name(state: Path) -> str:
    if state == default_state().absolute():
        return "hpkvfs-keepalive"
    return f"hpkvfs-keepalive-{hashlib.sha256(str(state).encode()).hexdigest()[:8]}"


def _quoted(word: str) -> str:
    """A word as systemd.service(5) reads it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _systemctl(*arguments: str) -> bool:
    try:
        done = subprocess.run(
            ["systemctl", "--user", *arguments], check=False, capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
