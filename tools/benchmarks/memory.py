"""Peak memory of a mount whose tree is larger than what it may keep in memory.

Makes a tree of a million inodes (HPKV_BENCH_INODES) in directories of a thousand, through the
operations that the FUSE adapter calls, at a server of its own; mounts it with --memory
(HPKV_BENCH_MEMORY, 256 MiB), lists all of it with every inode, then looks up names at random.
Beside them is one directory of 100,000 files (HPKV_BENCH_WIDE), which is listed while names come
and go in it.

    built_mib     what the process that made the tree had at most, publishing included
    mounted_mib   resident memory of the mounting process when it was mounted,
    walked_mib    its peak when all was listed,
    wide_seconds  how long the wide directory took to be listed, with 2,000 changes meanwhile,
    wide_stable   and whether each of its names that stayed was listed just once
    peak_mib      and when names were looked up at random, too
    within        whether that is within --memory
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import trio

from hpkvfs.fs.backend import run as perform
from hpkvfs.net.transport import TcpDialer
from hpkvfs.session import Options, open_session
from hpkvfs.state import StateDirectory
from hpkvfs.volume.items import ROOT_INO
from hpkvfs.volume.keys import VaultKeys, make_words
from tools.benchmarks.local import Server, local_server

INODES: Final = int(os.environ.get("HPKV_BENCH_INODES", "1000000"))
MEMORY: Final = int(os.environ.get("HPKV_BENCH_MEMORY", "256"))
WIDE: Final = int(os.environ.get("HPKV_BENCH_WIDE", "100000"))
IN_A_DIRECTORY: Final = 1_000
PUBLISHED_AT_ONCE: Final = 20_000
RANDOM_NAMES: Final = 5_000
TOKENS: Final = 30_000_000


def run(as_json: bool) -> dict[str, object]:
    """Figures as above."""

    def tell(message: str) -> None:
        if not as_json:
            print(time.strftime("%H:%M:%S"), message, file=sys.stderr)

    with (
        tempfile.TemporaryDirectory(prefix="hpkvfs-memory-") as base,
        local_server(Path(base) / "server") as server,
    ):
        state = Path(base) / "state"
        start = time.monotonic()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            built, blobs = pool.apply(_build, (state, server, server.voucher(TOKENS)))
        seconds = time.monotonic() - start
        tell(f"{INODES + WIDE:,} inodes made, {blobs:,} blobs")
        figures = _walk(state, Path(base) / "mnt", tell)
    return {
        "inodes": INODES,
        "blobs": blobs,
        "build_seconds": round(seconds),
        "built_mib": built,
        **figures,
        "memory_mib": MEMORY,
        "within": figures["peak_mib"] <= MEMORY,
    }


def _build(state: Path, server: Server, voucher: str) -> tuple[float, int]:
    """Make the tree; (peak MiB of this process, blobs that live)."""
    blobs = trio.run(_fill, StateDirectory(state), server, voucher)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1), blobs


async def _fill(state: StateDirectory, server: Server, voucher: str) -> int:
    keys = VaultKeys.from_words(make_words(12, secrets.token_bytes))
    state.create(keys, server.address, None, secrets.token_bytes, new=True)
    way = TcpDialer(server.host, server.port)
    options = Options(memory=MEMORY << 20)
    async with open_session(
        state, keys, way, options, clock=time.time_ns, rng=secrets.token_bytes
    ) as session:
        await session.connect()
        await session.redeem(voucher)
        fs = session.fs
        made = 0
        for name, children in _directories():
            make = partial(fs.make, ROOT_INO, name, 0o40755, 0, 0)
            directory = (await perform(session, make)).ino
            for child in range(children):
                make = partial(fs.make, directory, b"file %d" % child, 0o100644, 0, 0)
                await perform(session, make)
                made += 1
                if made % PUBLISHED_AT_ONCE == 0:
                    await session.publish()
        await session.publish()
        return int(session.status()["blobs_live"])


def _directories() -> Iterator[tuple[bytes, int]]:
    """Name of each directory, and how many files are in it."""
    for number in range(INODES // IN_A_DIRECTORY):
        yield b"d%d" % number, IN_A_DIRECTORY - 1
    yield b"wide", WIDE


def _walk(state: Path, directory: Path, tell: Callable[[str], None]) -> dict[str, float]:
    directory.mkdir()
    command = [sys.executable, "-m", "hpkvfs", "--state", str(state), "mount", "--foreground"]
    process = subprocess.Popen([*command, "--memory", str(MEMORY), str(directory)],
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        while not directory.is_mount():
            if process.poll() is not None:
                raise RuntimeError("it does not mount")
            time.sleep(0.1)
        figures = {"mounted_mib": _mib(process.pid, "VmRSS")}
        start, seen = time.monotonic(), 0
        for entry in os.scandir(directory):
            seen += 1
            for below in os.scandir(entry.path):
                below.stat(follow_symlinks=False)
                seen += 1
        figures["walk_seconds"] = round(time.monotonic() - start, 1)
        figures["walked_mib"] = _mib(process.pid, "VmHWM")
        tell(f"{seen:,} listed: {figures}")
        figures |= _list_wide(directory / "wide")
        choice = random.Random(1)
        for _ in range(RANDOM_NAMES):
            number = choice.randrange(INODES // IN_A_DIRECTORY)
            os.stat(directory / f"d{number}" / f"file {choice.randrange(IN_A_DIRECTORY - 1)}")
        figures["peak_mib"] = _mib(process.pid, "VmHWM")
        return figures
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(directory)], check=False)
        process.wait(120)


def _list_wide(directory: Path) -> dict[str, float]:
    """List a directory while others add and take away; how long it took, and whether it was right.

    The files with the lowest numbers go, and as many others come, from the beginning on.
    """
    changes = min(1_000, WIDE // 10)
    stay = {f"file {number}" for number in range(changes, WIDE)}
    start, seen = time.monotonic(), []
    with os.scandir(directory) as listing:
        for number, entry in enumerate(listing):
            seen.append(entry.name)
            if number < changes:
                (directory / f"file {number}").unlink()
                (directory / f"comes {number}").touch()
    seconds = time.monotonic() - start
    stayed = [name for name in seen if name in stay]
    stable = len(stayed) == len(stay) and len(seen) == len(set(seen))
    return {"wide_seconds": round(seconds, 1), "wide_stable": stable}


def _mib(pid: int, what: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.split(f"{what}:")[1].split()[0]) / 1024, 1)
