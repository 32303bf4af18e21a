# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``/etc/organism/steer.json``: what the keeper ``organism-steer`` holds, one section for each module that steers.

The modules ``irq_affinity`` and ``nic_steering`` each write their section; the keeper reads it anew at every pass. Who
applies takes the lock first, so that a module that restores and a keeper that holds never undo each other.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ._atomic import fsync_directory, write_atomic
from ._root import Root

PATH = "/etc/organism/steer.json"
LOCK = "/run/organism/steer.lock"
FORMAT = 1
SECTIONS = ("irq", "nic")
DRIFT_CHECK = 600
"""Seconds. Events bring every change that the kernel announces; this finds the others."""


class SteerConfigError(ValueError):
    """The file cannot be used; the text names it and the next step."""


def load(root: Root) -> dict[str, dict[str, Any]]:
    """The sections that there are, by name. Raises SteerConfigError."""
    try:
        raw = json.loads(root.read(PATH))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SteerConfigError(f"{PATH}: {error}; remove it and run level 3 again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise SteerConfigError(f"{PATH} is not of format {FORMAT}; remove it and run level 3 again")
    sections = {name: raw[name] for name in SECTIONS if name in raw}
    if not all(isinstance(section, dict) for section in sections.values()):
        raise SteerConfigError(f"{PATH}: a section is no object; remove the file and run level 3 again")
    return sections


def seconds_of(sections: Mapping[str, Mapping[str, Any]]) -> int:
    """Seconds between two looks without an event: the least that a section asks for."""
    asked = [section.get("drift_check", DRIFT_CHECK) for section in sections.values()]
    return min([int(value) for value in asked if isinstance(value, int) and value > 0], default=DRIFT_CHECK)


def write_section(root: Root, name: str, section: Mapping[str, Any] | None) -> None:
    """Replace or (None) remove one section; the file goes with its last one. Raises SteerConfigError, OSError."""
    sections: dict[str, Any] = load(root)
    sections.pop(name, None)
    if section is not None:
        sections[name] = dict(section)
    path = root.path(PATH)
    if sections:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        write_atomic(path, json.dumps({"format": FORMAT, **sections}, indent=1, sort_keys=True) + "\n")
    elif path.exists():
        path.unlink()
        fsync_directory(path.parent)


@contextlib.contextmanager
def locked(root: Root) -> Iterator[None]:
    """Hold the lock of all who steer (flock(2)); waits for the other's pass, which takes well under a second."""
    path = root.path(LOCK)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(root: Root, *, really: bool) -> Iterator[None]:
    """The lock, unless nothing will be written (check mode)."""
    if not really:
        yield
        return
    with locked(root):
        yield
