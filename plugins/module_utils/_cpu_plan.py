# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The CPU plan: which CPUs keep the house, which run virtual CPUs and which do input and output.

One file, ``/etc/organism/cpu_plan.json``, that every level and daemon reads. ``_cpu_zones.py`` makes plans.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _cpu_list
from ._root import Root

PATH = "/etc/organism/cpu_plan.json"
FORMAT = 1
ZONES = ("host", "vcpu", "io")


class CpuPlanError(ValueError):
    """The stored plan cannot be used; the message names the file and the next step."""


@dataclass(frozen=True)
class CpuPlan:
    """The three zones: sorted CPU numbers. On a machine that is too small for zones all three are all CPUs.

    ``cores``: the CPUs of each online core, siblings together. ``nodes``: NUMA node to its online CPUs. ``caches``: the
    CPUs of each last-level cache. ``efficiency``: the CPUs of efficiency cores (empty where all cores are of one kind).
    ``width``: number of possible CPUs, the width of the kernel's masks. ``reasons``: sentences that say why it is so.
    """

    host: tuple[int, ...]
    vcpu: tuple[int, ...]
    io: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...] = ()
    nodes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    caches: tuple[tuple[int, ...], ...] = ()
    efficiency: tuple[int, ...] = ()
    width: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether the zones are no partition: then nothing may be isolated, and pinning moves nothing."""
        return bool(set(self.host) & set(self.vcpu) or set(self.host) & set(self.io) or set(self.vcpu) & set(self.io))

    def zone(self, name: str) -> tuple[int, ...]:
        """The CPUs of ``host``, ``vcpu`` or ``io``. Raises ValueError for another name."""
        if name not in ZONES:
            raise ValueError(f"zones are {', '.join(ZONES)}, not {name!r}")
        cpus: tuple[int, ...] = getattr(self, name)
        return cpus

    def node_of(self, cpu: int) -> int | None:
        """The NUMA node of a CPU, or None when it is in none."""
        return next((node for node, cpus in self.nodes.items() if cpu in cpus), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, keys as in the file."""
        return {
            "format": FORMAT,
            **{zone: list(self.zone(zone)) for zone in ZONES},
            "cores": [list(core) for core in self.cores],
            "nodes": {str(node): list(cpus) for node, cpus in sorted(self.nodes.items())},
            "caches": [list(cache) for cache in self.caches],
            "efficiency": list(self.efficiency),
            "width": self.width,
            "shared": self.shared,
            "lists": {zone: _cpu_list.render(self.zone(zone)) for zone in ZONES},
            "reasons": list(self.reasons),
        }

    def table(self) -> str:
        """A small table for people: a line a zone, then the reasons."""
        kinds = {True: "E", False: "P"} if self.efficiency else {}
        rows = [("zone", "CPUs", "cores", "nodes", *(("kinds",) if kinds else ()))]
        for zone in ZONES:
            cpus = set(self.zone(zone))
            cores = [core for core in self.cores if cpus & set(core)]
            nodes = [node for node, members in self.nodes.items() if cpus & set(members)]
            mixed = "+".join(sorted({kinds[cpu in self.efficiency] for cpu in cpus}, reverse=True)) if kinds else ""
            row = (zone.upper(), _cpu_list.render(cpus), str(len(cores)), _cpu_list.render(nodes))
            rows.append((*row, *((mixed,) if kinds else ())))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)]) + "\n"

    def text(self) -> str:
        """The file's text."""
        return json.dumps(self.as_dict(), indent=1) + "\n"


def from_dict(raw: Any, where: str = PATH) -> CpuPlan:
    """The plan in JSON values. Raises CpuPlanError."""
    try:
        if raw["format"] != FORMAT:
            raise CpuPlanError(f"{where}: format {raw['format']}, and this version reads {FORMAT}; run level 1 again")
        return CpuPlan(
            host=_cpus(raw["host"]),
            vcpu=_cpus(raw["vcpu"]),
            io=_cpus(raw["io"]),
            cores=tuple(_cpus(core) for core in raw.get("cores", [])),
            nodes={int(node): _cpus(cpus) for node, cpus in raw.get("nodes", {}).items()},
            caches=tuple(_cpus(cache) for cache in raw.get("caches", [])),
            efficiency=_cpus(raw.get("efficiency", [])),
            width=int(raw.get("width", 0)),
            reasons=tuple(str(reason) for reason in raw.get("reasons", [])),
        )
    except CpuPlanError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CpuPlanError(f"{where} is no CPU plan ({error!r}); remove it and run level 1 again") from error


def _is_cpu(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _cpu_list.LIMIT


def _cpus(raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(_is_cpu(cpu) for cpu in raw):
        raise TypeError(f"not a list of CPU numbers: {raw!r}")
    return tuple(sorted(set(raw)))


def load(root: Root | None = None, path: str = PATH) -> CpuPlan | None:
    """The stored plan, or None when there is none. Raises CpuPlanError when there is one that cannot be used."""
    try:
        text = (root or Root()).read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CpuPlanError(f"{path}: {error.strerror or error}") from error
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise CpuPlanError(f"{path} is no JSON ({error}); remove it and run level 1 again") from error
    return from_dict(raw, path)
