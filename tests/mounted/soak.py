"""Random system calls on a real mount against a model, in lives that end with kill -9.

Client and server are the real commands. One thread makes system calls; another ends the life of
the mount at a moment of its own, and that of the server now and then, from which it comes back.
After each death the next mount must show

- every system call that returned: its record was in the redo log, and a process's death does not
  hurt what is there; the one under way whole, or not at all (a write may be cut short);
- of files that stay open (`Held`), whose pages the kernel keeps to itself: each page as it was at
  the last checkpoint (fsync, `hpkvfs sync`), or as a later write made it.

Then fsck finds nothing, and at the end the tokens and blobs of both sides are the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.commands import ENVIRONMENT, command
from tests.fs.model import Model, Thing
from tests.fs.play import Step, Tree, play_on_model
from tests.mounted.client import Client, Server

NAMES: Final = [b"a", b"b", b"c", b"d"]
HELD: Final = b"held"
HELD_FILES: Final = 4
HELD_SIZE: Final = 200_000
PAGE: Final = mmap.PAGESIZE
GONE: Final = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
TOKENS: Final = 50_000_000
RENAMEAT2: Final = ctypes.CDLL(None, use_errno=True).renameat2
AT_FDCWD: Final = -100


class Difference(AssertionError):
    """What was found is not what must be."""


class Death(Exception):
    """The mount is gone."""


@dataclass
class Held:
    """A file that stays open, what of it is safe, and what was written since."""

    path: bytes
    thing: Thing
    fd: int = -1
    memory: mmap.mmap | None = None
    safe: bytes = b""
    since: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        """Through the descriptor, or through the mapping."""
        self.since.append((offset, data))
        if self.memory is None:
            os.pwrite(self.fd, data, offset)
        else:
            self.memory[offset : offset + len(data)] = data
        _put(self.thing.data, offset, data)

    def checkpoint(self) -> None:
        """All of it is safe now."""
        self.safe, self.since = bytes(self.thing.data), []

    def adopt(self, found: bytes) -> None:
        """What a new mount has must be as in `safe`, each page perhaps later."""
        size = max([len(self.safe), *(at + len(data) for at, data in self.since)])
        states = [self.safe.ljust(size, b"\0")]
        for at, data in self.since:
            state = bytearray(states[-1])
            _put(state, at, data)
            states.append(bytes(state))
        if not len(self.safe) <= len(found) <= size:
            raise Difference(f"{self.path!r} has {len(found)} bytes, not {len(self.safe)}..{size}")
        whole = found.ljust(size, b"\0")
        for at in range(0, len(found), PAGE):
            page = slice(at, min(at + PAGE, len(found)))
            if all(whole[page] != state[page] for state in states):
                raise Difference(f"{self.path!r}: the page at {at} is as it never was")
        self.thing.data[:] = found
        self.checkpoint()

    def close(self) -> None:
        """Let go; the filesystem may be gone."""
        with contextlib.suppress(OSError, ValueError):
            if self.memory is not None:
                self.memory.close()
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self.memory, self.fd = None, -1


def _put(data: bytearray, offset: int, new: bytes) -> None:
    if len(data) < offset:
        data.extend(bytes(offset - len(data)))
    data[offset : offset + len(new)] = new


def random_step(chance: random.Random) -> Step:
    """One system call's worth of change, or two."""

    def path() -> tuple[bytes, ...]:
        return tuple(chance.choice(NAMES) for _ in range(chance.randint(1, 3)))

    def data() -> bytes:
        size = chance.choice([1, 100, 2_048, 5_000, 9_000, 20_000, 70_000, 300_000])
        return chance.randbytes(64) * (-(-size // 64))

    steps: list[Callable[[], Step]] = [
        lambda: ("file", path()),
        lambda: ("file", path()),
        lambda: ("dir", path()),
        lambda: ("dir", path()),
        lambda: ("fifo", path()),
        lambda: ("symlink", path(), chance.randbytes(9).hex().encode()),
        lambda: ("link", path(), path()),
        lambda: ("unlink", path()),
        lambda: ("rmdir", path()),
        lambda: ("rename", path(), path(), chance.choice([0, 0, 1, 2])),
        lambda: ("write", path(), chance.randrange(200_000), data()),
        lambda: ("write", path(), chance.randrange(60_000), data()),
        lambda: ("write", path(), 0, data()),
        lambda: ("truncate", path(), chance.randrange(100_000)),
        lambda: ("chmod", path(), chance.choice([0o600, 0o644, 0o755])),
        lambda: ("setxattr", path(), b"user." + chance.choice(NAMES), data()[:3_000]),
        lambda: ("removexattr", path(), b"user." + chance.choice(NAMES)),
    ]
    return chance.choice(steps)()


class Soak:
    """A vault, its server, the model, and lives until it is enough."""

    def __init__(
        self, base: Path, seed: int, life: float, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """`life`: seconds that the mount lives, about."""
        self.chance = random.Random(seed)
        self.life = life
        self.tell = tell
        self.server = Server(base / "server")
        self.client = Client.at(base / "client")
        self.client.init(self.server, TOKENS)
        self.root = os.fsencode(self.client.directory)
        self.model = Model()
        self.held: list[Held] = []
        self.counts: Counter[str] = Counter()
        self.peak_mib = 0.0
        self.uncertain: Step | None = None
        self._disturbed = threading.Event()
        self._killed = threading.Event()

    def run(self, lives: Iterator[int]) -> None:
        """Live as often as `lives` says; Difference at the first thing that is wrong."""
        self.client.mount("--publish-interval", "2")
        self._begin()
        for number in lives:
            self._live()
            self.counts["lives"] += 1
            self.client.mount("--publish-interval", "2")
            self._compare_after_death()
            self._check(full=number % 5 == 4)
            self._open_held()
            self.tell(f"life {number + 1}: {dict(self.counts)}, {self.peak_mib:.0f} MiB")
        self._end()

    def discard(self) -> None:
        """Leave nothing running, whatever happened."""
        for held in self.held:
            held.close()
        self.client.discard()
        self.server.stop()

    # -- one life ------------------------------------------------------------------------

    def _begin(self) -> None:
        os.mkdir(self._path((HELD,)), 0o755)
        play_on_model(self.model, ("dir", (HELD,)))
        for number in range(HELD_FILES):
            path = (HELD, b"%d" % number)
            play_on_model(self.model, ("file", path))
            self.held.append(Held(self._path(path), self.model.at(path)))
        self._open_held()

    def _open_held(self) -> None:
        """One of them is mapped too, so its size is what it will be from the start."""
        for number, held in enumerate(self.held):
            held.fd = os.open(held.path, os.O_RDWR | os.O_CREAT, 0o644)
            if number == 0:
                os.ftruncate(held.fd, HELD_SIZE)
                held.thing.data.extend(bytes(HELD_SIZE - len(held.thing.data)))
                os.fsync(held.fd)
                held.memory = mmap.mmap(held.fd, HELD_SIZE)
                assert len(held.memory[:]) == HELD_SIZE  # or a page that is missing were a SIGBUS
            held.checkpoint()

    def _live(self) -> None:
        self._killed.clear()
        self._disturbed.clear()
        self.uncertain = None
        reaper = threading.Thread(target=self._reap, args=(random.Random(self.chance.random()),))
        reaper.start()
        try:
            while not self._killed.is_set():
                self._act()
        except Death:
            pass
        except BaseException:
            self._killed.set()
            raise
        finally:
            reaper.join()
            for held in self.held:
                held.close()

    def _reap(self, chance: random.Random) -> None:
        """End the life when its time has come; perhaps the server's before."""
        length = self.life * (0.5 + chance.random())
        kills_server = chance.random() < 0.5
        first = length * chance.random() if kills_server else length
        if self._killed.wait(first):
            return
        if kills_server:
            self._disturbed.set()
            self.server.stop()
            self.counts["server kills"] += 1
            self._killed.wait(min(5.0, (length - first) * chance.random()))
            self.server.start()
            if self._killed.wait(length - first):
                return
        if self.client.pid is not None:
            self.peak_mib = max(self.peak_mib, _peak_mib(self.client.pid))
        self._killed.set()
        self.client.kill()

    def _act(self) -> None:
        choice = self.chance.random()
        if choice < 0.85:
            self._step(random_step(self.chance))
        elif choice < 0.96:
            self._write_held()
        elif choice < 0.99:
            self._fsync_held()
        elif choice < 0.994:
            self._command("sync")
        elif choice < 0.996:
            self._compare_alive()
        elif choice < 0.998:
            self._snapshot()
        else:
            self._command("gc")

    def _step(self, step: Step) -> None:
        if not self._makes_sense(step):
            return
        self.uncertain = step
        found = self._call(step)
        expected = play_on_model(self.model, step)
        self.uncertain = None
        self.counts["steps"] += 1
        if bool(found) != bool(expected):
            raise Difference(f"{step[:2]}: {os.strerror(found)}, the model: {expected}")

    def _makes_sense(self, step: Step) -> bool:
        """Whether a kernel and the model mean the same by it."""
        name, path = step[:2]
        if name not in ("chmod", "setxattr", "removexattr"):
            return True
        with contextlib.suppress(OSError):
            mode = self.model.at(path).mode
            return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        return True

    def _call(self, step: Step) -> int:
        """Carry a step out; 0 or the errno."""
        try:
            self._carry_out(*step)
        except OSError as error:
            if error.errno in GONE and self._is_dead():
                raise Death from None
            return error.errno or -1
        return 0

    def _is_dead(self) -> bool:
        """Whether the mount is; it may be about to be noted."""
        return self._killed.wait(1.0)

    def _carry_out(self, name: str, path: tuple[bytes, ...], *args: Any) -> None:
        full = self._path(path)
        match name:
            case "file":
                os.close(os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            case "dir":
                os.mkdir(full, 0o755)
            case "fifo":
                os.mkfifo(full, 0o600)
            case "symlink":
                os.symlink(args[0], full)
            case "link":
                os.link(full, self._path(args[0]), follow_symlinks=False)
            case "rename":
                _rename(full, self._path(args[0]), args[1])
            case "write":
                _write(full, *args)
            case "setxattr" | "removexattr":
                getattr(os, name)(full, *args, follow_symlinks=False)
            case _:
                getattr(os, name)(full, *args)

    def _path(self, path: tuple[bytes, ...]) -> bytes:
        return b"/".join((self.root, *path))

    # -- files that stay open ------------------------------------------------------------

    def _write_held(self) -> None:
        held = self.chance.choice(self.held)
        data = self.chance.randbytes(self.chance.choice([10, 700, PAGE, 3 * PAGE]))
        with self._until_death():
            held.write(self.chance.randrange(HELD_SIZE - len(data)), data)
            self.counts["held writes"] += 1

    def _fsync_held(self) -> None:
        held = self.chance.choice(self.held)
        with self._until_death():
            os.fsync(held.fd)
            held.checkpoint()
            self.counts["checkpoints"] += 1

    @contextlib.contextmanager
    def _until_death(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in GONE and self._is_dead():
                raise Death from None
            raise Difference(f"a file that is open: {error}") from None

    # -- commands ------------------------------------------------------------------------

    def _command(self, *arguments: str) -> None:
        done = subprocess.run(
            command("hpkvfs", "--state", self.client.state, *arguments),
            env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if self._killed.is_set():
            raise Death
        if done.returncode and not self._disturbed.is_set():
            raise Difference(f"{arguments}: exit code {done.returncode}: {done.stderr}")
        self.counts[arguments[0]] += 1
        if arguments == ("sync",) and not done.returncode:
            for held in self.held:
                held.checkpoint()

    def _snapshot(self) -> None:
        name = f"s{self.chance.randrange(6)}"
        done = self.client.state  # a name that is there is let go, another is made
        there = subprocess.run(
            command("hpkvfs", "--state", done, "snapshot", "list", "--json"),
            env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300,
        ).stdout  # fmt: skip
        self._command("snapshot", "delete" if f'"{name}"' in there else "create", name)

    # -- comparing -----------------------------------------------------------------------

    def _compare_alive(self) -> None:
        try:
            found = self._tree()
        except OSError as error:
            if error.errno in GONE and self._is_dead():
                raise Death from None
            raise Difference(f"reading: {error}") from None
        self._compare(found)
        self.counts["comparisons"] += 1

    def _compare_after_death(self) -> None:
        found = self._tree()
        for number, held in enumerate(self.held):
            held.adopt(found[HELD, b"%d" % number][2])
        if self.uncertain is not None and self.model.tree() != found:
            self._adopt_step(self.uncertain, found)
        self._compare(found)

    def _adopt_step(self, step: Step, found: Tree) -> None:
        """The step that was under way happened; a write perhaps in part."""
        name, path, *_ = step
        before = b""
        if name == "write":
            with contextlib.suppress(OSError):
                before = bytes(self.model.at(path).data)
        play_on_model(self.model, step)
        if name != "write" or path not in found or self.model.tree() == found:
            return
        thing, data = self.model.at(path), found[path][2]
        after = bytes(thing.data)
        size = max(len(before), len(after))
        old, new = before.ljust(size, b"\0"), after.ljust(size, b"\0")
        if len(before) <= len(data) <= size and all(
            byte in (old[at], new[at]) for at, byte in enumerate(data)
        ):
            thing.data[:] = data

    def _compare(self, found: Tree) -> None:
        expected = self.model.tree()
        if found == expected:
            return
        paths = [p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p)]
        shown = [(p, _brief(found.get(p)), _brief(expected.get(p))) for p in sorted(paths)[:5]]
        raise Difference(f"found and expected, under way {self.uncertain!r:.200}: {shown}")

    def _tree(self) -> Tree:
        found: Tree = {}
        self._walk((), found)
        return found

    def _walk(self, path: tuple[bytes, ...], found: Tree) -> None:
        full = self._path(path)
        facts = os.lstat(full)
        data = Path(os.fsdecode(full)).read_bytes() if stat.S_ISREG(facts.st_mode) else b""
        target = os.readlink(full) if stat.S_ISLNK(facts.st_mode) else b""
        xattrs = {
            os.fsencode(name): os.getxattr(full, name, follow_symlinks=False)
            for name in os.listxattr(full, follow_symlinks=False)
        }
        found[path] = (facts.st_mode, facts.st_nlink, data, target, xattrs)
        if stat.S_ISDIR(facts.st_mode):
            for name in os.listdir(full):
                self._walk((*path, name), found)

    # -- the oracles ---------------------------------------------------------------------

    def _check(self, *, full: bool) -> dict[str, Any]:
        report: dict[str, Any] = self.client.json("fsck", *(["--full"] if full else []))
        if report["problems"] or report["damaged"]:
            raise Difference(f"fsck: {report['problems'][:3]} {report['damaged'][:3]}")
        self.counts["fsck"] += 1
        return report

    def _end(self) -> None:
        """Everything put away; both sides' books and blobs are the same."""
        for held in self.held:
            held.close()
        self.client.umount()
        self.client.run("gc")
        accounted = self._check(full=True)["blobs"]
        status, server = self.client.json("status"), self.server.status()
        held = status["tokens_held"] + status["tokens_pending"]
        tokens = held, server["tokens"]["outstanding"]
        blobs = accounted, server["blobs"]
        if tokens[0] != tokens[1] or blobs[0] != blobs[1]:
            raise Difference(f"client and server: tokens {tokens}, blobs {blobs}")
        self.counts["generation"] = status["generation"]


def _brief(entry: Any) -> Any:
    if entry is None:
        return None
    mode, nlink, data, target, xattrs = entry
    return oct(mode), nlink, len(data), data[:16], target, sorted(xattrs)


def _write(path: bytes, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def _rename(old: bytes, new: bytes, flags: int) -> None:
    if RENAMEAT2(AT_FDCWD, old, AT_FDCWD, new, flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
