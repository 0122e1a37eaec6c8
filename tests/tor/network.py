"""A Tor network of six processes on this machine, for tests and benchmarks: `tools/tornet`.

    a0        directory authority and relay
    r0, r1    relays
    b0        bridge: the way in, so that there are enough relays for six hops
    client    the tor that an hpkvfs under test uses
    service   the tor that publishes the server's onion service

Everything is reached through Unix sockets (control ports, the client's SOCKS port), so that
whoever uses the network need not be where its TCP is. Where that is allowed (root, and `ip`),
its TCP is in a network namespace of its own that holds loopback only, with quick ACKs: delayed
ones cost 30 times the throughput. Elsewhere it works, slower.

Why each option is there: tor-manual(1), "TESTING NETWORK OPTIONS". It takes about 11 s: the
authority is told to vote as soon as it knows every relay, and its consensus is handed to
client and service instead of waiting for them to ask.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import stem
from stem.control import Controller
from stem.util import log as stem_log

from tests.ports import own_port

SECONDS_TO_START: Final = 60.0
VOTING: Final = 1800
RELAYS: Final = ("a0", "r0", "r1", "b0")
CACHED: Final = ("cached-certs", "cached-microdesc-consensus", "cached-microdescs.new")
ENDS: Final = ("client", "service")

_COMMON: Final = """\
TestingTorNetwork 1
DirAuthority a0 orport={or_port} no-v2 v3ident={v3_identity} 127.0.0.1:{dir_port} {fingerprint}
DataDirectory {data}
Schedulers Vanilla
NumCPUs 1
GeoIPFile /dev/null
GeoIPv6File /dev/null
__OwningControllerProcess {owner}
Log notice file {data}/notices
ControlSocket {data}/control
CookieAuthentication 1
"""
_RELAY: Final = """\
SocksPort 0
Address 127.0.0.1
AssumeReachable 1
ExitRelay 0
"""
_AUTHORITY: Final = """\
ORPort 127.0.0.1:{or_port}
DirPort 127.0.0.1:{dir_port}
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
TestingV3AuthInitialVotingInterval {voting}
TestingV3AuthInitialVoteDelay 2
TestingV3AuthInitialDistDelay 2
V3AuthVotingInterval {voting}
"""
_BRIDGE: Final = """\
ORPort 127.0.0.1:{bridge_port}
BridgeRelay 1
PublishServerDescriptor 0
"""
_END: Final = """\
UseBridges 1
Bridge 127.0.0.1:{bridge_port}
LearnCircuitBuildTimeout 0
CircuitBuildTimeout 30
CircuitPadding 0
"""


_SHARED: Final = (
    "TestingTorNetwork", "DirAuthority", "GeoIPFile", "GeoIPv6File", "UseBridges", "Bridge",
    "LearnCircuitBuildTimeout", "CircuitBuildTimeout", "CircuitPadding",
)  # fmt: skip


class Namespace:
    """A network namespace with nothing in it but loopback, as long as this process lives."""

    def __init__(self, *, loopback: bool = True) -> None:
        """RuntimeError where that is not allowed. Without `loopback` nothing can be reached."""
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _SET_UP if loopback else "echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"up\n":
            self.close()
            raise RuntimeError("no network namespace can be made here")

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs this one in the namespace."""
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", "--", *command]

    def close(self) -> None:
        """Nothing new can enter; it ends with the last process in it."""
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(10)


_SET_UP: Final = """\
set -e
ip link set lo up
for net in 127.0.0.0/8 127.0.0.1; do
    ip route replace local $net dev lo table local proto kernel scope host src 127.0.0.1 quickack 1
done
echo up
exec cat
"""


