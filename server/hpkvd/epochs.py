"""Epochs on disk: whose credentials this server issues and accepts.

    DATA/epochs/<number>.parameters   public: EpochParameters.encode()
    DATA/epochs/<number>.secret       Issuer.to_bytes(), mode 0600

Each epoch's parameters name the hash of the preceding one's, so that clients can notice a
server that shows different ones to different people. Parameters are written once and kept for
ever, also those of ended epochs. The secret signs money: who reads it can mint tokens, though not
find out who spent which. It is removed when its epoch has ended.

Several servers on one ledger have the same epochs: each begins one only if the ledger gives it
the number (`rotate`), and serves only while it has the newest (`check`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

from hpkvd import files
from hpkvd.ledger import NewestEpoch
from hpkvfs.protocol.credential import Issuer
from hpkvfs.protocol.epoch import NO_EPOCH, EpochParameters
from hpkvfs.protocol.errors import ProtocolError
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.messages import Parameters
from hpkvfs.protocol.tariff import Tariff

FIRST: Final = 1

Rng: TypeAlias = Callable[[int], bytes]
Claim: TypeAlias = Callable[[NewestEpoch], NewestEpoch]


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


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many epochs can be presented, the newest included; days from one to the next, while
    serving; 0 for none but by command."""

    keep: int = 4
    days: float = 90.0


class Epochs:
    """The epochs in use, in order, at least one; and those that ended, of which only the public
    parameters are left."""

    def __init__(
        self,
        epochs: Sequence[Epoch],
        identity: Identity,
        ended: Sequence[EpochParameters] = (),
    ) -> None:
        if not epochs:
            raise ValueError("a server has at least one epoch")
        self._by_digest = {epoch.parameters.digest: epoch for epoch in epochs}
        self._ended = {parameters.digest for parameters in ended}
        self.all = tuple(epochs)
        self.oldest, self.newest = epochs[0], epochs[-1]
        digests = tuple(self._by_digest)
        self._told = {
            one.digest: Parameters.signed(one.encode(), digests, identity)
            for one in (*ended, *(epoch.parameters for epoch in epochs))
        }

    def tell(self, digest: bytes | None) -> Parameters | None:
        """What clients are told of an epoch (None: the newest), signed; also of ended ones, so
        that the chain of hashes can be followed."""
        return self._told.get(digest or self.newest.parameters.digest)

    def find(self, digest: bytes) -> Epoch | None:
        """The epoch whose parameters have this hash, if it is in use."""
        return self._by_digest.get(digest)

    def has_ended(self, digest: bytes) -> bool:
        """Whether this was one of ours."""
        return digest in self._ended


def first_epoch(tariff: Tariff, rng: Rng) -> Epoch:
    """A server's first epoch, with a new issuer."""
    issuer = Issuer.generate(rng)
    return Epoch(EpochParameters(FIRST, tariff, issuer.parameters, NO_EPOCH), issuer)


def next_epoch(before: EpochParameters, tariff: Tariff, rng: Rng) -> Epoch:
    """The epoch after another, with a new issuer."""
    issuer = Issuer.generate(rng)
    parameters = EpochParameters(before.number + 1, tariff, issuer.parameters, before.digest)
    return Epoch(parameters, issuer)


def save(directory: Path, epoch: Epoch) -> None:
    """Write an epoch, durably; OSError, also if it is there already."""
    directory.mkdir(mode=0o700, exist_ok=True)
    _prepare(directory, epoch)
    files.publish(_parameters_path(directory, epoch.number))


def _prepare(directory: Path, epoch: Epoch) -> None:
    """Everything but its being there.

    The parameters come last, and in one step: from then on the epoch is there, and its parameters
    are never written again. A secret without parameters was never used.
    """
    path = _parameters_path(directory, epoch.number)
    if path.exists():
        raise FileExistsError(f"epoch {epoch.number} exists already")
    _secret_path(directory, epoch.number).unlink(missing_ok=True)
    files.write_new(_secret_path(directory, epoch.number), epoch.issuer.to_bytes())
    files.prepare(path, epoch.parameters.encode())


def _prepared(directory: Path, number: int) -> Epoch | None:
    """An epoch of which everything was written but its being there."""
    try:
        content = files.prepared(_parameters_path(directory, number)).read_bytes()
        return _with_secret(directory, EpochParameters.decode(content))
    except (OSError, ProtocolError, EpochError):
        return None


def rotate(
    directory: Path,
    tariff: Tariff,
    rng: Rng,
    oldest: int,
    claim: Claim,
    after: int | None = None,
) -> Epoch | None:
    """Begin the next epoch, durably; a running server takes it up. EpochError, OSError.

    `oldest`: number of the oldest epoch that can still be presented then. `claim`: see `check`.
    None if `after` is given and not the newest epoch: somebody else was quicker.

    It is claimed after it is on the disk and before it is there, so that who died between the two
    goes on with the very epoch that was claimed.
    """
    with files.locked(directory):
        chain = published(directory)
        number = chain[-1].number + 1
        if after is not None and chain[-1].number != after:
            return None
        check(directory, chain[-1], claim, interrupted=True)
        epoch = _prepared(directory, number)
        if epoch is None or not _is_ours(epoch.parameters, claim(_newest(chain[-1]))):
            for one in chain:
                if one.number >= oldest:
                    _check_refund(tariff, one)
            epoch = next_epoch(chain[-1], tariff, rng)
            _prepare(directory, epoch)
        if not _is_ours(epoch.parameters, claim(_newest(epoch.parameters))):
            raise _begun_elsewhere(directory, number)
        files.publish(_parameters_path(directory, number))
    return epoch


