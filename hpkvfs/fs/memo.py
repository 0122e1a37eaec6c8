"""What was decoded lately, so that the same inode or name is not searched and decoded again.

Invariants
  - what is here equals what the view would give: every effect is told to `note`;
  - it belongs to one state of what lies below, and is empty when that is another one (so it does
    not matter who publishes, or follows, a generation), unless `move` was told that it shows the
    same.
"""

from __future__ import annotations

from typing import Final

from hpkvfs.fs.layer import Effect, Gone, Put
from hpkvfs.volume.items import CHAIN, Dirent, Inode, ItemKind, split_key

MOST: Final = 20_000
"""Entries of each kind; some 200 bytes each. Past it all go: what is hot is soon back."""

Xattrs = dict[bytes, tuple[int, bytes]]
"""An inode's extended attributes: name -> (place, value)."""


class Memo:
    """Inodes by number, names by (directory, first place of their hash), xattrs by inode."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[tuple[int, int], tuple[Dirent, ...]] = {}
        self.xattrs: dict[int, Xattrs] = {}
        self._state: object = None

    def at(self, state: object) -> Memo:
        """Itself, emptied if it was about another state of what lies below."""
        if state is not self._state:
            self.clear()
            self._state = state
        return self

    def move(self, before: object, after: object) -> None:
        """One state of what lies below gives way to another, in which the view shows the same."""
        if self._state is before:
            self._state = after

    def clear(self) -> None:
        """Forget everything."""
        self.inodes.clear()
        self.names.clear()
        self.xattrs.clear()

    def trim(self) -> None:
        """Keep memory bounded."""
        for entries in (self.inodes, self.names, self.xattrs):
            if len(entries) > MOST:
                entries.clear()

    def note(self, effect: Effect) -> int:
        """Something changed; the number of the inode that was put, or 0."""
        if type(effect) is Put:
            ino, kind, offset = split_key(effect.key)
            if kind == ItemKind.INODE:
                self.inodes.pop(ino, None)
                return ino
            if kind == ItemKind.DIRENT:
                self._note_entry(ino, offset, effect.value)
            elif kind == ItemKind.XATTR:
                self.xattrs.pop(ino, None)
        elif type(effect) is Gone:
            self.inodes.pop(effect.ino, None)
            self.xattrs.pop(effect.ino, None)
        return 0

    def _note_entry(self, ino: int, cookie: int, value: bytes | None) -> None:
        place = (ino, cookie - cookie % CHAIN)
        entries = self.names.get(place)
        if entries is not None:
            entries = tuple(entry for entry in entries if entry.cookie != cookie)
            if value is not None:
                entries += (Dirent.decode(cookie, value),)
            self.names[place] = entries
