"""The systemd timer that keeps tokens safe: its unit files, and what is said without systemd."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Hpkvfs


def test_the_timer_is_written_where_systemd_looks_for_it(
    hpkvfs: Hpkvfs, vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    told = hpkvfs("keepalive", "--install-timer").output
    assert "systemctl --user enable --now" in told  # there is none here: it says what is left to do
    (service,) = (tmp_path / "systemd" / "user").glob("*.service")
    (timer,) = (tmp_path / "systemd" / "user").glob("*.timer")
    assert service.stem == timer.stem
    assert f'"--state" "{vault}" "keepalive"' in service.read_text()
    assert "RandomizedDelaySec" in timer.read_text()


def test_a_timer_that_could_not_unlock_the_vault_is_refused(
    hpkvfs: Hpkvfs, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", "/nowhere")
    password = tmp_path / "password"
    password.write_text("correct horse\n")
    hpkvfs("--password-file", password, "init", "--words-file", tmp_path / "words")
    assert "password" in hpkvfs("keepalive", "--install-timer", code=2).output
    assert not (tmp_path / "config").exists()
    hpkvfs("--password-file", password, "keepalive", "--install-timer")
    (service,) = (tmp_path / "config" / "systemd" / "user").glob("*.service")
    text = service.read_text()
    assert f'"--password-file" "{password}"' in text and "correct horse" not in text
