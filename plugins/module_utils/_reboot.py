# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What waits for a reboot of this host, and whether a reboot has brought it.

Each capability leaves a file in /run/organism/reboot-required.d: JSON with ``pending`` (parameters with ``live`` and
``coming``), or any text, which is then the reason itself. /run is empty after a boot, so no file goes stale.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from . import _kernel_cmdline as kc
from ._boot_tokens import PENDING
from ._root import Root

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def boot_id(root: Root) -> str:
    """The kernel's own number of this boot. Raises OSError."""
    return root.read(BOOT_ID)


def _entries(text: str) -> list[dict[str, Any]] | None:
    try:
        found = json.loads(text)["pending"]
        return [{"key": str(e["key"]), "live": e["live"], "coming": e["coming"]} for e in found]
    except (ValueError, KeyError, TypeError):
        return None


def unmet(entries: Iterable[Mapping[str, Any]], live: str) -> list[dict[str, Any]]:
    """Parameters that the running kernel does not have as they were to come; other reasons are not among them."""
    line = kc.parse(live)
    return [
        dict(entry)
        for entry in entries
        if "key" in entry and (" ".join(kc.effective(line.tokens, entry["key"])) or None) != entry["coming"]
    ]


def waiting(root: Root) -> list[dict[str, Any]]:
    """What waits: ``capability``, and either ``key``, ``live`` and ``coming`` of a parameter, or a ``reason``."""
    live = root.read("/proc/cmdline")
    found: list[dict[str, Any]] = []
    for capability in root.listdir(PENDING):
        text = root.read_or_none(f"{PENDING}/{capability}") or ""
        entries = _entries(text)
        if entries is None:
            found.append({"capability": capability, "reason": text.strip() or "asks for a reboot"})
        else:
            found += [{"capability": capability, **entry} for entry in unmet(entries, live)]
    return found


def describe(entry: Mapping[str, Any]) -> str:
    """One entry for people."""
    if "reason" in entry:
        return f"{entry['capability']}: {entry['reason']}"
    return (
        f"{entry['capability']}: {entry['live'] or 'no ' + entry['key']} -> {entry['coming'] or 'no ' + entry['key']}"
    )
