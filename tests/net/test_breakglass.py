"""A vault's breakglass entry against a whole server: kept up once in an epoch, lost to nobody."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import pytest
import trio

from hpkvfs.breakglass import Breakglass, warning
from hpkvfs.errors import EmptyWallet, Unreachable, VaultError
from hpkvfs.protocol.messages import ReissueRequest, StoreEntryRequest, decode_request
from hpkvfs.types import Generation
from hpkvfs.volume.keys import VaultKeys
from hpkvfs.wallet.wallet import Selection, Wallet
from tests.doubles import Fault
from tests.net.harness import World, epoch_one, running
from tests.store_contract import memo_of, new_blob

KEYS = VaultKeys(bytes(range(32)))
EPOCH = epoch_one().parameters.digest
HOUR = 3_600 * 10**9


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


class Client:
    """A store and the vault's entry over one journal, with a clock of its own."""

    def __init__(self, world: World, name: str, patience: float = 10) -> None:
        self.world = world
        self.name = name
        self.now = 10**18
        self.drawn = 2**31
        self.store = world.client(name=name, patience=patience)
        self.journal = world.journals[-1]
        self.glass = Breakglass(KEYS, self.store, self.journal, lambda: self.now, self.rng)

    def rng(self, size: int) -> bytes:
        """Half of every interval; and fresh nonces."""
        return self.drawn.to_bytes(4, "big") if size == 4 else secrets.token_bytes(size)

    def restarted(self, patience: float = 10) -> Client:
        """The process is killed, and another one opens the same journal."""
        self.world.journals.remove(self.journal)
        self.journal.die()
        again = Client(self.world, self.name, patience)
        again.now = self.now
        return again

    async def spend(self, times: int) -> None:
        """Insert so many blobs, at 10 tokens each."""
        for _ in range(times):
            signer, blob = new_blob()
            await self.store.insert(signer.public, blob, memo_of(blob))


async def rich(world: World, amount: int = 1_000, name: str = "wallet") -> Client:
    client = Client(world, name)
    await client.store.redeem(await world.sold(amount))
    await client.store.prime()
    return client


async def test_an_entry_is_stored_once_in_an_epoch_at_the_time_that_was_drawn(world: World) -> None:
    client = await rich(world)
    due = await client.glass.due()
    assert due == client.now + 12 * HOUR
    assert client.glass.report()["state"] == "none"
    assert not await client.glass.renew_if_due(Generation(5))
    client.now += 11 * HOUR
    client = client.restarted()
    assert await client.glass.due() == due  # the draw outlives the process
    client.now = due
    assert await client.glass.renew_if_due(Generation(5))
    report = client.glass.report()
    assert (report["state"], report["tokens"], report["held"]) == ("safe", 750, 990)
    for _ in range(5):
        client.now += 1_000 * HOUR
        assert not await client.glass.renew_if_due(Generation(6))
    assert world.ledger.totals().charged == 10
    world.assert_conserved(client.store)


async def test_the_user_is_warned_in_every_state_but_safe(world: World) -> None:
    client = Client(world, "poor")
    assert not client.glass.report()["at_risk"] and warning(client.glass.report()) is None
    client = await rich(world)
    _warned(client, "none", "of 1,000 tokens the words alone would bring back 0:")
    await client.glass.renew(None)
    assert client.glass.report()["state"] == "safe"
    assert warning(client.glass.report()) is None
    await client.store.redeem(await world.sold(9_000))
    _warned(client, "safe", "of 9,990 tokens the words alone would bring back 750:")
    await client.glass.renew(None)
    assert warning(client.glass.report()) is None
    await world.rotate()
    await client.store.refresh()
    _warned(client, "ageing", "and none once their epoch has ended")
    voucher = await world.sold(100)
    for _ in range(4):
        await world.rotate()
    await client.store.redeem(voucher)
    await client.store.refresh()
    _warned(client, "expired", "would bring back 0:")


