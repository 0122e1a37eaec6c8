"""A server's identity: RFC 8032's signatures, one meaning for each, and fixed bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import tagged_hash
from hpkvfs.protocol.identity import Identity, verify
from hpkvfs.protocol.messages import Parameters, decode_reply
from tests.protocol import vectors
from tests.protocol.parties import epoch

VECTORS = vectors.frozen_identity()
SEED = bytes.fromhex(VECTORS["seed"])


def told() -> Parameters:
    return vectors.told(SEED)


def test_the_public_key_is_that_of_rfc_8032() -> None:
    """Section 7.1, test 1."""
    assert Identity(SEED).public.hex() == VECTORS["public"]


def test_what_tor_is_given_is_clamped() -> None:
    expanded = Identity(SEED).expanded()
    assert expanded.hex() == VECTORS["expanded"]
    assert expanded[0] & 7 == 0 and expanded[31] >> 6 == 1
    assert expanded[32:] == hashlib.sha512(SEED).digest()[32:]


def test_the_signed_bytes_are_documented() -> None:
    message = b"hpkv/parameters/v1\0" + tagged_hash("hpkv/epoch/v1", epoch().encode())
    message += bytes(32) + epoch().digest
    assert message.hex() == VECTORS["signed"]
    assert told().signature.hex() == VECTORS["signature"]
    frame = told().encode()
    assert hashlib.sha256(frame).hexdigest() == VECTORS["frame_sha256"]
    assert decode_reply(frame) == told() and told().is_genuine


@pytest.mark.parametrize(
    "altered",
    [
        {"parameters": b"other" * 1_700},
        {"digests": (epoch().digest,)},
        {"digests": (epoch().digest, bytes(32))},
        {"identity": Identity(bytes(32)).public},
        {"identity": b"\xff" * 32},
        {"signature": bytes(64)},
    ],
)
def test_a_signature_covers_everything(altered: dict[str, object]) -> None:
    assert not replace(told(), **altered).is_genuine  # type: ignore[arg-type]


def test_a_signature_in_one_domain_is_none_in_another() -> None:
    identity = Identity(SEED)
    signature = identity.sign("hpkv/parameters/v1", b"message")
    assert verify(identity.public, "hpkv/parameters/v1", b"message", signature)
    assert not verify(identity.public, "hpkv/parameters/v", b"1\0message", signature)
    assert not verify(identity.public, "hpkv/else/v1", b"message", signature)


def test_an_identity_has_32_bytes_and_tells_nothing() -> None:
    with pytest.raises(Malformed):
        Identity(bytes(31))
    assert SEED.hex() not in repr(Identity(SEED)) and repr(SEED) not in repr(Identity(SEED))
