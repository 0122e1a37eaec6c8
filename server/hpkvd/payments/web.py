"""JSON over HTTP to a mint or a node: the only importer of httpx.

Bounded in time and size; no redirects, no cookies, no proxies from the environment. Addresses
that end in .onion, or all but this machine's if so set, are reached through tor's SOCKS port,
which is given the name to resolve: no resolver of ours hears it.
"""

from __future__ import annotations

import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import socksio
import trio

CALL_SECONDS: Final = 15.0
ONION_SECONDS: Final = 40.0
ANSWER_SIZE: Final = 2**20


class Away(Exception):
    """No answer, or none that means anything; the message has no secret in it."""


class Declined(Exception):
    """Answered, with an error: the HTTP status, and the mint's code if it gave one (0: none)."""

    def __init__(self, status: int, code: int) -> None:
        super().__init__(f"HTTP {status}, code {code}")
        self.status = status
        self.code = code


def check_url(url: str) -> None:
    """ValueError unless whoever answers there is who it says, or this machine itself."""
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"`{url}` is not a URL") from error
    if parts.scheme == "https" and parts.host:
        return
    if parts.scheme == "http" and (_is_onion(parts.host) or _is_loopback(parts.host)):
        return
    raise ValueError(f"`{url}` must begin with https://, or be on this machine or a .onion")


class Web:
    """One server's API below a URL; see `opened`."""

    def __init__(self, client: httpx.AsyncClient, seconds: float) -> None:
        self._client = client
        self._seconds = seconds

    async def get(self, path: str) -> Any:
        """The JSON there; Away, Declined."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: object) -> Any:
        """The JSON that answers this; Away (it may have been done), Declined."""
        return await self._call("POST", path, body)

    async def _call(self, method: str, path: str, body: object) -> Any:
        try:
            with trio.fail_after(self._seconds):
                status, raw = await self._exchange(method, path, body)
        except trio.TooSlowError:
            raise Away(f"no answer in {self._seconds:g} seconds") from None
        except (httpx.HTTPError, httpx.StreamError, socksio.SOCKSError, OSError) as error:
            raise Away(_told(error)) from None  # its text may name the address
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if 400 <= status < 500 and status not in (401, 403, 404, 408, 429):
            code = answer.get("code") if isinstance(answer, dict) else 0
            raise Declined(status, code if type(code) is int else 0)
        if status == 404:
            raise Declined(status, 0)
        if status not in (200, 201) or answer is None:
            raise Away(f"HTTP status {status}" if status >= 300 else "an answer that is no JSON")
        return answer

    async def _exchange(self, method: str, path: str, body: object) -> tuple[int, bytes]:
        content = None if body is None else json.dumps(body).encode()
        async with self._client.stream(method, path.lstrip("/"), content=content) as response:
            raw = bytearray()
            async for part in response.aiter_raw():
                raw += part
                if len(raw) > ANSWER_SIZE:
                    raise Away("an answer without end")
            return response.status_code, bytes(raw)


@asynccontextmanager
async def opened(
    url: str,
    *,
    socks: str = "",
    always: bool = False,
    ca_file: Path | None = None,
    headers: Mapping[str, str] = {},
) -> AsyncIterator[Web]:
    """A client of the API below `url`. `ca_file`: trust this certificate (PEM) alone.

    `socks`: HOST:PORT of tor, for .onion, or (`always`) for whatever is not on this machine.
    OSError if the file cannot be read.
    """
    host = httpx.URL(url).host
    proxied = _is_onion(host) or (always and not _is_loopback(host))
    context: ssl.SSLContext | bool = True if ca_file is None else _trusting(ca_file)
    if httpx.URL(url).scheme == "http":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody, and is quickly made
    seconds = ONION_SECONDS if proxied else CALL_SECONDS
    async with httpx.AsyncClient(
        base_url=url.rstrip("/") + "/",
        headers={"Accept-Encoding": "identity", "Content-Type": "application/json", **headers},
        verify=context,
        proxy=f"socks5://{socks}" if proxied else None,
        timeout=seconds,
        follow_redirects=False,
        trust_env=False,
        limits=httpx.Limits(max_connections=16, max_keepalive_connections=2),
    ) as client:
        yield Web(client, seconds)


def _trusting(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError as error:
        raise OSError(f"{ca_file} has no certificate in it (PEM)") from error


def _told(error: BaseException) -> str:
    """What can be told of a failure."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "its certificate is none that ca_file, or else this machine, trusts"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


def _is_onion(host: str) -> bool:
    return host.endswith(".onion")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
