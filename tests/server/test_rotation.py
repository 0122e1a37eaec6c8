"""Epochs that begin and end: by command, by schedule, in a server that goes on serving."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from hpkvd import config, epochs, identity
from hpkvd.cli import main
from hpkvd.config import Config
from hpkvd.epochs import EpochError, Epochs, Schedule
from hpkvd.handler import Handler
from hpkvd.ledger import NewestEpoch
from hpkvd.ledger.sqlite import SqliteLedger
from hpkvd.ledger.urls import open_ledger
from hpkvd.rotation import SECONDS_PER_DAY, Rotation
from hpkvfs.protocol.epoch import EpochParameters
from hpkvfs.protocol.messages import (
    Done,
    Outcome,
    Parameters,
    ParametersRequest,
    Reason,
    Refused,
    ReissueRequest,
    Spent,
)
from hpkvfs.protocol.tariff import Tariff
from hpkvfs.protocol.voucher import Voucher
from tests.server.postgres import Cluster
from tests.server.support import (
    LocalServer,
    Purchase,
    Purse,
    ServerProcess,
    epoch,
    local_server,
    new_blob,
    new_key,
)
from tests.server.support import identity as who


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    assert run("init", "--data", str(tmp_path / "data")).exit_code == 0
    return tmp_path / "data"


def settle(data: Path, **changes: object) -> None:
    (data / config.FILE).write_text(replace(Config(), **changes).render())  # type: ignore[arg-type]


def listed(data: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        run("epoch", "list", "--json", "--data", str(data)).output
    )["epochs"]
    return found


# -- the commands --------------------------------------------------------------------------------


def test_epochs_are_begun_and_listed(data: Path) -> None:
    settle(data, tariff=Tariff(2), epochs=Schedule(keep=2))
    result = run("epoch", "rotate", "--data", str(data))
    assert result.exit_code == 0 and "epoch 2 has begun" in result.output
    assert "epoch 1 and later" in result.output
    again = json.loads(run("epoch", "rotate", "--json", "--data", str(data)).output)
    assert (again["number"], again["oldest"]) == (3, 2)
    rows = listed(data)
    assert [row["state"] for row in rows] == ["ended", "accepted", "newest"]
    assert [row["tariff"]["look_up"] for row in rows] == [1, 2, 2]  # type: ignore[index]
    text = run("epoch", "list", "--data", str(data)).output
    assert "ended" in text and "look-up 2" in text


def test_the_list_ends_with_the_next_epoch_its_day_and_its_prices(data: Path) -> None:
    path = data / config.EPOCHS / "00000001.parameters"
    os.utime(path, (0, 1_000 * SECONDS_PER_DAY))
    settle(data, tariff=Tariff(2), epochs=Schedule(days=30))
    coming = json.loads(run("epoch", "list", "--json", "--data", str(data)).output)["next"]
    assert (coming["number"], coming["begins"]) == (2, "1972-10-27")
    assert coming["tariff"]["look_up"] == 2
    assert [row["tariff"]["look_up"] for row in listed(data)] == [1]  # type: ignore[index]
    settle(data, epochs=Schedule(days=0))
    *_, last = run("epoch", "list", "--data", str(data)).output.splitlines()
    assert last.split()[:4] == ["2", "by", "command", "next"]


def test_parameters_are_never_written_again(data: Path) -> None:
    directory = data / config.EPOCHS
    before = {path: path.read_bytes() for path in directory.iterdir()}
    first = epochs.published(directory)[0]
    with pytest.raises(FileExistsError):
        epochs.save(directory, replace(epoch(), parameters=first))
    run("epoch", "rotate", "--data", str(data))
    assert {path: path.read_bytes() for path in before} == before
    for path in directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_altered_parameters_are_noticed(data: Path) -> None:
    run("epoch", "rotate", "--data", str(data))
    path = data / config.EPOCHS / "00000001.parameters"
    altered = replace(EpochParameters.decode(path.read_bytes()), tariff=Tariff(5))
    path.write_bytes(altered.encode())
    result = run("serve", "--data", str(data))
    assert result.exit_code == os.EX_CONFIG and "does not follow" in result.output


def test_a_rotation_cut_short_left_nothing(data: Path) -> None:
    """The secret is there and the parameters are not: that epoch never was."""
    directory = data / config.EPOCHS
    (directory / "00000002.secret").write_bytes(b"cut short")
    (directory / "00000002.parameters.new").write_bytes(b"cut")
    assert run("epoch", "rotate", "--data", str(data)).exit_code == 0
    known = identity.load(data / config.IDENTITY)
    assert epochs.load(directory, known, keep=2).newest.number == 2


@pytest.mark.parametrize(
    ("tariff", "message"),
    [(Tariff(1, 30, 10, 20), "raise the refund"), (Tariff(1, 8, 2), "lower the refund")],
)
def test_tariffs_between_which_tokens_could_be_made(
    data: Path, tariff: Tariff, message: str
) -> None:
    """Insert for 10 in one epoch, delete for 10 or more in the other, and so on."""
    settle(data, tariff=tariff, epochs=Schedule(keep=2))
    result = run("epoch", "rotate", "--data", str(data))
    assert result.exit_code == os.EX_CONFIG and message in result.output
    assert len(listed(data)) == 1
    settle(data, tariff=tariff, epochs=Schedule(keep=1))
    assert run("epoch", "rotate", "--data", str(data)).exit_code == 0


@pytest.mark.parametrize("command", ["rotate", "list"])
def test_a_ledger_that_the_settings_do_not_name_is_used(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, url = tmp_path / "data", f"sqlite://{tmp_path}/elsewhere"
    assert run("init", "--data", str(data), "--ledger", url).exit_code == 0
    (data / config.FILE).write_text("")
    assert run("epoch", command, "--data", str(data)).exit_code == os.EX_IOERR
    monkeypatch.setenv("HPKVD_LEDGER", url)
    assert run("epoch", command, "--data", str(data)).exit_code == 0


@pytest.mark.parametrize("command", ["rotate", "list"])
def test_help_has_an_example(command: str) -> None:
    result = run("epoch", command, "--help")
    assert result.exit_code == 0
    assert f"hpkvd epoch {command}" in result.output.split("Example", 1)[1]


@pytest.mark.parametrize(
    "text", ["keep = 0", "keep = 201", "days = -1", "days = nan", "days = inf"]
)
def test_schedules_that_make_no_sense(data: Path, text: str) -> None:
    (data / config.FILE).write_text(f"[epochs]\n{text}\n")
    assert run("serve", "--data", str(data)).exit_code == os.EX_CONFIG


# -- several servers on one ledger ---------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Data directories of two servers that have the same keys, and one ledger of either engine."""
    one, other = tmp_path / "one", tmp_path / "other"
    url = f"sqlite://{tmp_path}/shared.sqlite"
    if request.param == "postgresql":
        cluster: Cluster = request.getfixturevalue("cluster")
        url = cluster.new_url()
    made = CliRunner().invoke(main, ["init", "--data", str(one)], env={"HPKVD_LEDGER": url})
    assert made.exit_code == 0, made.output
    (one / config.FILE).write_text(Config(ledger=url).render())
    shutil.copytree(one, other)
    return one, other


