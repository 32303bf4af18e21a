# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Generations: whole copies of a RAM layer's upper directory on disk, of which one is current.

    persist/generations/<n>/upper/            the tree; what did not change shares its inode with the one before
    persist/generations/<n>/generation.json   how many names and bytes it holds, to tell a whole one from a damaged one
    persist/current -> generations/<n>        the commit point: one rename(2)

A generation is built under a hidden name, written through (syncfs), named, and only then made current, with each
directory synced before the next step. A cut at any instant leaves ``current`` at a whole generation.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ._atomic import fsync_directory, write_atomic
from ._overlay import Entry, LayerError, link_groups, read_entry, run, same_tree, scan

FORMAT = 1
# origin, impure and the like belong to one mount (see _overlay.KEPT_ATTRIBUTES)
_DROPPED = ("origin", "impure", "uuid", "nlink", "protattr", "upper", "redirect", "metacopy")
# --modify-window=-1: compare times to the nanosecond, else a file changed within one second passes for unchanged
_COPY = ["rsync", "-aHAX", "--sparse", "--numeric-ids", "--modify-window=-1", "--from0", "--files-from=-",
         "--ignore-missing-args"]  # fmt: skip
_VANISHED = 24  # rsync: "some source files vanished", normal on a live layer
_PAGE = 4096


@dataclass(frozen=True)
class Generation:
    """What ``generation.json`` records: ``created`` in seconds since 1970, ``content`` the sum of its files' sizes and
    ``size`` the RAM that it needs, both in bytes.

    ``merged`` marks the empty generation that follows a commit: the ones before it have become part of base.
    ``unsettled`` counts names that changed while they were copied.
    """

    number: int
    created: float
    entries: int
    content: int
    size: int
    unsettled: int = 0
    merged: bool = False


@dataclass(frozen=True)
class Saved:
    """A sync's outcome: the current generation, whether it is a new one, and the bytes that were written for it."""

    generation: Generation
    new: bool
    written: int = 0


