"""The real command in a process of its own: kill -9, restart, stop, and strangers at the door."""

from __future__ import annotations

import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpkvfs.protocol.codec import REPLY_SIZE, REQUEST_SIZE
from hpkvfs.protocol.group import SigningKey
from hpkvfs.protocol.messages import Done, Reason, Refused, Spent, decode_reply
from tests.server.customers import Crowd, funded, workers
from tests.server.support import (
    ROOT,
    ServerProcess,
    hpkvd,
    new_blob,
    new_key,
    read_all,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    result = hpkvd("init", data=tmp_path / "data")
    assert result.returncode == 0, result.stderr
    return tmp_path / "data"


@pytest.fixture
def server(data: Path) -> Iterator[ServerProcess]:
    with ServerProcess(data) as server:
        yield server


def test_after_kill_9_nothing_acknowledged_is_lost_nor_spent_twice(server: ServerProcess) -> None:
    """Several customers at work, the server killed in the middle, three times."""
    with Crowd(server, cheats=4) as crowd:
        for _ in range(3):
            crowd.served(8)
            server.kill()
            server.restart()
    crowd.check()
    assert all(one.caught for one in crowd.customers)
    crowd.check()


def test_a_serial_spent_before_a_crash_is_spent_after_it(server: ServerProcess) -> None:
    purse = funded(server, 100)
    pair = list(purse.held)
    first = purse.look_up(new_key().public)
    purse.held = pair
    second = purse.look_up(new_key().public)
    done = server.ask(first.frame)
    server.kill()
    server.restart()
    assert isinstance(done, Done)
    reply = server.ask(second.frame)
    assert isinstance(reply, Spent)
    (fact,) = reply.facts
    assert (fact.fact, fact.issued) == (done.fact, done.issued)


def test_a_server_that_is_stopped_answers_first_and_tells_nothing(server: ServerProcess) -> None:
    assert server.line == f"hpkvd: listening on 127.0.0.1:{server.address[1]}"
    purse = funded(server, 1000)
    key, blob = new_key(), new_blob()
    purchase = purse.insert(key.public, blob)
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(purchase.frame)
        time.sleep(0.05)
        code, told = server.stop()
        reply = decode_reply(read_all(connection))
    purse.settle(purchase, reply)
    assert code == 0
    assert told == "hpkvd: stopping; the last requests are being answered\nhpkvd: stopped\n"


def test_strangers_at_the_door_do_no_harm(server: ServerProcess) -> None:
    idle = [socket.create_connection(server.address) for _ in range(50)]
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100)):
        with socket.create_connection(server.address) as stranger:
            stranger.sendall(noise)
    for frame in (bytes(REQUEST_SIZE), os.urandom(REQUEST_SIZE), b"\xff" * REQUEST_SIZE):
        assert server.ask(frame) == Refused(Reason.MALFORMED)
    with socket.create_connection(server.address) as stranger:
        stranger.sendall(os.urandom(REQUEST_SIZE))
        answer = read_all(stranger)
        assert len(answer) == REPLY_SIZE
    purse = funded(server, 100)
    purchase = purse.look_up(new_key().public)
    purse.settle(purchase, server.ask(purchase.frame))
    for connection in idle:
        connection.close()
    assert server.stop()[0] == 0


def test_ready_fd_gets_the_address(data: Path) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "hpkvd", "serve", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(writer), "--data", str(data)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
        pass_fds=[writer],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], 20)
        assert ready
        host, _, port = os.read(reader, 100).decode().strip().rpartition(":")
        assert os.read(reader, 1) == b""
        socket.create_connection((host, int(port)), timeout=60).close()
    finally:
        os.close(reader)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_no_secret_is_in_a_log_or_a_key_in_a_name(server: ServerProcess) -> None:
    """Whatever a request holds, nothing of it is told; nor is there a core file to have it."""
    for process in (server.process.pid, *workers(server)):
        assert resource.prlimit(process, resource.RLIMIT_CORE) == (0, 0)
    purse = funded(server, 1000)
    key = SigningKey(secrets.token_bytes(32))
    purchase = purse.look_up(key.public)
    server.ask(purchase.frame)
    server.ask(purchase.frame[:-1] + b"\1")
    _, told = server.stop()
    assert told == "hpkvd: stopping; the last requests are being answered\nhpkvd: stopped\n"
