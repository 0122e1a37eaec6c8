"""How a vault is used: what a mount's options say, and their defaults."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """How a vault is used.

    memory: bytes that the process is to get by with; the caches of nodes and extents take three
    eighths of it, changes that wait to be published a quarter at most, the interpreter and what is
    under way the rest;
    publish_interval: seconds from the first change to a new generation; remote_durability:
    fsync waits for the server; log_limit: bytes of changes, those of names and attributes too,
    that may wait in the log to be published; patience: seconds to try each request; spread:
    seconds over which each step of a publication is drawn out;
    snapshots_shown: they are readable under `.snapshots` in the root directory.

    read_only: publish nothing, look every follow_interval seconds for what another client did;
    takeover: go on from what another client wrote; kept: the number of a copy of changes that
    did not fit it, to be read only.

    helpers: processes for proofs; without any they are made on the thread that does all else.
    """

    publish_interval: float = 10.0
    remote_durability: bool = False
    cache_bytes: int = 1024 * MIB
    memory: int = 256 * MIB
    log_limit: int = 1024 * MIB
    patience: float | None = None
    spread: float = 0.0
    snapshots_shown: bool = True
    read_only: bool = False
    follow_interval: float = 60.0
    takeover: bool = False
    kept: int | None = None
    helpers: int = 0

    @property
    def caches(self) -> int:
        """Bytes of nodes and extents to keep."""
        return self.memory * 3 // 8

    @property
    def follows(self) -> bool:
        """Whether it goes on to what other clients publish while it is in use."""
        return self.read_only and self.kept is None
