"""Doubles of Lightning nodes: the documented shapes of clnrest and of LND's REST, over real HTTP.

No real node was asked: there is none here. What is in these answers is what the projects'
documentation shows, statuses and types included (LND's numbers of 64 bits are text).

`python -m tests.payments.nodes` is one whose invoices are paid as soon as they were shown; it
writes its URL, and ends with its standard input.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"


@dataclass
class Invoice:
    """One invoice, as a node keeps it."""

    name: str
    msat: int
    expiry: int
    created: int = field(default_factory=lambda: int(time.time()))
    state: str = "open"
    received: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        data = "".join(secrets.choice(ALPHABET) for _ in range(180))
        self.text = f"lnbc{self.msat // 100}n1{data}"

    def pay(self, msat: int | None = None) -> None:
        """Somebody pays it; a node that keeps to BOLT 4 takes no less than it asked for."""
        assert self.state == "open", "a node takes one payment for an invoice"
        self.state, self.received = "paid", self.msat if msat is None else msat


class Node:
    """A node on loopback: `invoices` by name; `made` counts the orders for one."""

    secret_file = b""
    kind = ""

    def __init__(self, port: int = 0) -> None:
        self.invoices: dict[str, Invoice] = {}
        self.made = 0
        self.unheard = 0
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(json.loads(body))

            def _answer(self, body: Any) -> None:
                status, answer = node.answer(self.path, dict(self.headers), body)
                if node.unheard:
                    node.unheard -= 1
                    self.close_connection = True
                    return
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                pass

        self._handler = Handler
        self._start(port)

    def _start(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def start(self) -> None:
        self._start(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def only(self) -> Invoice:
        (one,) = self.invoices.values()
        return one

    def answer(self, path: str, headers: dict[str, str], body: Any) -> tuple[int, Any]:
        raise NotImplementedError


class Cln(Node):
    """clnrest: https://docs.corelightning.org/reference/invoice, .../listinvoices."""

    kind = "cln"
    secret_file = b"a-rune==\n"

    def answer(self, path: str, headers: dict[str, str], body: Any) -> tuple[int, Any]:
        if headers.get("Rune") != "a-rune==":
            return 401, {"code": 1501, "message": "Not authorized: Not derived from master"}
        if path == "/v1/invoice":
            self.made += 1
            if body["label"] in self.invoices:
                return 500, {"code": 900, "message": "Duplicate label", "data": None}
            made = Invoice(body["label"], body["amount_msat"], body["expiry"])
            self.invoices[made.name] = made
            return 201, {
                "payment_hash": hashlib.sha256(made.name.encode()).hexdigest(),
                "expires_at": made.created + made.expiry,
                "bolt11": made.text,
                "payment_secret": "00" * 32,
                "created_index": len(self.invoices),
            }
        assert path == "/v1/listinvoices", path
        found = self.invoices.get(body["label"])
        return 201, {"invoices": [] if found is None else [self._listed(found)]}

    def _listed(self, one: Invoice) -> dict[str, Any]:
        row = {
            "label": one.name,
            "bolt11": one.text,
            "payment_hash": hashlib.sha256(one.name.encode()).hexdigest(),
            "amount_msat": one.msat,
            "status": {"open": "unpaid", "paid": "paid", "gone": "expired"}[one.state],
            "description": "hpkvd",
            "expires_at": one.created + one.expiry,
            "created_index": 1,
        }
        if one.state == "paid":
            row |= {"pay_index": 1, "amount_received_msat": one.received, "paid_at": 1}
        return row


class Quick(Cln):
    """Who is shown an invoice pays it."""

    def _listed(self, one: Invoice) -> dict[str, Any]:
        row = super()._listed(one)
        if one.state == "open":
            one.pay()
        return row


class Lnd(Node):
    """https://lightning.engineering/api-docs/api/lnd/lightning/add-invoice, .../lookup-invoice."""

    kind = "lnd"
    secret_file = bytes(range(200, 232))

    def answer(self, path: str, headers: dict[str, str], body: Any) -> tuple[int, Any]:
        if headers.get("Grpc-Metadata-macaroon") != self.secret_file.hex():
            return 500, {"code": 2, "message": "verification failed", "details": []}
        if path == "/v1/invoices":
            self.made += 1
            digest = hashlib.sha256(base64.b64decode(body["r_preimage"])).digest()
            if digest.hex() in self.invoices:
                exists = "invoice with payment hash already exists"
                return 409, {"code": 6, "message": exists, "details": []}
            made = Invoice(digest.hex(), int(body["value_msat"]), int(body["expiry"]))
            self.invoices[made.name] = made
            return 200, {
                "r_hash": base64.b64encode(digest).decode(),
                "payment_request": made.text,
                "add_index": str(len(self.invoices)),
                "payment_addr": "",
            }
        found = self.invoices.get(path.removeprefix("/v1/invoice/"))
        if found is None:
            message = "unable to locate invoice"
            return 404, {"code": 5, "message": message, "details": []}
        return 200, {
            "memo": "hpkvd",
            "value_msat": str(found.msat),
            "settled": found.state == "paid",
            "creation_date": str(found.created),
            "payment_request": found.text,
            "expiry": str(found.expiry),
            "state": {"open": "OPEN", "paid": "SETTLED", "gone": "CANCELED"}[found.state],
            "amt_paid_msat": str(found.received),
        }


def take_invoices(data: Path, url: str) -> None:
    """Have the server with this data directory sell by invoices of a Cln."""
    (data / "rune").write_bytes(Cln.secret_file)
    change_settings(
        data,
        {
            'kind = ""': 'kind = "cln"',
            'url = ""': f'url = "{url}"',
            'secret_file = ""': 'secret_file = "rune"',
        },
    )


def change_settings(data: Path, changes: dict[str, str]) -> None:
    """In a server's hpkvd.toml."""
    path = data / "hpkvd.toml"
    text = path.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


NODES = {"cln": Cln, "lnd": Lnd}

if __name__ == "__main__":
    with Quick() as quick:
        print(quick.url, flush=True)
        sys.stdin.read()
