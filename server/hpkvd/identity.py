"""The server's identity on disk: DATA/identity, the 32-byte seed of its ed25519 key, mode 0600.

It signs what clients are told of the epochs, and it is the key of the onion service. Who has it
can be this server to everybody; without it the address is lost, and every client with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpkvd import files
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.identity import IDENTITY_SIZE, Identity


class IdentityError(Exception):
    """There is no identity to use; the message says why and what to do."""


def create(path: Path, rng: Callable[[int], bytes]) -> None:
    """Make a new identity, durably; OSError, also if there is one."""
    files.write_new(path, rng(IDENTITY_SIZE))
    files.sync(path.parent)


def load(path: Path) -> Identity:
    """The identity of a data directory; IdentityError."""
    try:
        return Identity(path.read_bytes())
    except (OSError, Malformed) as error:
        raise IdentityError(
            f"the server's identity, {path}, cannot be read; restore it from a backup"
        ) from error
