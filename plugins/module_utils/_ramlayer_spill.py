# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Room in a RAM layer: the coldest files go down to base between two jobs, with the overlay unmounted for a moment.

Who uses the merged view for a job holds ``jobs`` shared; who spills holds it alone. A spiller takes ``gate`` first, and
a job passes through ``gate``, so that jobs one after the other cannot keep a spiller waiting for ever.

Order, and what a cut leaves: a generation that holds all of upper becomes current and those before it go; the cold
files are written into base and synced; only then do they leave upper. Base with that generation above it shows the same
content at each of these moments.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ._overlay import Entry, LayerError, holders, mount_overlay, scan, unmount
from ._ramlayer import Layer, _save, locked, presence, still_seen, usage
from ._ramlayer_content import apply_to_base, is_pinned
from ._ramlayer_copy import Damaged
from ._root import Root

_MIB = 1024 * 1024
_PAGE = 4096
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Cold:
    """A file of upper that may leave it: relative path, bytes of whole pages, and its last use in ns since 1970."""

    path: str
    size: int
    used_ns: int


@dataclass(frozen=True)
class Spilled:
    """``files`` left RAM, which freed ``size`` bytes; ``written`` bytes of them were not in base yet."""

    files: int = 0
    size: int = 0
    written: int = 0


def cold_files(upper: Mapping[str, Entry], used_ns: Mapping[str, int], pins: Iterable[str]) -> list[Cold]:
    """Files that base can hold instead, the longest unused first.

    Not the pinned ones, not hard links (base would make two files of them), and nothing below an opaque directory:
    what base has there is hidden.
    """
    pins = tuple(pins)
    found = []
    for path, entry in upper.items():
        if entry.kind != "file" or entry.links > 1 or path not in used_ns or is_pinned(path, pins):
            continue
        if any(upper[above].opaque for above in _above(path) if above in upper):
            continue
        found.append(Cold(path, -(-entry.allocated // _PAGE) * _PAGE, used_ns[path]))
    return sorted(found, key=lambda cold: (cold.used_ns, cold.path))


def choose(candidates: Iterable[Cold], need: int) -> list[Cold]:
    """The coldest files that free ``need`` bytes together, or all of them. Empty files free nothing."""
    chosen, freed = [], 0
    for cold in candidates:
        if freed >= need:
            break
        if cold.size:
            chosen.append(cold)
            freed += cold.size
    return chosen


def _above(path: str) -> list[str]:
    """The directories that lead to a path, the top first."""
    parts = path.split("/")[:-1]
    return [".", *("/".join(parts[: depth + 1]) for depth in range(len(parts)))]


def _last_use(upper: Path, paths: Iterable[str]) -> dict[str, int]:
    """tmpfs is mounted relatime: a second read within a day does not count, a write does."""
    found = {}
    for path in paths:
        try:
            status = os.lstat(upper / path)
        except FileNotFoundError:
            continue
        found[path] = max(status.st_atime_ns, status.st_mtime_ns)
    return found


def lock_files(notes: Path, name: str) -> tuple[Path, Path]:
    """``gate`` and ``jobs`` of a layer."""
    return notes / ".lock" / f"{name}.gate", notes / ".lock" / f"{name}.jobs"


@contextmanager
def quiet(layer: Layer, wait: float) -> Iterator[None]:
    """While this is held no job begins on the layer. Raises LayerError when one still runs after ``wait`` seconds."""
    deadline = time.monotonic() + wait
    gate, jobs = lock_files(layer.notes, layer.name)
    gate.parent.mkdir(parents=True, exist_ok=True)
    with gate.open("a") as first, jobs.open("a") as second:
        for stream in (first, second):
            while not _taken(stream.fileno()):
                if time.monotonic() >= deadline:
                    raise LayerError(f"{layer.name}: a job is using it; it can be emptied only between two jobs")
                time.sleep(_POLL_SECONDS)  # flock(2) has no time-out
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def spill(layer: Layer, root: Root, *, to_percent: float, pins: Iterable[str], wait: float) -> Spilled:
    """Bring the layer down to ``to_percent`` of its size. Raises LayerError; then nothing has left RAM.

    The caller's ``wait`` (seconds) is for a running job. A merged view that somebody else keeps busy is refused.
    """
    pins = tuple(pins)
    with quiet(layer, wait), locked(layer):
        if not presence(layer, root).mounted:
            raise LayerError(f"{layer.name} is not mounted, there is nothing to spill; start {layer.unit} first")
        need = _excess(layer, to_percent)
        if need <= 0 or not _chosen(layer, scan(layer.upper), pins, need):
            return Spilled()
        try:
            unmount(layer.merged)
        except LayerError as error:
            users = ", ".join(holders(root, layer.merged)) or "none that is visible from here"
            raise LayerError(f"{layer.name}: cannot be emptied, {layer.merged} is in use by {users}") from error
        try:
            elsewhere = still_seen(root, layer.upper)
            if elsewhere:
                raise LayerError(
                    f"{layer.name}: cannot be emptied, {', '.join(elsewhere)} still sees it mounted in a mount name "
                    "space of its own; end it, or give it mounts that follow the host's (rslave)"
                )
            return _move_down(layer, root, pins, need)
        except (OSError, Damaged) as error:
            raise LayerError(f"{layer.name}: not emptied: {error}") from error
        finally:
            mount_overlay(layer.merged, lower=layer.base, upper=layer.upper, work=layer.work)


def _excess(layer: Layer, to_percent: float) -> int:
    now = usage(layer)
    return now.used - int(now.size * to_percent / 100)


def _chosen(layer: Layer, upper: Mapping[str, Entry], pins: tuple[str, ...], need: int) -> list[Cold]:
    files = [path for path, entry in upper.items() if entry.kind == "file"]
    return choose(cold_files(upper, _last_use(layer.upper, files), pins), need)


def _move_down(layer: Layer, root: Root, pins: tuple[str, ...], need: int) -> Spilled:
    # a sync compares contents where times do not tell: what it has saved is what base does not have
    number = _save(layer, root).generation.number
    saved = layer.store.items(number) or {}
    upper = scan(layer.upper)
    chosen = _chosen(layer, upper, pins, need)
    dirty = {cold.path for cold in chosen} & saved.keys()
    written = sum(upper[path].allocated for path in dirty)
    if dirty:
        _has_room(layer, written)
        # what lies over another base is no whole state any more
        layer.store.prune(1)
        moving = {above for path in dirty for above in _above(path)} | dirty
        apply_to_base(layer.store.tree(number), {path: saved[path] for path in moving}, layer.base)
    touched = {os.path.dirname(cold.path) or "." for cold in chosen}  # noqa: PTH120 - relative names
    for cold in chosen:
        (layer.upper / cold.path).unlink()
    for folder in touched:
        os.utime(layer.upper / folder, ns=(upper[folder].mtime_ns, upper[folder].mtime_ns))
    return Spilled(len(chosen), sum(cold.size for cold in chosen), written)


def _has_room(layer: Layer, size: int) -> None:
    status = os.statvfs(layer.base)
    free = status.f_bavail * status.f_frsize
    # rsync writes beside the old file before it replaces it, and a disk filled to the brim fails the next sync
    if free < size + max(size // 10, 16 * _MIB):
        raise LayerError(
            f"{layer.name}: the disk of {layer.base} has {free // _MIB} MiB left and {-(-size // _MIB)} MiB would go "
            "there; make room on it"
        )
