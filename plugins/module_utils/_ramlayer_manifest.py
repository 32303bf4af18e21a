# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a generation consists of, name by name, and how that is written.

A generation's manifest is a chain of parts: a full list, then what each later generation changed. Parts are never
changed and are shared between generations by hard links, so that a manifest costs what changed; a chain that has grown
long is written anew in full.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ._overlay import Entry

FORMAT = 2
_LONGEST_CHAIN = 16
_PAGE = 4096


class Item(NamedTuple):
    """One name of a generation.

    ``link`` is the first (in byte order) of the names that are one file, or empty; ``digest`` is that of a file's
    content; ``born`` the generation whose sync made the inode on disk; ``allocated`` is bytes of blocks in RAM.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    rdev: int
    target: str
    attributes: tuple[tuple[str, bytes], ...]
    allocated: int
    link: str
    digest: str
    born: int

    @property
    def state(self) -> tuple[object, ...]:
        """As ``Entry.state``: what two copies of the same thing have in common."""
        return self.entry.state

    @property
    def entry(self) -> Entry:
        return Entry(self.kind, self.mode, self.uid, self.gid, self.size, self.mtime_ns, self.rdev, self.target,
                     self.attributes, allocated=self.allocated)  # fmt: skip

    def same_inode(self, other: Item | None) -> bool:
        """Whether both can be one inode on disk: all agree but the user's links and what holes take in RAM."""
        return other is not None and self[:9] == other[:9] and self[11:] == other[11:]


def item(entry: Entry, *, link: str = "", digest: str = "", born: int) -> Item:
    """The item of what was seen. Only what a copy keeps: a whiteout is a name, a directory's size means nothing."""
    if entry.kind == "whiteout":
        return Item("whiteout", 0, 0, 0, 0, 0, 0, "", (), 0, "", "", born)
    file = entry.kind == "file"
    return Item(
        entry.kind, entry.mode, entry.uid, entry.gid, entry.size if file else 0, entry.mtime_ns,
        entry.rdev if entry.kind in ("char", "block") else 0, entry.target, entry.attributes,
        entry.allocated if file else 0, link, digest, born,
    )  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """What ``generation.json`` records: ``created`` in seconds since 1970, ``content`` the sum of its files' sizes and
    ``size`` the RAM that it needs, both in bytes.

    ``merged`` marks the empty generation that follows a commit: the ones before it have become part of base.
    ``unsettled`` counts names that changed whenever they were read and were left at what they were before;
    ``not_quiescent`` those that a program had mapped for writing. ``chain`` are the manifest's parts with their
    SHA-256, ``appended`` how many names all but the first of them hold.
    """

    number: int
    created: float
    entries: int
    content: int
    size: int
    unsettled: int = 0
    not_quiescent: int = 0
    merged: bool = False
    appended: int = 0
    chain: tuple[tuple[str, str], ...] = ()


def encode(items: Mapping[str, Item], removed: Iterable[str] = (), *, full: bool) -> bytes:
    """A part of a manifest. Names are any bytes but NUL: those that are not UTF-8 are lone surrogates in JSON."""
    rows = {
        path: [*entry[:8], {name: value.hex() for name, value in entry.attributes}, *entry[9:]]
        for path, entry in items.items()
    }
    return json.dumps({"full": full, "items": rows, "removed": sorted(removed)}, separators=(",", ":")).encode()


def decode(parts: Iterable[tuple[bytes, str]]) -> dict[str, Item]:
    """The items of a chain of ``(part, SHA-256)``. Raises ValueError for parts that are not what they should be."""
    found: dict[str, Item] = {}
    for number, (data, wanted) in enumerate(parts):
        if hashlib.sha256(data).hexdigest() != wanted:
            raise ValueError(f"part {number} of the manifest is damaged")
        part: dict[str, Any] = json.loads(data)
        if part["full"] != (number == 0):
            raise ValueError("the manifest does not begin with a full list")
        for path in part["removed"]:
            found.pop(path, None)
        for path, row in part["items"].items():
            attributes = tuple((name, bytes.fromhex(value)) for name, value in row[8].items())
            found[path] = Item._make((*row[:8], attributes, *row[9:]))
    if "." not in found:
        raise ValueError("the manifest is empty")
    return found


def touched(part: bytes) -> set[str]:
    """The names that a part speaks of."""
    known = json.loads(part)
    return {*known["items"], *known["removed"]}


def append(chain: int, changed: int, total: int, spent: int) -> bool:
    """Whether to add a part of ``changed`` names to a ``chain`` of so many parts, of which all but the first hold
    ``spent`` names, for a generation of ``total`` names; else the manifest is written in full."""
    return 0 < chain < _LONGEST_CHAIN and changed + spent <= total


def memory_needed(items: Mapping[str, Item]) -> int:
    """Bytes of tmpfs that a tree takes: whole pages of its allocated blocks, hard links once."""
    return sum(
        -(-entry.allocated // _PAGE) * _PAGE
        for path, entry in items.items()
        if entry.kind == "file" and entry.link in ("", path)
    )


def content(items: Mapping[str, Item]) -> int:
    """Bytes of its files as programs see them."""
    return sum(entry.size for entry in items.values() if entry.kind == "file")
