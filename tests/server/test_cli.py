"""The command, as an operator meets it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpkvd import config, systemd
from hpkvd.cli import main
from hpkvd.config import Config, ConfigError
from hpkvd.serving import bind_unix
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.protocol.voucher import Voucher
from tests.ports import own_port
from tests.server.support import ROOT, hpkvd


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    assert run("init", "--data", str(tmp_path / "data")).exit_code == 0
    return tmp_path / "data"


def test_init_makes_a_directory_only_its_owner_can_read(data: Path) -> None:
    files = [path for path in data.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "hpkvd.toml",
        "identity",
        "ledger.sqlite",
        "00000001.secret",
        "00000001.parameters",
    }
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o600, path
    for path in (data, data / "epochs"):
        assert path.stat().st_mode & 0o777 == 0o700, path


def test_init_never_overwrites(data: Path) -> None:
    before = (data / "epochs" / "00000001.secret").read_bytes()
    result = run("init", "--data", str(data))
    assert result.exit_code == os.EX_CANTCREAT
    assert "not empty" in result.output
    assert "--data" in result.output
    assert (data / "epochs" / "00000001.secret").read_bytes() == before


def test_the_settings_written_are_the_defaults(data: Path) -> None:
    assert config.load(data) == Config()
    assert (Config().tariff, Config().listen) == (Tariff(1, 10, 8, 10, 72), "127.0.0.1:7387")


def test_prices_are_chosen_at_the_start(tmp_path: Path) -> None:
    where = str(tmp_path / "data")
    arguments = ("init", "--data", where, "--look-up", "2", "--insert", "30", "--refund", "20")
    assert run(*arguments, "--entry-hours", "5").exit_code == 0
    status = json.loads(run("status", "--json", "--data", where).output)
    tariff = {"look_up": 2, "insert": 30, "refund": 20, "entry": 30, "entry_hours": 5}
    assert status["tariff"] == tariff


def test_cheap_entries_are_a_wrong_command_line(tmp_path: Path) -> None:
    result = run("init", "--data", str(tmp_path / "data"), "--entry", "6")
    assert result.exit_code == 2
    assert "breakglass" in result.output


def test_a_refund_above_the_price_is_a_wrong_command_line(tmp_path: Path) -> None:
    result = run("init", "--data", str(tmp_path / "data"), "--refund", "10")
    assert result.exit_code == 2
    assert "refund" in result.output
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("command", [["serve"], ["status"], ["voucher", "--amount", "5"]])
def test_without_init_one_sentence_says_so(tmp_path: Path, command: list[str]) -> None:
    result = run(*command, "--data", str(tmp_path))
    assert result.exit_code == os.EX_CONFIG
    assert "hpkvd init" in result.output
    assert result.output.count("\n") == 1


def test_vouchers_are_printed_one_a_line_and_counted(data: Path) -> None:
    result = run("voucher", "--amount", "1000", "--count", "3", "--data", str(data))
    vouchers = [Voucher.parse(line) for line in result.output.splitlines()]
    assert [voucher.amount for voucher in vouchers] == [1000] * 3
    assert len({voucher.secret for voucher in vouchers}) == 3
    as_json = run("voucher", "--amount", "7", "--json", "--data", str(data))
    (one,) = json.loads(as_json.output)["vouchers"]
    assert Voucher.parse(one["voucher"]).amount == one["amount"] == 7
    status = json.loads(run("status", "--json", "--data", str(data)).output)
    assert status["vouchers"] == {"unspent": 4, "tokens": 3007}
    assert status["tokens"] == dict.fromkeys(("issued", "charged", "refunded", "outstanding"), 0)


@pytest.mark.parametrize("amount", ["0", "-5", "4294967296", "many"])
def test_a_voucher_of_no_worth_is_a_wrong_command_line(data: Path, amount: str) -> None:
    assert run("voucher", "--amount", amount, "--data", str(data)).exit_code == 2


def test_the_disk_does_not_hold_the_voucher(data: Path) -> None:
    result = run("voucher", "--amount", "1000", "--data", str(data))
    voucher = Voucher.parse(result.output)
    kept = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    assert voucher.digest in kept
    assert voucher.secret not in kept


def test_status_is_for_people_too(data: Path) -> None:
    lines = run("status", "--data", str(data)).output.splitlines()
    assert lines[0].startswith("epoch")
    assert any(line.split() == ["outstanding", "0"] for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("listen = 7387", "`listen` must be of type str"),
        ('listen = "localhost"', "HOST:PORT"),
        ('lisen = "127.0.0.1:1"', "no setting `lisen`"),
        ("[limits]\nconnections = 0", "limit"),
        ("[limits]\nconnections = true", "type int"),
        ("[limits]\nseconds = nan", "limit"),
        ("[limits]\nstop_seconds = -1", "limit"),
        ("[limits]\nspeed = 1", "no setting `speed`"),
        ("[tariff]\nrefund = 10", "refund"),
        ("tariff = 3", "type dict"),
        ("reserve_mib = -1", "negative"),
        ("listen", "hpkvd.toml"),
    ],
)
def test_wrong_settings_are_pointed_out(data: Path, text: str, message: str) -> None:
    (data / "hpkvd.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(data)
    result = run("serve", "--data", str(data))
    assert result.exit_code == os.EX_CONFIG
    assert message in result.output


def test_settings_left_out_are_the_defaults(data: Path) -> None:
    (data / "hpkvd.toml").write_text("[limits]\nseconds = 5\n")
    loaded = config.load(data)
    assert (loaded.limits.seconds, loaded.listen) == (5.0, Config().listen)


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:7387", ("::1", 7387)), ("host:1", ("host", 1))],
)
def test_an_address_has_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert config.address(text) == address


@pytest.mark.parametrize("text", ["", "7387", ":7387", "host:", "host:x", "host:65536", "host:-1"])
def test_anything_else_is_no_address(data: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        config.address(text)


def test_an_address_in_use_is_told_of(data: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("serve", "--listen", address, "--data", str(data))
    assert result.exit_code == os.EX_UNAVAILABLE
    assert address in result.output
    assert "--listen" in result.output


def test_what_cannot_be_made_leaves_nothing_in_the_way_of_the_next_try(tmp_path: Path) -> None:
    away = f"postgresql://keeper@127.0.0.1:{own_port()}/x"
    failed = hpkvd("init", "--ledger", away, data=tmp_path / "new")
    assert failed.returncode == os.EX_TEMPFAIL
    assert "are its URL, user and password right?" in failed.stderr
    assert hpkvd("init", data=tmp_path / "new").returncode == 0


@pytest.mark.parametrize("url", ["mysql://there", "postgresql://[there/x", "ledger.sqlite"])
def test_what_names_no_ledger_is_a_wrong_setting(tmp_path: Path, url: str) -> None:
    result = hpkvd("init", "--ledger", url, data=tmp_path / "new")
    assert result.returncode == os.EX_CONFIG
    assert result.stderr == (
        "hpkvd: a ledger is written as sqlite:///DIR/FILE or postgresql://USER@HOST/DATABASE\n"
    )


def test_a_socket_takes_the_place_of_one_left_over_and_of_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    bind_unix(path).close()
    with bind_unix(path), pytest.raises(OSError, match="in use"):
        bind_unix(path)  # another server's
    path.unlink()
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_the_settings_can_name_a_socket(data: Path, tmp_path: Path) -> None:
    file = data / "hpkvd.toml"
    file.write_text(file.read_text().replace("127.0.0.1:7387", f"unix:{tmp_path}/socket"))
    assert config.load(data).listen == f"unix:{tmp_path}/socket"
    (tmp_path / "socket").write_text("")
    refused = hpkvd("serve", "--workers", "0", data=data)
    assert refused.returncode == os.EX_UNAVAILABLE
    assert f"cannot listen on unix:{tmp_path}/socket (Address already in use)" in refused.stderr


@pytest.mark.parametrize("count", ["x", "90"])
def test_what_a_service_manager_passes_and_is_no_socket_is_one_sentence(
    data: Path, count: str
) -> None:
    script = (
        "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid());"
        "os.execv(sys.executable, [sys.executable, '-m', 'hpkvd', 'serve', '--data', sys.argv[1]])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(data)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}", "LISTEN_FDS": count},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == os.EX_CONFIG
    assert result.stderr.count("\n") == 1
    assert "$LISTEN_FDS" in result.stderr


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_does_not_listen_is_refused(kind: socket.SocketKind) -> None:
    with socket.socket(type=kind) as passed:
        passed.bind(("127.0.0.1", 0))
        environment = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="not listen"):
            patch.setattr(systemd, "FIRST_FD", os.dup(passed.fileno()))
            systemd.take_sockets(environment)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_node_whose_secret_is_not_there_is_one_sentence(data: Path, workers: str) -> None:
    file = data / "hpkvd.toml"
    text = file.read_text().replace('kind = ""', 'kind = "cln"')
    text = text.replace('url = ""', 'url = "https://127.0.0.1:1"')
    file.write_text(text.replace('secret_file = ""', 'secret_file = "rune"'))
    result = hpkvd("serve", "--listen", "127.0.0.1:0", "--workers", workers, data=data)
    assert result.returncode == os.EX_IOERR
    assert f"hpkvd: No such file or directory ({data}/rune)\n" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_secret_that_is_not_its_epochs_is_refused(data: Path, tmp_path: Path) -> None:
    assert run("init", "--data", str(tmp_path / "other")).exit_code == 0
    other = (tmp_path / "other" / "epochs" / "00000001.secret").read_bytes()
    (data / "epochs" / "00000001.secret").write_bytes(other)
    result = run("serve", "--data", str(data))
    assert result.exit_code == os.EX_CONFIG
    assert "secret of epoch 1" in result.output
    (data / "epochs" / "00000001.secret").write_bytes(b"short")
    assert "backup" in run("serve", "--data", str(data)).output


@pytest.mark.parametrize("content", [None, b"short"])
def test_without_its_identity_a_server_does_not_start(data: Path, content: bytes | None) -> None:
    (data / "identity").unlink()
    if content is not None:
        (data / "identity").write_bytes(content)
    result = run("serve", "--data", str(data))
    assert result.exit_code == os.EX_CONFIG
    assert "identity" in result.output and "backup" in result.output


@pytest.mark.parametrize("command", ["init", "serve", "voucher", "status", "plan"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"hpkvd {command}" in result.output.split("Example", 1)[1]
