"""What someone at a terminal sees: one clear sentence and what to do, or what they asked for."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import Result

from hpkvd import supervisor
from hpkvfs import background
from hpkvfs.cli import main
from hpkvfs.errors import HpkvError
from hpkvfs.session import Options
from hpkvfs.settings import Settings
from hpkvfs.volume.keys import check_words
from tests.cli.conftest import WORDS, Hpkvfs

NOBODY = "127.0.0.1:9"  # nothing listens there


def said(result: Result) -> str:
    """The sentence of an error: the first of at most two lines, in our style."""
    lines = result.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 2, lines
    sentence = lines[0].removeprefix("hpkvfs: ")
    assert sentence != lines[0]
    assert not sentence.endswith(".")
    if len(lines) == 2:
        assert lines[1].startswith("  ")
    return sentence


# -- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(main.commands))
def test_help_has_examples_and_a_sentence_for_each_option(hpkvfs: Hpkvfs, name: str) -> None:
    text = hpkvfs(name, "--help").stdout
    assert f"hpkvfs {name}" in text and "Example" in text
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help and parameter.help.endswith((".", ").")), parameter.name


def test_help_tells_how_to_begin() -> None:
    assert "hpkvfs init" in (main.epilog or "")


def test_version_is_told(hpkvfs: Hpkvfs) -> None:
    assert hpkvfs("--version").stdout.startswith("hpkvfs ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(hpkvfs: Hpkvfs, shell: str) -> None:
    assert "_HPKVFS_COMPLETE" in hpkvfs("completion", shell).stdout


def test_help_loads_nothing_heavy() -> None:
    heavy = ("trio", "pyfuse3", "rich", "coincurve", "cryptography", "hpkvfs.session")
    code = (
        "import sys\nfrom hpkvfs.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        f"sys.exit(','.join(m for m in {heavy!r} if m in sys.modules) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PLANTED = "from pathlib import Path\nPath('ran').touch()\nraise SystemExit(0)\n"


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")  # it is left running, as a rule
def test_modules_in_the_current_directory_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to where a vault is mounted from could have had its keys."""
    for name in ("hpkvfs.py", "hpkvd.py", "click.py"):
        (tmp_path / name).write_text(PLANTED)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HpkvError, match="ended without a word"):  # but it did run
        background.start(["--version"], tmp_path, None, tmp_path / "log", print, print)
    assert "hpkvfs " in (tmp_path / "log").read_text()
    server = subprocess.run(supervisor.command("--help"), capture_output=True, check=True)
    assert b"hpkvd" in server.stdout
    assert not (tmp_path / "ran").exists()
    subprocess.run([sys.executable, "-m", "hpkvfs"], check=True)  # the negative control
    assert (tmp_path / "ran").exists()