def check(
    directory: Path, newest: EpochParameters, claim: Claim, *, interrupted: bool = False
) -> None:
    """EpochError unless the newest epoch here is the newest of all servers on the ledger.

    `claim` is the ledger's `claim_epoch`. `interrupted`: or one that was claimed here, and is not
    there because whoever began it died.
    """
    there = claim(_newest(newest))
    if _is_ours(newest, there):
        return
    if there.number == newest.number + 1:
        left = _prepared(directory, there.number)
        if left is not None and _is_ours(left.parameters, there):
            if interrupted:
                return
            raise EpochError(
                f"beginning epoch {there.number} was cut short; run `hpkvd epoch rotate` to its end"
            )
    raise _begun_elsewhere(directory, there.number)


def _begun_elsewhere(directory: Path, number: int) -> EpochError:
    return EpochError(
        f"another server on this ledger began epoch {number}, which is not in {directory}; copy"
        " that directory from the server that has it"
    )


def _newest(parameters: EpochParameters) -> NewestEpoch:
    return NewestEpoch.of(parameters.number, parameters.digest)


def _is_ours(parameters: EpochParameters, there: NewestEpoch) -> bool:
    return _newest(parameters) == there


def _check_refund(tariff: Tariff, other: EpochParameters) -> None:
    """Who inserts in one epoch and deletes in another must not gain by it, again and again."""
    if tariff.refund >= other.tariff.insert:
        raise EpochError(
            f"a refund of {tariff.refund} would pay back more than epoch {other.number}, which can"
            f" still be presented, takes for an insert ({other.tariff.insert}); raise the refund"
            " after that has ended"
        )
    if other.tariff.refund >= tariff.insert:
        raise EpochError(
            f"an insert for {tariff.insert} would cost less than epoch {other.number}, which can"
            f" still be presented, pays back ({other.tariff.refund}); lower the refund first"
        )


def published(directory: Path) -> list[EpochParameters]:
    """The parameters of every epoch there ever was; EpochError unless they form one chain."""
    chain = [_parameters(directory, number) for number in _numbers(directory)]
    for before, after in pairwise(chain):
        if not after.follows(before):
            raise EpochError(
                f"epoch {after.number} in {directory} does not follow epoch {before.number};"
                " restore the directory from a backup"
            )
    return chain


def load(directory: Path, identity: Identity, keep: int, oldest: int = 0) -> Epochs:
    """The newest `keep` epochs from number `oldest` on; EpochError unless all form one chain."""
    chain = published(directory)
    oldest = oldest_kept(chain[-1].number, keep, oldest)
    live = [_with_secret(directory, one) for one in chain if one.number >= oldest]
    return Epochs(live, identity, [one for one in chain if one.number < oldest])


def oldest_kept(newest: int, keep: int, oldest: int) -> int:
    """Number of the oldest epoch that can be presented, where `oldest` and later ones may be."""
    return min(max(oldest, newest - keep + 1), newest)


def newest_number(directory: Path) -> int:
    """Number of the newest epoch; EpochError if there is none."""
    return _numbers(directory)[-1]


def began(directory: Path, number: int) -> float:
    """When an epoch began, in seconds since 1970: the age of its file, which a copy may change."""
    return _parameters_path(directory, number).stat().st_mtime


def forget(directory: Path, oldest: int) -> None:
    """Remove the secrets of the epochs below this one. Their parameters stay."""
    for path in directory.glob("*.secret"):
        if int(path.stem) < oldest:
            path.unlink(missing_ok=True)
    files.sync(directory)


def _numbers(directory: Path) -> list[int]:
    numbers = sorted(int(path.stem) for path in directory.glob("*.parameters"))
    if not numbers:
        raise EpochError(f"there is no epoch in {directory}; run `hpkvd init` first")
    return numbers


def _parameters(directory: Path, number: int) -> EpochParameters:
    try:
        parameters = EpochParameters.decode(_parameters_path(directory, number).read_bytes())
    except (OSError, ProtocolError) as error:
        raise _unreadable(directory, number) from error
    if parameters.number != number:
        raise _unreadable(directory, number)
    return parameters


def _with_secret(directory: Path, parameters: EpochParameters) -> Epoch:
    number = parameters.number
    try:
        issuer = Issuer.from_bytes(_secret_path(directory, number).read_bytes())
    except (OSError, ProtocolError) as error:
        raise _unreadable(directory, number) from error
    if parameters.issuer != issuer.parameters:
        raise EpochError(
            f"the secret of epoch {number} in {directory} is not that of its parameters;"
            " restore both from one backup"
        )
    return Epoch(parameters, issuer)


def _unreadable(directory: Path, number: int) -> EpochError:
    return EpochError(f"epoch {number} in {directory} cannot be read; restore it from a backup")


def _parameters_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.parameters"


def _secret_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.secret"
