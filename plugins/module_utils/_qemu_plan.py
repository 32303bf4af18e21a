# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which CPU each vCPU gets. Facts in, plan out; nothing here looks at the system.

Rules, in this order:

1. A vCPU that had a CPU keeps it, if that still is in the zone and is not another VM's.
2. A CPU has one vCPU. More only with a declared ratio of vCPUs to CPUs, which bounds the whole zone.
3. A VM stays within one last-level cache, else within one NUMA node, where it fits.
4. Threads of one guest core get siblings of one host core. A guest without SMT (all that Proxmox VE makes) is told that
   its vCPUs are cores, so they are spread over cores first and share them last, and a core of another VM last of all.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import _cpu_list
from ._qemu import VCPU, Thread


class PinRefusedError(Exception):
    """The vCPUs do not fit; the text says what holds the CPUs and what to declare."""


@dataclass(frozen=True)
class Zones:
    """``vcpu`` runs virtual CPUs, ``io`` all other threads of QEMU. ``cores``, ``caches``, ``nodes``: groups of CPUs of
    the machine. ``source``: where the zones come from, for messages.
    """

    vcpu: tuple[int, ...]
    io: tuple[int, ...]
    source: str = ""
    cores: tuple[tuple[int, ...], ...] = ()
    caches: tuple[tuple[int, ...], ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()

    @property
    def shared(self) -> bool:
        return bool(set(self.vcpu) & set(self.io))

    @property
    def all(self) -> tuple[int, ...]:
        """What a VM may use at all."""
        return tuple(sorted({*self.vcpu, *self.io}))


def capacity(zone: Sequence[int], ratio: float | None) -> int:
    """How many vCPUs may be on a zone."""
    return len(zone) if ratio is None else math.floor(len(zone) * ratio + 1e-9)


def assign(
    label: str,
    vcpus: Iterable[Thread],
    zones: Zones,
    used: Mapping[str, Sequence[int]],
    ratio: float | None = None,
    keep: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """vCPU index to CPU. ``used``: the CPUs of other pinned VMs, by their labels. Raises PinRefusedError."""
    wanted = sorted((each for each in vcpus if each.role == VCPU), key=lambda each: each.index or 0)
    zone, load = zones.vcpu, Counter(cpu for cpus in used.values() for cpu in cpus)
    most = 1 if ratio is None else max(1, math.ceil(ratio))
    _check(label, wanted, zones, used, ratio, load)
    state = _State(zones, load, most)
    kept = {index: cpu for index, cpu in (keep or {}).items() if cpu in zone}
    for each in wanted:
        cpu = kept.get(each.index if each.index is not None else -1)
        if cpu is not None and state.spare(cpu):
            state.take(each, cpu)
    rest = [each for each in wanted if each.index not in state.chosen]
    state.stay_in(_domain(zones, state, len(rest)) if not state.chosen else zone)
    for group in _groups(rest):
        state.place(group)
    return dict(sorted(state.chosen.items()))


def _check(
    label: str,
    wanted: Sequence[Thread],
    zones: Zones,
    used: Mapping[str, Sequence[int]],
    ratio: float | None,
    load: Mapping[int, int],
) -> None:
    zone = zones.vcpu
    shown = f"the VCPU zone {_cpu_list.render(zone) or '(empty)'} ({zones.source})"
    taken = sum(load.get(cpu, 0) for cpu in zone)
    free = sum(1 for cpu in zone if not load.get(cpu, 0))
    room = free if ratio is None else max(0, capacity(zone, ratio) - taken)
    if len(wanted) <= room:
        return
    needed = math.ceil(100 * (len(wanted) + taken) / len(zone)) / 100 if zone else 0
    said = f"{label} has {len(wanted)} vCPUs and {shown} has {room} of {len(zone)} CPUs left"
    if ratio is not None:
        said = f"{label} has {len(wanted)} vCPUs, and with oversubscribe {ratio:g} {shown} has room for {room} more"
    holders = {name: [cpu for cpu in cpus if cpu in zone] for name, cpus in used.items()}
    held = "; ".join(f"{name} holds {_cpu_list.render(cpus)}" for name, cpus in sorted(holders.items()) if cpus)
    raise PinRefusedError(
        f"{said}{f' ({held})' if held else ''}: give it fewer vCPUs, enlarge the zone, "
        f"or declare oversubscribe: {needed:g} for it"
    )


def _groups(vcpus: Sequence[Thread]) -> list[list[Thread]]:
    """vCPUs that are threads of one guest core together, the others alone; in the order of their first."""
    groups: dict[object, list[Thread]] = {}
    for each in vcpus:
        groups.setdefault(each.core if each.core is not None else each.tid, []).append(each)
    return list(groups.values())


def _domain(zones: Zones, state: _State, count: int) -> Sequence[int]:
    """The smallest part of the zone with room for all: a cache, a node, the zone."""
    for domains in (zones.caches, zones.nodes):
        parts = [[cpu for cpu in zones.vcpu if cpu in domain] for domain in domains]
        fitting = [part for part in parts if sum(state.spare(cpu) for cpu in part) >= count]
        if fitting:
            return min(fitting, key=lambda part: (sum(state.spare(cpu) for cpu in part), part))
    return zones.vcpu


class _State:
    """Loads of CPUs while vCPUs are placed."""

    def __init__(self, zones: Zones, load: Counter[int], most: int) -> None:
        self._zone: Sequence[int] = zones.vcpu
        self._load, self._most = Counter(load), most
        cores = [tuple(cpu for cpu in core if cpu in zones.vcpu) for core in zones.cores]
        covered = {cpu for core in cores for cpu in core}
        self._cores = [core for core in cores if core] + [(cpu,) for cpu in zones.vcpu if cpu not in covered]
        self._core_of = {cpu: core for core in self._cores for cpu in core}
        self._foreign = {core: sum(load[cpu] for cpu in core) for core in self._cores}
        self.chosen: dict[int, int] = {}

    def stay_in(self, zone: Sequence[int]) -> None:
        self._zone = zone

    def spare(self, cpu: int) -> int:
        return max(0, self._most - self._load[cpu])

    def take(self, vcpu: Thread, cpu: int) -> None:
        self._load[cpu] += 1
        self.chosen[vcpu.index or 0] = cpu

    def place(self, group: Sequence[Thread]) -> None:
        """Threads of one guest core on one host core where there is room, else each where it is best."""
        if len(group) > 1:
            free = [
                core
                for core in self._cores
                if core[0] in self._zone and len(core) >= len(group) and all(not self._load[cpu] for cpu in core)
            ]
            if free:
                for vcpu, cpu in zip(group, free[0], strict=False):
                    self.take(vcpu, cpu)
                return
        for vcpu in group:
            self.take(vcpu, min((cpu for cpu in self._zone if self.spare(cpu)), key=self._rank))

    def _rank(self, cpu: int) -> tuple[int, int, int, int]:
        core = self._core_of[cpu]
        return (self._load[cpu], self._foreign[core], sum(self._load[each] for each in core), cpu)
