# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A RAM layer: tmpfs above a directory on disk, merged by overlayfs, saved to disk as generations.

    ram/upper, ram/work     tmpfs; what was written since the layer was mounted and what was restored
    base                    on disk; what a commit has merged
    merged                  what programs see
    persist                 on disk; the generations of upper (_ramlayer_generations)

The order is fixed: tmpfs, restore, overlay; and back: overlay, save, tmpfs. Upper and base are changed only while the
overlay is not mounted, or through the merged view. Every operation holds the layer's lock.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._atomic import write_atomic
from ._overlay import (
    LayerError,
    Mount,
    holders,
    mount_at,
    mount_overlay,
    mount_tmpfs,
    mounts,
    resize_tmpfs,
    scan,
    unmount,
    without_clean,
)
from ._ramlayer_generations import Saved, Store, copy_tree
from ._root import Root

_MIB = 1024 * 1024
_FULL_PERCENT = 95.0


@dataclass(frozen=True)
class Layer:
    """Where a layer lives and how large it may get. ``service`` is the unit that holds it, for messages.

    ``folders`` are made in an empty base, so that programs find the places they are promised. Nothing is made later.
    ``state`` is the directory of locks and notes (tmpfs; by default beside ``ram``), ``command`` the command line of this
    layer with ``{verb}`` in it, ``size_key`` the setting of its size, for messages.
    """

    name: str
    ram: Path
    base: Path
    persist: Path
    merged: Path
    size_mb: int
    keep: int = 3
    high_percent: int = 85
    service: str = ""
    folders: tuple[str, ...] = ()
    state: Path | None = None
    command: str = ""
    size_key: str = "CACHE_MB"

    def ctl(self, verb: str) -> str:
        """The command line that an operator types for this layer."""
        return self.command.format(verb=verb) if self.command else f"gpucache-ctl {verb} {self.name}"

    @property
    def notes(self) -> Path:
        return self.ram.parent if self.state is None else self.state

    @property
    def upper(self) -> Path:
        return self.ram / "upper"

    @property
    def work(self) -> Path:
        return self.ram / "work"

    @property
    def restored(self) -> Path:
        """Exists in a tmpfs whose upper is complete: restored, or begun empty."""
        return self.ram / "restored"

    @property
    def store(self) -> Store:
        return Store(self.name, self.persist)

    @property
    def unit(self) -> str:
        return self.service or self.name


@contextmanager
def locked(layer: Layer) -> Iterator[None]:
    """One operation a layer at a time, across processes. The kernel drops the lock when its holder dies."""
    folder = layer.notes / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / layer.name).open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Presence:
    """What of a layer is there now."""

    ram: Mount | None
    merged: Mount | None
    restored: bool

    @property
    def mounted(self) -> bool:
        return self.merged is not None

    @property
    def size_mb(self) -> int | None:
        """The tmpfs's limit in MiB."""
        text = None if self.ram is None else self.ram.option("size")
        return None if text is None else _mebibytes(text)


def _mebibytes(text: str) -> int:
    unit = {"k": 1024, "m": _MIB, "g": 1024 * _MIB}.get(text[-1:].lower())
    return int(text) // _MIB if unit is None else int(text[:-1]) * unit // _MIB


def presence(layer: Layer, root: Root) -> Presence:
    found = mounts(root)
    ram = mount_at(found, layer.ram)
    ram = ram if ram is not None and ram.kind == "tmpfs" else None
    merged = mount_at(found, layer.merged)
    merged = merged if merged is not None and merged.kind == "overlay" else None
    return Presence(ram, merged, ram is not None and layer.restored.exists())


def mount(layer: Layer, root: Root) -> str:
    """Bring the layer up: tmpfs, the newest whole generation, overlay. Returns what was done. Raises LayerError."""
    with locked(layer):
        now = presence(layer, root)
        if now.mounted:
            return f"{layer.name} is mounted already{_resized(layer, now)}"
        foreign = mount_at(mounts(root), layer.merged)
        if foreign is not None:
            raise LayerError(f"{layer.name}: {layer.merged} holds a foreign {foreign.kind} mount; unmount it first")
        done = f"{layer.name}: kept what was in RAM"
        if now.ram is not None and not now.restored:
            unmount(layer.ram)  # a restore was cut: its half is worth nothing
            now = presence(layer, root)
        if now.ram is None:
            done = _restore(layer)
        else:
            _resized(layer, now)
        layer.work.mkdir(exist_ok=True)
        hidden = len(list(layer.merged.iterdir())) if layer.merged.is_dir() else 0
        mount_overlay(layer.merged, lower=layer.base, upper=layer.upper, work=layer.work)
        return done + (f"; it hides {hidden} names written to {layer.merged} while unmounted" if hidden else "")


def _resized(layer: Layer, now: Presence) -> str:
    if now.size_mb == layer.size_mb:
        return ""
    used = usage(layer).used
    if used > layer.size_mb * _MIB:
        raise LayerError(
            f"{layer.name}: {_mb(used)} MiB are in use, the limit cannot become {layer.size_mb} MiB; "
            f"stop {layer.unit}, run commit, start it again"
        )
    resize_tmpfs(layer.ram, layer.size_mb)
    return f", resized from {now.size_mb} to {layer.size_mb} MiB"


