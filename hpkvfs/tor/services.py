"""Onion services: what tor is told of one, and of what bounds who comes to it.

There are two ways to publish one, with one key and so one address:

    ADD_ONION   at a tor that runs: the key goes over the control connection and is on no disk of
                tor's. It has no word for limits at the introduction points;
    SETCONF     at a tor of our own: HiddenServiceDir and the options beside it. The key is in a
                file for as long as there is that directory: tor reads it again with each setting.

SETCONF puts the services it names in place of all that were configured, which is why a tor that
others use as well is never told this way.
Sources: control-spec (ADD_ONION, SETCONF), rend-spec-v3 (introduction points, proof of work),
tor(1), "HIDDEN SERVICE OPTIONS".
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hpkvfs.tor.control import TorError

if TYPE_CHECKING:
    from hpkvfs.tor.control import Controller

KEY_SIZE: Final = 64
DIRECTORY: Final = "service"
SECRET: Final = "hs_ed25519_secret_key"
DERIVED: Final = ("hs_ed25519_public_key", "hostname")
_TAG: Final = b"== ed25519v1-secret: type0 ==".ljust(32, b"\0")


@dataclass(frozen=True, slots=True)
class Throttle:
    """So many a second, after a first `burst`; ValueError for what tor refuses."""

    rate: int
    burst: int

    def __post_init__(self) -> None:
        if self.burst < self.rate:
            raise ValueError(f"a burst of {self.burst} is less than the {self.rate} of each second")


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds who comes to a service.

    streams: connections at a time on one circuit; 0 for any number.
    work: what is let in; of more, those who did most proof of work are first. None: no such order.
    introductions: what each introduction point lets through; it drops what is more, at random.
    None: it drops none. Only a tor of our own can be told; `insist`: others are an error.
    """

    streams: int = 0
    work: Throttle | None = None
    introductions: Throttle | None = None
    insist: bool = False


@dataclass(frozen=True, slots=True)
class Onion:
    """An onion service: `port` of its address leads to `target` (127.0.0.1:N or unix:PATH).

    key: KEY_SIZE bytes, the expanded ed25519 key as tor keeps it (RFC 8032, 5.1.5).
    """

    port: int
    target: str
    key: bytes = field(repr=False)
    limits: Limits = Limits()


def publish(controller: Controller, onion: Onion, data: Path | None) -> str:
    """Have it published; `....onion`, though its descriptor is still on its way. TorError.

    data: the directory of a tor of our own; None for one that runs.
    """
    if data is None:
        return _add(controller, onion)
    return _configure(controller, onion, data)


# -- at a tor that runs ------------------------------------------------------------------------


def _add(controller: Controller, onion: Onion) -> str:
    if onion.limits.introductions and onion.limits.insist:
        raise TorError(
            "a tor that runs can't be told how many introductions to let through",
            "give --tor own, or --intro-rate 0",
        )
    reply = _told(controller, " ".join(["ADD_ONION", *_words(onion)]))
    return f"{reply.partition('ServiceID=')[2].split()[0]}.onion"


def _words(onion: Onion) -> list[str]:
    limits = onion.limits
    words = [f"ED25519-V3:{base64.b64encode(onion.key).decode()}", "Flags=DiscardPK"]
    if limits.streams:
        words.append(f"MaxStreams={limits.streams}")
    if limits.work:
        words.append("PoWDefensesEnabled=1")
        words += [f"PoWQueueRate={limits.work.rate}", f"PoWQueueBurst={limits.work.burst}"]
    return [*words, f"Port={onion.port},{onion.target}"]


# -- at one of our own -------------------------------------------------------------------------


def _configure(controller: Controller, onion: Onion, data: Path) -> str:
    directory = data / DIRECTORY
    _refuse_others(controller, directory)
    try:
        _write_key(directory, onion.key)
        settings = {"HiddenServiceDir": _quoted(str(directory)), **_settings(onion)}
        _told(controller, "SETCONF " + " ".join(f"{name}={settings[name]}" for name in settings))
        return (directory / "hostname").read_text().strip()
    except OSError as error:
        raise TorError(f"can't write to {directory}: {error.strerror}") from None


def _settings(onion: Onion) -> dict[str, str | int]:
    limits = onion.limits
    settings: dict[str, str | int] = {"HiddenServicePort": _quoted(f"{onion.port} {onion.target}")}
    if limits.streams:
        settings["HiddenServiceMaxStreams"] = limits.streams
    if limits.work:
        settings |= {
            "HiddenServicePoWDefensesEnabled": 1,
            "HiddenServicePoWQueueRate": limits.work.rate,
            "HiddenServicePoWQueueBurst": limits.work.burst,
        }
    if limits.introductions:
        settings |= {
            "HiddenServiceEnableIntroDoSDefense": 1,
            "HiddenServiceEnableIntroDoSRatePerSec": limits.introductions.rate,
            "HiddenServiceEnableIntroDoSBurstPerSec": limits.introductions.burst,
        }
    return settings


def _refuse_others(controller: Controller, directory: Path) -> None:
    """A service in the user's further settings would be lost without a word."""
    for line in _told(controller, "GETCONF HiddenServiceOptions").splitlines():
        name, _, value = line.partition("=")
        if name.endswith("HiddenServiceDir") and value and value != str(directory):
            raise TorError(
                "the further settings of our tor have an onion service of their own",
                "take it out of the file torrc, and give it to another tor",
            )


def _write_key(directory: Path, key: bytes) -> None:
    """The key where tor reads it, of mode 0600 from the beginning, whole or not at all."""
    directory.mkdir(mode=0o700, exist_ok=True)
    secret, content = directory / SECRET, _TAG + key
    if secret.exists() and secret.read_bytes() == content:
        return
    for name in DERIVED:  # of another key; tor makes new ones
        (directory / name).unlink(missing_ok=True)
    temporary = directory / f"{SECRET}.new"
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(secret)


def _told(controller: Controller, command: str) -> str:
    reply = controller.msg(command)
    if not reply.is_ok():
        _, _, text = next(iter(reply.content()))
        raise TorError(
            f"tor does not publish the service: {text}",
            "proof of work needs tor 0.4.8, its limits 0.4.9: give --no-pow"
            if "PoW" in text
            else "",
        )
    return str(reply)


def _quoted(text: str) -> str:
    """As the control port wants it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
