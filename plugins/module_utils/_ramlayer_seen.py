# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a sync remembers of upper until the next one, and what has been touched since.

The memory lies in RAM beside the layer and belongs to one mount of its tmpfs. It is a help, never the truth: without
it, or when the clock was set meanwhile, every name is looked at and every file's content is compared.

Kernels before 6.13 take a file's times from the tick of the clock: two changes within one tick have one ctime. So what
was touched shortly before the last look counts as touched since (``SLACK``).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
import marshal
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

from ._atomic import write_atomic
from ._overlay import Entry, entry_or_none, parent, scan
from ._ramlayer_manifest import Item

SLACK = 20_000_000
"""Nanoseconds: two ticks of the slowest usual clock (100 Hz)."""
_VERSION = 1
_SAME_CLOCK = 1_000_000  # ns: reading two clocks one after the other is never that far off


@dataclass
class Seen:
    """``entries`` is all of upper, ``items`` the current generation's content, both as of ``since`` (ns since 1970).

    ``compare`` names files whose content has to be compared although nothing seems to have changed: those that were
    mapped or unsettled. ``promoted`` has the digests of files that only mirror base.
    """

    token: str
    generation: int
    since: int
    clock: int
    compare: set[str] = field(default_factory=set)
    entries: dict[str, Entry] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    promoted: dict[str, str] = field(default_factory=dict)


def clock() -> int:
    """The difference of the clock that stamps files and the one that cannot be set, in ns: it moves when it is set."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Memory:
    """The file of a ``Seen``: a line of JSON, enough to find that nothing changed, then the rest in marshal's form.

    marshal belongs to one version of Python; so does this file (``_VERSION`` and marshal's own are in the first line).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first = b""

    def head(self) -> Seen | None:
        """Everything but ``entries``, ``items`` and ``promoted``; None when there is no memory that can be used."""
        try:
            with self.path.open("rb") as stream:
                self._first = stream.readline()
            known = json.loads(self._first)
            if known["version"] != [_VERSION, marshal.version, sys.implementation.cache_tag]:
                return None
            return Seen(known["token"], known["generation"], known["since"], known["clock"], set(known["compare"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fill(self, seen: Seen) -> bool:
        """Read the rest; False when it is damaged, or was replaced since the head was read."""
        try:
            with self.path.open("rb") as stream:
                if stream.readline() != self._first:
                    return False
                rest = stream.read()  # at once: marshal.load would read it item by item
            entries, items, seen.promoted = marshal.loads(rest)  # noqa: S302 - root's own file in /run
            # as _make does, without a call of Python's a row: there are tens of thousands
            seen.entries = dict(zip(entries, map(tuple.__new__, repeat(Entry), entries.values()), strict=True))
            seen.items = dict(zip(items, map(tuple.__new__, repeat(Item), items.values()), strict=True))
        except (OSError, ValueError, TypeError, EOFError):
            return False
        return True

    def keep(self, seen: Seen) -> None:
        """Raises OSError; the caller decides whether the next sync may be slow."""
        first = {
            "version": [_VERSION, marshal.version, sys.implementation.cache_tag], "token": seen.token,
            "generation": seen.generation, "since": seen.since, "clock": seen.clock, "compare": sorted(seen.compare),
        }  # fmt: skip
        rest = marshal.dumps((
            {path: tuple(entry) for path, entry in seen.entries.items()},
            {path: tuple(item) for path, item in seen.items.items()},
            seen.promoted,
        ))  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(first).encode() + b"\n" + rest, mode=0o600, durable=False)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def touched(upper: Path, since: int, *, directories: bool = False) -> set[str] | None:
    """Names below upper whose inode changed after ``since``, and files that were read or mapped; None: not known.

    ``directories`` asks for those alone. find(1) (findutils, essential on Debian) makes the walk: one lstat(2) a name,
    several times faster than it can be done here.
    """
    when = f"@{since // 10**9}.{since % 10**9:09d}"
    changed = ["-newerct", when]
    test = ["-type", "d", *changed] if directories else ["(", *changed, "-o", "-type", "f", "-newerat", when, ")"]
    try:
        done = subprocess.run(
            ["find", f"{upper}/", "-ignore_readdir_race", *test, "-printf", "%P\\0"],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError:
        return None
    if done.returncode != 0:  # something went away underneath it
        return None
    return {os.fsdecode(name) or "." for name in done.stdout.split(b"\0")[:-1]}


def follow(upper: Path, known: Mapping[str, Entry], names: set[str]) -> tuple[dict[str, Entry], set[str]]:
    """The entries of upper now, from those ``known`` and the names touched since; and the names that are fresh.

    A directory that was renamed is itself touched but what is in it is not: a name that was not there, or is another
    inode than before, is read with all that is below it.
    """
    entries = dict(known)
    fresh: set[str] = set()
    children: dict[str, set[str]] = {}
    if any(path not in entries or entries[path].kind == "dir" for path in names):
        for path in entries:
            if path != ".":
                children.setdefault(parent(path), set()).add(path)

    def drop(path: str) -> None:
        for child in children.pop(path, ()):
            drop(child)
        entries.pop(path, None)
        children.get(parent(path), set()).discard(path)

    def take(path: str) -> None:
        drop(path)
        try:
            found = scan(upper, path)
        except (FileNotFoundError, NotADirectoryError):
            return
        entries.update(found)
        fresh.update(found)
        for name in found:
            children.setdefault(parent(name), set()).add(name)

    for path in sorted(names):
        now = entry_or_none(upper / path)
        before = entries.get(path)
        if now is None:
            drop(path)
        elif before is None or before.inode != now.inode or before.kind != now.kind:
            if path not in fresh:
                take(path)
        else:
            entries[path] = now
            fresh.add(path)
        if now is not None and now.kind == "dir" and path in entries:
            prefix = "" if path == "." else f"{path}/"
            try:
                present = {prefix + name for name in os.listdir(upper / path)}  # noqa: PTH208 - names are wanted
            except (FileNotFoundError, NotADirectoryError):
                continue
            for child in [*children.get(path, ())]:
                if child not in present:
                    drop(child)
            for child in present:
                if child not in entries:
                    take(child)
    for path in sorted(fresh):  # what lies in a directory that is gone again
        if path in entries and path != "." and parent(path) not in entries:
            drop(path)
    return entries, {path for path in fresh if path in entries}


def same_clock(one: int, other: int) -> bool:
    return abs(one - other) < _SAME_CLOCK
