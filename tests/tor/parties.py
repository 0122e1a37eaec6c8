"""What is at the two ends of the network: services behind an onion address, clients that have
no other network than the tor they are given."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from stem.control import EventType

from hpkvd import identity as identities
from hpkvd.config import IDENTITY
from hpkvfs.address import onion_host
from hpkvfs.protocol.identity import Identity
from tests.commands import ENVIRONMENT, command
from tests.mounted.client import Client, Server, eventually
from tests.payments.nodes import take_invoices
from tests.tor.network import Namespace, Network

PORT = 7387
HOOK = Path(__file__).with_name("hook")


@contextlib.contextmanager
def echo(network: Network) -> Iterator[str]:
    """The onion address of a bare echo service."""
    with subprocess.Popen(
        network.inside(command("tests.tor.echo")), env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield publish(network, port, Identity(random.randbytes(32)))
        finally:
            process.kill()


def publish(network: Network, port: int, identity: Identity) -> str:
    """Have the service's tor publish a port of this machine; `....onion`."""
    key = base64.b64encode(identity.expanded()).decode()
    with network.controller("service") as controller:
        made = controller.create_ephemeral_hidden_service(
            {PORT: f"127.0.0.1:{port}"},
            key_type="ED25519-V3",
            key_content=key,
            await_publication=True,
            timeout=60,
            detached=True,
        )
    host = onion_host(identity.public)
    assert host == f"{made.service_id}.onion"
    return host


DEBIAN = Path("/usr/share/tor/tor-service-defaults-torrc")


def _debians_settings(base: Path) -> str:
    """Debian's own file, but for its directories, the daemon, the log, and a port that another
    may have."""
    changes = {
        "/var/lib/tor": f"{base}/lib",
        "/run/tor": f"{base}/run",
        "RunAsDaemon 1": "RunAsDaemon 0",
        "SocksPort 9050": "SocksPort auto",
        "Log notice syslog": f"Log notice file {base}/lib/notices",
    }
    settings = DEBIAN.read_text()
    for before, after in changes.items():
        assert before in settings
        settings = settings.replace(before, after)
    return settings


@contextlib.contextmanager
def debian_tor(network: Network) -> Iterator[Path]:
    """The control socket of a tor that is set up and owned as Debian's; of our own user where we
    are not root."""
    with tempfile.TemporaryDirectory(prefix="debian-tor-") as directory:
        base = Path(directory)
        base.chmod(0o755)
        settings = _debians_settings(base)
        network.prepare(base / "lib")
        (base / "run").mkdir()
        if os.geteuid() == 0:
            for path in (base / "lib", *(base / "lib").iterdir(), base / "run"):
                shutil.chown(path, "debian-tor", "debian-tor")
            (base / "run").chmod(0o2755)
        else:
            settings = settings.replace("User debian-tor\n", "")
        (base / "defaults").write_text(settings)
        (base / "torrc").write_text(network.settings("client"))
        line = ["tor", "--quiet", "--defaults-torrc", base / "defaults", "-f", base / "torrc"]
        with subprocess.Popen(network.inside([str(word) for word in line])) as process:
            try:
                control = base / "run" / "control"
                eventually(control.exists, "Debian's tor to start")
                yield control
            finally:
                process.terminate()


class OnionServer(Server):
    """hpkvd where the network's TCP is; it publishes itself at the service's tor, or, with
    `--tor own` among the options, at one of its own."""

    def __init__(self, network: Network, data: Path, *options: str) -> None:
        self._network = network
        self.options = options
        super().__init__(data)
        self.identity = identities.load(data / IDENTITY)
        assert self.onion == f"{onion_host(self.identity.public)}:{PORT}"

    @property
    def control(self) -> Path:
        """The control socket of a tor of its own."""
        return self.data / "tor" / "control"

    def start(self) -> None:
        """Return when it is published."""
        arguments: list[str | Path] = [
            "serve",
            "--data",
            self.data,
            "--listen",
            self.address,
            "--onion",
        ]
        if "own" in self.options:
            self._network.prepare(self.data / "tor", f"ControlSocket {self.control}\n")
        else:
            arguments += ["--tor", self._network.control("service")]
        self.process = subprocess.Popen(
            self._network.inside(command("hpkvd", *arguments, *self.options)),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        told = [self.process.stdout.readline().strip() for _ in range(2)]
        said = dict(line.removeprefix("hpkvd: ").rsplit(" ", 1) for line in told if line)
        self.address = said["listening on"]
        self.onion = said["onion service at"]

    def stop(self) -> None:
        super().stop()
        self.process.stdout.close()


class SellingServer(OnionServer):
    """One that also sells by invoices, of a node beside it (payments/nodes.py)."""

    def start(self) -> None:
        """Return when it is published."""
        self._node = subprocess.Popen(
            self._network.inside(command("tests.payments.nodes")),
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._node.stdout is not None
        take_invoices(self.data, self._node.stdout.readline().strip())
        super().start()

    def stop(self) -> None:
        super().stop()
        self._node.communicate("", 20)


@dataclass
class OnionClient(Client):
    """hpkvfs in a network namespace without any network, and with each connection it makes
    noted: tor's sockets are files, so they are there all the same."""

    tor: Path = field(kw_only=True)
    namespace: Namespace | None = field(kw_only=True)

    @property
    def log(self) -> Path:
        """Where the connections are noted."""
        return self.state.with_name("connections")

    def run(
        self, *arguments: str | Path, stdin: str = "", code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        line = command("hpkvfs", "--state", self.state, "--tor", self.tor, *arguments)
        environment = ENVIRONMENT | {"CONNECTIONS": str(self.log)}
        environment["PYTHONPATH"] = f"{HOOK}:{environment['PYTHONPATH']}"
        done = subprocess.run(
            self.namespace.inside(line) if self.namespace else line,
            input=stdin,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, (arguments, done.returncode, done.stdout, done.stderr)
        return done

    def connections(self) -> set[str]:
        """Where it connected to: a path, or HOST:PORT."""
        return {json.loads(line) for line in self.log.read_text().splitlines()}


class Saboteur:
    """Closes circuits of the client's tor at random, while they are being connected."""

    def __init__(self, network: Network, share: float, seed: int) -> None:
        self._network = network
        self._share = share
        self._random = random.Random(seed)
        self.closed = 0
        self.seen = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        doomed: SimpleQueue[str | None] = SimpleQueue()
        with self._network.controller("client") as controller:

            def stream(event: Any) -> None:
                if event.status == "SENTCONNECT" and event.target_address.endswith(".onion"):
                    self.seen += 1
                    if self._random.random() < self._share:
                        doomed.put(event.circ_id)

            def close() -> None:
                while (circuit := doomed.get()) is not None:
                    self.closed += controller.msg(f"CLOSECIRCUIT {circuit}").is_ok()

            thread = threading.Thread(target=close)
            thread.start()
            controller.add_event_listener(stream, EventType.STREAM)
            try:
                yield
            finally:
                doomed.put(None)
                thread.join()
