"""An interrupt while a command is still being imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


def start(command: str, first_import: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(first_import), ".", "server"])
    return subprocess.run(
        [sys.executable, "-m", command, "--version"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["hpkvfs", "hpkvd"])
def test_an_interrupt_during_the_imports_ends_it_without_a_word(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "click.py").write_text(INTERRUPTED)
    done = start(command, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("command", ["hpkvfs", "hpkvd"])
def test_an_interrupt_elsewhere_in_python_does_say_something(command: str, tmp_path: Path) -> None:
    """The negative control: what is imported before the command is in charge."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    assert "KeyboardInterrupt" in start(command, tmp_path).stderr
