"""Where a server is. Without Tor, only a server on this machine is talked to."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from hpkvfs.errors import UserError

DEFAULT_SERVER: Final = "127.0.0.1:7387"


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name or number) and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """HOST:PORT or [IPV6]:PORT; UserError."""
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
            raise UserError(f"not a server's address: {text}", f"write it as {DEFAULT_SERVER}")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine, so that nobody sees who talks to it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def check_private(self, insecure_direct: bool) -> None:
        """UserError when talking to it would tell it, and the network, who the client is."""
        if not (insecure_direct or self.is_loopback):
            raise UserError(
                f"a direct connection to {self.host} would show it your address",
                "use a server on this machine until Tor is supported, or give --insecure-direct",
            )
