"""Small files, whole, durable and only their owner's before anyone relies on them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_new(path: Path, content: bytes) -> None:
    """A new file of mode 0600, durable but for its name (see `sync`); FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def prepare(path: Path, content: bytes) -> None:
    """What `publish` will make the file of this name, durably; instead of what was prepared."""
    temporary = prepared(path)
    temporary.unlink(missing_ok=True)
    write_new(temporary, content)
    sync(path.parent)


def publish(path: Path) -> None:
    """A new file that is there whole and durable, or not at all; FileExistsError."""
    os.link(prepared(path), path)  # unlike a rename it never replaces
    prepared(path).unlink()
    sync(path.parent)


def prepared(path: Path) -> Path:
    """Where it waits for that."""
    return path.with_name(f"{path.name}.new")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait for, and hold, the directory against others who lock it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make the names in a directory durable, or what is in a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
