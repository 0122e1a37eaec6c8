"""The systemd units, as far as systemd can judge them without running them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.server.support import ROOT

UNITS = ROOT / "packaging" / "systemd"
PROGRAM = "/opt/hpkvfs/.venv/bin/hpkvd"


def installed(directory: Path) -> Path:
    """The units with a program that is there."""
    target = shutil.copytree(UNITS, directory / "units")
    service = target / "hpkvd.service"
    text = service.read_text()
    assert PROGRAM in text
    service.write_text(text.replace(PROGRAM, "/bin/true"))
    return service


def analyzed(*arguments: str) -> str:
    result = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_systemd_finds_nothing_to_say_of_the_units(tmp_path: Path) -> None:
    service = installed(tmp_path)
    verify = "verify", "--man=no"
    assert analyzed(*verify, str(service), str(service.with_name("hpkvd.socket"))) == ""
    service.write_text(service.read_text().replace("ProtectClock=", "ProtectClok="))
    assert "ProtectClok" in analyzed(*verify, str(service))  # it would have


def test_the_service_is_shut_in(tmp_path: Path) -> None:
    """systemd's own measure, 0 to 10: below 2."""
    told = analyzed("security", "--offline=true", "--no-pager", str(installed(tmp_path)))
    found = re.search(r"Overall exposure level for hpkvd.service: ([0-9.]+)", told)
    assert found is not None
    assert float(found[1]) < 2.0
