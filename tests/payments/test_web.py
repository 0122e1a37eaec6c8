"""Through a proxy, the proxy resolves the name; over TLS, only who is trusted is spoken to."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hpkvd.payments import web
from hpkvd.payments.web import Away

NAME = "mint.example"
ONION = "a" * 56 + ".onion"


async def mint(stream: trio.abc.Stream) -> None:
    """Answers one request, whatever it is."""
    await stream.receive_some(4096)
    await stream.send_all(b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}')


@dataclass
class Proxy:
    """A SOCKS5 proxy (RFC 1928) that is the mint itself: `asked` has the type and name it heard."""

    asked: list[tuple[int, bytes]] = field(default_factory=list)
    sulks: bool = False

    async def serve(self, stream: trio.SocketStream) -> None:
        assert await stream.receive_some(3) == b"\5\1\0"
        if self.sulks:
            return
        await stream.send_all(b"\5\0")
        request = await stream.receive_some(4096)
        assert request[:3] == b"\5\1\0"
        self.asked.append((request[3], request[5:-2]))
        await stream.send_all(b"\5\0\0\1" + bytes(6))
        await mint(stream)


class Resolver(trio.abc.HostnameResolver):
    """What this machine would ask its name server; nobody is there."""

    def __init__(self) -> None:
        self.heard: list[bytes | str | None] = []

    async def getaddrinfo(self, host: Any, *rest: Any, **more: Any) -> Any:
        self.heard.append(host)
        raise OSError("no name server")

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise AssertionError


@asynccontextmanager
async def listening(
    serve: Callable[[Any], Any], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """A server on loopback; its port."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):  # refused by the other side
                await serve(
                    stream if tls is None else trio.SSLStream(stream, tls, server_side=True)
                )

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handle, 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.fixture
async def resolver() -> Resolver:
    resolver = Resolver()
    trio.socket.set_custom_hostname_resolver(resolver)
    return resolver


@pytest.mark.parametrize(
    ("url", "always"),
    [(f"http://{ONION}", False), (f"http://{ONION}", True), (f"http://{NAME}", True)],
)
async def test_the_proxy_is_given_the_name_and_no_name_server_hears_it(
    url: str, always: bool, resolver: Resolver
) -> None:
    proxy = Proxy()
    async with (
        listening(proxy.serve) as port,
        web.opened(url, socks=f"127.0.0.1:{port}", always=always) as line,
    ):
        assert await line.get("v1/info") == {"a": 1}
    assert proxy.asked == [(3, url.removeprefix("http://").encode())]  # 3: a name
    assert not resolver.heard


async def test_without_the_setting_the_name_server_hears_it(resolver: Resolver) -> None:
    """A negative control: this is how a look-up of our own would be noticed."""
    proxy = Proxy()
    async with (
        listening(proxy.serve) as port,
        web.opened(f"http://{NAME}", socks=f"127.0.0.1:{port}") as line,
    ):
        with pytest.raises(Away):
            await line.get("v1/info")
    assert not proxy.asked
    assert {str(name) for name in resolver.heard} <= {NAME, str(NAME.encode())} and resolver.heard


async def test_this_machine_is_never_reached_through_the_proxy() -> None:
    proxy = Proxy()
    async with listening(proxy.serve) as port, listening(mint) as here:
        url = f"http://127.0.0.1:{here}"
        async with web.opened(url, socks=f"127.0.0.1:{port}", always=True) as line:
            assert await line.get("v1/info") == {"a": 1}
    assert not proxy.asked


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_proxy_that_hangs_up_is_somebody_away() -> None:
    """httpcore leaves that socket to the collector, which warns."""
    async with (
        listening(Proxy(sulks=True).serve) as port,
        web.opened(f"http://{ONION}", socks=f"127.0.0.1:{port}") as line,
    ):
        with pytest.raises(Away):
            await line.get("v1/info")


def certificate(directory: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """One that a node signed itself, for loopback: its file, and the node's side of TLS."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    public, private = directory / f"{name}.pem", directory / f"{name}.key"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return public, context


async def test_only_a_node_with_the_right_certificate_is_spoken_to(tmp_path: Path) -> None:
    right, context = certificate(tmp_path, "node")
    wrong, _ = certificate(tmp_path, "another")
    async with listening(mint, context) as port:
        url = f"https://127.0.0.1:{port}"
        async with web.opened(url, ca_file=right) as line:
            assert await line.get("v1/getinfo") == {"a": 1}
        for other in (wrong, None):  # None: those that this machine trusts
            async with web.opened(url, ca_file=other) as line:
                with pytest.raises(Away) as refused:
                    await line.get("v1/getinfo")
            assert "its certificate is none that ca_file" in str(refused.value)
            assert "127.0.0.1" not in str(refused.value)


async def test_a_file_without_a_certificate_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    path.write_text("no certificate")
    with pytest.raises(OSError, match="has no certificate in it"):
        async with web.opened("https://127.0.0.1:1", ca_file=path):
            pass
