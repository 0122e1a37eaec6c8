"""Where a server is: an onion service, or a server on this machine.

An onion address of version 3 (rend-spec-v3, "Encoding onion addresses") is the server's public
key with a checksum, so that nobody else can answer for it, and a wrong letter shows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Final

from hpkvfs.errors import UserError

DEFAULT_PORT: Final = 7387
DEFAULT_SERVER: Final = f"127.0.0.1:{DEFAULT_PORT}"
_ONION: Final = ".onion"
_ONION_VERSION: Final = b"\3"


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name or number) and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """HOST:PORT or [IPV6]:PORT, or ....onion, with a port or without; UserError."""
        if text.lower().endswith(_ONION):
            text = f"{text}:{DEFAULT_PORT}"
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
            raise UserError(f"not a server's address: {text}", f"write it as {DEFAULT_SERVER}")
        if host.lower().endswith(_ONION):
            host = host.lower()
            _onion_key(host)
        return cls(host, int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def identity(self) -> bytes | None:
        """The 32-byte ed25519 key that an onion address is; None for other addresses."""
        return _onion_key(self.host) if self.is_onion else None

    @property
    def is_onion(self) -> bool:
        """Whether it is reached through Tor, and only so."""
        return self.host.endswith(_ONION)

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine, so that nobody sees who talks to it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def check_private(self, insecure_direct: bool) -> None:
        """UserError when talking to it would tell it, and the network, who the client is."""
        if not (self.is_onion or self.is_loopback or insecure_direct):
            raise UserError(
                f"a direct connection to {self.host} would show it your address",
                "use the server's .onion address, or give --insecure-direct",
            )


def onion_host(identity: bytes) -> str:
    """The onion address that a 32-byte ed25519 key is: 56 letters and digits and `.onion`."""
    label = base64.b32encode(identity + _checksum(identity) + _ONION_VERSION)
    return label.decode().lower() + _ONION


def _onion_key(host: str) -> bytes:
    label = host.removesuffix(_ONION).rpartition(".")[2]
    try:
        raw = base64.b32decode(label.upper())
    except (binascii.Error, ValueError):
        raw = b""
    identity, checksum, version = raw[:32], raw[32:34], raw[34:]
    if version != _ONION_VERSION or checksum != _checksum(identity):
        raise UserError(
            f"not an onion address: {host}", "a letter is wrong or missing; copy it again"
        )
    return identity


def _checksum(identity: bytes) -> bytes:
    return hashlib.sha3_256(b".onion checksum" + identity + _ONION_VERSION).digest()[:2]
