"""The answer to the kernel's first request, with what libfuse leaves out of it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hpkvfs.handshake import ATOMIC_O_TRUNC, HANDLE_KILLPRIV_V2, mounted, promises, promising


def request(flags: int, opcode: int = 26) -> bytes:
    """An INIT of protocol 7.38, as the kernel sends it."""
    head = struct.pack("=IIQQIIII", 104, opcode, 2, 0, 0, 0, 0, 0)
    return head + struct.pack("=IIII", 7, 38, 131_072, flags) + bytes(48)


def answer(flags: int) -> bytes:
    """As libfuse answers it."""
    return struct.pack("=IiQIIII", 80, 0, 2, 7, 38, 131_072, flags) + bytes(range(48))


def test_the_promise_is_made_to_a_kernel_that_offers_it_only() -> None:
    assert promises(request(0xFFFF_FFFF)) == HANDLE_KILLPRIV_V2
    assert promises(request(0xFFFF_FFFF & ~HANDLE_KILLPRIV_V2)) == 0


@pytest.mark.parametrize("raw", [b"", request(0)[:40], request(0xFFFF_FFFF, opcode=1)])
def test_a_first_request_that_is_not_init_is_refused(raw: bytes) -> None:
    with pytest.raises(OSError, match="not INIT"):
        promises(raw)


def test_the_answer_has_the_promise_and_is_else_what_libfuse_said() -> None:
    assert promising(answer(0x30), HANDLE_KILLPRIV_V2) == answer(0x30 | HANDLE_KILLPRIV_V2)
    assert promising(answer(0x30), 0) == answer(0x30)


def test_no_file_is_truncated_by_opening_it() -> None:
    """It would come back longer than it was left, if another program was writing to it."""
    assert promising(answer(0x30 | ATOMIC_O_TRUNC), 0) == answer(0x30)


def test_an_error_is_handed_on_as_it_is() -> None:
    error = struct.pack("=IiQ", 16, -71, 2)
    assert promising(error, HANDLE_KILLPRIV_V2) == error


def test_what_cannot_be_mounted_so_is_left_to_libfuse(tmp_path: Path) -> None:
    assert mounted(str(tmp_path / "none"), {"fsname=test"}) is None
