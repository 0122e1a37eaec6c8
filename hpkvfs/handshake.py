"""Mounting with an answer to INIT, the kernel's first request, that libfuse 3.14 cannot give.

FUSE_HANDLE_KILLPRIV_V2 is added: a kernel that was promised that we take set-uid bits and
capabilities from a file that changes does not ask for `security.capability` before each write
(hpkvfs/fs/inodes.py keeps it).

FUSE_ATOMIC_O_TRUNC is taken out. With it and the writeback cache, when one program opens a file
with O_TRUNC while another writes to it, Linux (6.18 at least) can hand over pages from before the
truncation after it: the file is longer below than the kernel says, and has the old bytes, which
shows after the next mount (6 of 120 runs of four programs on a bare pass-through; 0 of 120 of
truncate(2), which is what the kernel sends without the flag).

libfuse answers INIT alone. So:

    fusermount3 mounts, and passes us the kernel's descriptor
    libfuse is given one end of a socket pair, as a mountpoint of the name /dev/fd/N
    INIT goes from the kernel to our end; what libfuse answers comes back there
    `settle` changes its flags, answers the kernel, and puts its descriptor in the socket's place

Invariant: no more than that one message goes through the socket, in either direction: `settle`
is called before each request that is waited for, and INIT is answered before the second.
"""

from __future__ import annotations

import array
import logging
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

log = logging.getLogger(__name__)

HANDLE_KILLPRIV_V2: Final = 1 << 28
ATOMIC_O_TRUNC: Final = 1 << 3
_REQUEST: Final = struct.Struct("=IIQQIIIIIIII")  # fuse_in_header, fuse_init_in up to its flags
_ANSWER: Final = struct.Struct("=IiQIIII")  # fuse_out_header, fuse_init_out up to its flags
_INIT: Final = 26
_BUFFER: Final = 1 << 16
_COMMAND: Final = "fusermount3"


class Handshake:
    """A mount whose INIT is on its way; `path` is what libfuse is to take for its mountpoint."""

    def __init__(self, directory: str, kernel: int) -> None:
        """`kernel`: the descriptor of a filesystem just mounted on a directory; ours from now on.

        OSError, and it is closed and the mount gone, when the kernel does not say INIT.
        """
        self._directory = directory
        self._kernel = kernel
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._served = theirs.detach()
        self.path = f"/dev/fd/{self._served}"
        self._settled = False
        try:
            request = os.read(kernel, _BUFFER)
            self._promises = promises(request)
            self._ours.send(request)
        except OSError:
            os.close(self._served)
            self.close()
            raise

    def settle(self) -> None:
        """Hand libfuse's answer on, once it is there; from then on libfuse has the kernel."""
        if self._settled:
            return
        try:
            answer = self._ours.recv(_BUFFER, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._settled = True
        try:
            os.write(self._kernel, promising(answer, self._promises))
        except OSError as error:  # unmounted meanwhile; libfuse will find out
            log.info("INIT was not answered: %s", error.strerror)
        os.dup2(self._kernel, self._served, inheritable=False)

    def close(self) -> None:
        """Take the mount away, unless that has happened; after libfuse closed its descriptor."""
        gone = _is_unmounted(self._kernel)
        # first, since a synchronous end of the mount would ask us
        os.close(self._kernel)
        self._ours.close()
        if not gone:
            with suppress(OSError):
                subprocess.run(
                    [_COMMAND, "-u", "-q", "-z", "--", self._directory], check=False,
                    stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip


def mounted(directory: str, options: Iterable[str]) -> Handshake | None:
    """Mount on a directory; None, and nothing is mounted, when that fails for any reason."""
    try:
        return Handshake(directory, _mount(directory, options))
    except OSError as error:
        log.info("mounted by libfuse: %s", error)
        return None


def promises(request: bytes) -> int:
    """The flags to add to the answer to an INIT: those that the kernel offers."""
    if len(request) < _REQUEST.size:
        raise OSError("the kernel's first request is not INIT")
    _, opcode, *_, flags = _REQUEST.unpack_from(request)
    if opcode != _INIT:
        raise OSError("the kernel's first request is not INIT")
    return int(flags) & HANDLE_KILLPRIV_V2


def promising(answer: bytes, flags: int) -> bytes:
    """An answer to INIT with more flags, and without ATOMIC_O_TRUNC; one that reports an error
    stays as it is."""
    if len(answer) < _ANSWER.size:
        return answer
    *head, given = _ANSWER.unpack_from(answer)
    return _ANSWER.pack(*head, (given | flags) & ~ATOMIC_O_TRUNC) + answer[_ANSWER.size :]


def _mount(directory: str, options: Iterable[str]) -> int:
    """Have fusermount3 mount, as libfuse does for who is not root; the kernel's descriptor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [_COMMAND, "-o", ",".join(sorted(options)), "--", directory], check=False,
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
        )  # fmt: skip
        theirs.close()
        if done.returncode:
            raise OSError(f"{_COMMAND} exited with {done.returncode}")
        size = socket.CMSG_SPACE(array.array("i").itemsize)
        _, control, _, _ = ours.recvmsg(1, size, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return array.array("i", data)[0]
    raise OSError(f"{_COMMAND} passed no descriptor")


def _is_unmounted(kernel: int) -> bool:
    poll = select.poll()
    poll.register(kernel, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
