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
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
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
    read_entry,
    resize_tmpfs,
    scan,
    unmount,
)
from ._ramlayer_copy import Damaged, apply_to_directory, fill_tree
from ._ramlayer_generations import Items, Saved, Store, make_durable
from ._ramlayer_manifest import Generation
from ._ramlayer_mapped import mapped_inodes
from ._ramlayer_save import Source, save
from ._ramlayer_seen import SLACK, Memory, Seen, clock
from ._root import Root

_MIB = 1024 * 1024
_FULL_PERCENT = 95.0
_NAMED = 20  # names in a note: enough to find the program


@dataclass(frozen=True)
class Layer:
    """Where a layer lives and how large it may get. ``service`` is the unit that holds it, for messages.

    ``folders`` are made in an empty base, so that programs find the places they are promised. Nothing is made later.
    ``state`` is the directory of locks and notes (tmpfs; by default beside ``ram``), ``command`` the command line of
    this layer with ``{verb}`` in it, ``size_key`` the setting of its size, for messages.
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
        """Exists in a tmpfs whose upper is complete: restored, or begun empty. It holds a word of this tmpfs's own."""
        return self.ram / "restored"

    @property
    def memory(self) -> Memory:
        """What the last sync saw; in RAM, but not in the layer's own."""
        return Memory(self.notes / ".state" / f"{self.name}.seen")

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


@contextmanager
def _turn(layer: Layer) -> Iterator[None]:
    """One layer at a time among those that lie side by side, so that twelve that are due together use one core."""
    folder = layer.notes / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".turn").open("a") as stream:
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
    """Mount the tmpfs and fill it with the newest generation that proves whole. Every file's digest is compared."""
    layer.base.mkdir(parents=True, exist_ok=True)
    candidates = layer.store.candidates()
    if not candidates:
        if not any(layer.base.iterdir()):
            for folder in layer.folders:
                (layer.base / folder).mkdir()
        _fill(layer, None)
        return f"{layer.name}: mounted, empty"
    damaged: list[str] = []
    for number in candidates:
        record = layer.store.read(number)
        if record is not None and record.size > layer.size_mb * _MIB:
            raise LayerError(
                f"{layer.name}: generation {number} needs {_mb(record.size)} MiB of RAM, the layer has "
                f"{layer.size_mb}; raise {layer.size_key}, or merge it into {layer.base}: {layer.ctl('commit')}"
            )
        try:
            if record is None:
                raise Damaged(layer.store.damage(number))
            _fill(layer, record)
        except Damaged as error:
            damaged.append(f"generation {number} is damaged and was passed over: {error}")
            continue
        note = f" ({'; '.join(damaged)})" if damaged else ""
        return f"{layer.name}: mounted, generation {number} restored{note}"
    raise LayerError(
        f"{layer.name}: no generation in {layer.store.folder} is whole, and starting empty would hide what is "
        f"left; look at it, then move {layer.store.folder} and {layer.store.pointer} away to start empty "
        f"({'; '.join(damaged)})"
    )


def _fill(layer: Layer, record: Generation | None) -> None:
    """A new tmpfs with the content of a generation. Raises Damaged, LayerError; then there is no tmpfs."""
    mount_tmpfs(layer.ram, layer.size_mb)
    try:
        layer.upper.mkdir()
        items: Items = {}
        if record is None:
            apply_to_directory(str(layer.upper), read_entry(layer.base))
        else:
            found = layer.store.items(record.number)
            if found is None:
                raise Damaged(layer.store.damage(record.number))
            items = found
            fill_tree(layer.store.tree(record.number), layer.upper, items)
        token = secrets.token_hex(8)
        layer.restored.write_text(f"{token}\n", encoding="utf-8")
    except Damaged:
        unmount(layer.ram)
        raise
    except (OSError, LayerError) as error:
        unmount(layer.ram)
        raise LayerError(f"{layer.name}: not restored: {error}") from error
    if record is not None:
        _remember(layer, token, record, items)


def _remember(layer: Layer, token: str, record: Generation, items: Items) -> None:
    """Spare the first sync from comparing what was just copied."""
    since, ticks = time.time_ns() - SLACK, clock()
    try:
        layer.memory.keep(Seen(token, record.number, since, ticks, set(), scan(layer.upper), items))
    except OSError:
        layer.memory.forget()


