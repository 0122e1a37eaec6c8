"""Credentials moved from one epoch into another: nothing gained, nothing mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpkvfs.protocol.credential import Credential, Draft, Issuer, Statement, parse, prepare
from hpkvfs.protocol.errors import BadIssuance, BadProof
from hpkvfs.protocol.tariff import Operation
from tests.protocol.parties import (
    TARIFF,
    Stream,
    epoch,
    issuer,
    next_epoch,
    next_issuer,
    parameters,
    purse,
    statement,
)
from tests.protocol.vectors import frozen, move

ABOUT = statement(Operation.REISSUE, next_epoch().digest)
TARGET = next_issuer().parameters


def moving(amounts: tuple[int, int] = (600, 400)) -> Draft:
    return prepare(parameters(), ABOUT, purse(), amounts, Stream("moving"), TARGET)


def moved() -> tuple[Credential, Credential]:
    draft = moving()
    request = parse(draft.request, 2)
    issuer().verify(ABOUT, request, next_issuer())
    return draft.finish(TARGET, next_issuer().issue(ABOUT, request))


def look_up(of: Issuer, digest: bytes, presented: tuple[Credential, Credential]) -> None:
    """Pay for a look-up in the epoch with this digest; BadProof."""
    about = Statement(digest, Operation.LOOK_UP, b"key", -TARIFF.look_up)
    amounts = (sum(one.amount for one in presented) - TARIFF.look_up, 0)
    draft = prepare(of.parameters, about, presented, amounts, Stream("look up"))
    of.verify(about, parse(draft.request, 2))


def test_what_was_moved_pays_in_the_new_epoch_and_not_in_the_old() -> None:
    pair = moved()
    assert [one.amount for one in pair] == [600, 400]
    look_up(next_issuer(), next_epoch().digest, pair)
    with pytest.raises(BadProof):
        look_up(issuer(), epoch().digest, pair)


def test_two_epochs_cannot_be_presented_at_once() -> None:
    mixed = (purse()[0], moved()[0])
    for of, digest in ((issuer(), epoch().digest), (next_issuer(), next_epoch().digest)):
        for pair in (mixed, mixed[::-1]):
            with pytest.raises(BadProof):
                look_up(of, digest, pair)
    for pair in (mixed, mixed[::-1]):
        amounts = (sum(one.amount for one in pair), 0)
        draft = prepare(parameters(), ABOUT, pair, amounts, Stream("mixed"), TARGET)
        with pytest.raises(BadProof):
            issuer().verify(ABOUT, parse(draft.request, 2), next_issuer())


def test_a_move_moves_what_there_is() -> None:
    with pytest.raises(ValueError, match="balance"):
        moving((600, 401))


@pytest.mark.parametrize("named", [None, "other"])
def test_a_proof_names_both_issuers(named: str | None) -> None:
    """Digits of one epoch's table, or a proof for one, are nothing in another."""
    other = Issuer.generate(Stream("other"))
    target = other.parameters if named else None
    draft = prepare(parameters(), ABOUT, purse(), (600, 400), Stream("moving"), target)
    with pytest.raises(BadProof):
        issuer().verify(ABOUT, parse(draft.request, 2), next_issuer())


@pytest.mark.parametrize(
    "about",
    [
        replace(ABOUT, context=b""),
        replace(ABOUT, context=epoch().digest),
        replace(ABOUT, epoch=next_epoch().digest),
        replace(ABOUT, delta=1),
    ],
)
def test_a_move_is_about_its_two_epochs(about: Statement) -> None:
    request = parse(moving().request, 2)
    with pytest.raises(BadProof):
        issuer().verify(about, request, next_issuer())
    with pytest.raises(BadProof):
        issuer().verify(about, request)
    with pytest.raises(BadProof):
        next_issuer().verify(about, request)


def test_the_old_issuer_cannot_answer_for_the_new() -> None:
    draft = moving()
    reply = issuer().issue(ABOUT, parse(draft.request, 2))
    with pytest.raises(BadIssuance):
        draft.finish(TARGET, reply)


def test_a_move_is_byte_for_byte_the_frozen_one() -> None:
    assert move() == frozen()["move"]
