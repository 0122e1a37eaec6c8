"""`hpkvfs buy` against a real server process, a real mint, and doubles of Lightning nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hpkvfs.cli import main
from hpkvfs.protocol.ecash import Token
from tests.payments.mint import MintProcess
from tests.payments.nodes import Cln
from tests.payments.shop import hpkvd
from tests.server.support import ROOT, ServerProcess, until

Hpkvfs = Callable[..., Result]


def start(state: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpkvfs", "--state", str(state), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def hpkvfs(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hpkvfs:
    """Run the command, in this process, over a new vault at the server; it must end with `code`."""
    for room in ("cli", "settings"):
        monkeypatch.setattr(f"hpkvfs.{room}.guard_memory", lambda: None)

    def run(*arguments: str, code: int = 0, stdin: str = "") -> Result:
        state = ["--state", str(tmp_path / "state")]
        result = CliRunner().invoke(main, [*state, *arguments], input=stdin)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    host, port = server.address
    made = ("init", "--no-password", "--server", f"{host}:{port}", "--words-file")
    run(*made, str(tmp_path / "words"))
    return run


def status(data: Path) -> Any:
    return json.loads(hpkvd("status", "--json", data=data).stdout)


def test_the_prices_are_shown_and_ecash_is_turned_into_tokens(
    hpkvfs: Hpkvfs, mint: MintProcess, data: Path, tmp_path: Path
) -> None:
    shown = hpkvfs("buy").stdout
    assert "10,000 tokens for 1,000 sat" in shown and mint.url in shown
    assert "hpkvfs buy --cashu - <" in shown  # and no token where others can read it
    text = mint.token()
    bought = hpkvfs("buy", "--cashu", "-", stdin=text)
    assert bought.stdout == "990 tokens bought; 990 in all\n"
    assert json.loads(hpkvfs("balance", "--json").stdout)["held"] == 990
    again = hpkvfs("buy", "--cashu", text, code=2)
    assert "redeemed already" in again.stderr
    assert json.loads(hpkvfs("balance", "--json").stdout)["held"] == 990
    report = status(data)
    assert report["sold"]["cashu"] == {"tokens": 990, "sats": 99}
    assert report["tokens"]["issued"] == 990

    out = tmp_path / "takings"
    assert hpkvd("takings", "--out", str(out), data=data).exit_code == 0
    (line,) = out.read_text().splitlines()
    assert Token.decode(line).amount == 99
    assert out.stat().st_mode & 0o777 == 0o600
    assert status(data)["takings"]["sats"] == 0
    assert hpkvd("takings", "--out", str(out), data=data).exit_code == os.EX_CANTCREAT
    told = json.loads(hpkvd("income", "--json", data=data).stdout)
    assert told["paid"]["cashu"] == {"tokens": 990, "sats": 99}


def test_lightning_shows_an_invoice_waits_and_issues(
    hpkvfs: Hpkvfs, node: Cln, tmp_path: Path, data: Path, server: ServerProcess
) -> None:
    process = start(tmp_path / "state", "buy", "--tokens", "500", "--lightning")
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("500 tokens for 50 sat, within")
    assert process.stdout.readline().strip() == node.only.text
    node.only.pay()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "500 tokens bought; 500 in all\n"), err
    assert status(data)["sold"]["lightning"] == {"tokens": 500, "sats": 50}
    assert node.secret_file.decode().strip() not in json.dumps(status(data))
    _, logged = server.stop()
    assert "stopped" in logged and "HTTP" not in logged and node.url not in logged


def test_interrupted_anywhere_it_is_gone_on_with(
    hpkvfs: Hpkvfs, node: Cln, tmp_path: Path, server: ServerProcess
) -> None:
    process = start(tmp_path / "state", "buy", "--tokens", "500", "--lightning")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    other = hpkvfs("buy", "--tokens", "700", "--lightning", code=2)
    assert "500 tokens is not finished" in other.stderr
    shown = hpkvfs("buy", "--no-wait", "--json")
    assert json.loads(shown.stdout)["invoice"] == node.only.text
    server.kill()
    node.only.pay()
    server._options += ["--listen", "{}:{}".format(*server.address)]
    server.restart()
    assert hpkvfs("buy").stdout == "500 tokens bought; 500 in all\n"
    assert json.loads(hpkvfs("balance", "--json").stdout)["held"] == 500
    assert node.made == 1
    assert "10,000 tokens for 1,000 sat" in hpkvfs("buy").stdout  # nothing is left to go on with


def test_a_mint_that_is_away_loses_nothing_and_the_next_run_goes_on(
    hpkvfs: Hpkvfs, mint: MintProcess
) -> None:
    text = mint.token()
    mint.stop()
    try:
        failed = hpkvfs("buy", "--cashu", "-", stdin=text, code=4)
        assert failed.stderr.count("\n") == 2 and "nothing is lost" in failed.stderr
    finally:
        mint.start()
    assert hpkvfs("buy").stdout == "990 tokens bought; 990 in all\n"


def test_what_cannot_be_bought_is_one_sentence(hpkvfs: Hpkvfs, mint: MintProcess) -> None:
    for arguments in (
        ("buy", "--lightning"),
        ("buy", "--tokens", "5"),
        ("buy", "--lightning", "--cashu", "x", "--tokens", "5"),
        ("buy", "--cashu", "x", "--tokens", "5"),
        ("buy", "--cashu", "hello"),
        ("buy", "--lightning", "--tokens", "5"),
    ):
        failed = hpkvfs(*arguments, code=2)
        assert "Traceback" not in failed.stderr
    token = Token.decode(mint.token(21))
    elsewhere = Token("https://another.example", token.unit, token.proofs).encode()
    assert "does not take tokens of that mint" in hpkvfs("buy", "--cashu", elsewhere, code=2).stderr
    assert hpkvfs("buy", "--abandon").stdout == "0 purchases were given up\n"


def test_an_expired_invoice_is_said_and_a_new_one_can_be_had(hpkvfs: Hpkvfs, node: Cln) -> None:
    hpkvfs("buy", "--tokens", "500", "--lightning", "--no-wait")
    node.only.state = "gone"
    assert "expired" in hpkvfs("buy", code=2).stderr
    node.invoices.clear()
    hpkvfs("buy", "--tokens", "700", "--lightning", "--no-wait")
    assert node.only.msat == 70_000
    assert hpkvfs("buy", "--abandon").stdout == "1 purchase was given up\n"


def test_giving_up_what_was_paid_takes_it_instead(
    hpkvfs: Hpkvfs, node: Cln, server: ServerProcess
) -> None:
    hpkvfs("buy", "--tokens", "500", "--lightning", "--no-wait")
    node.only.pay()
    server.kill()
    assert "nothing is lost" in hpkvfs("buy", "--abandon", code=4).stderr
    server._options += ["--listen", "{}:{}".format(*server.address)]
    server.restart()
    given_up = hpkvfs("buy", "--abandon").stdout
    assert given_up == (
        "0 purchases were given up; 500 tokens were paid for already, and are here\n"
    )
    assert json.loads(hpkvfs("balance", "--json").stdout)["held"] == 500


def test_giving_up_ecash_does_not_pay_with_it(hpkvfs: Hpkvfs, mint: MintProcess) -> None:
    text = mint.token()
    mint.stop()
    try:
        hpkvfs("buy", "--cashu", "-", stdin=text, code=4)
    finally:
        mint.start()
    assert hpkvfs("buy", "--abandon").stdout == "1 purchase was given up\n"
    assert json.loads(hpkvfs("balance", "--json").stdout)["held"] == 0
    assert hpkvfs("buy", "--cashu", "-", stdin=text).stdout == "990 tokens bought; 990 in all\n"


def test_ctrl_c_while_waiting_says_how_to_go_on(
    hpkvfs: Hpkvfs, node: Cln, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, asked_again = node.answer, threading.Event()

    def heard(*question: Any) -> Any:
        asked_again.set()
        return answer(*question)

    with start(tmp_path / "state", "buy", "--tokens", "500", "--lightning") as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            monkeypatch.setattr(node, "answer", heard)
            assert asked_again.wait(60)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "nothing is lost, paid or not; go on with it: hpkvfs buy\n" in err
    node.only.pay()
    assert hpkvfs("buy").stdout == "500 tokens bought; 500 in all\n"


def test_a_server_killed_between_swap_and_issue_gives_the_next_run_the_tokens(
    hpkvfs: Hpkvfs, mint: MintProcess, server: ServerProcess, tmp_path: Path, data: Path
) -> None:
    """Killed at some moment of the payment; whichever it was, the token buys what it is worth."""
    text, log = mint.token(), mint.directory / "log"
    before = log.stat().st_size
    process = start(tmp_path / "state", "buy", "--cashu", text)
    until(lambda: b"/v1/swap" in log.read_bytes()[before:])
    server.kill()
    process.kill()
    process.communicate()
    server._options += ["--listen", "{}:{}".format(*server.address)]
    server.restart()
    assert hpkvfs("buy", "--cashu", text).stdout == "990 tokens bought; 990 in all\n"
    assert status(data)["sold"]["cashu"]["tokens"] == 990
