"""Servers that lie to a whole vault: each is found out, told by name, and nothing is lost.

Each test ends with an honest server, at which the tree is whole, fsck with all file data finds
nothing, and both sides count the same tokens. tests/net/test_store.py has lies about single
requests and about parameters.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from hpkvd.epochs import Epochs
from hpkvd.handler import Handler
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvfs.errors import CorruptBlob, Misbehaviour, Unreachable
from hpkvfs.protocol.credential import Issuer, parse
from hpkvfs.protocol.group import GA, POINT_SIZE, SCALAR_SIZE, add
from hpkvfs.protocol.messages import (
    DeleteRequest,
    Done,
    Fact,
    InsertRequest,
    LookUpRequest,
    Outcome,
    Reason,
    Refused,
    Reply,
    Request,
)
from hpkvfs.protocol.tariff import Operation
from hpkvfs.session import Session
from hpkvfs.types import BLOB_SIZE, BlobId, Generation
from hpkvfs.volume.anchor import Anchor
from hpkvfs.volume.blob import Kind, Sealer
from hpkvfs.volume.deadlist import DeadList
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.volume.search import PROBE_GAP
from tests.adversary.vault import Vault, read, vault
from tests.fs.play import Tree, play, tree
from tests.net.harness import epoch_one, identity
from tests.volume.test_keys_and_blobs import sealed_by_the_server

LATER = ("write", (b"b",), 5_000, b"later" * 4_000)


@pytest.fixture
async def cheated(tmp_path: Path) -> AsyncIterator[Vault]:
    async with vault(tmp_path) as made:
        yield made


async def tree_of(vault: Vault, machine: str = "first") -> Tree:
    async with vault.session(machine) as session:
        await session.connect()
        return await tree(session)


async def publish_more(session: Session) -> None:
    """One more generation."""
    await play(session, LATER)
    await session.publish()


def without_cache(vault: Vault) -> None:
    """Everything has to be asked for."""
    (vault.directory / "first" / "cache").unlink()


def look_ups_of(
    keys: set[bytes], outcome: Outcome, value: bytes | None
) -> Callable[[Request, Reply], Reply | None]:
    """A lie: every look-up of one of the keys ends so."""

    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, LookUpRequest) and request.key in keys:
            assert isinstance(reply, Done)
            return replace(reply, fact=replace(reply.fact, outcome=outcome), value=value)
        return None

    return lie


# -- what it says is stored ------------------------------------------------------------------


def altered(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


ALTERATIONS: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the key": lambda blob: altered(blob, 5),
    "a bit of the content": lambda blob: altered(blob, 9_000),
    "a bit of the tag": lambda blob: altered(blob, 16_432),
    "noise": lambda blob: secrets.token_bytes(len(blob)),
    "zeros": lambda blob: bytes(len(blob)),
}


@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
async def test_an_altered_blob(cheated: Vault, alter: Callable[[bytes], bytes]) -> None:
    expected = await tree_of(cheated)
    without_cache(cheated)

    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, Done) and reply.value is not None:
            return replace(reply, value=alter(reply.value))
        return None

    async with cheated.session() as session:
        await session.connect()
        cheated.lie(lie)
        with pytest.raises(CorruptBlob, match="altered"):
            await read(session, b"b")
    assert cheated.told
    await cheated.assert_well(expected)


async def test_another_blob_in_its_place(cheated: Vault) -> None:
    """Grafting: a genuine blob of the same vault, of the same kind."""
    expected = await tree_of(cheated)
    without_cache(cheated)
    seen: list[bytes] = []

    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, Done) and reply.value is not None:
            seen.append(reply.value)
            return replace(reply, value=seen[0])
        return None

    async with cheated.session() as session:
        await session.connect()
        cheated.lie(lie)
        with pytest.raises(CorruptBlob, match="altered"):
            await read(session, b"b")
    await cheated.assert_well(expected)


async def test_a_withheld_blob(cheated: Vault) -> None:
    expected = await tree_of(cheated)
    without_cache(cheated)

    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, Done) and reply.fact.outcome is Outcome.FOUND:
            return replace(reply, fact=replace(reply.fact, outcome=Outcome.ABSENT), value=None)
        return None

    async with cheated.session() as session:
        await session.connect()
        cheated.lie(lie)
        with pytest.raises(CorruptBlob, match="missing at the server"):
            await read(session, b"b")
    await cheated.assert_well(expected)


async def test_fsck_names_what_was_confirmed_and_not_kept(cheated: Vault) -> None:
    without_cache(cheated)  # or it could be stored again
    key = cheated.key(BlobId(0))  # the first block of a file
    cheated.world.ledger._write.execute("DELETE FROM blob WHERE key = ?", (key,))
    async with cheated.session() as session:
        await session.connect()
        report = await session.fsck(extents=True)
        assert any("BlobRef(0) is missing at the server" in one for one in report.problems)
        assert report.damaged


# -- which generation is the newest ----------------------------------------------------------


async def test_the_newest_anchor_withheld(cheated: Vault) -> None:
    """From a client with local state it cannot be hidden."""
    async with cheated.session() as session:
        await session.connect()
        await publish_more(session)
    expected = await tree_of(cheated)

    cheated.lie(look_ups_of({cheated.anchor_key(1)}, Outcome.ABSENT, None))
    async with cheated.session() as session:
        with pytest.raises(CorruptBlob, match="no longer has generation 1"):
            await session.connect()
        assert (await tree(session)) == expected
    await cheated.assert_well(expected)


async def test_an_older_anchor_in_its_place(cheated: Vault) -> None:
    async with cheated.session() as session:
        await session.connect()
        older = await cheated.world.ledger.read(cheated.anchor_key(0))
        await publish_more(session)
    expected = await tree_of(cheated)

    cheated.lie(look_ups_of({cheated.anchor_key(1)}, Outcome.FOUND, older))
    async with cheated.session() as session:
        with pytest.raises(CorruptBlob, match="does not open"):
            await session.connect()
    await cheated.assert_well(expected)


async def test_a_generation_that_existed_and_is_withheld_from_the_words(cheated: Vault) -> None:
    """The breakglass entry knows one; without it an old anchor cannot be told from the newest."""
    async with cheated.session() as session:
        await session.connect()
        for _ in range(2):
            await publish_more(session)
    expected = await tree_of(cheated)
    hidden = {cheated.anchor_key(1), cheated.anchor_key(2)}

    cheated.lie(look_ups_of(hidden, Outcome.ABSENT, None))
    async with cheated.session("second") as session:
        await session.redeem(cheated.world.voucher(500))
        with pytest.raises(CorruptBlob):
            await session.recover(Generation(2))
    async with cheated.session("third") as session:
        await session.redeem(cheated.world.voucher(500))
        generation, _ = await session.recover()
        assert generation == 0
    await cheated.assert_well(expected, machine="second")


NOTHING = Anchor(
    Generation(1), b"stranger", 0, 0, None, (), BlobId(100), 50, 0, 0, 1, DeadList()
)  # fmt: skip


async def shown_an_empty_vault(cheated: Vault) -> Tree:
    """The tree of a client to which the server shows a next generation that it made up itself.

    It knows the storage key, since that is what it is asked for; and FORMAT.md."""
    key = cheated.anchor_key(1)
    made_up = sealed_by_the_server(key, Kind.ANCHOR, NOTHING.encode())

    cheated.lie(look_ups_of({key}, Outcome.FOUND, made_up))
    return await tree_of(cheated)


async def test_a_newer_generation_that_is_made_up(cheated: Vault) -> None:
    expected = await tree_of(cheated)
    with pytest.raises(CorruptBlob, match="does not open"):
        await shown_an_empty_vault(cheated)
    assert cheated.told
    await cheated.assert_well(expected)


async def test_a_vault_sealed_with_what_the_server_knows_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with the tag for a salt, all is gone without a word."""
    monkeypatch.setattr(VaultKeys, "sealing", lambda keys, tag: tag)
    async with vault(tmp_path) as cheated:
        assert len(await tree_of(cheated)) > 1
        with pytest.raises(FileNotFoundError):  # not even a root directory
            await shown_an_empty_vault(cheated)


