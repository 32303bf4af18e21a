# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The levels that exist, the hosts they apply to, and the marker that each leaves on a host when it has finished there.

A marker is ``/etc/organism/levels/<n>.json`` with the level, the version of the collection that finished it last and
the time it did. It says nothing about the settings of that run: whether the host still is as a level wants it is
answered by running the level again in check mode, not by a file.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

COLLECTION_VERSION = "0.1.0"
"""Equal to ``version`` of galaxy.yml (a test compares them)."""

MARKERS = "/etc/organism/levels"


@dataclass(frozen=True)
class Level:
    """One level. ``groups``: inventory groups whose hosts it changes (empty: all hosts). ``capabilities``: its tags."""

    number: int
    name: str
    groups: tuple[str, ...]
    capabilities: tuple[str, ...]

    def applies_to(self, groups: Iterable[str]) -> bool:
        return not self.groups or bool(set(self.groups) & set(groups))


LEVELS = {
    level.number: level
    for level in (
        Level(0, "baseline", (), ("baseline",)),
        Level(
            1,
            "organism",
            ("pve",),
            ("host_tools", "cpu_plan", "zfs", "memory", "io_scheduler", "profile", "ramlayer"),
        ),
        Level(2, "extreme", ("pve",), ("vm_hook", "qemu_pin", "steering", "mitigations")),
        Level(3, "irq", ("pve",), ("irq", "nic")),
        Level(4, "perfection", ("pve",), ("power",)),
        Level(6, "gpu_pool", ("pve",), ("gpu_passthrough", "vm_guard", "pool_vm")),
        Level(7, "fleet", ("bus", "gpu_pool", "conductor"), ("runtime", "gpu", "bus", "gpucache", "worker")),
        Level(8, "conductor", ("conductor",), ("conductor",)),
        Level(9, "proof", ("conductor",), ("validate",)),
    )
}


@dataclass(frozen=True)
class Marker:
    """What a finished level leaves; ``finished`` is UTC, ISO 8601, to the second."""

    level: int
    version: str
    finished: str

    def render(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


def marker_path(level: int) -> str:
    return f"{MARKERS}/{level}.json"


def parse_marker(text: str) -> Marker | None:
    """The marker in a file's text; None when it is no marker (an operator's or a crash's leftovers prove nothing)."""
    try:
        raw = json.loads(text)
        return Marker(level=int(raw["level"]), version=str(raw["version"]), finished=str(raw["finished"]))
    except (ValueError, KeyError, TypeError):
        return None


def level(number: int) -> Level:
    """A level by its number. Raises ValueError for one that does not exist yet."""
    if number not in LEVELS:
        raise ValueError(f"level {number} does not exist; levels are {', '.join(str(known) for known in LEVELS)}")
    return LEVELS[number]


def predecessor(number: int, groups: Iterable[str]) -> Level | None:
    """The nearest lower level that exists and applies to a host of these groups; None below the first."""
    groups = tuple(groups)
    lower = [known for known in LEVELS.values() if known.number < level(number).number and known.applies_to(groups)]
    return max(lower, key=lambda known: known.number) if lower else None


def series(version: str) -> str:
    """The part of a version within which levels fit together: its first two numbers."""
    return ".".join(version.split("+")[0].split(".")[:2])


def obstacle(needed: Level, marker: Marker | None, version: str) -> str | None:
    """Why a level that needs ``needed`` must not run, with the command to run first; None when it may."""
    command = f"run: ansible-playbook organism.proxmox.site --tags level{needed.number}"
    if marker is None:
        return f"level {needed.number} ({needed.name}) has not finished on this host; {command}"
    if series(marker.version) != series(version):
        return (
            f"level {needed.number} ({needed.name}) was finished here by version {marker.version} "
            f"on {marker.finished}, and this is version {version}; {command}"
        )
    return None


def unfinished_parts(number: int, skipped_tags: Iterable[str]) -> list[str]:
    """Capabilities of a level that a run left out by ``--skip-tags``: such a run does not finish the level."""
    return sorted(set(level(number).capabilities) & set(skipped_tags))
