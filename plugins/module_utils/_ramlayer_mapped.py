# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files of a layer that a program has mapped shared and may store into.

On tmpfs a store changes mtime and ctime only when it is the first use of a page by that mapping; later ones, and those
to a page that was read before, change neither. So mappings are looked for in ``/proc/*/maps`` (proc(5)). The device
there is the overlay's own (Linux since 6.6) or that of upper's tmpfs (before); the inode there may be the one that the
file had in base, so what is mapped is asked of ``/proc/PID/map_files``, whose stat(2) is upper's inode.

Not seen: programs in a process namespace beside this one (run the sync on the host, not in a container), and devices
that were given a file's pages for good.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass

from ._root import Root

_SHARED = re.compile(
    rb"^(?P<range>[0-9a-f]+-[0-9a-f]+) .(?P<write>[w-]).s [0-9a-f]+ (?P<device>[0-9a-f]+:[0-9a-f]+) "
    rb"(?P<inode>[1-9][0-9]*)",
    re.MULTILINE,
)
_FLAGS = re.compile(rb"^VmFlags:(?P<flags>.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Mapping:
    """A shared mapping of some file: where it is in its process, and whether it may be written now."""

    span: str
    writable: bool
    device: int
    inode: int


def parse_maps(text: bytes) -> list[Mapping]:
    """The shared mappings of files in a ``/proc/PID/maps``."""
    found = []
    for match in _SHARED.finditer(text):
        major, minor = (int(part, 16) for part in match["device"].split(b":"))
        found.append(
            Mapping(match["range"].decode(), match["write"] == b"w", os.makedev(major, minor), int(match["inode"]))
        )
    return found


def may_write(smaps: bytes, span: str) -> bool:
    """Whether a mapping that cannot be written now may be made writable by mprotect(2): the flag ``mw`` in smaps."""
    start = smaps.find(span.encode() + b" ")
    flags = None if start < 0 else _FLAGS.search(smaps, start)
    return flags is None or b"mw" in flags["flags"].split()


def mapped_inodes(root: Root, devices: Collection[int]) -> set[int]:
    """Inodes (as stat(2) tells them) of files on these devices that somebody has mapped and may store into."""
    found: set[int] = set()
    # most programs have nothing of a layer mapped: looking for the device's name is far cheaper than reading each line
    needles = [f" {os.major(device):02x}:{os.minor(device):02x} ".encode() for device in devices]
    for pid in root.listdir("/proc"):
        if not pid.isdigit():
            continue
        text = _bytes(root, f"/proc/{pid}/maps")
        if not any(needle in text for needle in needles):
            continue
        near = [mapping for mapping in parse_maps(text) if mapping.device in devices]
        if not near:
            continue
        smaps: bytes | None = None
        for mapping in near:
            if not mapping.writable:
                smaps = _bytes(root, f"/proc/{pid}/smaps") if smaps is None else smaps
                if not may_write(smaps, mapping.span):
                    continue
            found.add(mapping.inode)
            first, last = (int(part, 16) for part in mapping.span.split("-"))  # maps pads what map_files does not
            inode = _inode(root, f"/proc/{pid}/map_files/{first:x}-{last:x}")
            if inode is not None:
                found.add(inode)
    return found


def _bytes(root: Root, path: str) -> bytes:
    try:
        descriptor = os.open(f"{root.top}{path}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # it has ended
        return b""
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _inode(root: Root, path: str) -> int | None:
    try:
        return root.path(path).stat().st_ino
    except OSError:  # unmapped since
        return None