def sync(layer: Layer, root: Root) -> Saved:
    """Save upper as a new generation if it differs from the current one. Raises LayerError; the outcome is noted."""
    with locked(layer):
        now = presence(layer, root)
        if now.ram is None or not now.restored:
            raise LayerError(f"{layer.name} is not mounted, there is nothing to save; start {layer.unit} first")
        return _save(layer, root)


def _save(layer: Layer, root: Root) -> Saved:
    began = time.time()
    try:
        make_durable(layer.persist)
        with _turn(layer):
            saved = save(_source(layer, root), keep=layer.keep)
    except OSError as error:
        _note(layer, {"ok": False, "at": began, "error": str(error), "no_space": error.errno in (ENOSPC, EDQUOT)})
        raise LayerError(f"{layer.name}: not saved: {error}") from error
    except LayerError as error:
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (ENOSPC, EDQUOT)
        _note(layer, {"ok": False, "at": began, "error": str(error), "no_space": full})
        raise
    _note(layer, {"ok": True, "at": began, "seconds": round(time.time() - began, 3), "new": saved.new,
                  "generation": saved.generation.number, "written": saved.written,
                  "unsettled": list(saved.unsettled[:_NAMED]), "not_quiescent": list(saved.not_quiescent[:_NAMED]),
                  "unsettled_count": len(saved.unsettled),
                  "not_quiescent_count": len(saved.not_quiescent)})  # fmt: skip
    return saved


def _source(layer: Layer, root: Root) -> Source:
    token = layer.restored.read_text(encoding="utf-8").strip()
    places = [path for path in (layer.upper, layer.merged) if path.is_dir()]
    devices = {path.stat().st_dev for path in places}
    return Source(layer.store, layer.upper, layer.base, layer.memory, token, lambda: mapped_inodes(root, devices))


def _note(layer: Layer, outcome: dict[str, Any]) -> None:
    folder = layer.notes / ".state"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_atomic(folder / f"{layer.name}.json", json.dumps(outcome) + "\n", durable=False)
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        # the sync's own outcome counts, and its caller has it; a note of an earlier one would mislead
        (folder / f"{layer.name}.json").unlink(missing_ok=True)


def last_sync(layer: Layer) -> dict[str, Any] | None:
    """How the last sync since boot ended: ``ok``, ``at`` (seconds since 1970), then ``error`` and ``no_space``, or the
    generation and the names (some of them, and how many) that were ``unsettled`` or ``not_quiescent``."""
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
                saved = _save(layer, root).generation.number
                raise LayerError(
                    f"{layer.name}: {layer.merged} is in use by {users}; it is saved as generation {saved} but still "
                    f"mounted: end them, then {layer.ctl('unmount')}; to go on, start {layer.unit} ({error})"
                ) from error
        if now.ram is None:
            return f"{layer.name} is not mounted"
        done = f"{layer.name}: unmounted"
        if now.restored:
            try:
                done += f", generation {_save(layer, root).generation.number} is current"
            except LayerError as error:
                left = f"its content is still in {layer.ram}: make room, then {layer.ctl('unmount')}"
                raise LayerError(f"{error}; {left}") from error
        unmount(layer.ram)
        for mount_point in (layer.ram, layer.merged):
            # what somebody wrote below a mount point is theirs
            if mount_point.is_dir() and not any(mount_point.iterdir()):
                mount_point.rmdir()  # takes it from other mount name spaces, too (Linux 3.18)
        elsewhere = still_seen(root, layer.upper)
        if elsewhere:
            done += (
                f", but {', '.join(elsewhere)} still sees it in a mount name space of its own: what is written there "
                "from now on is not saved; end it, or give it mounts that follow the host's (rslave)"
            )
        return done


def still_seen(root: Root, upper: Path, limit: int = 5) -> list[str]:
    """``pid name`` of processes whose mount name space has kept an overlay with this upper.

    umount(2) reaches only those that get the host's mounts by propagation; it would change underneath the others.
    """
    mark = f"upperdir={upper},"
    pids = [pid for pid in root.listdir("/proc") if pid.isdigit()]
    keeping = [pid for pid in pids if mark in (root.read_or_none(f"/proc/{pid}/mountinfo") or "")]
    return [f"{pid} {root.read_or_none(f'/proc/{pid}/comm') or '?'}" for pid in keeping[:limit]]


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