class Store:
    """The generations of one layer. ``name`` is the layer's, for messages."""

    def __init__(self, name: str, persist: Path) -> None:
        self.name = name
        self.persist = persist
        self.folder = persist / "generations"
        self.pointer = persist / "current"

    def tree(self, number: int) -> Path:
        return self.folder / str(number) / "upper"

    def numbers(self) -> list[int]:
        """Generations that have their name, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def read(self, number: int) -> Generation | None:
        """The record of a generation, or None when it is missing or damaged."""
        try:
            record = json.loads((self.folder / str(number) / "generation.json").read_text(encoding="utf-8"))
            if record.pop("version") != FORMAT or record["number"] != number:
                return None
            return Generation(**{field.name: record[field.name] for field in fields(Generation)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def current_number(self) -> int | None:
        """The number that ``current`` points to, whole or not; None when nothing was ever saved."""
        try:
            name = self.pointer.readlink().name
        except OSError:
            return None
        return int(name) if name.isdigit() else None

    def whole(self, number: int) -> Generation | None:
        """The record when the tree has the names and bytes that it promises, else None."""
        record = self.read(number)
        if record is None:
            return None
        try:
            entries = scan(self.tree(number))
        except OSError:
            return None
        return record if (len(entries), _content(entries)) == (record.entries, record.content) else None

    def newest_whole(self) -> Generation | None:
        """The current generation, or the newest whole one behind it; None when there is none. Scans trees."""
        current = self.current_number()
        candidates = [] if current is None else [current]
        candidates += [number for number in reversed(self.restorable()) if number != current]
        return next((found for found in map(self.whole, candidates) if found is not None), None)

    def restorable(self) -> list[int]:
        """Numbers of generations that belong to the present base: the last merged one and those after it."""
        numbers = self.numbers()
        merged = [number for number in numbers if (record := self.read(number)) is not None and record.merged]
        return [number for number in numbers if not merged or number >= merged[-1]]

    def save(self, upper: Path, wanted: Mapping[str, Entry], *, keep: int, merged: bool = False) -> Saved:
        """Make ``wanted`` (a part of the tree ``upper``) the current generation, unless the current one equals it.

        Raises LayerError; then the generation that was current still is, and the unfinished one is gone.
        """
        current = self.current_number()
        record = None if current is None else self.read(current)
        if current is not None and record is not None and not merged and self._equals(current, wanted):
            return Saved(record, new=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_unfinished()
        number = max([*self.numbers(), current or 0]) + 1
        building = self.folder / f".new-{number}"
        try:
            saved = self._build(building, number, upper, wanted, current, merged)
            building.rename(self.folder / str(number))
            fsync_directory(self.folder)
        except (OSError, LayerError) as error:
            kept = "nothing was saved before" if current is None else f"generation {current} stays current"
            left = _discard(building)
            raise LayerError(f"{self.name}: not saved to {self.persist}, {kept}: {_reason(error)}{left}") from error
        self.point_to(number)
        self.prune(keep)
        return saved

    def _equals(self, number: int, wanted: Mapping[str, Entry]) -> bool:
        try:
            return same_tree(wanted, scan(self.tree(number)))
        except OSError:
            return False

    def _build(
        self, building: Path, number: int, upper: Path, wanted: Mapping[str, Entry], current: int | None, merged: bool
    ) -> Saved:
        building.mkdir(mode=0o700)
        target = building / "upper"
        target.mkdir()
        link = [] if current is None or not self.tree(current).is_dir() else [f"--link-dest={self.tree(current)}"]
        copy_tree(upper, target, wanted, extra=link)
        made, unsettled = self._compare(upper, target, wanted)
        written = sum(entry.size for entry in made.values() if entry.kind == "file" and entry.links == 1)
        record = Generation(number, time.time(), len(made), _content(made), memory_needed(wanted), unsettled, merged)
        text = json.dumps({"version": FORMAT, **asdict(record)}, indent=2)
        write_atomic(building / "generation.json", text + "\n", durable=False)
        sync_filesystem(building)
        return Saved(record, new=True, written=written)

    def _compare(self, upper: Path, target: Path, wanted: Mapping[str, Entry]) -> tuple[dict[str, Entry], int]:
        """What was made, and how many names changed meanwhile. Raises LayerError when the copy is not a true one."""
        made = scan(target)
        # two files that now only look alike may have been one in the last generation; linking to it made them one again
        false_links = link_groups(made) - link_groups(wanted)
        if false_links:
            _mend_links(target, wanted, {path for group in false_links for path in group})
            made = scan(target)
        unsettled = 0
        for path, entry in wanted.items():
            if path in made and made[path].state == entry.state:
                continue
            try:
                still = read_entry(upper / path).state == entry.state
            except (FileNotFoundError, NotADirectoryError):
                still = False
            if still:
                raise LayerError(f"the copy of {path} differs: does {target} keep owners, device nodes and trusted.*?")
            unsettled += 1
        return made, unsettled

    def point_to(self, number: int) -> None:
        """Switch ``current`` in one step that survives a cut."""
        temporary = self.persist / ".current"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"generations/{number}")
        temporary.rename(self.pointer)
        fsync_directory(self.persist)

    def prune(self, keep: int) -> None:
        """Remove all but the current generation and the newest ``keep - 1`` others that belong to the present base."""
        current = self.current_number()
        others = [number for number in self.restorable() if number != current]
        kept = {current, *others[len(others) - max(keep - 1, 0) :]}
        for number in self.numbers():
            if number not in kept:
                # a generation that is half removed must not have its name any more
                (self.folder / str(number)).rename(self.folder / f".old-{number}")
        self._clear_unfinished()

    def _clear_unfinished(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith((".new-", ".old-")):
                shutil.rmtree(path)


def memory_needed(entries: Mapping[str, Entry]) -> int:
    """Bytes of tmpfs that a tree takes: whole pages of its allocated blocks, hard links once."""
    seen: set[int] = set()
    total = 0
    for entry in entries.values():
        if entry.kind == "file" and (entry.links == 1 or entry.inode not in seen):
            seen.add(entry.inode)
            total += -(-entry.allocated // _PAGE) * _PAGE
    return total


def copy_tree(source: Path, target: Path, entries: Mapping[str, Entry], *, extra: list[str] | None = None) -> None:
    """Copy the named entries with owners, times, ACLs, attributes, hard links, holes and devices. Raises LayerError."""
    # naming any attribute rule replaces rsync's own, which is to leave system.* (ACLs among them) to -A
    rules = ["--filter=-x system.*", *(f"--filter=-x trusted.overlay.{name}" for name in _DROPPED)]
    # to rsync "." means what lies in it as well, so the top directory is not in the list
    listed = b"\0".join(os.fsencode(path) for path in entries if path != ".")
    if listed:
        run([*_COPY, *rules, *(extra or []), f"{source}/", f"{target}/"], feed=listed, accept=(0, _VANISHED))
    if "." in entries:
        _apply(target, entries["."])


def _apply(folder: Path, entry: Entry) -> None:
    """Give a directory another's owner, mode, attributes (ACLs are some) and times, in the order that keeps each."""
    os.chown(folder, entry.uid, entry.gid)
    folder.chmod(entry.mode)
    wanted = dict(entry.attributes)
    for name, _value in read_entry(folder).attributes:
        if name not in wanted:
            os.removexattr(folder, name)
    for name, value in wanted.items():
        os.setxattr(folder, name, value)
    os.utime(folder, ns=(entry.mtime_ns, entry.mtime_ns))


def sync_filesystem(path: Path) -> None:
    """syncfs(2): everything written to the file system of ``path`` is on the disk after it. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(descriptor)


def _content(entries: Mapping[str, Entry]) -> int:
    return sum(entry.size for entry in entries.values() if entry.kind == "file")


def _mend_links(target: Path, wanted: Mapping[str, Entry], paths: set[str]) -> None:
    """Give each of the names an inode of its own, then link those that are one file in ``wanted``."""
    for path in sorted(paths):
        name = target / path
        temporary = name.with_name(f".{name.name[:200]}.unshared")
        run(["cp", "-a", "--", str(name), str(temporary)])
        temporary.replace(name)
    for group in link_groups(wanted):
        first, *others = sorted(group)
        if group & paths:
            for path in others:
                (target / path).unlink()
                (target / path).hardlink_to(target / first)
    for folder in {os.path.dirname(path) or "." for path in paths}:  # noqa: PTH120 - relative names
        if folder in wanted:
            os.utime(target / folder, ns=(wanted[folder].mtime_ns, wanted[folder].mtime_ns))


def _discard(folder: Path) -> str:
    """Remove an unfinished generation; what cannot be removed is told, and the next save tries again."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        return f"; {folder} is left behind ({error.strerror})"
    return ""


def _reason(error: OSError | LayerError) -> str:
    text = str(error)
    if "No space left" in text or (isinstance(error, OSError) and error.errno == 28):
        return f"no space left on the disk; free some, or lower KEEP_GENERATIONS ({text})"
    return text
