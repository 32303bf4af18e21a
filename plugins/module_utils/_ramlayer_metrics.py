# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a RAM layer's syncs tell: counters since boot, and a file of metrics for node_exporter's textfile collector.

What is not there: a share of hits. overlayfs tells nobody whether a read was served from upper or from base, and a
number made up from sizes would be read as one that was measured.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._atomic import write_atomic
from ._overlay import LayerError
from ._ramlayer import Layer
from ._root import Root

COUNTERS = ("syncs", "failed", "enospc", "written_bytes", "spills", "spilled_bytes")
PREFIX = "organism_ramlayer"

# name, type, help; in the order of the file
FAMILIES = (
    ("mounted", "gauge", "1 when the overlay is mounted."),
    ("size_bytes", "gauge", "Limit of the layer's tmpfs."),
    ("used_bytes", "gauge", "Bytes in use of the layer's tmpfs."),
    ("dirty_bytes", "gauge", "Bytes of changed files that the last sync did not bring to disk."),
    ("not_quiescent_files", "gauge", "Files that the last sync found mapped for writing, saved as they were then."),
    ("unsettled_files", "gauge", "Files that changed while the last sync read them, saved by a later one."),
    ("generation", "gauge", "Number of the current generation."),
    ("generation_created_timestamp_seconds", "gauge", "When the current generation was saved."),
    ("last_sync_timestamp_seconds", "gauge", "When the last sync began."),
    ("last_sync_success", "gauge", "1 when the last sync ended well."),
    ("sync_duration_seconds", "gauge", "How long the last sync took."),
    ("syncs_total", "counter", "Syncs since boot."),
    ("sync_failures_total", "counter", "Syncs since boot that failed."),
    ("enospc_total", "counter", "Syncs and spills since boot that found no room, in RAM or on disk."),
    ("sync_written_bytes_total", "counter", "Bytes that syncs wrote since boot."),
    ("spills_total", "counter", "Times since boot that cold files left RAM for base."),
    ("spilled_bytes_total", "counter", "RAM that spills freed since boot."),
)


def no_room(error: BaseException | None) -> bool:
    """Was a full file system behind an error?"""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, LayerError) and ("No space left" in str(error) or "no space left" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def counters(layer: Layer) -> dict[str, int]:
    """Counts since boot; zero where none was kept yet."""
    try:
        found = json.loads(_file(layer).read_text(encoding="utf-8"))
        return {name: int(found.get(name, 0)) for name in COUNTERS}
    except (OSError, ValueError, AttributeError, TypeError):
        return dict.fromkeys(COUNTERS, 0)


def count(layer: Layer, **more: int) -> None:
    """Add to the counters. Two processes at once may lose one: they are read for alerts, not for accounts."""
    found = counters(layer)
    for name, number in more.items():
        found[name] += number
    _file(layer).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_file(layer), json.dumps(found) + "\n", durable=False)


def _file(layer: Layer) -> Path:
    return layer.notes / ".state" / f"{layer.name}.counters.json"


def values(status: Mapping[str, Any], counted: Mapping[str, int], *, dirty: int = 0) -> dict[str, float]:
    """Metrics by the names of the families, from a layer's status; what is not known is left out."""
    last = status.get("last_sync") or {}
    age = status.get("generation_age_s")
    found: dict[str, float | None] = {
        "mounted": int(bool(status["overlay"])),
        "size_bytes": status["size_mb"] * 1024 * 1024,
        "used_bytes": None if "used_mb" not in status else round(status["used_mb"] * 1024 * 1024),
        "dirty_bytes": dirty,
        "not_quiescent_files": last.get("not_quiescent_count"),
        "unsettled_files": last.get("unsettled_count"),
        "generation": status.get("generation"),
        "generation_created_timestamp_seconds": None if age is None else round(status["ts"] - age, 3),
        "last_sync_timestamp_seconds": last.get("at"),
        "last_sync_success": None if not last else int(bool(last.get("ok"))),
        "sync_duration_seconds": last.get("seconds"),
        "syncs_total": counted["syncs"],
        "sync_failures_total": counted["failed"],
        "enospc_total": counted["enospc"],
        "sync_written_bytes_total": counted["written_bytes"],
        "spills_total": counted["spills"],
        "spilled_bytes_total": counted["spilled_bytes"],
    }
    return {name: value for name, value in found.items() if value is not None}


def render(name: str, found: Mapping[str, float]) -> str:
    """The text exposition format, one layer a file; types and helps are the same in all of them."""
    lines = []
    for family, kind, about in FAMILIES:
        if family in found:
            full = f"{PREFIX}_{family}"
            lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}", f'{full}{{layer="{name}"}} {found[family]!r}']
    return "\n".join(lines) + "\n"


def textfile(folder: str, name: str) -> str:
    return f"{folder}/organism-ramlayer-{name}.prom"


def publish(root: Root, folder: str, name: str, found: Mapping[str, float]) -> bool:
    """Leave the metrics where node_exporter reads them. False when there is no such directory. Raises OSError."""
    if not folder or not root.path(folder).is_dir():
        return False
    write_atomic(root.path(textfile(folder, name)), render(name, found), durable=False)
    return True


def withdraw(root: Root, folder: str, name: str) -> None:
    """Without its file an alert on a layer that was taken away ends, instead of ringing for ever."""
    if folder:
        root.path(textfile(folder, name)).unlink(missing_ok=True)
