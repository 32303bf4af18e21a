# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Work on one RAM layer with an answer for machines and a message for people: what ``gpucache-ctl`` and ``ramlayer``
have in common, so that the GPUs' caches and the host's layer behave alike.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from . import _ramlayer as ramlayer
from . import _ramlayer_metrics as metrics
from ._overlay import LayerError, scan, without_clean
from ._ramlayer import Layer
from ._ramlayer_content import commit, prewarm, restore
from ._ramlayer_manifest import Generation
from ._ramlayer_spill import Spilled, spill
from ._root import Root

Answer = dict[str, Any]
_MIB = 1024 * 1024
_NAMED = 20


@dataclass(frozen=True)
class Habits:
    """How a layer is tended. Percents are of its size; ``spill_to`` None: it is never emptied by itself."""

    largest_mb: int = 128
    readers: int = 4
    quota_percent: int = 100
    pins: Collection[str] = ()
    spill_above: int = 70
    spill_to: int | None = None
    spill_wait: float = 0.0
    textfiles: str = ""


def _record(generation: Generation) -> Answer:
    """A generation's record; how its manifest is stored concerns nobody outside."""
    return {name: value for name, value in asdict(generation).items() if name != "chain"}


def _plain(layer: Layer, text: str) -> str:
    return text.removeprefix(f"{layer.name}: ")


def mounting(layer: Layer, root: Root) -> Answer:
    return {"message": _plain(layer, ramlayer.mount(layer, root))}


def unmounting(layer: Layer, root: Root) -> Answer:
    return {"message": _plain(layer, ramlayer.stop(layer, root))}


def syncing(layer: Layer, root: Root, habits: Habits) -> Answer:
    """Save, count, and leave the metrics. Raises LayerError when it was not saved."""
    try:
        saved = ramlayer.sync(layer, root)
    except LayerError as error:
        metrics.count(layer, syncs=1, failed=1, enospc=int(metrics.no_room(error)))
        report(layer, root, habits, dirty=_dirty(layer))
        raise
    metrics.count(layer, syncs=1, written_bytes=saved.written)
    report(layer, root, habits)
    generation = saved.generation
    done = f"generation {generation.number} saved" if saved.new else f"unchanged since generation {generation.number}"
    if saved.unsettled:
        done += f"; {len(saved.unsettled)} names changed meanwhile and follow with the next sync"
    if saved.not_quiescent:
        done += f"; {len(saved.not_quiescent)} files are mapped for writing and not quiescent"
    named = {
        "unsettled_names": list(saved.unsettled[:_NAMED]),
        "not_quiescent_names": list(saved.not_quiescent[:_NAMED]),
    }
    return {"message": done, "new": saved.new, "written_bytes": saved.written, **_record(generation), **named}


def tending(layer: Layer, root: Root, habits: Habits) -> Answer:
    """What the timer does: mount again what a cut spill left unmounted, save, and make room where it is scarce.

    Raises LayerError when the save failed; room that could not be made is told in the answer, the next time may do.
    """
    now = ramlayer.presence(layer, root)
    again = ""
    if now.ram is not None and now.restored and not now.mounted:
        again = f"{_plain(layer, ramlayer.mount(layer, root))}; "
    answer = syncing(layer, root, habits)
    if habits.spill_to is not None and ramlayer.usage(layer).percent >= habits.spill_above:
        try:
            room = spilling(layer, root, habits)
            answer |= {"spill": room, "message": f"{answer['message']}; {room['message']}"}
        except LayerError as error:
            answer |= {"spill": {"ok": False, "error": str(error)}, "message": f"{answer['message']}; {error}"}
    return answer | {"message": again + answer["message"]}


def spilling(layer: Layer, root: Root, habits: Habits) -> Answer:
    """Make room by bringing cold files down to base. Raises LayerError."""
    if habits.spill_to is None:
        raise LayerError(f"{layer.name}: this layer is not emptied while it is in use; stop {layer.unit} and commit")
    try:
        done = spill(layer, root, to_percent=habits.spill_to, pins=habits.pins, wait=habits.spill_wait)
    except LayerError as error:
        if metrics.no_room(error) or "make room" in str(error):
            metrics.count(layer, enospc=1)
            report(layer, root, habits)
        raise
    if done != Spilled():
        metrics.count(layer, spills=1, spilled_bytes=done.size)
    report(layer, root, habits)
    text = f"{done.files} cold files ({done.size / _MIB:.1f} MiB) left RAM for base" if done.files else "no cold files"
    return {"ok": True, "message": text, "files": done.files, "bytes": done.size, "written_bytes": done.written}


def prewarming(layer: Layer, root: Root, habits: Habits) -> Answer:
    warmed = prewarm(
        layer, root, largest_mb=habits.largest_mb, readers=habits.readers, quota_percent=habits.quota_percent,
        pins=habits.pins,
    )  # fmt: skip
    return {
        "message": f"{warmed.files} files ({warmed.size / _MIB:.1f} MiB) brought into RAM, {warmed.skipped} left on "
        "disk",
        "files": warmed.files, "bytes": warmed.size, "skipped": warmed.skipped,
    }  # fmt: skip


def committing(layer: Layer, root: Root) -> Answer:
    generation = commit(layer, root)
    return {"message": f"merged into base; generation {generation.number} begins empty", **_record(generation)}


def restoring(layer: Layer, root: Root, number: int) -> Answer:
    generation = restore(layer, root, number)
    return {"message": f"the next start restores generation {generation.number}", **_record(generation)}


def listing(layer: Layer) -> Answer:
    """The generations on disk; each is looked through to tell whether it is whole."""
    store = layer.store
    current, restorable = store.current_number(), store.restorable()
    listed = []
    for number in store.numbers():
        record = store.whole(number)
        listed.append(
            {"number": number, "current": number == current, "whole": record is not None,
             "restorable": record is not None and number in restorable,
             **({} if record is None else _record(record))}
        )  # fmt: skip
    lines = [
        f"{'*' if g['current'] else ' '} {g['number']}: "
        + (f"{g['entries']} names, {g['content'] / _MIB:.1f} MiB" if g["whole"] else "damaged")
        + ("" if g["restorable"] or not g["whole"] else ", from before base was changed")
        for g in listed
    ]
    return {"message": "no generation yet" if not lines else "\n" + "\n".join(lines), "generations": listed}


def report(layer: Layer, root: Root, habits: Habits, *, dirty: int = 0) -> bool:
    """Leave the layer's metrics; False when nothing collects them here. Raises OSError."""
    status = ramlayer.status(layer, root) | {"ts": time.time()}
    found = metrics.values(status, metrics.counters(layer), dirty=dirty)
    return metrics.publish(root, habits.textfiles, layer.name, found)


def _dirty(layer: Layer) -> int:
    """Bytes of files in upper that the current generation does not have like this; 0 when it cannot be read."""
    current = layer.store.current_number()
    try:
        wanted = without_clean(scan(layer.upper), layer.base)
        saved = {} if current is None else scan(layer.store.tree(current))
    except OSError:
        return 0
    return sum(
        entry.size
        for path, entry in wanted.items()
        if entry.kind == "file" and (path not in saved or saved[path].state != entry.state)
    )
