"""tests/vectors/credentials.json: what no version of the code may change.

`generators`, `key` and `bip340` come from elsewhere (the reference implementation of WabiSabi,
arithmetic with small numbers, BIP340). `exchange` and `move` froze our own
transcripts, and identity.json what a server signs; after a deliberate change of the protocol,
`python -m tests.protocol.vectors` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from hpkvfs.protocol.credential import parse, prepare
from hpkvfs.protocol.identity import Identity
from hpkvfs.protocol.messages import Parameters
from hpkvfs.protocol.tariff import Operation
from tests.protocol.parties import (
    Stream,
    epoch,
    issuer,
    next_epoch,
    next_issuer,
    parameters,
    purse,
    settle,
    statement,
)

PATH = Path(__file__).parents[1] / "vectors" / "credentials.json"
IDENTITY_PATH = PATH.with_name("identity.json")


@cache
def frozen() -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(PATH.read_text())
    return contents


def exchange() -> dict[str, str]:
    """An insertion paid from the purse, in hexadecimal; long public values as SHA-256."""
    about = statement(Operation.INSERT, b"key and digest of a blob")
    draft, request, reply = settle(about, purse(), (495, 495), Stream("exchange"))
    first, second = draft.finish(parameters(), reply)
    return {
        "issuer": issuer().to_bytes().hex(),
        "epoch_sha256": hashlib.sha256(epoch().encode()).hexdigest(),
        "epoch_digest": epoch().digest.hex(),
        "presented": " ".join(c.encode().hex() for c in purse()),
        "context": about.context.hex(),
        "request": request.encoded.hex(),
        "draft": draft.encode().hex(),
        "reply": reply.hex(),
        "issued": f"{first.encode().hex()} {second.encode().hex()}",
    }


def move() -> dict[str, str]:
    """The purse moved into the next epoch."""
    about = statement(Operation.REISSUE, next_epoch().digest)
    target = next_issuer().parameters
    draft = prepare(parameters(), about, purse(), (500, 500), Stream("move"), target)
    request = parse(draft.request, 2)
    reply = next_issuer().issue(about, request)
    first, second = draft.finish(target, reply)
    return {
        "issuer": next_issuer().to_bytes().hex(),
        "epoch_digest": next_epoch().digest.hex(),
        "request": request.encoded.hex(),
        "draft": draft.encode().hex(),
        "reply": reply.hex(),
        "issued": f"{first.encode().hex()} {second.encode().hex()}",
    }


@cache
def frozen_identity() -> dict[str, str]:
    contents: dict[str, str] = json.loads(IDENTITY_PATH.read_text())
    return contents


def told(seed: bytes) -> Parameters:
    """The epoch's parameters, signed by the identity of this seed."""
    return Parameters.signed(epoch().encode(), (bytes(32), epoch().digest), Identity(seed))


def signed() -> dict[str, str]:
    """What a server signs of its parameters, and the SHA-256 of the frame that says so."""
    parameters = told(bytes.fromhex(frozen_identity()["seed"]))
    message = bytes(32) + epoch().digest
    return {
        "signed": (b"hpkv/parameters/v1\0" + epoch().digest + message).hex(),
        "signature": parameters.signature.hex(),
        "frame_sha256": hashlib.sha256(parameters.encode()).hexdigest(),
    }


if __name__ == "__main__":
    IDENTITY_PATH.write_text(json.dumps({**frozen_identity(), **signed()}, indent=2) + "\n")
    PATH.write_text(
        json.dumps({**frozen(), "exchange": exchange(), "move": move()}, indent=2) + "\n"
    )
