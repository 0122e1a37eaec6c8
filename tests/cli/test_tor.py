"""What a user at a terminal sees of a tor that starts, and where a tor of our own lives."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Hpkvfs
from tests.commands import ENVIRONMENT
from tests.mounted.client import eventually

ONION = "2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion"
VOUCHER = f"hpkv1-100-{'a' * 32}"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_shown_how_far_tor_is(hpkvfs: Hpkvfs, state: Path, terminal: bool) -> None:
    """A real tor of our own, with its state under the vault's, that never goes on the network.
    Where there is no terminal nothing is shown: the negative control."""
    hpkvfs("init", "--server", ONION, "--no-password", "--words-file", state.with_name("words"))
    (state / "tor").mkdir(mode=0o700)
    (state / "tor" / "torrc").write_text("DisableNetwork 1\n")
    ours, theirs = pty.openpty() if terminal else os.pipe()
    line = [sys.executable, "-m", "hpkvfs", "--state", str(state), "--tor", "own", "redeem", "-"]
    with subprocess.Popen(
        line,
        env=ENVIRONMENT | {"TERM": "xterm"},
        stdin=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        assert process.stdin is not None
        process.stdin.write(f"{VOUCHER}\n".encode())
        process.stdin.close()
        shown = b""
        if terminal:
            while b"tor is at 0 %: starting" not in shown:
                shown += os.read(ours, 4096)
        else:
            eventually((state / "tor" / "port").exists, "tor to start", 20)
        process.send_signal(signal.SIGINT)
        if not terminal:
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert (b"tor is at" in shown) == terminal
    assert (state / "tor").stat().st_mode & 0o777 == 0o700
    assert (state / "tor" / "lock").exists()  # tor's own
    assert not (state / "tor" / "port").exists()  # it ended with us
