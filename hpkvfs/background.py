"""Mounting in the background: a process of its own, and what it tells the one that started it.

The child is `hpkvfs ... mount --foreground --ready-fd N`, in a session of its own, with its
messages going to the log in the state directory. Through descriptor N it says, in lines of
JSON, {"notice": TEXT} and {"phase": TEXT} any number of times, then {"ready": true} or
{"error": {...}}. The password goes through another pipe, since arguments and environment can
be seen by others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from hpkvfs.control import decode_error, encode, encode_error
from hpkvfs.errors import HpkvError, UserError

MAX_LOG: Final = 1 << 20


class Herald:
    """The child's end: tells the parent how it goes; nobody, once it is ready."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._pipe: Any = os.fdopen(fd, "wb", buffering=0)

    def notice(self, text: str) -> None:
        """Something the user should know."""
        self._tell({"notice": text})

    def phase(self, text: str) -> None:
        """How far it got, to be shown until something else is."""
        self._tell({"phase": text})

    def ready(self) -> None:
        """The filesystem is mounted."""
        self._tell({"ready": True})
        self._close()

    def failed(self, error: HpkvError) -> None:
        """The filesystem will not be mounted."""
        self._tell({"error": encode_error(error)})
        self._close()

    def _tell(self, message: dict[str, Any]) -> None:
        if self._pipe is None:
            return
        try:
            self._pipe.write(encode(message))
        except OSError:
            self._close()  # the parent is gone; the mount is not its to keep

    def _close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def start(
    arguments: Sequence[str],
    directory: Path,
    password: str | None,
    log: Path,
    notice: Callable[[str], None],
    phase: Callable[[str], None],
) -> int:
    """Run `hpkvfs ARGUMENTS -- DIRECTORY` until it is mounted; its process id.

    HpkvError as the child raised it.
    """
    told, tell = os.pipe()
    secret, give = os.pipe()
    descriptors = ["--ready-fd", str(tell)]
    if password is not None:
        descriptors += ["--password-fd", str(secret)]
    with _open_log(log) as errors:
        child = subprocess.Popen(
            # -P: with -m alone, modules in the user's current directory would come before ours
            [sys.executable, "-P", "-m", "hpkvfs", *arguments, *descriptors, "--", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=(tell,) if password is None else (tell, secret),
            start_new_session=True,
        )
    try:
        os.write(give, (password or "").encode())  # fits in the pipe: nobody has to read it
        for fd in (tell, secret, give):
            os.close(fd)
        with os.fdopen(told, "rb") as lines:
            for line in lines:
                if _is_ready(json.loads(line), notice, phase):
                    return child.pid
    except BaseException:
        child.terminate()
        raise
    raise HpkvError("the mounting process ended without a word", f"see {log}")


def _is_ready(
    message: dict[str, Any], notice: Callable[[str], None], phase: Callable[[str], None]
) -> bool:
    if "error" in message:
        raise decode_error(message["error"])
    if "notice" in message:
        notice(message["notice"])
    if "phase" in message:
        phase(message["phase"])
    return "ready" in message


def _open_log(path: Path) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        if path.exists() and path.stat().st_size > MAX_LOG:
            flags |= os.O_TRUNC
        return os.fdopen(os.open(path, flags, 0o600), "wb")
    except OSError as error:
        raise UserError(f"can't write to {path}: {error.strerror}") from None