@dataclass
class Network:
    """The processes. `control(name)` and `socks` are where it is reached."""

    base: Path
    namespace: Namespace | None
    life: subprocess.Popen[bytes]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    values: dict[str, object] = field(default_factory=dict)

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs this one where the network's TCP is."""
        return self.namespace.inside(command) if self.namespace else list(command)

    def control(self, name: str) -> Path:
        """A process's control socket; its cookie lets in who may read it."""
        return self.base / name / "control"

    @property
    def socks(self) -> Path:
        """The client's SOCKS socket."""
        return self.base / "client" / "socks"

    @contextlib.contextmanager
    def controller(self, name: str | Path) -> Iterator[Controller]:
        """An authenticated control connection, also to a socket; OSError, stem.ControllerError."""
        path = str(name if isinstance(name, Path) else self.control(name))
        with socket.socket(socket.AF_UNIX) as probe:  # stem leaks one that can't be connected
            probe.connect(path)
        with Controller.from_socket_file(path) as controller:
            controller.authenticate()
            yield controller

    def settings(self, name: str) -> str:
        """What of a process's settings makes it one of this network."""
        lines = self._torrc(name).read_text().splitlines(keepends=True)
        return "".join(line for line in lines if line.split()[0] in _SHARED)

    def prepare(self, data: Path, more: str = "") -> None:
        """Have a tor that somebody owns, with its state in `data`, be one of this network."""
        data.mkdir(mode=0o700, exist_ok=True)
        (data / "torrc").write_text(self.settings("client") + more)
        for file in CACHED:
            shutil.copy(self.base / "a0" / file, data / file)

    def start(self, name: str) -> None:
        """Start one of the processes, or start it again."""
        command = self.inside(_tor(self._torrc(name)))
        self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def kill(self, name: str) -> None:
        """As kill -9 would."""
        self.processes[name].kill()
        self.processes[name].wait(10)

    def wait_until_up(self, name: str) -> None:
        """Return when it has circuits."""
        _eventually(self.control(name).exists, f"{name} to start")
        _eventually(lambda: self._phase(name) == "done", f"{name} to bootstrap")

    def _phase(self, name: str) -> str:
        with self.controller(name) as controller:
            said = controller.get_info("status/bootstrap-phase")
        return str(said).partition("TAG=")[2].partition(" ")[0]

    def _torrc(self, name: str) -> Path:
        return self.base / name / "torrc"

    # -- building --------------------------------------------------------------------------

    def build(self) -> None:
        """Make keys and settings, start everything, return when client and service are up."""
        ports = [own_port() for _ in range(3)]
        self.values = dict(zip(("or_port", "dir_port", "bridge_port"), ports, strict=True))
        self.values |= {"owner": self.life.pid, "voting": VOTING}
        for name in (*RELAYS, *ENDS):
            (self.base / name).mkdir(mode=0o700)
        self._make_authority()
        for name in RELAYS:
            self._configure(name)
            self.start(name)
        self._vote()
        for name in ENDS:
            for file in CACHED:
                shutil.copy(self.base / "a0" / file, self.base / name / file)
            self._configure(name)
            self.start(name)
        for name in ENDS:
            self.wait_until_up(name)

    def _make_authority(self) -> None:
        keys = self.base / "a0" / "keys"
        keys.mkdir(mode=0o700)
        subprocess.run(
            ["tor-gencert", "--create-identity-key", "-m", "12", "--passphrase-fd", "0",
             "-a", f"127.0.0.1:{self.values['dir_port']}"],
            cwd=keys, input=b"not a secret\n", check=True, capture_output=True,
        )  # fmt: skip
        certificate = (keys / "authority_certificate").read_text()
        self.values["v3_identity"] = certificate.partition("\nfingerprint ")[2].split()[0]
        listed = subprocess.run(
            [*_tor(self.base / "none"), "--ignore-missing-torrc", "--list-fingerprint",
             "--ORPort", "1", "--Nickname", "a0", "--DataDirectory", str(self.base / "a0")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        _, _, fingerprint = listed.stdout.split("\n")[-2].partition(" ")
        self.values["fingerprint"] = fingerprint.replace(" ", "")

    def _configure(self, name: str) -> None:
        parts = [_COMMON]
        if name in RELAYS:
            parts += [f"Nickname {name}\n", _RELAY]
        if name in ("r0", "r1"):
            parts.append("ORPort 127.0.0.1:auto\n")
        parts += {"a0": [_AUTHORITY], "b0": [_BRIDGE]}.get(name, [])
        if name in ENDS:
            socks = f"unix:{self.socks}" if name == "client" else "0"
            parts += [_END, f"SocksPort {socks}\n"]
        values = {**self.values, "data": self.base / name}
        self._torrc(name).write_text("".join(parts).format_map(values))

    def _vote(self) -> None:
        """Have the authority vote as soon as it knows the relays; wait for its consensus."""
        wanted = len(RELAYS) - 1  # the bridge does not publish itself

        def known() -> int:
            with self.controller("a0") as controller:
                return str(controller.get_info("desc/all-recent")).count("\nrouter-signature")

        _eventually(self.control("a0").exists, "the authority to start")
        _eventually(lambda: known() >= wanted, "the relays to publish themselves")
        with self.controller("a0") as controller:
            offset = (int(time.time()) + 5) % VOTING
            controller.set_conf("TestingV3AuthVotingStartOffset", str(offset))
        files = [self.base / "a0" / name for name in CACHED]
        _eventually(lambda: all(file.exists() for file in files), "a consensus")

    def close(self) -> None:
        """End every process."""
        for process in self.processes.values():
            process.terminate() if process.poll() is None else None
        for process in self.processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        assert self.life.stdin is not None
        self.life.stdin.close()
        self.life.wait(10)
        if self.namespace is not None:
            self.namespace.close()


@contextlib.contextmanager
def private_network(base: Path | None = None) -> Iterator[Network]:
    """A network that is up, for as long as the block runs."""
    stem_log.get_logger().setLevel("CRITICAL")  # it quotes logins
    with contextlib.ExitStack() as stack:
        if base is None:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tornet-")))
        try:
            namespace = Namespace()
        except (OSError, RuntimeError):
            namespace = None
        # Ends with us, and the processes with it. Were it us that they belong to, stem would have
        # them end with its first control connection.
        life = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        network = Network(base, namespace, life)
        stack.callback(network.close)
        network.build()
        yield network


def _tor(torrc: Path) -> list[str]:
    """tor with these settings and no others."""
    return ["tor", "--quiet", "--defaults-torrc", str(torrc.with_name("none")), "-f", str(torrc)]


def _eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        with contextlib.suppress(OSError, stem.ControllerError):  # it is starting
            if condition():
                return
        if time.monotonic() > end:
            raise RuntimeError(f"waited {SECONDS_TO_START:g} s for {what}")
        time.sleep(0.05)