BAIT = 70
"""As many blobs as the server makes up, one look-up of a token each, before it gives up."""


async def orphans_found(cheated: Vault) -> int:
    """By who comes back from the words, and finds something under every key he asks for."""

    def lie(request: Request, reply: Reply) -> Reply | None:
        if not isinstance(reply, Done) or reply.fact.outcome is not Outcome.ABSENT:
            return None
        if not isinstance(request, LookUpRequest) or cheated.told == BAIT:
            return None
        if request.key in {cheated.anchor_key(one) for one in (1, 2, 4, 16, 256, 65_536)}:
            return None
        fact, bait = replace(reply.fact, outcome=Outcome.FOUND), secrets.token_bytes(BLOB_SIZE)
        return replace(reply, fact=fact, value=bait)

    cheated.lie(lie)
    async with cheated.session("second") as session:
        await session.redeem(cheated.world.voucher(500))
        return (await session.recover())[1]


async def test_blobs_without_end_after_the_last(cheated: Vault) -> None:
    expected = await tree_of(cheated)
    assert await orphans_found(cheated) == 0
    assert cheated.told == PROBE_GAP
    await cheated.assert_well(expected, machine="second")


async def test_who_takes_whatever_is_there_for_his_own_goes_on_looking(
    cheated: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    monkeypatch.setattr(Sealer, "is_ours", lambda *_: True)
    assert await orphans_found(cheated) == cheated.told == BAIT


# -- money -----------------------------------------------------------------------------------


def wrong_amount(request: InsertRequest, reply: Done) -> Done:
    """Credentials of its key, genuine but for one token too many or too few."""
    epoch = epoch_one()
    asked = parse(request.credentials, 2)
    first, second = asked.requested
    changed = replace(asked, requested=(first._replace(m=add(first.m, GA.point)), second))
    statement = request.statement(epoch.tariff)
    return replace(reply, issued=epoch.issuer.issue(statement, changed))


OTHER = Issuer.generate(secrets.token_bytes)


def wrong_key(request: InsertRequest, reply: Done) -> Done:
    """Credentials that the server could tell from everybody else's."""
    statement = request.statement(epoch_one().tariff)
    return replace(reply, issued=OTHER.issue(statement, parse(request.credentials, 2)))


def bad_proof(request: InsertRequest, reply: Done) -> Done:
    """Genuine credentials without a proof that they are."""
    return replace(reply, issued=reply.issued[:-32] + secrets.token_bytes(32))


def swapped(request: InsertRequest, reply: Done) -> Done:
    """The two credentials in each other's place."""
    mac = SCALAR_SIZE + 2 * POINT_SIZE
    first, second, rest = reply.issued[:mac], reply.issued[mac : 2 * mac], reply.issued[2 * mac :]
    return replace(reply, issued=second + first + rest)


def of_another_statement(request: InsertRequest, reply: Done) -> Done:
    """Issued for the same credentials and another price."""
    statement = replace(request.statement(epoch_one().tariff), delta=-9)
    issued = epoch_one().issuer.issue(statement, parse(request.credentials, 2))
    return replace(reply, issued=issued)


MISISSUED = [wrong_amount, wrong_key, bad_proof, swapped, of_another_statement]


@pytest.mark.parametrize("forge", MISISSUED, ids=lambda forge: forge.__name__)
async def test_credentials_that_are_not_what_was_paid_for(
    cheated: Vault, forge: Callable[[InsertRequest, Done], Done]
) -> None:
    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, InsertRequest) and isinstance(reply, Done):
            return forge(request, reply)
        return None

    async with cheated.session() as session:
        await session.connect()
        await play(session, LATER)
        expected = await tree(session)
        cheated.lie(lie)
        with pytest.raises(Misbehaviour, match="worthless"):
            await session.publish()
        assert session.store.conservation.holds
    assert cheated.told
    await cheated.assert_well(expected)


