"""The quickstart, on a small tree: what a newcomer runs first must work, and must clean up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv/bin/hpkvfs").exists(), reason="needs the .venv that tools/test makes"
)


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "tools/quickstart"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A directory for the quickstart, taken down whatever happens."""
    directory = tmp_path / "here"
    yield directory
    quickstart("--down", "--dir", str(directory))


def test_it_ends_with_a_vault_in_use_and_can_be_taken_down(home: Path) -> None:
    done = quickstart("--small", "--dir", str(home))
    assert done.returncode == 0, done.stderr
    server = int((home / "server.pid").read_text())
    note = home / "vault" / "note"
    note.write_text("hello")
    status = subprocess.run([home / "hpkvfs", "status"], capture_output=True, text=True)
    assert str(home / "vault") in status.stdout
    assert os.listdir(home / "vault" / "copy")

    again = quickstart("--small", "--dir", str(home))
    assert again.returncode == 1
    assert "in " + str(home) + " already" in again.stderr
    assert note.read_text() == "hello"

    down = quickstart("--down", "--dir", str(home))
    assert down.returncode == 0, down.stderr
    assert not home.exists()
    assert str(home) not in Path("/proc/self/mounts").read_text()
    assert not Path(f"/proc/{server}").exists()


def test_it_leaves_other_peoples_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    for arguments in (["--small"], ["--down"]):
        done = quickstart(*arguments, "--dir", str(tmp_path))
        assert done.returncode == 1
        assert "something else in it" in done.stderr
        assert os.listdir(tmp_path) == ["precious"]
