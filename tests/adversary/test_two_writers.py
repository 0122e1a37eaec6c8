"""Two writers, one of whom does not know yet that he is not alone: he never forks the vault."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpkvfs.errors import SecondWriter
from hpkvfs.session import Session
from hpkvfs.volume import commit
from tests.adversary.vault import Vault, vault
from tests.fs.play import Tree, play, tree


async def publish(session: Session, number: int) -> None:
    await play(session, ("write", (b"b",), 100 * number, bytes([number]) * 9_000))
    await session.publish()


async def publish_behind_another(made: Vault) -> Tree:
    """By who published generation 2, while another client went on to 5 and collected 3; what that
    one left."""
    async with made.session() as first:
        await first.connect()
        for number in range(2):
            await publish(first, number)
        async with made.session("second") as second:
            await second.redeem(made.world.voucher(2_000))
            await second.recover()
            for number in range(3):
                await publish(second, 2 + number)
            await second.gc()
            expected = await tree(second)
        await play(first, ("write", (b"b",), 0, b"mine"))
        await first.publish()
    return expected


async def test_who_is_behind_is_refused_however_far_the_other_went(tmp_path: Path) -> None:
    async with vault(tmp_path) as made:
        with pytest.raises(SecondWriter):
            await publish_behind_another(made)


async def test_without_the_first_anchor_of_the_other_nobody_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the key of his next anchor is free again, and what he was told is
    published is nowhere."""
    monkeypatch.setattr(commit, "handed_over", lambda previous, writer: ())
    async with vault(tmp_path) as made:
        expected = await publish_behind_another(made)
        async with made.session("third") as third:
            await third.redeem(made.world.voucher(200))
            await third.recover()
            assert await tree(third) == expected