async def test_a_smaller_refund(cheated: Vault) -> None:
    async with cheated.session() as session:
        await session.connect()
        await publish_more(session)
    expected = await tree_of(cheated)

    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, DeleteRequest) and isinstance(reply, Done):
            statement = replace(request.statement(epoch_one().tariff), delta=7)
            issued = epoch_one().issuer.issue(statement, parse(request.credentials, 2))
            return Done(Fact(Operation.DELETE, Outcome.DELETED, 7), issued)
        return None

    cheated.lie(lie)
    async with cheated.session() as session:
        await session.connect()
        with pytest.raises(Misbehaviour, match="charged for something else"):
            await session.gc()
        assert session.store.conservation.holds
    assert cheated.told
    await cheated.assert_well(expected)


async def test_a_refused_refund_for_what_was_deleted(cheated: Vault) -> None:
    """It deletes, keeps the refund, and says there was nothing."""
    async with cheated.session() as session:
        await session.connect()
        await publish_more(session)
    expected = await tree_of(cheated)

    def lie(request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, DeleteRequest) and isinstance(reply, Done):
            return Refused(Reason.KEY_ABSENT)
        return None

    cheated.lie(lie)
    async with cheated.session() as session:
        await session.connect()
        await session.gc()
        assert session.store.balance.pending == 0  # the reissue of each brought the refund
    assert cheated.told
    await cheated.assert_well(expected)


