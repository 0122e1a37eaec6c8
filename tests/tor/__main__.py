"""Front end of the private network: `tools/tornet up`, `tools/tornet check`."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import trio

from hpkvfs import tor
from hpkvfs.protocol.identity import Identity
from tests.tor.network import Network, private_network

ECHO = "import socket,sys\ns=socket.create_server(('127.0.0.1',0));print(s.getsockname()[1],flush=True)\nwhile 1:\n c,_=s.accept();c.sendall(c.recv(4096));c.close()"  # noqa: E501


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  tools/tornet check
  tools/tornet up            then, elsewhere: hpkvfs --tor /tmp/tornet-.../client/control ...
""",
)
def main() -> None:
    """A private Tor network on this machine: a directory, relays, a bridge, two ends.

    Its TCP is in a network namespace of its own where that is allowed (root, with `ip`).
    """


@main.command()
def up() -> None:
    """Start it, tell where it is, and end it on Ctrl-C."""
    click.echo("tornet: starting, which takes about 12 s", err=True)
    with private_network() as network:
        where = network.inside([])
        click.echo(f"client's control socket:   {network.control('client')}")
        click.echo(f"client's SOCKS socket:     {network.socks}")
        click.echo(f"service's control socket:  {network.control('service')}")
        click.echo(f"run a server in it with:   {' '.join(where)} hpkvd serve" if where else "")
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


@main.command()
def check() -> None:
    """Start it, publish an onion service, send a message through it, end it."""
    start = time.monotonic()
    with private_network() as network:
        where = "a network namespace of its own" if network.namespace else "this machine's loopback"
        click.echo(f"tornet: up after {time.monotonic() - start:.1f} s, on {where}")
        trio.run(_check, network)
    click.echo(f"tornet: an echo came back after {time.monotonic() - start:.1f} s")


async def _check(network: Network) -> None:
    echo = subprocess.Popen(
        network.inside([sys.executable, "-c", ECHO]), stdout=subprocess.PIPE, text=True
    )
    try:
        assert echo.stdout is not None
        port = int(echo.stdout.readline())
        async with tor.running(network.control("service"), Path("/nonexistent")) as service:
            onion = tor.Onion(80, f"127.0.0.1:{port}", Identity(secrets.token_bytes(32)).expanded())
            name = await service.publish(onion)
            stream = await trio.open_unix_socket(str(network.socks))
            await stream.send_all(b"\5\1\0")
            await stream.receive_some(2)
            host = name.encode()
            await stream.send_all(b"\5\1\0\3" + bytes([len(host)]) + host + b"\0\x50hello")
            said = b""
            while not said.endswith(b"hello"):
                part = await stream.receive_some(4096)
                if not part:
                    raise click.ClickException(f"no echo came back, but {said!r}")
                said += part
    finally:
        echo.kill()
        echo.communicate()


if __name__ == "__main__":
    main(prog_name="tools/tornet")