def copy_epochs(source: Path, target: Path) -> None:
    shutil.copytree(source / config.EPOCHS, target / config.EPOCHS, dirs_exist_ok=True)


def looked_over(data: Path) -> Result:
    """What `serve` says before it listens; it does not get further."""
    return run("serve", "--data", str(data), "--listen", "nonsense")


def test_of_several_servers_one_begins_an_epoch_and_the_others_must_have_it(
    pair: tuple[Path, Path],
) -> None:
    one, other = pair
    assert "nonsense" in looked_over(other).output
    assert run("epoch", "rotate", "--data", str(one)).exit_code == 0
    for refused in (run("epoch", "rotate", "--data", str(other)), looked_over(other)):
        assert refused.exit_code == os.EX_CONFIG
        assert refused.output.count("\n") == 1
        assert "another server on this ledger began epoch 2" in refused.output
        assert "copy" in refused.output
    assert len(listed(other)) == 1
    copy_epochs(one, other)
    assert "nonsense" in looked_over(other).output
    assert run("epoch", "rotate", "--data", str(other)).exit_code == 0
    assert run("epoch", "rotate", "--data", str(one)).exit_code == os.EX_CONFIG
    copy_epochs(other, one)
    assert listed(one) == listed(other)
    assert [row["number"] for row in listed(one)] == [1, 2, 3]


