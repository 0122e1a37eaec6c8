"""What programs do, on hpkvfs and on its peers side by side: seconds, CPU, memory, blobs.

    hpkvfs        with a hpkvd of its own on loopback
    passthrough   pyfuse3 with a directory behind it: what Python in the way costs at least
    gocryptfs, cryfs, s3ql   as Debian has them, over a local directory

Each row is run on all of them before the next one, in an order that rotates, `ROUNDS` times;
the median counts. Between two of them nothing is left to do: hpkvfs publishes and s3ql uploads
what the row before left (not in its seconds, but in its CPU).

Needs root, and the peers: apt-get install gocryptfs cryfs mmdebstrap; s3ql is not in Debian 12,
so the one of Debian 13 is installed into /var/lib/hpkvfs-bench/trixie by the first run (200 MB).
A peer that can't be had is left out, and its geomean with it.

    geomean_vs_PEER   geometric mean over the rows of PEER's seconds by ours: above 1 we are faster
    read_vs_passthrough   our seconds by the pass-through's, reading what the kernel has cached
    rows              ROW: {PEER: {seconds, cpu, server_cpu, peak_mib, blobs, amplification}}
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tools.benchmarks.local import Server, end_with_parent, local_server

MIB: Final = 1 << 20
BLOB: Final = 16_433
ROUNDS: Final = int(os.environ.get("HPKV_BENCH_ROUNDS", "2"))
BIG: Final = int(os.environ.get("HPKV_BENCH_MIB", "256")) * MIB
SMALL_FILES: Final = 2_000
TRANSACTIONS: Final = 1_000
GIT_FILES: Final = 1_000
TAR_FILES: Final = 3_000
RANDOM_READS: Final = 4_000
APPENDS: Final = 200
TOKENS: Final = 30_000_000
TRIXIE: Final = Path("/var/lib/hpkvfs-bench/trixie")
ENVIRONMENT: Final = {
    **os.environ,
    "CRYFS_FRONTEND": "noninteractive",
    "CRYFS_NO_UPDATE_CHECK": "true",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{f"GIT_{who}_{what}": f"bench{'@localhost' if what == 'EMAIL' else ''}"
       for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}  # fmt: skip


Command = Sequence[str | Path]

# -- peers -----------------------------------------------------------------------------------


@dataclass
class Peer:
    """A mounted filesystem: where, whose processes, and how to have it finish its work."""

    name: str
    directory: Path
    process: subprocess.Popen[bytes]
    settle: Callable[[], None]
    server: Server | None = None
    server_pid: int = 0

    def cpu(self) -> float:
        """Seconds of user and system time that its processes used."""
        return sum(map(_cpu, _family(self.process.pid)))

    def server_cpu(self) -> float:
        """The same of its server."""
        return _cpu(self.server_pid) if self.server_pid else 0.0

    def peak(self, *, reset: bool = False) -> float:
        """MiB of memory at the highest since the last reset."""
        total = 0
        for pid in _family(self.process.pid):
            if reset:
                Path(f"/proc/{pid}/clear_refs").write_text("5")
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else 0
        return total / 1024

    def blobs(self) -> int:
        """Blobs that its server holds."""
        return json.loads(_hpkvd("status", self.server))["blobs"] if self.server else 0


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(other for child in children for other in _family(int(child)))]


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _hpkvd(command: str, server: Server) -> str:
    arguments = [sys.executable, "-m", "hpkvd", command, "--data", str(server.data), "--json"]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def _run(*command: str | Path, **options: Any) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL,
                   env=ENVIRONMENT, **options)  # fmt: skip


@contextmanager
def _mounted(command: Command, directory: Path, log: Path) -> Iterator[Any]:
    """A filesystem that its process serves in the foreground until it is unmounted."""
    directory.mkdir(exist_ok=True)
    with log.open("ab") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said,
                                   stdin=subprocess.DEVNULL, env=ENVIRONMENT,
                                   preexec_fn=end_with_parent)  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not directory.is_mount():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} does not mount: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield process
    finally:
        subprocess.run(["umount", str(directory)], check=False, capture_output=True)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            subprocess.run(["umount", "-l", str(directory)], check=False)
            process.kill()
            process.wait()


@contextmanager
def _hpkvfs(base: Path) -> Iterator[Peer]:
    with local_server(base / "server") as server:
        client: list[str | Path] = [sys.executable, "-m", "hpkvfs", "--state", base / "state"]
        _run(*client, "init", "--server", server.address, "--no-password",
             "--words-file", base / "words")  # fmt: skip
        (base / "voucher").write_text(server.voucher(TOKENS))
        _run(*client, "redeem", "--voucher-file", base / "voucher")
        command = [*client, "mount", "--foreground", base / "mnt"]
        with _mounted(command, base / "mnt", base / "log") as process:
            settle = _settler(client)
            yield Peer("hpkvfs", base / "mnt", process, settle, server, server.pid)


def _settler(client: Command) -> Callable[[], None]:
    return lambda: _run(*client, "sync")


@contextmanager
def _passthrough(base: Path) -> Iterator[Peer]:
    (base / "data").mkdir()
    script = Path(__file__).with_name("passthrough.py")
    command: list[str | Path] = [sys.executable, script, base / "data", base / "mnt"]
    with _mounted(command, base / "mnt", base / "log") as process:
        yield Peer("passthrough", base / "mnt", process, _nothing)


@contextmanager
def _gocryptfs(base: Path) -> Iterator[Peer]:
    (base / "data").mkdir()
    (base / "password").write_text("benchmark\n")
    options: list[str | Path] = ["-q", "-passfile", base / "password"]
    _run("gocryptfs", "-init", "-scryptn", "10", *options, base / "data")
    command: list[str | Path] = ["gocryptfs", "-fg", *options, base / "data", base / "mnt"]
    with _mounted(command, base / "mnt", base / "log") as process:
        yield Peer("gocryptfs", base / "mnt", process, _nothing)


@contextmanager
def _cryfs(base: Path) -> Iterator[Peer]:
    (base / "data").mkdir()
    (base / "mnt").mkdir()
    # it asks for its password on a pipe: made first, then mounted in the foreground
    script = f"echo benchmark | exec cryfs -f {base}/data {base}/mnt"
    with _mounted(["sh", "-c", script], base / "mnt", base / "log") as process:
        yield Peer("cryfs", base / "mnt", process, _nothing)


@contextmanager
def _s3ql(base: Path) -> Iterator[Peer]:
    _install_s3ql()
    inside = TRIXIE / f"bench-{os.getpid()}-{base.name}"
    inside.mkdir()
    here = Path("/") / inside.name
    try:
        with _devices():
            (inside / "data").mkdir()
            chroot: list[str | Path] = ["chroot", TRIXIE]
            places: list[str | Path] = ["--cachedir", here / "cache", "--log", "none"]
            _run(*chroot, "mkfs.s3ql", "--plain", *places, f"local://{here}/data",
                 stderr=subprocess.DEVNULL)  # fmt: skip
            (inside / "mnt").mkdir()
            command = [*chroot, "mount.s3ql", "--fg", "--allow-root", *places,
                       f"local://{here}/data", here / "mnt"]  # fmt: skip
            with _mounted(command, inside / "mnt", base / "log") as process:
                flush: list[str | Path] = [*chroot, "s3qlctrl", "flushcache", here / "mnt"]
                yield Peer("s3ql", inside / "mnt", process, lambda: _run(*flush))
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _install_s3ql() -> None:
    if (TRIXIE / "usr/bin/mount.s3ql").exists():
        return
    TRIXIE.parent.mkdir(parents=True, exist_ok=True)
    _run("mmdebstrap", "--variant=minbase", "--include=s3ql,fuse3", "trixie", TRIXIE,
         "http://deb.debian.org/debian", stderr=subprocess.DEVNULL)  # fmt: skip


@contextmanager
def _devices() -> Iterator[None]:
    """/dev and /proc inside the Debian that has s3ql."""
    places = [("/dev", TRIXIE / "dev"), ("/proc", TRIXIE / "proc")]
    for source, place in places:
        _run("mount", "--bind", source, place)
    try:
        yield
    finally:
        for _, place in places:
            subprocess.run(["umount", "-l", str(place)], check=False)


def _nothing() -> None:
    pass


PEERS: Final = {
    "hpkvfs": _hpkvfs,
    "passthrough": _passthrough,
    "gocryptfs": _gocryptfs,
    "cryfs": _cryfs,
    "s3ql": _s3ql,
}

# -- rows ------------------------------------------------------------------------------------

Row = Callable[[Path, Path], int]
"""Does it in a directory, given one with what can be prepared; bytes of data that it writes."""


def _sequential_write(here: Path, made: Path) -> int:
    piece = random.Random(1).randbytes(MIB)
    with (here / "big").open("wb", buffering=0) as file:
        for number in range(BIG // MIB):
            file.write(number.to_bytes(8, "big") + piece[8:])
    return BIG


def _sequential_read(here: Path, made: Path) -> int:
    with (here / "big").open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
    return 0


def _sequential_read_uncached(here: Path, made: Path) -> int:
    _drop_pages(here / "big")
    return _sequential_read(here, made)


def _drop_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _places() -> Iterator[int]:
    choice = random.Random(2)
    return (4_096 * choice.randrange(BIG // 4_096) for _ in range(RANDOM_READS))


def _random_read(here: Path, made: Path) -> int:
    _drop_pages(here / "big")
    with (here / "big").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in _places():
            assert len(os.pread(file.fileno(), 4_096, place)) == 4_096
    return 0


def _random_overwrite(here: Path, made: Path) -> int:
    page = random.Random(3).randbytes(4_096)
    with (here / "big").open("r+b", buffering=0) as file:
        for place in _places():
            os.pwrite(file.fileno(), page, place)
        os.fsync(file.fileno())
    return 4_096 * RANDOM_READS


def _create_small(here: Path, made: Path) -> int:
    content = random.Random(4).randbytes(1_024)
    for directory in range(20):
        (here / f"small{directory}").mkdir()
    for number in range(SMALL_FILES):
        with open(here / f"small{number % 20}" / f"file{number}", "wb", buffering=0) as file:
            file.write(content)
    return 1_024 * SMALL_FILES


def _stat_all(here: Path, made: Path) -> int:
    assert sum(entry.stat().st_size > 0 for d in range(20) for entry in os.scandir(
        here / f"small{d}")) == SMALL_FILES  # fmt: skip
    return 0


def _append_fsync(here: Path, made: Path) -> int:
    with (here / "log").open("ab", buffering=0) as file:
        for _ in range(APPENDS):
            file.write(b"x" * 200)
            os.fsync(file.fileno())
    return 200 * APPENDS


def _sqlite(here: Path, made: Path) -> int:
    connection = sqlite3.connect(here / "db", isolation_level=None)
    connection.execute("create table t (id integer primary key, value text)")
    for number in range(TRANSACTIONS):
        connection.execute("insert into t (value) values (?)", (f"value number {number}" * 5,))
    connection.close()
    return 100 * TRANSACTIONS


def _git(*arguments: str) -> Row:
    def row(here: Path, made: Path) -> int:
        repository = here / "repository"
        _run("git", "-C", repository, *arguments)
        return 0

    return row


def _git_add(here: Path, made: Path) -> int:
    _run("git", "-C", here / "repository", "add", ".")
    return 0


def _untar(here: Path, made: Path) -> int:
    _run("tar", "-xf", made / "tree.tar", "-C", here)
    return (made / "tree.tar").stat().st_size


def _remove(here: Path, made: Path) -> int:
    _run("rm", "-rf", here / "tree")
    return 0


ROWS: Final[dict[str, Row]] = {
    "write 256 MiB": _sequential_write,
    "read 256 MiB, cached": _sequential_read,
    "read 256 MiB, not cached": _sequential_read_uncached,
    "read 4 KiB at random": _random_read,
    "overwrite 4 KiB at random": _random_overwrite,
    "create 2,000 small files": _create_small,
    "stat them": _stat_all,
    "append 200 B, fsync": _append_fsync,
    "sqlite, 1,000 transactions": _sqlite,
    "git add of 1,000 files": _git_add,
    "git commit": _git("commit", "-qm", "all"),
    "git status": _git("status", "--porcelain"),
    "untar 3,000 files": _untar,
    "rm -rf of them": _remove,
}
NEEDS: Final = {
    "read 256 MiB, cached": "write 256 MiB",
    "read 256 MiB, not cached": "write 256 MiB",
    "read 4 KiB at random": "write 256 MiB",
    "overwrite 4 KiB at random": "write 256 MiB",
    "stat them": "create 2,000 small files",
    "git commit": "git add of 1,000 files",
    "git status": "git add of 1,000 files",
    "rm -rf of them": "untar 3,000 files",
}


def _prepare(made: Path) -> None:
    """A tree of small files, as sources are, and a tar of it."""
    choice = random.Random(5)
    tree = made / "tree"
    for number in range(TAR_FILES):
        directory = tree / f"d{number % 60}" / f"e{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        size = min(int(choice.expovariate(1 / 6_000)), 200_000)
        (directory / f"f{number}").write_bytes(choice.randbytes(size))
    with tarfile.open(made / "tree.tar", "w") as tar:
        tar.add(tree, "tree")
    repository = made / "repository"
    for number in range(GIT_FILES):
        directory = repository / f"d{number % 40}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}.txt").write_bytes(
            choice.randbytes(2_000).hex().encode()[: choice.randrange(200, 4_000)]
        )


# -- measuring -------------------------------------------------------------------------------

Figures = dict[str, float]


def run(as_json: bool, only: Sequence[str] = ()) -> dict[str, object]:
    """The figures; `only`: names of peers and beginnings of rows, all when there are none."""
    if os.geteuid() != 0:
        raise SystemExit("tools/bench fs mounts its peers: run it as root")
    wanted = [row for row in ROWS if any(row.startswith(word) for word in only)] or list(ROWS)
    wanted = [row for row in ROWS if row in wanted or row in {NEEDS.get(w) for w in wanted}]
    names = [peer for peer in PEERS if peer in only] or list(PEERS)
    found: dict[str, dict[str, list[Figures]]] = {row: {} for row in wanted}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is undone
    _sweep()
    for number in range(ROUNDS):
        prefix = f"hpkvfs-fs-{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix) as base, ExitStack() as stack:
            made = Path(base) / "made"
            made.mkdir()
            _prepare(made)
            peers = [p for name in names if (p := _enter(stack, name, Path(base)))]
            for row in wanted:
                peers.append(peers.pop(0))
                for peer in peers:
                    _tell(f"round {number + 1}: {row}: {peer.name}", as_json)
                    found[row].setdefault(peer.name, []).append(_measure(peer, row, made))
    rows = {row: {peer: _median(runs) for peer, runs in by.items()} for row, by in found.items()}
    if not as_json:
        _show(rows, names)
    return {**_summary(rows, names), "rows": rows if as_json else len(rows)}


_MINE: Final = re.compile(
    rf"({re.escape(tempfile.gettempdir())}/hpkvfs-fs-|{re.escape(str(TRIXIE))}/bench-)(\d+)-[^/]*"
)


def _sweep() -> None:
    """Take away what an earlier run left behind that was killed: mounts, then directories."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed(mounts):
        if _is_left_behind(place):
            subprocess.run(["umount", "-l", place], check=False)
    bases = [*Path(tempfile.gettempdir()).glob("hpkvfs-fs-*"), *TRIXIE.glob("bench-*")]
    for base in bases:
        if _is_left_behind(str(base)):
            shutil.rmtree(base, ignore_errors=True)


