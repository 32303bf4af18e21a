# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The CPU zones that a steering module works with: given as lists, else those of the stored plan.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Mapping

from . import _cpu_list, _cpu_plan, _cpu_zones, _topology
from ._root import Root


class ZonesMissing(ValueError):
    """Nobody says which CPUs the zones have; the text names the way out."""


def zones(
    root: Root, given: Mapping[str, str | None], needed: tuple[str, ...], *, check: bool
) -> dict[str, tuple[int, ...]]:
    """CPUs by zone. In check mode, where the plan itself may be pending, the one that level 1 would make by default.

    Raises ZonesMissing, CpuListError, CpuPlanError, PlanRefused.
    """
    found = {zone: _cpu_list.parse(text) for zone, text in given.items() if text}
    if all(zone in found for zone in _cpu_plan.ZONES):
        return found
    plan = _cpu_plan.load(root)
    if plan is None and check:
        plan = _cpu_zones.plan(_topology.read(root))
    if plan is not None:
        return {zone: found.get(zone, plan.zone(zone)) for zone in _cpu_plan.ZONES}
    missing = [zone for zone in needed if zone not in found]
    if missing:
        options = ", ".join(f"{zone}_cpus" for zone in missing)
        raise ZonesMissing(f"there is no {_cpu_plan.PATH}: run level 1 (cpu_plan) first, or give {options}")
    return found
