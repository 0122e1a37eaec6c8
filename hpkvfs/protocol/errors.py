"""What can be wrong with the other side's bytes. A leaf: imports nothing of ours."""

from __future__ import annotations


class ProtocolError(Exception):
    """The other side did not keep to the protocol."""


class Malformed(ProtocolError):
    """An encoding was refused: wrong length, bad point, non-canonical scalar, and the like."""


class BadProof(ProtocolError):
    """Issuer: a client's proof does not hold. Nothing was issued, nothing may be spent."""


class BadIssuance(ProtocolError):
    """Client: an issuer's parameters or reply do not hold, so its credentials are worthless."""
