"""A page of text over HTTP, for programs on this machine only."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from hpkvd import log

REQUEST_SIZE: Final = 8192
SECONDS: Final = 5.0


def is_loopback(host: str) -> bool:
    """Whether this can be reached from this machine alone; names other than localhost cannot."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve_page(host: str, port: int, page: Callable[[], str]) -> None:
    """GET anything: the page. Until cancelled; says so and returns if the port is taken."""
    try:
        await trio.serve_tcp(partial(_serve, page), port, host=host)
    except OSError as error:
        log.tell(f"no metrics: cannot listen on port {port} ({error.strerror or error})")


async def _serve(page: Callable[[], str], stream: trio.SocketStream) -> None:
    with trio.move_on_after(SECONDS):
        try:
            request = b""
            while b"\r\n\r\n" not in request and len(request) < REQUEST_SIZE:
                part = await stream.receive_some(REQUEST_SIZE)
                if not part:
                    return
                request += part
            await stream.send_all(_response(page()))
        except trio.BrokenResourceError:
            pass


def _response(text: str) -> bytes:
    body = text.encode()
    head = (
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
