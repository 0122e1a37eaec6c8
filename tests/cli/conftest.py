"""What tests of the command share: running it in this process, and a state directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpkvfs.cli import main

WORDS = "legal winner thank year wave sausage worth useful legal winner thank yellow"

Hpkvfs = Callable[..., Result]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def hpkvfs(state: Path, monkeypatch: pytest.MonkeyPatch) -> Hpkvfs:
    """Run the command with this test's state directory; the exit code must be `code`."""
    for name in ("HPKVFS_STATE", "HPKVFS_PASSWORD_FILE", "HPKVFS_INSECURE_DIRECT"):
        monkeypatch.delenv(name, raising=False)
    # what keeps keys out of core dumps is for good, and this process runs other tests too
    for room in ("cli", "settings"):
        monkeypatch.setattr(f"hpkvfs.{room}.guard_memory", lambda: None)

    def run(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(
            main, ["--state", str(state), *map(str, arguments)], input=stdin
        )
        assert result.exit_code == code, (result.output, result.exception)
        if code:
            assert isinstance(result.exception, SystemExit)
        return result

    return run


@pytest.fixture
def vault(hpkvfs: Hpkvfs, state: Path) -> Path:
    """The state directory of a new vault without a password."""
    hpkvfs("init", "--no-password", "--words-file", state.with_name("words"))
    return state
