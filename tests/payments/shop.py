"""A cashier over a ledger and a mint, whose connection can be cut or lied on at any point."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from hpkvd.cli import main
from hpkvd.ledger import Engine
from hpkvd.payments import Prices, web
from hpkvd.payments.cashier import Cashier
from hpkvd.payments.cashu import Cashu
from hpkvd.payments.mint import Mint
from hpkvd.payments.web import Away, Web
from hpkvfs.protocol.ecash import Token
from hpkvfs.protocol.messages import Method, Payment, PayRequest, Reason, Refused, Reply
from hpkvfs.protocol.voucher import voucher_digest
from tests.doubles import Clock
from tests.server.ledgers import opened

PRICES = Prices(tokens_per_ksat=10_000, least=10, most=1_000_000)


def hpkvd(name: str, *arguments: str, data: Path) -> Result:
    """One of the operator's commands, in this process, which is the quicker."""
    return CliRunner().invoke(main, [name, "--data", str(data), *arguments])


class Died(Exception):
    """The server is killed here."""


@dataclass
class Line(Web):
    """A Web on which the calls of one path meet a fate: see `fates`."""

    under: Web
    fates: dict[str, list[str]] = field(default_factory=dict)
    lies: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    async def get(self, path: str) -> Any:
        return await self._fated(path, lambda: self.under.get(path))

    async def post(self, path: str, body: object) -> Any:
        return await self._fated(path, lambda: self.under.post(path, body))

    async def _fated(self, path: str, call: Callable[[], Any]) -> Any:
        """`lost`: it never arrives; `unheard`: it does, its answer does not; `dies`, `dies after`:
        the server is killed before, or when the answer is there."""
        name = path.split("/")[1]
        self.calls.append(name)
        fates = self.fates.get(name, [])
        fate = fates.pop(0) if fates else ""
        if fate == "lost":
            raise Away("lost")
        if fate == "dies":
            raise Died
        answer = await call()
        if fate == "unheard":
            raise Away("unheard")
        if fate == "dies after":
            raise Died
        return self.lies[name](answer) if name in self.lies else answer


@dataclass
class Shop:
    """A running server's part of it: `cashier` may be replaced, as after a crash."""

    ledger: Engine
    cashier: Cashier
    line: Line
    clock: Clock
    url: str

    def restart(self) -> None:
        """Another process, which knows nothing but the ledger; and the line is whole again."""
        self.line.fates.clear()
        self.line.lies.clear()
        methods = {Method.CASHU: _cashu(self.line, self.url)}
        self.cashier = Cashier(self.ledger, methods, self.clock)

    async def pay(self, text: str, least: int = 1) -> Reply:
        """Hand a token over, as hpkvfs does."""
        return await self.cashier.pay(request(text, least))

    async def refused(self, text: str, least: int = 1) -> Reason:
        reply = await self.pay(text, least)
        assert isinstance(reply, Refused), reply
        return reply.reason

    async def paid(self, text: str, least: int = 1) -> int:
        reply = await self.pay(text, least)
        assert isinstance(reply, Payment) and reply.paid, reply
        return reply.tokens

    async def assert_sold(self, tokens: int, sats: int) -> None:
        """So much was sold, once, for so much ecash in the till, and nothing is open."""
        totals = self.ledger.totals()
        assert (totals.cashu_tokens, totals.voucher_amount) == (tokens, tokens)
        assert (totals.cashu_sats, totals.takings_sats) == (sats, sats)
        assert totals.sales == 0
        coins = [coin for one in self.ledger.takings() for coin in Token.decode(one.text).proofs]
        assert sum(coin.amount for coin in coins) == sats
        if coins:  # the mint honours them: they are the operator's, unspent
            assert await Mint(self.line.under, self.url).states(coins) == {"UNSPENT"}


def request(text: str, least: int = 1) -> PayRequest:
    digest = voucher_digest(Token.decode(text).voucher_secret)
    return PayRequest(Method.CASHU, digest, least, text.encode())


def _cashu(line: Line, url: str) -> Cashu:
    return Cashu({url: Mint(line, url)}, PRICES, secrets.token_bytes)


@asynccontextmanager
async def shop(ledger_url: str, mint_url: str) -> AsyncIterator[Shop]:
    async with opened(ledger_url) as ledger, web.opened(mint_url) as under:
        clock = Clock()
        line = Line(under)
        cashier = Cashier(ledger, {Method.CASHU: _cashu(line, mint_url)}, clock)
        yield Shop(ledger, cashier, line, clock, mint_url)
