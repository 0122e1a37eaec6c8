"""An epoch's parameters: what a client must know to pay, and must check before it does.

Invariant: the digest covers everything here and goes into every proof, so that an issuer
which shows two clients different parameters cannot use one's requests as the other's. Each
epoch names its predecessor's digest; a pinned digest thereby pins all of the past.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass, field
from typing import Final

from hpkvfs.protocol.credential import PARAMETERS_SIZE, IssuerParameters
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import tagged_hash
from hpkvfs.protocol.tariff import Tariff

VERSION: Final = 1
DIGEST_SIZE: Final = 32
NO_EPOCH: Final = bytes(DIGEST_SIZE)
"""What the first epoch names as its predecessor."""

_HEADER: Final = struct.Struct(">4sBIIIIIH32s")
_MAGIC: Final = b"hpke"
EPOCH_SIZE: Final = _HEADER.size + PARAMETERS_SIZE


def parameters_digest(encoded: bytes) -> bytes:
    """The 32 bytes by which an epoch is known: a tagged hash of its encoded parameters."""
    return tagged_hash("hpkv/epoch/v1", encoded)


@dataclass(frozen=True, slots=True)
class EpochParameters:
    """Number (u32), tariff, issuer's public key, and digest of the epoch before (32 bytes)."""

    number: int
    tariff: Tariff
    issuer: IssuerParameters
    previous: bytes
    encoded: bytes = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.number < 2**32:
            raise ValueError(f"an epoch cannot have number {self.number}")
        if len(self.previous) != DIGEST_SIZE:
            raise ValueError(f"a digest has {DIGEST_SIZE} bytes, not {len(self.previous)}")
        encoded = self._header() + self.issuer.encoded
        object.__setattr__(self, "encoded", encoded)
        object.__setattr__(self, "digest", parameters_digest(encoded))

    def _header(self) -> bytes:
        tariff = astuple(self.tariff)
        return _HEADER.pack(_MAGIC, VERSION, self.number, *tariff, self.previous)

    def encode(self) -> bytes:
        """EPOCH_SIZE bytes: magic "hpke", version, u32 number, four u32 prices (look-up, insert,
        refund, entry), u16 hours that an entry stays open, previous, issuer."""
        return self.encoded

    @classmethod
    def decode(cls, encoded: bytes) -> EpochParameters:
        """Inverse of encode; Malformed for anything else. Call verify() before use."""
        if len(encoded) != EPOCH_SIZE:
            raise Malformed(f"epoch parameters have {EPOCH_SIZE} bytes, not {len(encoded)}")
        magic, version, number, *tariff_fields, previous = _HEADER.unpack_from(encoded)
        if (magic, version) != (_MAGIC, VERSION):
            raise Malformed("not the parameters of an epoch in this version")
        try:
            tariff = Tariff(*tariff_fields)
        except ValueError as error:
            raise Malformed(str(error)) from error
        issuer = IssuerParameters.decode(encoded[_HEADER.size :])
        return cls(number, tariff, issuer, previous)

    def verify(self) -> None:
        """The client's check of the issuer's digit table; BadIssuance if it is false. Cached."""
        self.issuer.verify()

    def follows(self, older: EpochParameters) -> bool:
        """Whether this epoch names `older` as the one before it."""
        return self.previous == older.digest and self.number == older.number + 1
