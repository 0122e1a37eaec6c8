"""Several processes on one socket: killed, replaced, reloaded, drained, watched."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from hpkvd import supervisor
from hpkvd.supervisor import Supervisor
from hpkvfs.protocol.messages import Parameters, ParametersRequest, decode_reply
from tests.ports import own_port
from tests.server.customers import Crowd, funded, workers
from tests.server.support import ROOT, ServerProcess, hpkvd, new_blob, new_key, read_all, until


@pytest.fixture
def data(tmp_path: Path) -> Path:
    assert hpkvd("init", data=tmp_path / "data").returncode == 0
    return tmp_path / "data"


@pytest.fixture
def server(data: Path) -> Iterator[ServerProcess]:
    with ServerProcess(data, workers=2) as server:
        yield server


def replace_one(server: ServerProcess) -> None:
    """Kill a worker, and wait for another in its place."""
    before = workers(server)
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(workers(server) - before) == 1)


def test_a_worker_killed_under_load_loses_nothing_and_is_replaced(server: ServerProcess) -> None:
    with Crowd(server, cheats=4) as crowd:
        for _ in range(3):
            replace_one(server)
            crowd.served(5)
    crowd.check()
    code, told = server.stop()
    assert code == 0
    assert "a worker ended (killed by SIGKILL); starting another" in told
    assert told.count("; starting another") + told.count("; trying again in") == 3


def test_reloading_replaces_the_workers_and_nobody_is_turned_away(server: ServerProcess) -> None:
    before, served, running = workers(server), 0, True

    def ask() -> None:
        nonlocal served
        while running:
            server.parameters()
            served += 1

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    server.process.send_signal(signal.SIGHUP)
    until(lambda: len(workers(server)) == 2 and not workers(server) & before)
    running = False
    thread.join()
    assert served > 10
    code, told = server.stop()
    assert (code, "reloaded" in told) == (0, True)


def test_logs_can_be_objects(data: Path) -> None:
    settings = data / "hpkvd.toml"
    settings.write_text(settings.read_text().replace('log = "text"', 'log = "json"'))
    with ServerProcess(data, workers=1) as server:
        os.kill(min(workers(server)), signal.SIGKILL)
        assert server.process.stderr is not None
        told = json.loads(server.process.stderr.readline())
        assert told == {
            "level": "info",
            "message": "a worker ended (killed by SIGKILL); starting another",
        }


def test_settings_that_are_wrong_do_not_get_in_by_reloading(server: ServerProcess) -> None:
    before = workers(server)
    (server.data / "hpkvd.toml").write_text("lisen = 3")
    server.process.send_signal(signal.SIGHUP)
    assert server.process.stderr is not None
    told = ""
    while "the old ones go on" not in told:  # the timer of epochs may complain in between
        told += (line := server.process.stderr.readline())
        assert line
    assert "no setting `lisen`" in told
    server.parameters()
    until(lambda: workers(server) == before)


def test_stopping_answers_what_was_asked_of_every_worker(server: ServerProcess) -> None:
    purses = [funded(server, 100) for _ in range(4)]
    asked = []
    for purse in purses:
        purchase = purse.insert(new_key().public, new_blob())
        connection = socket.create_connection(server.address, timeout=10)
        connection.sendall(purchase.frame)
        asked.append((purse, purchase, connection))
    time.sleep(0.1)
    code, told = server.stop()
    for purse, purchase, connection in asked:
        with connection:
            purse.settle(purchase, decode_reply(read_all(connection)))
    assert code == 0
    assert told == "hpkvd: stopping; the last requests are being answered\nhpkvd: stopped\n"


def test_asked_twice_to_stop_it_still_ends_well(server: ServerProcess) -> None:
    process = server.process
    assert process.stderr is not None
    held = socket.create_connection(server.address, timeout=10)  # somebody to be waited for
    with held:
        held.sendall(b"x")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "hpkvd: stopped\n")


def test_workers_do_not_outlive_their_parent(server: ServerProcess) -> None:
    before = workers(server)
    server.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))


STUB = """
import os, signal, socket, sys
channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1]))
channel.send(b'{"stubs": 1}')
signal.pause()
"""


async def test_a_worker_that_falls_silent_is_ended_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "HANG_SECONDS", 0.2)
    parent = Supervisor([sys.executable, "-c", STUB], [], 1, stop_seconds=5)
    stop, ready = trio.Event(), trio.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.run, stop, ready.set)
            await ready.wait()
            while parent.board.died < 2:
                await trio.sleep(0.02)
            stop.set()
    assert parent.workers == 0
    assert parent.board.total()["stubs"] >= 2


DOOMED = STUB.replace("signal.pause()", "os.kill(os.getpid(), 40)")


async def test_a_worker_that_keeps_dying_is_replaced_ever_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hpkvd")
    pauses: list[float] = []
    start = Supervisor._start

    async def recorded(parent: Supervisor, pause: float = supervisor.FIRST_PAUSE) -> Any:
        pauses.append(pause)
        return await start(parent, pause)

    monkeypatch.setattr(Supervisor, "_start", recorded)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.3)
    parent = Supervisor([sys.executable, "-c", DOOMED], [], 1, stop_seconds=5)
    await _run_until(parent, lambda: len(pauses) == 5)
    assert pauses == [0.1, 0.2, 0.3, 0.3, 0.3]
    assert "a worker ended (killed by signal 40); starting another" in caplog.text


async def test_without_room_for_another_process_the_parent_goes_on_and_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hpkvd")
    parent = Supervisor([sys.executable, "-c", STUB], [], 2, stop_seconds=5)
    open_process, refused = trio.lowlevel.open_process, 0

    async def full(*arguments: Any, **options: Any) -> Any:
        nonlocal refused
        if parent.board.died and refused < 3:
            refused += 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await open_process(*arguments, **options)

    monkeypatch.setattr(trio.lowlevel, "open_process", full)

    async def kill_one() -> None:
        parent._workers[0].process.kill()

    await _run_until(parent, lambda: refused == 3 and parent.workers == 2, kill_one)
    assert "no process can be started (Resource temporarily unavailable)" in caplog.text


async def test_without_room_for_another_process_reloading_leaves_the_workers_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hpkvd")
    parent = Supervisor([sys.executable, "-c", STUB], [], 1, stop_seconds=5)

    async def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    async def reload() -> None:
        monkeypatch.setattr(trio.lowlevel, "open_process", full)
        before = list(parent._workers)
        await parent.reload()
        assert parent._workers == before

    await _run_until(parent, lambda: True, reload)
    assert "the old ones go on as they are" in caplog.text


async def _run_until(
    parent: Supervisor,
    condition: Callable[[], bool],
    when_ready: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
) -> None:
    stop, ready = trio.Event(), trio.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.run, stop, ready.set)
            await ready.wait()
            await when_ready()
            while not condition():
                await trio.sleep(0.02)
            stop.set()


async def test_told_to_stop_while_a_worker_still_starts_the_parent_stops() -> None:
    slow = STUB.replace("channel.send(b'{\"stubs\": 1}')\n", "")
    parent = Supervisor([sys.executable, "-c", slow], [], 2, stop_seconds=5)
    stop = trio.Event()
    with trio.fail_after(30):  # a start is waited for twice as long
        async with trio.open_nursery() as nursery:
            nursery.start_soon(parent.run, stop, lambda: pytest.fail("not ready"))
            while len(parent._workers) < 2:
                await trio.sleep(0.02)
            stop.set()


async def test_workers_that_cannot_start_are_told_of_by_their_code() -> None:
    parent = Supervisor([sys.executable, "-c", "raise SystemExit(78)"], [], 2, stop_seconds=5)
    with trio.fail_after(60):
        failure = await parent.run(trio.Event(), lambda: pytest.fail("not ready"))
    assert failure is not None
    assert failure.code == 78


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
        text: str = page.read().decode()
    return text


def test_the_counts_are_of_all_workers_and_coarse(data: Path) -> None:
    port = own_port()
    with ServerProcess(data, "--metrics", f"127.0.0.1:{port}", workers=2) as server:
        purse = funded(server, 100)
        key = new_key()
        purse.settle(purchase := purse.insert(key.public, new_blob()), server.ask(purchase.frame))
        for _ in range(150):
            server.parameters()
        # One insertion and one voucher are nobody's business; their worker may tell of them last.
        for line in ('parameters"} 100\n', 'insert"} 0\n', 'issue"} 0\n'):
            until(lambda line=line: f'operation="{line}' in scrape(port))  # type: ignore[misc]
        page = scrape(port)
        assert "hpkvd_workers 2\n" in page
        bounds = re.findall(r'answer_seconds_bucket\{le="([^"]+)"\} (\d+)', page)
        assert [float(bound) for bound, _ in bounds] == sorted(float(bound) for bound, _ in bounds)
        count = int(bounds[-1][1])
        assert f"hpkvd_answer_seconds_count {count}\n" in page
        assert re.search(r"^hpkvd_answer_seconds_sum \d+$", page, re.MULTILINE)
        assert page.count("# TYPE hpkvd_answer_seconds ") == page.count("answer_seconds histogram")
        assert key.public.hex() not in page
        victim = min(workers(server))
        os.kill(victim, signal.SIGKILL)
        until(lambda: "hpkvd_workers_died_total 1\n" in scrape(port))
        assert 'operation="parameters"} 100\n' in scrape(port)


def test_metrics_for_the_world_are_refused(data: Path) -> None:
    result = hpkvd("serve", "--metrics", "0.0.0.0:9387", data=data)
    assert result.returncode == os.EX_CONFIG
    assert "loopback" in result.stderr


def test_a_service_manager_passes_sockets_and_is_told(data: Path, tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        script = (
            "import fcntl, os, sys;"
            "passed = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[2:]];"
            "[os.dup2(fd, 3 + place) for place, fd in enumerate(passed)];"
            "os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.environ['WATCHDOG_PID']=str(os.getpid());"
            "os.execv(sys.executable, [sys.executable, '-m', 'hpkvd', 'serve', '--workers', '2',"
            " '--data', sys.argv[1]])"
        )
        fds = listening.fileno(), other.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(data), *map(str, fds)],
            env=os.environ
            | {
                "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}",
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "LISTEN_FDS": "2",
                "WATCHDOG_USEC": "400000",
            },
            pass_fds=fds,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.DEVNULL,
        )
        try:
            told = [manager.recv(1000).decode()]
            while "READY=1" not in told[-1]:
                told.append(manager.recv(1000).decode())
            told.append(manager.recv(1000).decode())
            assert told[-1] == "WATCHDOG=1"
            assert process.stdout is not None
            for one in (listening, other):
                host, port = one.getsockname()
                assert process.stdout.readline() == f"hpkvd: listening on {host}:{port}\n"
                with socket.create_connection((host, port), timeout=10) as connection:
                    connection.sendall(ParametersRequest().encode())
                    assert isinstance(decode_reply(read_all(connection)), Parameters)
        finally:
            process.terminate()
            process.communicate(timeout=20)
        assert process.returncode == 0
        manager.settimeout(0.1)
        while (last := manager.recv(1000).decode()) == "WATCHDOG=1":
            pass
        assert last == "STOPPING=1"
