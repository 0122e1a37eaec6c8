"""A paid request before it is asked for, and what came of it: values, without any I/O.

    Order --of an epoch, with inputs--> Task --a Prover's Draft--> Attempt --asked--> Answer

An Attempt (wallet/wallet.py) has all that it takes to use the answer, and is what the journal
keeps; net/till.py sees to that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from hpkvfs.protocol.credential import Credential, Draft, IssuerParameters, Statement
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import CredentialedRequest
from hpkvfs.protocol.tariff import Operation
from hpkvfs.wallet.wallet import Attempt, Held

Make: TypeAlias = Callable[[bytes], CredentialedRequest]
Complete: TypeAlias = Callable[[CredentialedRequest, bytes], CredentialedRequest]


def add_credentials(request: CredentialedRequest, credentials: bytes) -> CredentialedRequest:
    """The request with what is presented and asked for; what `complete` does if nothing else."""
    return replace(request, credentials=credentials)


@dataclass(frozen=True, slots=True)
class Order:
    """What to ask for: `make` a request of an epoch, `complete` it with its credentials.

    `memo`, `place`: see wallet.Pending.
    """

    operation: Operation
    make: Make
    complete: Complete = add_credentials
    memo: bytes = b""
    place: bytes = b""


@dataclass(frozen=True, slots=True)
class Task:
    """A request to be proved: it presents these, and asks for two credentials of these amounts.

    `into`: the epoch of what it asks for, None if that is the epoch of what it presents.
    """

    request: CredentialedRequest
    statement: Statement
    epoch: EpochParameters
    presented: tuple[Credential, ...]
    amounts: tuple[int, int]
    into: EpochParameters | None

    @classmethod
    def of(
        cls,
        epoch: EpochParameters,
        request: CredentialedRequest,
        inputs: tuple[Held, ...],
        amounts: tuple[int, int],
        into: EpochParameters | None = None,
    ) -> Task:
        """What there is to prove of a request that presents `inputs`."""
        presented = tuple(held.credential for held in inputs)
        return cls(request, request.statement(epoch.tariff), epoch, presented, amounts, into)

    @property
    def arguments(
        self,
    ) -> tuple[
        IssuerParameters,
        Statement,
        tuple[Credential, ...],
        tuple[int, int],
        IssuerParameters | None,
    ]:
        """What Prover.prepare takes."""
        into = self.into.issuer if self.into else None
        return self.epoch.issuer, self.statement, self.presented, self.amounts, into

    def attempt(self, draft: Draft, complete: Complete = add_credentials) -> Attempt:
        """What leaves, with its proof, and what it takes to use the answer."""
        about, body = self.statement, complete(self.request, draft.request).body()
        return Attempt(
            about.operation,
            about.delta,
            hashlib.sha256(body).digest(),
            draft.encode(),
            body,
            self.into.digest if self.into else b"",
            draft,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Which attempt was performed, and the blob if it was a look-up that found one."""

    attempt: Attempt
    value: bytes | None = None