# -- the order and number of answers ---------------------------------------------------------


async def test_answers_in_each_others_place(cheated: Vault) -> None:
    """Of two requests at a time, each gets the other's answer."""
    expected = await tree_of(cheated)
    honest = cheated.world.wire.answer
    waiting: list[tuple[bytes, trio.Event, list[bytes]]] = []

    async def swapping(frame: bytes) -> bytes:
        mine = (await honest(frame), trio.Event(), list[bytes]())
        if not waiting:
            waiting.append(mine)
            with trio.move_on_after(0.2):
                await mine[1].wait()
            waiting.clear()
            return mine[2][0] if mine[2] else mine[0]
        other = waiting.pop()
        other[2].append(mine[0])
        other[1].set()
        return other[0]

    async with cheated.session() as session:
        await session.connect()
        await play(session, LATER)
        expected = await tree(session)
        cheated.world.wire.answer = swapping
        with pytest.raises(Misbehaviour):
            await session.publish()
        assert session.store.conservation.holds
    await cheated.assert_well(expected)


async def test_an_old_answer_to_a_new_question(cheated: Vault) -> None:
    """Replay: what an earlier look-up of the same key was answered."""
    expected = await tree_of(cheated)
    without_cache(cheated)
    before: dict[bytes, Reply] = {}

    def lie(request: Request, reply: Reply) -> Reply | None:
        if not isinstance(request, LookUpRequest):
            return None
        return before.setdefault(request.key, reply)

    cheated.lie(lie)
    async with cheated.session() as session:
        await session.connect()
    async with cheated.session() as session:
        with pytest.raises(Misbehaviour, match="worthless"):
            await session.connect()
        assert session.store.conservation.holds
    await cheated.assert_well(expected)


async def test_no_answer_to_what_was_done(cheated: Vault) -> None:
    honest = cheated.world.wire.answer

    async def silent(frame: bytes) -> bytes:
        await honest(frame)
        return b""

    async with cheated.session(patience=1) as session:
        await session.connect()
        await play(session, LATER)
        expected = await tree(session)
        cheated.world.wire.answer = silent
        with pytest.raises(Unreachable):
            await session.publish()
        assert session.store.conservation.holds
    await cheated.assert_well(expected)


async def test_a_server_put_back_to_yesterday(cheated: Vault) -> None:
    """The whole ledger of an earlier time, as from a backup."""
    world, before = cheated.world, cheated.directory / "before"
    world.ledger._write.execute(f"VACUUM INTO '{before}'")
    charged = world.ledger.totals().charged
    async with cheated.session() as session:
        await session.connect()
        await publish_more(session)
        expected = await tree(session)
    stale = SqliteLedger(before, reserve=0)
    async with stale.serving():
        world.wire.answer = Handler(Epochs([epoch_one()], identity()), stale, world.clock).answer
        async with cheated.session() as session:
            with pytest.raises(CorruptBlob, match="no longer has generation 1"):
                await session.connect()
            assert await tree(session) == expected
            assert session.store.conservation.holds
    charged = stale.totals().charged - charged
    stale.close()
    await cheated.assert_well(expected, spent_elsewhere=charged)