def _is_left_behind(place: str) -> bool:
    """Whether it is, or is in, a directory of a run whose process is gone."""
    mine = _MINE.match(place)
    return mine is not None and not Path("/proc", mine[2]).exists()


def _tell(message: str, quiet: bool) -> None:
    if not quiet:
        print(message, file=sys.stderr)


def _enter(stack: ExitStack, name: str, base: Path) -> Peer | None:
    (base / name).mkdir()
    try:
        return stack.enter_context(PEERS[name](base / name))
    except (FileNotFoundError, subprocess.CalledProcessError, RuntimeError) as error:
        print(f"without {name}: {error}", file=sys.stderr)
        return None


def _measure(peer: Peer, row: str, made: Path) -> Figures:
    here = peer.directory
    if row.startswith("git add"):
        shutil.copytree(made / "repository", here / "repository")
        _run("git", "init", "-q", here / "repository")
    peer.settle()
    if row.endswith("MiB, cached"):
        _sequential_read(here, made)  # a kernel takes back what was long not used
    blobs, cpu, server_cpu = peer.blobs(), peer.cpu(), peer.server_cpu()
    peer.peak(reset=True)
    start = time.perf_counter()
    size = ROWS[row](here, made)
    seconds = time.perf_counter() - start
    peer.settle()
    stored = peer.blobs() - blobs
    figures = {
        "seconds": round(seconds, 4),
        "cpu": round(peer.cpu() - cpu, 2),
        "peak_mib": round(peer.peak(), 1),
    }
    if peer.server:
        figures["server_cpu"] = round(peer.server_cpu() - server_cpu, 2)
        figures["blobs"] = stored
        if size:
            figures["amplification"] = round(stored * BLOB / size, 2)
    return figures