async def test_who_recovered_is_warned_that_the_entry_will_be_gone(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(None)
    heir = Client(world, "heir")
    await heir.glass.recover()
    _warned(heir, "opened", "the words alone would bring back 0, and none before long")


def _warned(client: Client, state: str, text: str) -> None:
    report = client.glass.report()
    assert report["state"] == state and report["at_risk"]
    assert text in str(warning(report)) and "hpkvfs keepalive --now" in str(warning(report))


async def test_what_is_done_with_the_vault_does_not_show_in_when_it_is_stored(
    world: World,
) -> None:
    """The time depends on the draw and the epoch alone, not on what was written or spent."""
    busy, idle = await rich(world, name="busy"), await rich(world, name="idle")
    assert await busy.glass.due() == await idle.glass.due()
    await busy.spend(5)
    busy.now += HOUR
    assert await busy.glass.due() == await idle.glass.due()


async def test_the_words_alone_bring_the_tokens_back(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(Generation(9))
    await client.spend(3)
    heir = Client(world, "heir")
    found = await heir.glass.recover()
    assert found is not None
    assert (found.gained, found.lost, found.generation) == (750, 0, 9)
    assert found.hours == 73
    assert heir.store.balance.total == 750 and heir.store.conservation.holds
    await heir.spend(10)
    assert heir.glass.report()["state"] == "opened"


async def test_a_recovered_vault_replaces_its_entry_before_the_timer_fires(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(None)
    heir = Client(world, "heir")
    await heir.glass.recover()
    await heir.store.prime()
    due = await heir.glass.due()
    assert due is not None and due - heir.now < 72 * HOUR
    heir.now = due
    assert await heir.glass.renew_if_due(Generation(1))
    world.clock.pass_hours(100)
    third = Client(world, "third")
    found = await third.glass.recover()
    assert found is not None and found.gained > 500


async def test_a_second_recovery_of_one_entry_finds_its_tokens_spent(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(Generation(9))
    first, second = Client(world, "first"), Client(world, "second")
    await first.glass.recover()
    found = await second.glass.recover()
    assert found is not None
    assert (found.gained, found.lost, found.generation) == (0, 750, 9)
    assert second.store.balance.total == 0 and second.store.conservation.holds
    assert not second.journal.load().pending


async def test_recovering_again_on_the_same_machine_claims_nothing_twice(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(Generation(9))
    heir = Client(world, "heir")
    await heir.glass.recover()
    await heir.journal.flush()
    again = heir.restarted()
    found = await again.glass.recover()
    assert found is not None and found.lost == 0
    assert again.store.balance.total == 750 and again.store.conservation.holds


async def test_what_the_lost_machine_spent_of_the_reserve_is_told_and_the_rest_recovered(
    world: World,
) -> None:
    client = await rich(world)
    await client.glass.renew(None)
    await client.spend(30)  # 240 were outside of the reserve
    report = client.glass.report()
    assert (report["tokens"], report["stored_tokens"]) == (375, 750)
    heir = Client(world, "heir")
    found = await heir.glass.recover()
    assert found is not None and (found.gained, found.lost) == (375, 375)
    assert heir.store.balance.total == 375


async def test_ordinary_calls_leave_the_reserve_alone(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(None)
    await client.spend(20)
    assert client.glass.report()["tokens"] == 750
    await client.journal.flush()
    assert client.restarted().glass.report()["tokens"] == 750


async def test_without_an_entry_nothing_is_found_and_nothing_left(world: World) -> None:
    heir = Client(world, "heir")
    assert await heir.glass.recover() is None
    assert world.ledger.totals().requests == 0


async def test_an_entry_that_is_gone_is_none(world: World) -> None:
    client = await rich(world)
    await client.glass.renew(None)
    await Client(world, "first").glass.recover()
    world.clock.pass_hours(73)
    assert await Client(world, "second").glass.recover() is None


async def test_a_poor_wallet_stores_nothing_and_keeps_what_it_has(world: World) -> None:
    client = await rich(world, 11)
    with pytest.raises(EmptyWallet):
        await client.glass.renew(None)
    client.now += 100 * HOUR
    assert not await client.glass.renew_if_due(None)
    assert client.store.balance.total == 11 and world.ledger.totals().charged == 0


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.LOSE_REQUEST, Fault.LATE])
@pytest.mark.parametrize("kill", [False, True])
async def test_storing_that_was_cut_short_is_paid_once(
    world: World, fault: Fault, kill: bool
) -> None:
    """No answer comes within the client's patience; then it asks what is there, and goes on."""
    client = await rich(world)
    await client.journal.flush()
    client = client.restarted(patience=0.3)
    await client.store.parameters()
    frames = len(world.wire.frames)

    async def strike(frame: bytes) -> bytes:
        if isinstance(decode_request(frame), StoreEntryRequest):
            world.wire.faults.extend([fault] * 30)
            world.wire.answer = honest
            raise trio.BrokenResourceError
        return await honest(frame)

    honest, world.wire.answer = world.wire.answer, strike
    with pytest.raises(Unreachable):
        await client.glass.renew(Generation(2))
    assert len(world.wire.frames) > frames
    world.wire.faults.clear()
    if kill:
        client = client.restarted()
    await client.store.resolve_pending()
    await world.wire.deliver_late()
    await client.glass.renew(Generation(2))
    assert client.glass.report()["state"] == "safe"
    totals = world.ledger.totals()
    assert (totals.charged, totals.entries) == (10, 1)
    assert client.store.balance.total == 990
    world.assert_conserved(client.store)


@pytest.mark.parametrize("later", [False, True], ids=["the same epoch", "a later epoch"])
@pytest.mark.parametrize("asked", range(2))
async def test_no_more_is_promised_than_the_entry_there_has(
    world: World, later: bool, asked: int
) -> None:
    """The next entry is cut short while its reserve is made, or when it should leave."""
    client = await rich(world)
    await client.glass.renew(None)
    await client.journal.flush()
    if later:
        await world.rotate()
    client = client.restarted(patience=0.3)

    async def cut(frame: bytes) -> bytes:
        nonlocal asked
        asked -= isinstance(decode_request(frame), ReissueRequest | StoreEntryRequest)
        if asked < 0:
            world.wire.faults.extend([Fault.LOSE_REQUEST] * 30)
        return await honest(frame)

    honest, world.wire.answer = world.wire.answer, cut
    with pytest.raises(Unreachable):
        await client.glass.renew(None)
    world.wire.answer = honest
    world.wire.faults.clear()
    await client.store.recover()
    report = client.glass.report()
    assert report["tokens"] == 0 and report["at_risk"]
    client = client.restarted()
    assert client.glass.report()["tokens"] == 0 and await client.glass.due() is not None


@pytest.mark.parametrize("commits", range(0, 9, 2))
@pytest.mark.parametrize("keeps_last", [False, True])
async def test_a_crash_anywhere_in_storing_loses_nothing(
    world: World, commits: int, keeps_last: bool
) -> None:
    client = await rich(world)
    client.journal.commits_left, client.journal.keeps_last = commits, keeps_last
    with contextlib.suppress(VaultError):
        await client.glass.renew(Generation(2))
    client = client.restarted()
    await client.store.recover()
    await client.glass.renew(Generation(2))
    report = client.glass.report()
    assert report["state"] == "safe" and report["tokens"] > 700
    world.assert_conserved(client.store)
    await client.journal.flush()
    found = await Client(world, "heir").glass.recover()
    assert found is not None and (found.gained, found.lost) == (report["tokens"], 0)


@pytest.mark.parametrize("commits", range(5))
@pytest.mark.parametrize("keeps_last", [False, True])
async def test_a_crash_anywhere_in_recovering_loses_nothing(
    world: World, commits: int, keeps_last: bool
) -> None:
    await (await rich(world)).glass.renew(Generation(2))
    heir = Client(world, "heir")
    heir.journal.commits_left, heir.journal.keeps_last = commits, keeps_last
    with contextlib.suppress(VaultError):
        await heir.glass.recover()
    heir = heir.restarted()
    await heir.store.recover()
    await heir.glass.recover()
    await heir.store.recover()
    assert heir.store.balance.held == 750 and heir.store.conservation.holds
    await heir.spend(20)


async def test_an_answer_lost_in_recovering_loses_nothing(world: World) -> None:
    await (await rich(world)).glass.renew(Generation(2))
    heir = Client(world, "heir")
    world.wire.faults.extend([Fault.NONE] * 3 + [Fault.LOSE_REPLY, Fault.DUPLICATE] * 6)
    found = await heir.glass.recover()
    assert found is not None and found.gained == 750
    assert heir.store.balance.total == 750 and heir.store.conservation.holds


async def test_an_entry_that_could_not_be_filled_is_not_counted_on(world: World) -> None:
    """What was carved for it is in no entry: nobody is told that the words bring it back."""
    client = await rich(world)
    await client.glass.renew(Generation(0))
    await world.rotate()
    carve, filled = Wallet.carve, set[int]()

    def first_only(self: Wallet, epoch: bytes, amount: int) -> Selection | None:
        filled.add(client.store._wallet.count_reserved(epoch))
        if 1 in filled:
            raise Unreachable("no answer")
        return carve(self, epoch, amount)

    with patch.object(Wallet, "carve", first_only), pytest.raises(Unreachable):
        await client.glass.renew(Generation(0))
    assert filled == {0, 1}
    assert client.glass.report()["tokens"] == 0
    await client.glass.renew(Generation(0))
    assert client.glass.report()["tokens"] > 0


async def test_a_client_that_went_on_elsewhere_has_a_greater_counter(world: World) -> None:
    """Two clients of one vault store entries in one epoch; the later one replaces the other's."""
    one, other = await rich(world), await rich(world, name="other")
    await one.glass.renew(Generation(1))
    assert await other.glass.renew(Generation(2))
    found = await Client(world, "heir").glass.recover()
    assert found is not None and found.generation == 2
    assert world.ledger.totals().entries == 1


async def test_claims_of_spent_tokens_are_not_held_for_a_bug(world: World) -> None:
    """Resolving in the background what turns out to be spent elsewhere writes it off, quietly."""
    await (await rich(world)).glass.renew(None)
    slow = Client(world, "slow", patience=0.3)
    await slow.store.parameters()
    there = await slow.store.open_entry(KEYS.entry_signer(EPOCH))
    assert there is not None
    world.wire.faults.extend([Fault.NONE] * 5 + [Fault.LOSE_REQUEST] * 30)
    with pytest.raises(Unreachable):
        await slow.glass.recover()
    world.wire.faults.clear()
    await Client(world, "quick").glass.recover()
    await slow.store.resolve_pending()
    assert slow.store.balance.total == 0 and slow.store.conservation.holds
