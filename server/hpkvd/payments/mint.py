"""A Cashu mint, as a wallet sees it: NUT-01, 02 (keys, fees), 03 (swap), 04 (bolt11), 07, 09.

Nothing a mint says is believed that can be checked: every signature comes with a proof (NUT-12)
that the published key made it, and answers the very output that it is for. What a mint can do all
the same is refuse, say that a coin was spent, and not honour its own coins later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from hpkvd.payments.web import Web
from hpkvfs.protocol.ecash import SAT, Output, Proof, Signed, hash_to_curve
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.group import Point

SPENT: Final = 11001
PENDING: Final = (11002, 11004)
MAX_KEYSETS: Final = 1_000


class Lies(Exception):
    """An answer that no honest mint gives."""


class Keyset(NamedTuple):
    """Keys of one unit; `fee`: thousandths of a unit for each coin of it that is swapped."""

    id: str
    unit: str
    active: bool
    fee: int


@dataclass(frozen=True, slots=True)
class Quote:
    """An invoice of the mint's, and whether it was paid, and its coins issued."""

    id: str
    invoice: str
    state: str
    expiry: int


class Mint:
    """Asks one mint; Away, Declined, Lies."""

    def __init__(self, web: Web, url: str) -> None:
        self.url = url
        self._web = web
        self._keys: dict[str, dict[int, Point]] = {}

    async def keysets(self) -> list[Keyset]:
        """All there ever were."""
        answer = await self._web.get("v1/keysets")
        with _Reader("keysets"):
            return [
                Keyset(
                    str(one["id"]).lower(),
                    str(one["unit"]),
                    one["active"] is True,
                    _count(one.get("input_fee_ppk") or 0),
                )
                for one in _list(answer["keysets"])[:MAX_KEYSETS]
            ]

    async def keys(self, keyset: str) -> dict[int, Point]:
        """The key of each amount; they never change."""
        if keyset not in self._keys:
            answer = await self._web.get(f"v1/keys/{keyset}")
            with _Reader("keys"):
                (one,) = [one for one in _list(answer["keysets"]) if one["id"] == keyset]
                self._keys[keyset] = {
                    int(amount): Point.decode(bytes.fromhex(key))
                    for amount, key in one["keys"].items()
                }
        return self._keys[keyset]

    async def states(self, proofs: Sequence[Proof]) -> set[str]:
        """UNSPENT, PENDING, SPENT: what there is among these coins."""
        points = [hash_to_curve(one.secret.encode()).encode().hex() for one in proofs]
        answer = await self._web.post("v1/checkstate", {"Ys": points})
        with _Reader("states"):
            states = {str(one["Y"]): str(one["state"]) for one in _list(answer["states"])}
            return {states[point] for point in points}

    async def swap(self, proofs: Sequence[Proof], outputs: Sequence[Output]) -> list[Proof]:
        """New coins for old ones, which are spent by that."""
        inputs = [_input(one) for one in proofs]
        answer = await self._web.post(
            "v1/swap", {"inputs": inputs, "outputs": [_output(one) for one in outputs]}
        )
        with _Reader("signatures"):
            signatures = _list(answer["signatures"])
        return await self._unblind(outputs, signatures)

    async def restore(self, outputs: Sequence[Output]) -> list[Proof] | None:
        """The coins that these outputs became, if the mint has signed them."""
        answer = await self._web.post("v1/restore", {"outputs": [_output(one) for one in outputs]})
        with _Reader("restored signatures"):
            told = _list(answer["outputs"])
            signatures = _list(answer.get("signatures") or answer.get("promises") or [])
            if not told and not signatures:
                return None
            if len(told) != len(signatures):
                raise Lies("as many outputs as signatures")
            found = {one["B_"]: sign for one, sign in zip(told, signatures, strict=True)}
            ordered = [found[one.blinded.encode().hex()] for one in outputs]
        return await self._unblind(outputs, ordered)

    async def _unblind(self, outputs: Sequence[Output], signatures: list[Any]) -> list[Proof]:
        keys = await self.keys(outputs[0].keyset)
        with _Reader("a signature"):
            if len(signatures) != len(outputs):
                raise Lies("another number of signatures")
            coins = []
            for output, told in zip(outputs, signatures, strict=True):
                if (told["id"], told["amount"]) != (output.keyset, output.amount):
                    raise Lies("a signature for something else")
                signed = Signed.decode(told["C_"], told["dleq"]["e"], told["dleq"]["s"])
                coins.append(output.unblind(keys[output.amount], signed))
            return coins

    async def quote(self, sats: int) -> Quote:
        """A new invoice, for so many sat."""
        return _quote(await self._web.post("v1/mint/quote/bolt11", {"amount": sats, "unit": SAT}))

    async def quoted(self, quote: str) -> Quote:
        """How an invoice is getting on."""
        return _quote(await self._web.get(f"v1/mint/quote/bolt11/{quote}"))

    async def issue(self, quote: str, outputs: Sequence[Output]) -> list[Proof]:
        """The coins for an invoice that was paid."""
        body = {"quote": quote, "outputs": [_output(one) for one in outputs]}
        answer = await self._web.post("v1/mint/bolt11", body)
        with _Reader("signatures"):
            signatures = _list(answer["signatures"])
        return await self._unblind(outputs, signatures)


class _Reader:
    """Turns whatever goes wrong in reading an answer into Lies."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        wrong = (Malformed, ValueError, TypeError, LookupError, AttributeError)
        if kind is not None and issubclass(kind, wrong):
            raise Lies(f"the mint's {self._what} cannot be read") from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed("not a list")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Malformed("not a count")
    return value


def _quote(answer: Any) -> Quote:
    with _Reader("quote"):
        state = answer.get("state") or ("PAID" if answer.get("paid") else "UNPAID")
        expiry = answer.get("expiry") or 0
        return Quote(str(answer["quote"]), str(answer["request"]), str(state), _count(expiry))


def _input(proof: Proof) -> dict[str, object]:
    body: dict[str, object] = {
        "amount": proof.amount,
        "id": proof.keyset,
        "secret": proof.secret,
        "C": proof.signature.hex(),
    }
    if proof.witness is not None:
        body["witness"] = proof.witness
    return body


def _output(output: Output) -> dict[str, object]:
    return {"amount": output.amount, "id": output.keyset, "B_": output.blinded.encode().hex()}