def test_of_servers_that_rotate_at_one_moment_one_does(pair: tuple[Path, Path]) -> None:
    def rotate(data: Path) -> str:
        with closing(open_ledger(config.load(data).ledger)) as ledger:
            directory, rng = data / config.EPOCHS, secrets.token_bytes
            try:
                epochs.rotate(directory, Tariff(), rng, 1, ledger.claim_epoch)
            except EpochError as error:
                return str(error)
        return "begun"

    with ThreadPoolExecutor(2) as pool:
        begun, refused = sorted(pool.map(rotate, pair), reverse=True)
    assert begun == "begun"
    assert "another server on this ledger began epoch 2" in refused
    assert sorted(len(listed(data)) for data in pair) == [1, 2]


def test_a_rotation_cut_short_after_its_claim_goes_on_with_the_same_epoch(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    with monkeypatch.context() as cut:
        cut.setattr("hpkvd.files.publish", lambda _: (_ for _ in ()).throw(OSError(5, "cut")))
        assert run("epoch", "rotate", "--data", str(one)).exit_code == os.EX_IOERR
    claimed = (one / config.EPOCHS / "00000002.parameters.new").read_bytes()
    assert "cut short; run `hpkvd epoch rotate`" in looked_over(one).output
    assert run("epoch", "rotate", "--data", str(other)).exit_code == os.EX_CONFIG
    assert run("epoch", "rotate", "--data", str(one)).exit_code == 0
    assert (one / config.EPOCHS / "00000002.parameters").read_bytes() == claimed
    assert "nonsense" in looked_over(one).output


# -- while serving -------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Serving:
    """A rotation and a handler over a data directory, turned by hand."""

    def __init__(self, data: Path) -> None:
        self.clock = Clock()
        self.ledger = SqliteLedger(data / config.LEDGER, reserve=0)
        known = identity.load(data / config.IDENTITY)
        self.rotation = Rotation(data, known, self.ledger, self.clock)
        self.epochs = self.rotation.load(config.load(data))
        self.handler = Handler(self.epochs, self.ledger)

    async def turn(self) -> Epochs:
        self.epochs = await self.rotation._turn(self.handler, self.epochs)
        return self.epochs


@pytest.fixture
async def serving(data: Path) -> AsyncIterator[Serving]:
    made = Serving(data)
    async with made.ledger.serving():
        yield made
    made.ledger.close()


async def test_a_serving_server_takes_up_what_a_command_began(data: Path, serving: Serving) -> None:
    settle(data, tariff=Tariff(3))
    assert (await serving.turn()).newest.number == 1
    run("epoch", "rotate", "--data", str(data))
    assert (await serving.turn()).newest.tariff == Tariff(3)
    told = serving.epochs.tell(None)
    assert told is not None and told.is_genuine and len(told.digests) == 2


async def test_a_serving_server_says_that_it_misses_another_ones_epoch(
    data: Path, serving: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpkvd.rotation.POLL_SECONDS", 0.0)
    settle(data, epochs=Schedule(days=1))
    serving.clock.ahead = 2 * SECONDS_PER_DAY
    serving.ledger.claim_epoch(NewestEpoch(2, 4711))
    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serving.rotation.run, serving.handler, serving.epochs)
            while "another server on this ledger began epoch 2" not in caplog.text:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert "epochs stay as they are" in caplog.text
    assert len(listed(data)) == 1


async def test_the_schedule_is_read_while_serving(data: Path, serving: Serving) -> None:
    settle(data, epochs=Schedule(days=0))
    serving.clock.ahead = 1_000 * SECONDS_PER_DAY
    assert (await serving.turn()).newest.number == 1  # never by itself
    settle(data, epochs=Schedule(days=1_001))
    assert (await serving.turn()).newest.number == 1  # not yet
    settle(data, epochs=Schedule(days=999), tariff=Tariff(4))
    assert (await serving.turn()).newest.number == 2
    assert serving.epochs.newest.tariff == Tariff(4)
    serving.clock.ahead = 0
    assert (await serving.turn()).newest.number == 2


async def test_what_ends_is_forgotten(data: Path, serving: Serving) -> None:
    settle(data, epochs=Schedule(keep=2))
    for _ in range(3):
        run("epoch", "rotate", "--data", str(data))
    await serving.turn()
    assert [one.number for one in serving.epochs.all] == [3, 4]
    assert serving.ledger.oldest_epoch == 3
    names = {path.name for path in (data / config.EPOCHS).iterdir()}
    assert {name for name in names if name.endswith(".secret")} == {
        "00000003.secret",
        "00000004.secret",
    }
    assert len(names) == 6
    settle(data, epochs=Schedule(keep=4))  # it does not bring back what ended
    await serving.turn()
    assert [one.number for one in serving.epochs.all] == [3, 4]
    first = epochs.published(data / config.EPOCHS)[0]
    told = serving.epochs.tell(first.digest)
    assert told is not None and told.parameters == first.encode()


async def test_a_missing_secret_is_not_taken_for_an_end(data: Path, serving: Serving) -> None:
    run("epoch", "rotate", "--data", str(data))
    (data / config.EPOCHS / "00000001.secret").unlink()
    with pytest.raises(EpochError, match=r"epoch 1 .* backup"):
        await serving.turn()
    assert serving.ledger.oldest_epoch <= 1


def test_a_server_process_rotates(data: Path) -> None:
    settle(data, epochs=Schedule(keep=1))
    with ServerProcess(data) as server:
        assert server.parameters().number == 1
        assert run("epoch", "rotate", "--data", str(data)).exit_code == 0
        deadline = time.monotonic() + 60
        while server.parameters().number == 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        old = data / config.EPOCHS / "00000001.secret"
        while old.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, told = server.stop()
    assert code == 0 and "epoch 2 is in use" in told


# -- what requests of several epochs come to ------------------------------------------------------


class Two:
    """A server with an old epoch and a new one, and a purse in the old."""

    def __init__(self, server: LocalServer, purse: Purse) -> None:
        self.server = server
        self.purse = purse
        self.newer = epochs.next_epoch(epoch().parameters, Tariff(), secrets.token_bytes)
        server.handler.use(Epochs([epoch(), self.newer], who()))

    def end(self) -> None:
        self.server.handler.use(Epochs([self.newer], who(), [epoch().parameters]))

    async def end_newer_too(self) -> None:
        later = epochs.next_epoch(self.newer.parameters, Tariff(), secrets.token_bytes)
        await self.server.ledger.retire(3)
        ended = [epoch().parameters, self.newer.parameters]
        self.server.handler.use(Epochs([later], who(), ended))

    def move(self) -> Purchase:
        return self.purse.move(self.newer.parameters)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    async with local_server(tmp_path / "ledger") as server:
        yield Two(server, await server.purse(1_000, credentials=6))


async def test_tokens_are_moved_and_spent_in_the_new_epoch(two: Two) -> None:
    purchase = two.move()
    done = await two.server.ask(purchase.request)
    assert isinstance(done, Done) and done.fact.outcome is Outcome.REISSUED
    newer = Purse(two.newer.parameters, list(purchase.finish(done)))
    key, blob = new_key(), new_blob()
    insert = newer.insert(key.public, blob)
    newer.settle(insert, await two.server.ask(insert.request))
    delete = newer.delete(key, hashlib.sha256(blob).digest())
    newer.settle(delete, await two.server.ask(delete.request))
    assert two.server.ledger.totals().outstanding == two.purse.amount + newer.amount


async def test_what_was_moved_is_spent_in_the_old_epoch(two: Two) -> None:
    """A double spend across epochs is answered with the fact of the first."""
    pair = two.purse.held[-2:]
    purchase = two.move()
    done = await two.server.ask(purchase.request)
    assert isinstance(done, Done)
    two.purse.held += pair
    reply = await two.server.ask(two.purse.look_up(new_key().public).request)
    assert isinstance(reply, Spent)
    assert {one.fingerprint for one in reply.facts} == {purchase.request.fingerprint}
    assert await two.server.ask(purchase.request) == done  # and the other way round
    two.purse.held += pair
    assert isinstance(await two.server.ask(two.move().request), Spent)


async def test_a_replay_is_recalled_while_the_epoch_lasts_and_then_refused(two: Two) -> None:
    purchase = two.purse.look_up(new_key().public)
    done = await two.server.ask(purchase.request)
    assert isinstance(done, Done)
    assert await two.server.ask(purchase.request) == done
    two.end()
    assert await two.server.ask(purchase.request) == Refused(Reason.EPOCH_ENDED)
    more = two.purse.look_up(new_key().public)
    assert await two.server.ask(more.request) == Refused(Reason.EPOCH_ENDED)
    assert await two.server.ask(two.move().request) == Refused(Reason.EPOCH_ENDED)


async def test_a_request_that_an_end_overtakes_is_refused(two: Two) -> None:
    """It passed the handler when its epoch was in use; its serials may be forgotten by now. That it
    ended is not said while the list has it: who hears so must find it in no list any more."""
    await two.server.ledger.retire(2)
    late = two.purse.reissue().request
    busy = await two.server.ask(late)
    assert isinstance(busy, Refused) and busy.reason is Reason.BUSY
    two.end()
    assert await two.server.ask(late) == Refused(Reason.EPOCH_ENDED)


async def test_a_move_is_told_again_until_where_it_went_ends(two: Two) -> None:
    """Its credentials are worth something so long; and nothing else of the old epoch is."""
    purchase = two.move()
    done = await two.server.ask(purchase.request)
    never = two.move()
    await two.server.ledger.retire(2)
    assert await two.server.ask(purchase.request) == done
    two.end()
    while two.server.ledger._sweep.due:
        await two.server.ledger._tidied()
    assert await two.server.ask(purchase.request) == done
    assert await two.server.ask(never.request) == Refused(Reason.EPOCH_ENDED)
    await two.end_newer_too()
    assert await two.server.ask(purchase.request) == Refused(Reason.EPOCH_ENDED)
    while two.server.ledger._sweep.due:
        await two.server.ledger._tidied()
    assert two.server.ledger.totals().requests == 0


NOWHERE: dict[str, Callable[[Two], bytes]] = {
    "back": lambda two: epoch().parameters.digest,
    "unknown": lambda two: bytes(32),
}


@pytest.mark.parametrize("where", NOWHERE.values(), ids=NOWHERE)
async def test_tokens_move_to_later_epochs_only(two: Two, where: Callable[[Two], bytes]) -> None:
    purse = Purse(two.newer.parameters, two.purse.held)
    request = replace(two.move().request, epoch=purse.epoch, into=where(two))
    assert await two.server.ask(request) == Refused(Reason.UNKNOWN_EPOCH)


async def test_a_proof_for_one_epoch_does_not_move_into_another(two: Two) -> None:
    later = epochs.next_epoch(two.newer.parameters, Tariff(), secrets.token_bytes)
    two.server.handler.use(Epochs([epoch(), two.newer, later], who()))
    before = two.server.ledger.totals()
    request = replace(two.move().request, into=later.parameters.digest)
    assert await two.server.ask(request) == Refused(Reason.BAD_PROOF)
    plain = replace(two.move().request, into=None)
    assert await two.server.ask(plain) == Refused(Reason.BAD_PROOF)
    assert two.server.ledger.totals() == before


async def test_a_voucher_and_a_chain_outlive_an_epoch(two: Two) -> None:
    voucher = Voucher.generate(50, secrets.token_bytes)
    two.server.ledger.add_vouchers([voucher])
    two.end()
    newer = Purse(two.newer.parameters)
    purchase = newer.redeem(voucher)
    newer.settle(purchase, await two.server.ask(purchase.request))
    assert newer.amount == 50
    reply = await two.server.ask(ParametersRequest(epoch().parameters.digest))
    assert isinstance(reply, Parameters)
    assert reply.digests == (two.newer.parameters.digest,)
    assert two.newer.parameters.follows(EpochParameters.decode(reply.parameters))


def test_moving_nothing_is_no_request() -> None:
    for request in (
        ReissueRequest(bytes(32), 0, b"i" * 32, b"c"),
        ReissueRequest(bytes(32), 2, bytes(32), b"c"),
    ):
        with pytest.raises(ValueError, match="not complete"):
            request.encode()
