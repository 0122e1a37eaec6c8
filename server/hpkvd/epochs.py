"""Epochs on disk: whose credentials this server issues and accepts.

    DATA/epochs/<number>.parameters   public: EpochParameters.encode()
    DATA/epochs/<number>.secret       Issuer.to_bytes(), mode 0600

Each epoch's parameters name the hash of the preceding one's, so that clients can notice a
server that shows different ones to different people. The secret signs money: who reads it can
mint tokens, though not find out who spent which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from hpkvd import files
from hpkvfs.protocol.credential import Issuer
from hpkvfs.protocol.epoch import NO_EPOCH, EpochParameters
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.messages import Parameters
from hpkvfs.protocol.tariff import Tariff

FIRST: Final = 1


class EpochError(Exception):
    """The epochs on disk cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """An issuer's secret key, and what is public of the time in which it is used."""

    parameters: EpochParameters
    issuer: Issuer = field(repr=False)

    @property
    def number(self) -> int:
        """1 for a server's first epoch."""
        return self.parameters.number

    @property
    def tariff(self) -> Tariff:
        """What each operation costs in this epoch."""
        return self.parameters.tariff


class Epochs:
    """The epochs in use, in order; at least one."""

    def __init__(self, epochs: Sequence[Epoch], identity: Identity) -> None:
        if not epochs:
            raise ValueError("a server has at least one epoch")
        self._by_digest = {epoch.parameters.digest: epoch for epoch in epochs}
        self.newest = epochs[-1]
        digests = tuple(self._by_digest)
        self._told = {
            epoch.parameters.digest: Parameters.signed(epoch.parameters.encode(), digests, identity)
            for epoch in epochs
        }

    def tell(self, digest: bytes | None) -> Parameters | None:
        """What clients are told of an epoch in use (None: the newest), signed."""
        return self._told.get(digest or self.newest.parameters.digest)

    def find(self, digest: bytes) -> Epoch | None:
        """The epoch whose parameters have this hash, if it is in use."""
        return self._by_digest.get(digest)


def first_epoch(tariff: Tariff, rng: Callable[[int], bytes]) -> Epoch:
    """A server's first epoch, with a new issuer."""
    issuer = Issuer.generate(rng)
    return Epoch(EpochParameters(FIRST, tariff, issuer.parameters, NO_EPOCH), issuer)


def save(directory: Path, epoch: Epoch) -> None:
    """Write an epoch, durably; OSError, also if it is there already."""
    directory.mkdir(mode=0o700, exist_ok=True)
    files.write_new(_secret_path(directory, epoch.number), epoch.issuer.to_bytes())
    files.write_new(_parameters_path(directory, epoch.number), epoch.parameters.encode())
    files.sync(directory)


def load(directory: Path, identity: Identity) -> Epochs:
    """Every epoch in the directory; EpochError unless they form one chain."""
    numbers = sorted(int(path.stem) for path in directory.glob("*.parameters"))
    if not numbers:
        raise EpochError(f"there is no epoch in {directory}; run `hpkvd init` first")
    epochs = [_load_one(directory, number) for number in numbers]
    for before, after in pairwise(epochs):
        if not after.parameters.follows(before.parameters):
            raise EpochError(
                f"epoch {after.number} in {directory} does not follow epoch {before.number};"
                " restore the directory from a backup"
            )
    return Epochs(epochs, identity)


def _load_one(directory: Path, number: int) -> Epoch:
    try:
        encoded = _parameters_path(directory, number).read_bytes()
        secret = _secret_path(directory, number).read_bytes()
        parameters, issuer = EpochParameters.decode(encoded), Issuer.from_bytes(secret)
    except (OSError, ProtocolError, ValueError) as error:
        raise EpochError(
            f"epoch {number} in {directory} cannot be read; restore it from a backup"
        ) from error
    if parameters.number != number or parameters.issuer != issuer.parameters:
        raise EpochError(
            f"the secret of epoch {number} in {directory} is not that of its parameters;"
            " restore both from one backup"
        )
    return Epoch(parameters, issuer)


def _parameters_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.parameters"


def _secret_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.secret"