def test_the_password_is_asked_for_where_memory_is_guarded(
    hpkvfs: Hpkvfs, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the process that only starts the one that mounts."""
    order: list[str] = []
    monkeypatch.setattr("hpkvfs.mounting.guard_memory", lambda: order.append("guard"))
    monkeypatch.setattr(Settings, "password", lambda *_: order.append("password"))
    monkeypatch.setattr(background, "start", lambda *_: order.append("start"))
    hpkvfs("mount", vault)
    assert order == ["guard", "password", "start"]


# -- init ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["12", "24"])
def test_init_shows_words_that_are_valid(hpkvfs: Hpkvfs, state: Path, count: str) -> None:
    state.mkdir()
    state.chmod(0o755)  # as a directory is that was made by hand
    result = hpkvfs("init", "--no-password", "--words", count)
    words = " ".join(word for word in result.stdout.split() if not word.isdigit())
    assert len(words.split()) == int(count)
    assert check_words(words) == words
    assert "without a password" in result.stderr
    assert stat.S_IMODE((state / "vault").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert words not in (state / "vault").read_text()


def test_init_writes_words_to_a_file_and_nowhere_else(hpkvfs: Hpkvfs, tmp_path: Path) -> None:
    result = hpkvfs("init", "--no-password", "--words-file", tmp_path / "words")
    words = check_words((tmp_path / "words").read_text())
    assert stat.S_IMODE((tmp_path / "words").stat().st_mode) == 0o600
    assert result.stdout == ""
    assert not any(f" {word} " in result.stderr for word in words.split() if len(word) > 5)


def test_init_never_overwrites_a_words_file(hpkvfs: Hpkvfs, state: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("another vault's")
    result = hpkvfs("init", "--no-password", "--words-file", tmp_path / "words", code=2)
    assert "File exists" in said_last(result)
    assert (tmp_path / "words").read_text() == "another vault's"
    assert not (state / "vault").exists()


def test_init_does_not_touch_a_vault_that_is_there(hpkvfs: Hpkvfs, vault: Path) -> None:
    before = (vault / "vault").read_bytes()
    words = vault.with_name("more words")
    result = hpkvfs("init", "--no-password", "--words-file", words, code=3)
    assert said(result) == f"there is a vault in {vault} already"
    assert (vault / "vault").read_bytes() == before
    assert not words.exists()


def test_init_asks_for_a_password_twice(hpkvfs: Hpkvfs) -> None:
    hpkvfs("init", stdin="secret\nother\nsecret\nsecret\n")
    hpkvfs("balance", stdin="secret\n")
    assert said_last(hpkvfs("balance", stdin="other\n", code=2)) == "the password is wrong"


def said_last(result: Result) -> str:
    """The sentence after a prompt."""
    return result.stderr.rpartition("hpkvfs: ")[2].splitlines()[0]


def test_passwords_from_a_file(hpkvfs: Hpkvfs, tmp_path: Path) -> None:
    right, wrong, empty = (tmp_path / name for name in ("right", "wrong", "empty"))
    right.write_text("secret\n")
    wrong.write_text("other\n")
    empty.touch()
    hpkvfs("--password-file", right, "init", "--words-file", tmp_path / "words")
    hpkvfs("--password-file", right, "status")
    result = hpkvfs("--password-file", wrong, "status", code=2)
    assert said(result) == "the password is wrong"
    assert "recover" in result.stderr
    assert "no password in" in said(hpkvfs("--password-file", empty, "status", code=2))
    assert "can't read" in said(hpkvfs("--password-file", tmp_path / "none", "status", code=2))


def test_without_an_answer_there_is_no_password(hpkvfs: Hpkvfs, state: Path) -> None:
    result = hpkvfs("init", stdin="", code=2)
    assert said_last(result).startswith("no new password")
    assert not state.exists()


# -- servers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["192.0.2.1:7387", "example.org:80", "[2001:db8::1]:7387"])
def test_a_server_elsewhere_is_refused(hpkvfs: Hpkvfs, state: Path, server: str) -> None:
    result = hpkvfs("init", "--no-password", "--server", server, code=2)
    assert "would show it your address" in said(result)
    assert "--insecure-direct" in result.stderr
    assert not state.exists()
    hpkvfs("--insecure-direct", "init", "--no-password", "--server", server)
    # also when it is used, not only when it is set
    assert "would show it your address" in said(hpkvfs("balance", code=2))


@pytest.mark.parametrize("server", ["127.0.0.1:1", "127.9.9.9:65535", "[::1]:80", "localhost:80"])
def test_servers_on_this_machine_are_allowed(hpkvfs: Hpkvfs, server: str) -> None:
    hpkvfs("init", "--no-password", "--server", server)


@pytest.mark.parametrize(
    "server",
    ["", "127.0.0.1", "127.0.0.1:", ":80", "localhost:0", "localhost:65536", "::1:80", "a:\u0668"],
)
def test_what_is_no_address_is_refused(hpkvfs: Hpkvfs, server: str) -> None:
    result = hpkvfs("init", "--no-password", "--server", server, code=2)
    assert "not a server's address" in said(result)


# -- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("legal winner thank", "expected 12 or 24 words, found 3"),
        (WORDS.replace("sausage", "sausages"), "word 6 is not one of the BIP39 words"),
        (WORDS.replace("yellow", "year"), "the words' checksum does not match"),
        (" ", "no words in"),
    ],
)
def test_wrong_words_are_told_apart(
    hpkvfs: Hpkvfs, tmp_path: Path, words: str, complaint: str
) -> None:
    (tmp_path / "seed").write_text(words)
    result = hpkvfs("recover", "--no-password", "--seed", tmp_path / "seed", code=2)
    assert complaint in said(result)
    assert "sausages" not in result.output
    assert not (tmp_path / "state").exists()


def test_recovery_does_not_take_over_another_vault(hpkvfs: Hpkvfs, vault: Path) -> None:
    before = (vault / "vault").read_bytes()
    result = hpkvfs("recover", "--no-password", "--seed", "-", stdin=WORDS, code=3)
    assert "other words" in said(result)
    assert (vault / "vault").read_bytes() == before


def test_a_passphrase_makes_another_vault(hpkvfs: Hpkvfs, vault: Path, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text("extra")
    result = hpkvfs("recover", "--seed", vault.with_name("words"), "--passphrase-file",
                    tmp_path / "passphrase", code=3)  # fmt: skip
    assert "another passphrase" in said(result)
    result = hpkvfs("recover", "--seed", vault.with_name("words"), code=2)
    assert "is here already" in said(result)


# -- vouchers --------------------------------------------------------------------------------


def test_what_is_no_voucher_is_refused(hpkvfs: Hpkvfs, vault: Path) -> None:
    for text in ("hpkv1-100-short", "hpkv1-0-" + "a" * 32, "hpkv1-100-" + "1" * 32):
        assert "a voucher reads hpkv1-" in said(hpkvfs("redeem", text, code=2))
    assert "no voucher" in said(hpkvfs("redeem", "-", stdin="", code=2))


def test_a_voucher_is_asked_for_unseen(hpkvfs: Hpkvfs, vault: Path) -> None:
    result = hpkvfs("redeem", stdin="not a voucher\n", code=2)
    assert "not a voucher" not in result.output
    assert "a voucher reads" in result.stderr


def test_a_voucher_is_given_once(hpkvfs: Hpkvfs, vault: Path) -> None:
    hpkvfs("redeem", "-", "--voucher-file", "x", code=2)


# -- states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["balance", "status", "sync", "gc", "fsck", "mount /tmp/x"])
def test_without_a_vault_every_command_says_how_to_get_one(hpkvfs: Hpkvfs, command: str) -> None:
    result = hpkvfs(*command.split(), code=3)
    assert "there is no vault in" in said(result)
    assert "hpkvfs init" in result.stderr


def test_umount_of_what_is_not_mounted(hpkvfs: Hpkvfs, vault: Path) -> None:
    assert "is not mounted" in said(hpkvfs("umount", code=2))


def test_a_newer_format_is_refused(hpkvfs: Hpkvfs, vault: Path) -> None:
    fields = json.loads((vault / "vault").read_text())
    (vault / "vault").write_text(json.dumps({**fields, "format": 99}))
    result = hpkvfs("balance", code=3)
    assert "format 99" in said(result)
    assert "newer hpkvfs" in result.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "key"])
def test_a_damaged_key_file_is_one_sentence(hpkvfs: Hpkvfs, vault: Path, content: str) -> None:
    fields = json.loads((vault / "vault").read_text())
    if content == "key":
        content = json.dumps({**fields, "key": {"plain": "no hex"}})
    (vault / "vault").write_text(content)
    assert "is damaged" in said(hpkvfs("balance", code=3))


def test_the_key_of_another_vault_is_noticed(hpkvfs: Hpkvfs, vault: Path) -> None:
    fields = json.loads((vault / "vault").read_text())
    fields["key"] = {"plain": "ab" * 32}
    (vault / "vault").write_text(json.dumps(fields))
    assert "is not the key of its vault" in said(hpkvfs("balance", code=3))


def test_the_wallet_of_another_vault_is_noticed(hpkvfs: Hpkvfs, vault: Path) -> None:
    hpkvfs("balance")
    wallet = (vault / "wallet.sqlite").read_bytes()
    for path in vault.iterdir():
        path.unlink()
    hpkvfs("init", "--no-password")
    (vault / "wallet.sqlite").write_bytes(wallet)
    said(hpkvfs("balance", code=3))


def test_a_vault_in_use_is_left_alone(hpkvfs: Hpkvfs, vault: Path) -> None:
    from hpkvfs.state import StateDirectory

    with StateDirectory(vault).locked():
        assert "in use by another process" in said(hpkvfs("balance", code=3))
    hpkvfs("balance")


def test_a_state_directory_that_can_not_be_made(hpkvfs: Hpkvfs, state: Path) -> None:
    state.parent.mkdir(exist_ok=True)
    state.write_text("a file")
    result = hpkvfs("init", "--no-password", code=2)
    assert "Traceback" not in result.output


def test_an_unreachable_server_is_one_sentence(hpkvfs: Hpkvfs) -> None:
    hpkvfs("init", "--no-password", "--server", NOBODY)
    begun = time.monotonic()
    assert "the server cannot be reached" in said(hpkvfs("sync", code=4))
    assert time.monotonic() - begun < 10


def test_balance_and_status_need_no_server(hpkvfs: Hpkvfs, vault: Path) -> None:
    assert json.loads(hpkvfs("balance", "--json").stdout) == {
        "held": 0, "pending": 0, "total": 0, "expired": 0, "way": "directly",
    }  # fmt: skip
    status = json.loads(hpkvfs("status", "--json").stdout)
    assert status["mounted"] is None
    assert status["generation"] is None
    assert "none yet" in hpkvfs("status").stdout


# -- trading speed for cover -----------------------------------------------------------------------


def test_spread_reaches_the_mount_also_in_the_background(
    hpkvfs: Hpkvfs, vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def here(settings: Settings, directory: Path, options: Options, *_: object) -> None:
        seen.append(options.spread)

    def background(settings: Settings, directory: Path, flags: list[str]) -> None:
        hpkvfs("mount", "--foreground", *flags, directory)

    monkeypatch.setattr("hpkvfs.mounting._mount_here", here)
    monkeypatch.setattr("hpkvfs.mounting._mount_in_background", background)
    hpkvfs("mount", "--spread", "10m", tmp_path)
    hpkvfs("mount", tmp_path)
    assert seen == [600.0, 0.0]


def test_spread_reaches_the_collection(
    hpkvfs: Hpkvfs, vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def perform(settings: Settings, name: str, arguments: dict[str, object], _: str) -> object:
        seen.append((name, arguments["spread"]))
        return {"deleted": 0, "absent": 0, "refunded": 0}

    monkeypatch.setattr(Settings, "perform", perform)
    hpkvfs("gc", "--spread", "6h", "--json")
    assert seen == [("gc", 21_600.0)]


def test_a_spread_that_is_no_duration(hpkvfs: Hpkvfs, vault: Path, tmp_path: Path) -> None:
    said = hpkvfs("mount", "--spread", "soon", tmp_path, code=2).stderr
    assert "'soon' is no duration; write 90s, 10m, 6h or 2d" in said
