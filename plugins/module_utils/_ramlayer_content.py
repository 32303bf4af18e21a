# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What moves between a RAM layer and its base: prewarming brings files up, a commit takes everything down.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ._overlay import KEPT_ATTRIBUTES, Entry, LayerError, read_entry, scan, without_clean
from ._ramlayer import Layer, locked, presence, still_seen, usage
from ._ramlayer_copy import Damaged, merge_tree, sync_filesystem
from ._ramlayer_generations import Items
from ._ramlayer_manifest import Generation, item
from ._root import Root

_MIB = 1024 * 1024
_PAGE = 4096


def is_pinned(path: str, patterns: Iterable[str]) -> bool:
    """Does a shell pattern name this path? ``*`` matches slashes too: ``models/*`` is all below it."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Candidate:
    """A file of base that may be brought into RAM: relative path, bytes, and modification time in ns."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Prewarmed:
    """Files and bytes that are in RAM now and were not before; ``skipped`` had no room or are being executed."""

    files: int
    size: int
    skipped: int


def choose(
    candidates: Collection[Candidate], *, largest: int, budget: int, pins: Collection[str] = ()
) -> tuple[list[Candidate], int]:
    """The newest files below ``largest`` bytes that fit into ``budget`` bytes, and how many were left out.

    A file that does not fit is passed over, so that one large model does not keep small ones out. Whole pages count.
    Pinned ones come first, whatever their size.
    """
    chosen: list[Candidate] = []
    left_out = 0
    pinned = {c.path for c in candidates if is_pinned(c.path, pins)} if pins else set()
    for candidate in sorted(candidates, key=lambda c: (c.path not in pinned, -c.mtime_ns, c.path)):
        pages = -(-candidate.size // _PAGE) * _PAGE
        if (candidate.size < largest or candidate.path in pinned) and pages <= budget:
            chosen.append(candidate)
            budget -= pages
        else:
            left_out += 1
    return chosen, left_out


def prewarm(
    layer: Layer, root: Root, *, largest_mb: int, readers: int, quota_percent: int = 100, pins: Collection[str] = ()
) -> Prewarmed:
    """Promote files of base into RAM, newest first, up to the high watermark. Raises LayerError.

    Files that a shell pattern of ``pins`` names come first and may be of any size. What mirrors base already counts
    against ``quota_percent`` of the layer's size.

    Opening a lower file for writing makes overlayfs copy it up; nothing is written, so content and times stay. What is
    promoted is not saved by a sync (it only mirrors base).
    """
    with locked(layer):
        if not presence(layer, root).mounted:
            raise LayerError(f"{layer.name} is not mounted, there is nothing to warm; start {layer.unit} first")
        now = usage(layer)
        budget = now.size * layer.high_percent // 100 - now.used
        if quota_percent < 100:
            budget = min(budget, now.size * quota_percent // 100 - _mirrored(layer))
        found = _candidates(layer)
        chosen, skipped = choose(found, largest=largest_mb * _MIB, budget=budget, pins=pins)
        with ThreadPoolExecutor(max_workers=readers) as pool:
            promoted = list(pool.map(lambda c: _promote(layer.merged / c.path), chosen))
        size = sum(c.size for c, done in zip(chosen, promoted, strict=True) if done)
        return Prewarmed(sum(promoted), size, skipped + promoted.count(False))


def _mirrored(layer: Layer) -> int:
    """Bytes of upper that only mirror base."""
    upper = scan(layer.upper)
    kept = without_clean(upper, layer.base)
    return sum(entry.allocated for path, entry in upper.items() if entry.kind == "file" and path not in kept)


def _candidates(layer: Layer) -> list[Candidate]:
    """Regular files of base that show through in the merged view and are not in upper yet."""
    found = []
    for path, entry in scan(layer.base).items():
        if entry.kind != "file" or entry.size == 0 or os.path.lexists(layer.upper / path):
            continue
        try:
            seen = read_entry(layer.merged / path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # deleted in the layer, or below something that hides it
        if seen.kind == "file" and seen.size == entry.size and seen.mtime_ns == entry.mtime_ns:
            found.append(Candidate(path, entry.size, entry.mtime_ns))
    return found


def _promote(path: Path) -> bool:
    try:
        # never O_CREAT or O_TRUNC; O_NOFOLLOW because a job may have put a link there meanwhile
        os.close(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        if error.errno in (errno.ETXTBSY, errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC):
            return False
        raise LayerError(f"{path} cannot be brought into RAM: {error.strerror}") from error
    return True


def commit(layer: Layer, root: Root) -> Generation:
    """Merge the current generation into base and begin an empty one. Only while unmounted. Raises LayerError.

    Repeating it after a cut is safe: until the empty generation is current, base with the old generation above it shows
    the same content, however much of it base has already.
    """
    with locked(layer):
        now = presence(layer, root)
        if now.mounted or now.ram is not None:
            raise LayerError(f"{layer.name} is mounted, base would change underneath it: stop {layer.unit} first")
        elsewhere = still_seen(root, layer.upper)
        if elsewhere:
            raise LayerError(
                f"{layer.name}: nothing merged, {', '.join(elsewhere)} still sees it mounted in a mount name space of "
                "its own, and base would change underneath it; end it, then run commit again"
            )
        current = layer.store.current_number()
        record = None if current is None else layer.store.whole(current)
        if current is None:
            raise LayerError(f"{layer.name} has no generation yet, there is nothing to merge; sync it first")
        if record is None:
            raise LayerError(f"{layer.name}: generation {current} is damaged; choose another with restore")
        if record.merged and record.entries <= 1:  # the one that a spill begins with is full
            return record
        items = layer.store.items(current)
        layer.base.mkdir(parents=True, exist_ok=True)
        try:
            apply_to_base(layer.store.tree(current), items or {}, layer.base)
            return _begin_empty(layer)
        except (OSError, LayerError, Damaged) as error:
            why = f"generation {current} is not merged yet, run commit again: {error}"
            raise LayerError(f"{layer.name}: {why}") from error


def apply_to_base(tree: Path, items: Items, base: Path) -> None:
    """Make ``base`` what ``base`` below ``tree`` shows: honours whiteouts, opaque directories and changed types."""
    kept: Items = {}
    for path, found in items.items():
        target = base / path
        there = _lexists(target)
        if path != "." and there is not None:
            if there.kind == "dir" and (found.kind != "dir" or found.entry.opaque):
                shutil.rmtree(target)
            elif there.kind != found.kind or found.kind == "whiteout":
                target.unlink()
        if found.kind != "whiteout":
            attributes = tuple(pair for pair in found.attributes if pair[0] not in KEPT_ATTRIBUTES)
            kept[path] = found._replace(attributes=attributes)
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        merge_tree(tree, base, kept)
        sync_filesystem(descriptor)
    finally:
        os.close(descriptor)


def _lexists(path: Path) -> Entry | None:
    try:
        return read_entry(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _begin_empty(layer: Layer) -> Generation:
    """The generation after a commit holds only the root directory, with base's owner, mode and times."""
    return layer.store.begin_empty(item(read_entry(layer.base), born=0), keep=layer.keep)


def restore(layer: Layer, root: Root, number: int) -> Generation:
    """Make an older generation the one that the next mount restores. Only while unmounted. Raises LayerError."""
    with locked(layer):
        now = presence(layer, root)
        if now.mounted or now.ram is not None:
            raise LayerError(f"{layer.name} is mounted, its next sync would undo this: stop {layer.unit} first")
        store = layer.store
        if number not in store.numbers():
            known = ", ".join(map(str, store.restorable())) or "none"
            raise LayerError(f"{layer.name} has no generation {number}; there are: {known}")
        if number not in store.restorable():
            raise LayerError(f"{layer.name}: generation {number} was made before the last commit changed base")
        record = store.whole(number)
        if record is None:
            raise LayerError(f"{layer.name}: generation {number} is damaged, its names or bytes are not those recorded")
        store.point_to(number)
        return record