def _restore(layer: Layer) -> str:
    generation = layer.store.newest_whole()
    if generation is None and layer.store.numbers():
        raise LayerError(
            f"{layer.name}: no generation in {layer.store.folder} is whole, and starting empty would hide what is "
            f"left; look at it, then move {layer.store.folder} and {layer.store.pointer} away to start empty"
        )
    if generation is not None and generation.size > layer.size_mb * _MIB:
        raise LayerError(
            f"{layer.name}: generation {generation.number} needs {_mb(generation.size)} MiB of RAM, the layer has "
            f"{layer.size_mb}; raise {layer.size_key}, or merge it into {layer.base}: {layer.ctl('commit')}"
        )
    layer.base.mkdir(parents=True, exist_ok=True)
    if generation is None and not any(layer.base.iterdir()):
        for folder in layer.folders:
            (layer.base / folder).mkdir()
    mount_tmpfs(layer.ram, layer.size_mb)
    try:
        layer.upper.mkdir()
        if generation is None:
            _like(layer.base, layer.upper)
        else:
            tree = layer.store.tree(generation.number)
            copy_tree(tree, layer.upper, scan(tree))
        layer.restored.write_text(f"{generation.number if generation else 0}\n", encoding="utf-8")
    except (OSError, LayerError) as error:
        unmount(layer.ram)
        raise LayerError(f"{layer.name}: not restored: {error}") from error
    if generation is None:
        return f"{layer.name}: mounted, empty"
    passed_over = layer.store.current_number()
    note = "" if passed_over == generation.number else f" (generation {passed_over} is damaged and was passed over)"
    return f"{layer.name}: mounted, generation {generation.number} restored{note}"


def _like(source: Path, target: Path) -> None:
    status = source.stat()
    os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)


def sync(layer: Layer, root: Root) -> Saved:
    """Save upper as a new generation if it differs from the current one. Raises LayerError; the outcome is noted."""
    with locked(layer):
        now = presence(layer, root)
        if now.ram is None or not now.restored:
            raise LayerError(f"{layer.name} is not mounted, there is nothing to save; start {layer.unit} first")
        return _save(layer)


def _save(layer: Layer) -> Saved:
    began = time.time()
    try:
        layer.persist.mkdir(parents=True, exist_ok=True)
        saved = layer.store.save(layer.upper, without_clean(scan(layer.upper), layer.base), keep=layer.keep)
    except OSError as error:
        _note(layer, {"ok": False, "at": began, "error": str(error)})
        raise LayerError(f"{layer.name}: not saved: {error}") from error
    except LayerError as error:
        _note(layer, {"ok": False, "at": began, "error": str(error)})
        raise
    _note(layer, {"ok": True, "at": began, "seconds": round(time.time() - began, 3), "new": saved.new,
                  "generation": saved.generation.number, "written": saved.written})  # fmt: skip
    return saved


def _note(layer: Layer, outcome: dict[str, Any]) -> None:
    folder = layer.notes / ".state"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{layer.name}.json", json.dumps(outcome) + "\n", durable=False)


def last_sync(layer: Layer) -> dict[str, Any] | None:
    """How the last sync since boot ended: ``ok``, ``at`` (seconds since 1970), and ``error`` or the generation."""
    try:
        found = json.loads((layer.notes / ".state" / f"{layer.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def stop(layer: Layer, root: Root) -> str:
    """Take the layer down: overlay, final save, tmpfs. Raises LayerError; RAM content that cannot be saved is kept."""
    with locked(layer):
        now = presence(layer, root)
        if now.mounted:
            try:
                unmount(layer.merged)
            except LayerError as error:
                users = ", ".join(holders(root, layer.merged)) or "none that is visible from here"
                saved = _save(layer).generation.number
                raise LayerError(
                    f"{layer.name}: {layer.merged} is in use by {users}; it is saved as generation {saved} but still "
                    f"mounted: end them, then {layer.ctl('unmount')}; to go on, start {layer.unit} ({error})"
                ) from error
        if now.ram is None:
            return f"{layer.name} is not mounted"
        done = f"{layer.name}: unmounted"
        if now.restored:
            try:
                done += f", generation {_save(layer).generation.number} is current"
            except LayerError as error:
                left = f"its content is still in {layer.ram}: make room, then {layer.ctl('unmount')}"
                raise LayerError(f"{error}; {left}") from error
        unmount(layer.ram)
        for mount_point in (layer.ram, layer.merged):
            # what somebody wrote below a mount point is theirs
            if mount_point.is_dir() and not any(mount_point.iterdir()):
                mount_point.rmdir()
        return done


@dataclass(frozen=True)
class Usage:
    """Bytes of the tmpfs."""

    size: int
    used: int

    @property
    def percent(self) -> float:
        return 100.0 * self.used / self.size if self.size else 0.0


def usage(layer: Layer) -> Usage:
    status = os.statvfs(layer.ram)
    return Usage(status.f_blocks * status.f_frsize, (status.f_blocks - status.f_bfree) * status.f_frsize)


def status(layer: Layer, root: Root) -> dict[str, Any]:
    """The layer for all to read. ``level``: ``off``, ``ok``, ``high`` (above the watermark), ``full`` (95 %)."""
    now = presence(layer, root)
    store = layer.store
    current = store.current_number()
    record = None if current is None else store.read(current)
    found: dict[str, Any] = {
        "gpu": layer.name,
        "tmpfs": now.ram is not None,
        "overlay": now.mounted,
        "merged": str(layer.merged),
        "size_mb": layer.size_mb,
        "level": "off",
        "generation": current,
        "generation_age_s": None if record is None else round(time.time() - record.created, 1),
        "generation_readable": None if current is None else record is not None,
        "generations": store.numbers(),
        "last_sync": last_sync(layer),
    }
    if now.ram is not None:
        used = usage(layer)
        level = "full" if used.percent >= _FULL_PERCENT else "high" if used.percent >= layer.high_percent else "ok"
        found |= {"size_mb": used.size // _MIB, "used_mb": round(used.used / _MIB, 1), "level": level,
                  "used_percent": round(used.percent, 1)}  # fmt: skip
    return found


def _mb(size: int) -> int:
    return -(-size // _MIB)