def _median(runs: list[Figures]) -> Figures:
    return {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}


def _summary(rows: dict[str, dict[str, Figures]], names: Sequence[str]) -> dict[str, object]:
    figures: dict[str, object] = {}
    for peer in names:
        ratios = [by[peer]["seconds"] / by["hpkvfs"]["seconds"]
                  for by in rows.values() if peer in by and "hpkvfs" in by]  # fmt: skip
        if peer != "hpkvfs" and ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            figures[f"geomean_vs_{peer}"] = round(mean, 2)
    cached = rows.get("read 256 MiB, cached", {})
    if {"hpkvfs", "passthrough"} <= set(cached):
        ratio = cached["hpkvfs"]["seconds"] / cached["passthrough"]["seconds"]
        figures["read_vs_passthrough"] = round(ratio, 2)
    return figures


def _show(rows: dict[str, dict[str, Figures]], names: Sequence[str]) -> None:
    table = Table(title="seconds (CPU seconds, peak MiB)", title_justify="left")
    table.add_column("row")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("blobs", justify="right")
    table.add_column("written, times", justify="right")
    for row, by in rows.items():
        ours = by.get("hpkvfs", {})
        cells = [_cell(by[name]) if name in by else "" for name in names]
        extra = (str(ours.get("blobs", "")), str(ours.get("amplification", "")))
        table.add_row(row, *cells, *extra)
    Console(width=150).print(table)


def _cell(figures: Figures) -> str:
    return f"{figures['seconds']:.3f} ({figures['cpu']:.1f}, {figures['peak_mib']:.0f})"
