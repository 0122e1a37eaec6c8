"""POSIX access control lists, as the kernel hands them over in extended attributes.

    u32 version (2), then entries: u16 tag, u16 permissions, u32 id; all little-endian

The kernel checks permissions by them (FUSE_POSIX_ACL); what is left to a filesystem is what
acl(5) says of their relation to the mode: the owner's, the mask's (or the group's, when there
is no mask) and the others' entries *are* the nine bits of the mode, and a directory's default
list becomes the list of what is made in it.

Source: linux fs/posix_acl.c, include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"

_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_NAMED: Final = (_USER, _GROUP)
_ORDER: Final = (_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER)


class Entry(NamedTuple):
    """Whom it is about, and what they may do (rwx as in a mode)."""

    tag: int
    permissions: int
    id: int


class Acl(NamedTuple):
    """A valid list: each of owner, group and others once, a mask when somebody is named."""

    entries: tuple[Entry, ...]

    @classmethod
    def decode(cls, raw: bytes) -> Acl:
        """From an attribute's value; ValueError when it is not a valid list."""
        if raw[:4] != _VERSION or (len(raw) - 4) % _ENTRY.size:
            raise ValueError("not an access control list")
        entries = tuple(Entry(*fields) for fields in _ENTRY.iter_unpack(raw[4:]))
        tags = [entry.tag for entry in entries]
        named = [(entry.tag, entry.id) for entry in entries if entry.tag in _NAMED]
        valid = (
            set(tags) <= set(_ORDER)
            and tags == sorted(tags)
            and all(entry.permissions <= 7 for entry in entries)
            and all(tags.count(tag) == 1 for tag in (_USER_OBJ, _GROUP_OBJ, _OTHER))
            and tags.count(_MASK) <= 1
            and len(set(named)) == len(named)
            and (not named or _MASK in tags)
        )
        if not valid:
            raise ValueError("not a valid access control list")
        return cls(entries)

    def encode(self) -> bytes:
        """Inverse of decode."""
        return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in self.entries)

    @property
    def is_minimal(self) -> bool:
        """Whether it says no more than the nine bits of a mode."""
        return len(self.entries) == 3

    @property
    def mode(self) -> int:
        """The nine bits of the mode of a file with this list."""
        shifts = self._shifts()
        return sum(e.permissions << shifts[e.tag] for e in self.entries if e.tag in shifts)

    def with_mode(self, mode: int) -> Acl:
        """What chmod makes of it."""
        shifts = self._shifts()
        return self._each({tag: mode >> shift & 7 for tag, shift in shifts.items()})

    def inherited(self, mode: int) -> Acl:
        """The list of a file made with this mode in a directory whose default list this is."""
        shifts = self._shifts()
        asked = {tag: mode >> shift & 7 for tag, shift in shifts.items()}
        given = {e.tag: e.permissions for e in self.entries if e.tag in shifts}
        return self._each({tag: given[tag] & asked[tag] for tag in shifts})

    def _shifts(self) -> dict[int, int]:
        """The entries that are bits of the mode, and where there."""
        masked = any(entry.tag == _MASK for entry in self.entries)
        return {_USER_OBJ: 6, _MASK if masked else _GROUP_OBJ: 3, _OTHER: 0}

    def _each(self, permissions: dict[int, int]) -> Acl:
        return Acl(
            tuple(
                e._replace(permissions=permissions.get(e.tag, e.permissions)) for e in self.entries
            )
        )
