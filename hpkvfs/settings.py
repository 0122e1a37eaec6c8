"""What every command of hpkvfs shares: its settings, its errors, secrets, output.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import click

from hpkvfs import control, ui
from hpkvfs.address import Address
from hpkvfs.errors import HpkvError, UserError
from hpkvfs.guard import guard_memory

if TYPE_CHECKING:
    from hpkvfs.mount import Vault
    from hpkvfs.net.transport import Way
    from hpkvfs.state import StateDirectory
    from hpkvfs.volume.keys import VaultKeys

Result = dict[str, Any]


class Failure(click.ClickException):
    """One sentence, what to do, and the exit code."""

    def __init__(self, error: HpkvError) -> None:
        super().__init__(error.message)
        self.hint = error.hint
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: Any = None) -> None:
        """As every other line of ours, on standard error."""
        click.echo(f"hpkvfs: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


class Commands(click.Group):
    """A group whose commands may raise errors of ours, or of the operating system."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HpkvError as error:
            raise Failure(error) from error
        except BrokenPipeError:
            _leave_quietly()
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise Failure(HpkvError(f"{error.strerror or error}{where}")) from error


def _leave_quietly() -> NoReturn:
    """Nobody reads what we write any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


@dataclass(slots=True)
class Settings:
    """The options that every command has."""

    path: Path
    password_file: Path | None
    insecure_direct: bool
    verbose: bool
    tor: str = "auto"
    tor_password_file: Path | None = None
    tell: Callable[[str], None] = ui.phase
    password_fd: int | None = None
    new_password: str | None = field(default=None, repr=False)  # known already: do not ask

    @property
    def state(self) -> StateDirectory:
        """The state directory; nothing is read yet."""
        from hpkvfs.state import StateDirectory

        return StateDirectory(self.path)

    @property
    def socket(self) -> Path:
        """Where a mounting process listens."""
        return self.path / "control"

    def address(self, text: str) -> Address:
        """The server; UserError when talking to it would give the user away."""
        address = Address.parse(text)
        address.check_private(self.insecure_direct)
        return address

    @property
    def way_options(self) -> list[str]:
        """The options that say how to reach the server, for another process of ours."""
        options = ["--insecure-direct"] * self.insecure_direct
        options += ["--tor", self.tor] if self.tor != "auto" else []
        if self.tor_password_file is not None:
            options += ["--tor-password-file", str(self.tor_password_file.absolute())]
        return options

    def password(self, state: StateDirectory) -> str | None:
        """The vault's password, asked for if it has one."""
        if not state.needs_password:
            return None
        if self.new_password is not None:
            return self.new_password
        if self.password_fd is not None:
            with os.fdopen(self.password_fd, "rb") as pipe:
                return pipe.read().decode()
        if self.password_file is not None:
            return read_secret(self.password_file, "password")
        self.new_password = prompt("password", "--password-file")
        return self.new_password

    def open(self) -> Vault:
        """The vault, unlocked."""
        guard_memory()
        state = self.state
        address = self.address(state.server)
        return self.vault(state.unlock(self.password(state)), address)

    def vault(self, keys: VaultKeys, address: Address) -> Vault:
        """The vault, and the way to its server."""
        from hpkvfs.mount import Vault

        return Vault(self.state, keys, self._way(address), address.identity)

    def _way(self, address: Address) -> Way:
        if not address.is_onion:
            from hpkvfs.net.transport import TcpDialer

            return TcpDialer(address.host, address.port)
        from secrets import token_bytes

        from hpkvfs.net.circuits import Circuits, TorSettings

        password = None
        if self.tor_password_file is not None:
            password = read_secret(self.tor_password_file, "password of tor's control port")
        settings = TorSettings.parse(self.tor, self.path / "tor", password, self.tell)
        return Circuits(address, settings, token_bytes)

    def perform(self, name: str, arguments: Result, doing: str) -> Result:
        """One command, by the process that has the vault mounted, or else by this one."""
        mounted = control.reach(self.socket)
        if mounted is not None:
            with mounted, ui.progress(doing) as progress:
                return control.ask(mounted, name, arguments, progress)
        vault = self.open()
        from hpkvfs import mount

        with ui.progress(doing) as progress:
            return mount.run(mount.perform, vault, name, arguments, progress)


def default_state() -> Path:
    """Where the state directory is when nobody says."""
    import platformdirs

    return platformdirs.user_state_path("hpkvfs")


pass_settings = click.make_pass_decorator(Settings)
file_path = click.Path(path_type=Path, dir_okay=False)


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds, or a number with s, m, h or d behind it, as seconds."""

    name = "duration"
    _SECONDS: ClassVar[dict[str, int]] = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """See click.ParamType."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no duration; write 90s, 10m, 6h or 2d", param, ctx)
        return float(found[1]) * self._SECONDS[found[2]]


spread_option = click.option(
    "--spread",
    type=Duration(),
    default=0.0,
    metavar="DURATION",
    help="Draw requests out over so long (90s, 10m, 6h).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON.")


def read_secret(path: Path, what: str) -> str:
    """A secret from a file, or standard input for `-`; UserError."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"can't read the {what} from {path}: {reason}") from None
    text = text.removesuffix("\n")
    if not text.strip():
        raise UserError(f"there is no {what} in {path}")
    return text


def prompt(what: str, option: str, *, twice: bool = False) -> str:
    """Ask for a secret at the terminal; UserError, naming the option, when there is none."""
    try:
        text: str = click.prompt(what, hide_input=True, confirmation_prompt=twice, err=True)
    except click.Abort:
        raise UserError(f"no {what} given", f"give it with {option}") from None
    return text


def show(result: Result, as_json: bool, text: Callable[[Result], str]) -> None:
    """Write a result as JSON, or as text for people."""
    click.echo(json.dumps(result) if as_json else text(result))
