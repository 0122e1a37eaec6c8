"""`hpkvd serve --onion` through the private network."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

from hpkvd import config, identity
from hpkvfs.address import onion_host
from hpkvfs.protocol.codec import REPLY_SIZE
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import Parameters, ParametersRequest, decode_reply
from tests.server.support import hpkvd, read_all
from tests.tor.network import Network

SECONDS = 60


def told(network: Network, host: str) -> Parameters | None:
    """What the server behind an onion address says of its epochs; None if it is not reached."""
    user = secrets.token_hex(16).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(20)
        try:
            stream.connect(str(network.socks))
            stream.sendall(b"\5\1\2")
            assert stream.recv(2) == b"\5\2"
            stream.sendall(b"\1" + 2 * (bytes([len(user)]) + user))
            assert stream.recv(2) == b"\1\0"
            name = host.encode()
            stream.sendall(b"\5\1\0\3" + bytes([len(name)]) + name + (7387).to_bytes(2, "big"))
            code, kind = stream.recv(4)[1::2]
            stream.recv(16 + 2 if kind == 4 else 4 + 2)  # the address and port it is bound to
            if code:
                return None
            stream.sendall(ParametersRequest().encode())
            reply = decode_reply(read_all(stream)[:REPLY_SIZE])
        except (OSError, Malformed):
            return None
    assert isinstance(reply, Parameters)
    return reply


def eventually(network: Network, host: str) -> Parameters:
    deadline = time.monotonic() + SECONDS
    while (reply := told(network, host)) is None:
        assert time.monotonic() < deadline, "the onion service is not reached"
        time.sleep(0.3)
    return reply


def test_a_server_publishes_its_identity_and_again_when_tor_was_killed(
    network: Network, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    assert hpkvd("init", data=data).returncode == 0
    public = identity.load(data / config.IDENTITY).public
    host = onion_host(public)
    command = [sys.executable, "-m", "hpkvd", "serve", "--data", str(data), "--onion"]
    command += ["--listen", f"unix:{tmp_path / 's'}", "--workers", "0"]
    command += ["--tor", str(network.control("service"))]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("hpkvd: listening on")
        assert server.stdout.readline() == f"hpkvd: onion service at {host}:7387\n"
        reply = eventually(network, host)
        assert reply.identity == public and reply.is_genuine
        network.kill("service")
        network.start("service")
        network.wait_until_up("service")
        assert eventually(network, host) == reply
    finally:
        server.terminate()
        server.communicate(timeout=20)
