"""A real Cashu mint (nutshell, with its FakeWallet) on loopback, and a real wallet that fills it.

tools/mint has them in a venv of their own. The wallet makes as many tokens as tests want in one
go, since starting it takes longer than all it does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from hpkvfs.protocol.ecash import Token
from tests.ports import own_port

ROOT = Path(__file__).parents[2]
FEE = 100
"""Thousandths of a sat for each coin swapped."""
AMOUNTS = (100,) * 36 + (33,) * 4 + (21,) * 5

WALLET = """
import asyncio, sys
from cashu.core.settings import settings
settings.tor = False
from cashu.wallet.wallet import Wallet

def powers(amount):
    return [1 << bit for bit in range(amount.bit_length()) if amount >> bit & 1]

async def main(url, directory, amounts):
    wallet = await Wallet.with_db(url, directory, "wallet")
    await wallet.load_mint()
    quote = await wallet.request_mint(sum(amounts))
    split = [coin for amount in amounts for coin in powers(amount)]
    while True:
        try:
            coins = await wallet.mint(sum(amounts), quote_id=quote.quote, split=split)
            break
        except Exception as error:
            if "not paid" not in str(error):
                raise
            await asyncio.sleep(0.02)
    for place, amount in enumerate(amounts):
        mine = [next(one for one in coins if one.amount == coin) for coin in powers(amount)]
        coins = [one for one in coins if one not in mine]
        print("token", await wallet.serialize_proofs(mine, legacy=place % 2 == 1))

asyncio.run(main(sys.argv[1], sys.argv[2], list(map(int, sys.argv[3:]))))
"""


class MintProcess:
    """The mint, and the tokens that its wallet made: V4 and V3 by turns."""

    def __init__(self, directory: Path, amounts: Sequence[int] = AMOUNTS) -> None:
        self.directory = directory
        self._amounts = list(amounts)
        self._tokens: list[tuple[int, str]] = []
        tool = subprocess.run([ROOT / "tools" / "mint"], stdout=subprocess.PIPE, check=True)
        self._python = tool.stdout.decode().strip()
        self.port = own_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._python, "-m", "cashu.mint"],
                cwd=self.directory,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
                assert time.monotonic() < end, "the mint does not start"
                time.sleep(0.05)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "CASHU_DIR": str(self.directory),
            "MINT_BACKEND_BOLT11_SAT": "FakeWallet",
            "MINT_LISTEN_HOST": "127.0.0.1",
            "MINT_LISTEN_PORT": str(self.port),
            "MINT_PRIVATE_KEY": "for tests",
            "MINT_DATABASE": str(self.directory / "database"),
            "MINT_INPUT_FEE_PPK": str(FEE),
            "MINT_RATE_LIMIT": "FALSE",
            "FAKEWALLET_DELAY_INCOMING_PAYMENT": "0",
        }

    def token(self, amount: int = 100) -> str:
        """A token of so many sat that nobody was given yet."""
        if amount not in [one for one, _ in self._tokens]:
            self._fill([amount] if amount not in self._amounts else self._amounts)
        place = next(n for n, (worth, _) in enumerate(self._tokens) if worth == amount)
        return self._tokens.pop(place)[1]

    def _fill(self, amounts: Sequence[int]) -> None:
        wallet = self.directory / f"wallet-{len(list(self.directory.iterdir()))}"
        made = subprocess.run(
            [self._python, "-c", WALLET, self.url, wallet, *map(str, amounts)],
            cwd=self.directory,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        texts = [line.split()[1] for line in made.stdout.splitlines() if line.startswith("token ")]
        assert len(texts) == len(amounts), made.stderr[-2000:]
        self._tokens += [(Token.decode(text).amount, text) for text in texts]
