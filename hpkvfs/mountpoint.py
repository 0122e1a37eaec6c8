"""Where a filesystem is mounted: what a directory must be for it, and taking it away again."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hpkvfs.errors import UserError

log = logging.getLogger(__name__)

_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
STOP: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What ends a mount."""
BESIDE: Final = "hpkvfs-snapshot"
"""What a snapshot that is mounted beside its vault says it is mounted from."""
_MAKE_IT: Final = "make an empty directory to mount on"


def is_mounted(directory: Path, source: str = "") -> bool:
    """Whether a vault is mounted there, without a question to it: it would be one to ourselves.

    `source`: what it says it is mounted from; anything if empty.
    """
    with open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(b" - ")
            where = _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), fields.split()[4])
            kind, what = rest.split()[:2]
            if (kind, where) == (b"fuse.hpkvfs", os.fsencode(directory)):
                return source in ("", os.fsdecode(what))
    return False


@contextmanager
def mounting(directory: Path, is_mounted: Callable[[], bool]) -> Iterator[None]:
    """UserError when libfuse can't mount there; it has said why by then."""
    try:
        yield
    except RuntimeError as error:
        if is_mounted():
            raise
        log.error("%s", error)
        raise UserError(
            f"{directory} can't be mounted on", "the log in the state directory says why"
        ) from None


def detaching(directory: Path, *, force: bool = False) -> list[str]:
    """The command that unmounts as umount(8) does; with `force`, also what is in use."""
    return ["fusermount3", "-u", *["-z"] * force, "--", str(directory)]


def check_detached(directory: Path, code: int, said: bytes) -> None:
    """UserError unless that command did it; `said`: on standard error."""
    if code == 0:
        return
    text = said.decode(errors="replace").strip()
    log.warning("fusermount3: %s", text)
    if "busy" in text:
        raise UserError(
            f"{directory} is in use",
            f"end what uses it (fuser -vm {directory}), or leave with --force",
        )
    raise UserError(f"{directory} can't be unmounted", text)


def mount_point(directory: Path) -> Path:
    """The directory to mount on, made ready for it; UserError when it can't be."""
    path = directory.absolute()
    try:
        entries = os.listdir(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return _without_dead_mount(path)
        raise UserError(f"can't mount on {path}: {error.strerror}", _MAKE_IT) from None
    path = path.resolve()
    if path.is_mount():
        raise UserError(f"something is mounted on {path} already", "unmount it, or name another")
    if entries:
        raise UserError(f"{path} is not empty", "mount on an empty directory")
    return path


def _without_dead_mount(path: Path) -> Path:
    """Take away a mount whose process was killed."""
    done = subprocess.run(detaching(path, force=True), check=False, capture_output=True)
    if done.returncode:
        raise UserError(
            f"the process that had mounted {path} is gone, and its mount is in the way",
            f"fusermount3 -u {path}",
        )
    log.info("took away the dead mount on %s", path)
    return mount_point(path)
