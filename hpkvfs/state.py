"""The state directory: one vault on this machine.

    vault           JSON: format, server, fingerprint, and the root key, sealed or not (0600)
    lock            held (flock) by the process that uses the vault
    wallet.sqlite   credentials and what was asked with them        sealed rows
    cache           blobs                                           sealed slots
    redo.N          changes not yet published                       sealed records
    control         socket of the process that has the vault mounted
    log             what a background mount has to say

Everything but the server's address and the vault's fingerprint is encrypted under the root
key. With a password the root key itself is sealed by scrypt (RFC 7914) and
ChaCha20-Poly1305; without one, whoever reads the state directory reads the vault.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from hpkvfs.errors import AlreadyInUse, DiskFull, NewerFormat, NoState, UserError, VaultError
from hpkvfs.volume.keys import VaultKeys

FORMAT = 1
_LITTLE = 1 << 20
_WALLETS = ("wallet.sqlite", "wallet-2.sqlite")
_FIELDS = {"format", "server", "new", "fingerprint", "key"}
_SCRYPT = {"n": 1 << 16, "r": 8, "p": 1}


class StateDirectory:
    """Paths, lock and key file of one state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = path / "cache"
        self.control = path / "control"
        self.log = path / "log"
        self._vault = path / "vault"

    @property
    def wallet(self) -> Path:
        """The wallet's journal."""
        return self.path / (self._read().get("wallet") or _WALLETS[0])

    @property
    def other_wallet(self) -> Path:
        """Where the wallet's journal can be made anew while it is in use."""
        return next(self.path / name for name in _WALLETS if name != self.wallet.name)

    @property
    def exists(self) -> bool:
        """Whether a vault was set up here."""
        return self._vault.exists()

    @property
    def is_new(self) -> bool:
        """Whether the vault began here, so that no other client can have written to it."""
        return bool(self._read()["new"])

    def create(
        self,
        keys: VaultKeys,
        server: str,
        password: str | None,
        rng: Callable[[int], bytes],
        *,
        new: bool,
    ) -> None:
        """Set up for a vault, new or recovered.

        VaultError if there is one already, UserError if the directory can't be written.
        """
        if self.exists:
            raise VaultError(
                f"there is a vault in {self.path} already", "name another directory with --state"
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)  # also one that was there: sizes and times of files tell
            self._write(
                {
                    "format": FORMAT,
                    "server": server,
                    "new": new,
                    "fingerprint": keys.fingerprint.hex(),
                    "key": _seal(keys.root, password, rng),
                }
            )
        except OSError as error:
            raise UserError(f"can't write to {self.path}: {error.strerror}") from None

    @property
    def has_room(self) -> bool:
        """Whether the disk has room for more than a little, as far as the kernel says."""
        facts = os.statvfs(self.path)
        return facts.f_bavail * facts.f_frsize > _LITTLE

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self._read()["server"])

    @property
    def fingerprint(self) -> bytes:
        """Of the vault this directory belongs to."""
        return bytes.fromhex(self._read()["fingerprint"])

    @property
    def needs_password(self) -> bool:
        """Whether the root key is sealed with a password."""
        return "sealed" in self._read()["key"]

    def unlock(self, password: str | None) -> VaultKeys:
        """The vault's keys; UserError when the password is wrong."""
        fields = self._read()
        try:
            keys = VaultKeys(_open(fields["key"], password))
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None
        if keys.fingerprint.hex() != fields["fingerprint"]:
            raise VaultError(f"the key in {self.path} is not the key of its vault")
        return keys

    def set_server(self, server: str) -> None:
        """Point the vault at another address of its server."""
        self._write({**self._read(), "server": server})

    def change_keys(
        self, keys: VaultKeys, password: str | None, wallet: Path, rng: Callable[[int], bytes]
    ) -> None:
        """Make this the state of another vault, whose wallet is that one; all or nothing."""
        old = self.wallet
        change = {
            "fingerprint": keys.fingerprint.hex(),
            "key": _seal(keys.root, password, rng),
            "wallet": wallet.name,
        }
        self._write({**self._read(), **change})
        old.unlink(missing_ok=True)
        self.cache.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the vault; AlreadyInUse when another process does."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyInUse(
                    f"the vault in {self.path} is in use by another process",
                    "it is mounted already, or another command is running; try hpkvfs status",
                ) from None
            yield
        finally:
            os.close(fd)

    def _read(self) -> dict[str, Any]:
        try:
            fields: dict[str, Any] = json.loads(self._vault.read_text())
            found = fields["format"]
        except FileNotFoundError:
            raise NoState(
                f"there is no vault in {self.path}",
                "make one with hpkvfs init, or bring one back with hpkvfs recover",
            ) from None
        except OSError as error:
            raise VaultError(f"can't read {self._vault}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None
        if found != FORMAT:
            raise NewerFormat(
                f"{self.path} has format {found}, which this hpkvfs does not know",
                "install a newer hpkvfs",
            )
        if not fields.keys() >= _FIELDS:
            raise self._damaged()
        return fields

    def _damaged(self) -> VaultError:
        return VaultError(
            f"{self._vault} is damaged", "recover from your words into another --state"
        )

    def _write(self, fields: dict[str, Any]) -> None:
        temporary = self._vault.with_suffix(".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(fields, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._vault)
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def disk_trouble() -> Iterator[None]:
    """Say as an error of ours that this machine's disk refused something."""
    try:
        yield
    except OSError as error:
        raise disk_failure(error) from error


def disk_failure(error: OSError) -> VaultError:
    """What to say of a disk's refusal: DiskFull, or VaultError."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else VaultError
    return kind(
        f"the state directory cannot be written: {error.strerror}",
        "nothing is lost: make room on the disk, or see what is wrong with it",
    )


def _seal(root: bytes, password: str | None, rng: Callable[[int], bytes]) -> dict[str, Any]:
    if not password:
        return {"plain": root.hex()}
    salt = rng(16)
    cipher = ChaCha20Poly1305(_stretch(password, salt, **_SCRYPT))
    # the key is new with its salt, so the nonce may be constant
    return {**_SCRYPT, "salt": salt.hex(), "sealed": cipher.encrypt(bytes(12), root, None).hex()}


def _open(key: dict[str, Any], password: str | None) -> bytes:
    if "plain" in key:
        return bytes.fromhex(key["plain"])
    if not password:
        raise UserError("the vault is locked with a password", "give it with --password-file")
    stretched = _stretch(password, bytes.fromhex(key["salt"]), key["n"], key["r"], key["p"])
    try:
        return ChaCha20Poly1305(stretched).decrypt(bytes(12), bytes.fromhex(key["sealed"]), None)
    except InvalidTag:
        raise UserError(
            "the password is wrong", "the words still open the vault: hpkvfs recover"
        ) from None


def _stretch(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(password.encode())
