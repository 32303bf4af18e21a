# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Divides the CPUs of a machine into the zones HOST, VCPU and IO: facts in, plan out.

HOST keeps the house (CPU 0's core is always there: timers, kernel threads and firmware expect it), IO takes interrupts
and their work near to the devices, VCPU runs guests and nothing else. A zone has whole cores only, since siblings share
a core's execution units and first caches.

Where there are several NUMA nodes or last-level caches, zones are rounded up to whole ones, the widest boundary first,
as long as IO is near to its devices and VCPU keeps at least half of the cores; what is shared nevertheless is said in
the plan's reasons.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import _cpu_list
from ._cpu_plan import CpuPlan
from ._topology import Topology

Core = tuple[int, ...]

BOUNDARIES = ("node", "cache", "core")
SMALLEST = 3
"""Cores that a machine must have for one of each zone."""


class PlanRefused(ValueError):
    """Wanted zones that must not be used. ``offenders``: one sentence for each fault, each naming CPUs."""

    def __init__(self, reason: str, offenders: Iterable[str] = ()) -> None:
        self.offenders = tuple(offenders)
        super().__init__("; ".join([reason, *self.offenders]))


@dataclass(frozen=True)
class Wishes:
    """``host_cores`` and ``io_cores``: at least so many cores each. The lists override what would be computed.

    ``boundary``: ``auto``, or the one of BOUNDARIES that zones must not share. ``force`` accepts lists that split
    cores, name offline CPUs (they are left out) or keep CPU 0 from HOST.
    """

    host_cores: int = 1
    io_cores: int = 1
    host: tuple[int, ...] | None = None
    vcpu: tuple[int, ...] | None = None
    io: tuple[int, ...] | None = None
    boundary: str = "auto"
    force: bool = False

    @property
    def overridden(self) -> dict[str, tuple[int, ...]]:
        """Zone to the CPUs that the operator wants there, where any are given."""
        given = {"host": self.host, "vcpu": self.vcpu, "io": self.io}
        return {zone: cpus for zone, cpus in given.items() if cpus}


@dataclass(frozen=True)
class _Zones:
    host: tuple[Core, ...]
    vcpu: tuple[Core, ...]
    io: tuple[Core, ...]


def plan(topology: Topology, wishes: Wishes | None = None) -> CpuPlan:
    """The zones of a machine. Raises PlanRefused when the wishes cannot or must not be met."""
    wishes = wishes or Wishes()
    if wishes.host_cores < 1 or wishes.io_cores < 1:
        raise PlanRefused("each zone needs a core: host_cores and io_cores are 1 or more")
    if wishes.boundary not in ("auto", *BOUNDARIES):
        raise PlanRefused(f"boundary is auto, {', '.join(BOUNDARIES)}, not {wishes.boundary!r}")
    if wishes.overridden:
        return _overridden(topology, wishes)
    if len(topology.cores) < SMALLEST:
        everything = topology.online
        reason = (
            f"{_count(len(topology.cores), 'core')}, and zones of their own need {SMALLEST}: "
            "all zones are all CPUs, so nothing is isolated or kept apart"
        )
        return _result(topology, everything, everything, everything, [reason])
    return _computed(topology, wishes)


# --- computed -------------------------------------------------------------------------------------------------------


def _computed(topology: Topology, wishes: Wishes) -> CpuPlan:
    boundaries = BOUNDARIES if wishes.boundary == "auto" else (wishes.boundary,)
    near, why_near = _near_devices(topology)
    obstacles: list[str] = []
    for boundary in boundaries:
        units = _units(topology, boundary)
        if boundary != "core" and len(units) < 2 and wishes.boundary == "auto":
            continue  # there is one only, so there is nothing to keep apart
        if boundary != "core" and len(units) < SMALLEST:
            obstacles.append(f"zones share {_plural(boundary)}, because there are only {len(units)}")
            continue
        zones, obstacle = _divide(topology, units, near, wishes, half=wishes.boundary == "auto" and boundary != "core")
        if zones is not None:
            host, vcpu, io = _flat(zones.host), _flat(zones.vcpu), _flat(zones.io)
            if why_near and not near & set(io):
                why_near = "IO is far from its devices: the boundary that is wanted leaves it no place near them"
            reasons = [_size_reason("HOST", zones.host, wishes.host_cores, boundary), why_near]
            reasons += [_size_reason("IO", zones.io, wishes.io_cores, boundary), *obstacles]
            return _result(topology, host, vcpu, io, [reason for reason in reasons if reason])
        obstacles.append(f"zones share {_plural(boundary)}, because {obstacle}")
    raise PlanRefused(obstacles[-1].split(", because ", 1)[1])


def _divide(
    topology: Topology, units: Sequence[tuple[Core, ...]], near: frozenset[int], wishes: Wishes, *, half: bool
) -> tuple[_Zones | None, str]:
    """Give whole units to HOST (CPU 0's first), IO (near its devices), then HOST again, until both are large enough.

    On a hybrid machine efficiency cores come first, and those that are left over are HOST's, so that all of VCPU's
    cores are of one kind. Returns the zones, or None and the reason why they cannot be.
    """
    small = set(topology.efficiency)
    home = next(unit for unit in units if any(topology.online[0] in core for core in unit))
    free = [unit for unit in units if unit is not home]
    host, io = [home], list[tuple[Core, ...]]()

    def is_small(unit: tuple[Core, ...]) -> bool:
        return bool(small) and all(core[0] in small for core in unit)

    def take(unit: tuple[Core, ...], zone: list[tuple[Core, ...]]) -> None:
        free.remove(unit)
        zone.append(unit)

    while _cores_in(io) < wishes.io_cores and free:
        caches = {_cache_of(topology, core) for unit in host for core in unit}
        take(
            min(
                free,
                key=lambda unit: (
                    not any(cpu in near for core in unit for cpu in core),
                    bool(small) and not is_small(unit),
                    not any(_cache_of(topology, core) in caches for core in unit),
                    unit,
                ),
            ),
            io,
        )
    while _cores_in(host) < wishes.host_cores and free:
        nodes = {_node_of(topology, core) for unit in host for core in unit}
        caches = {_cache_of(topology, core) for unit in host for core in unit}
        take(
            min(
                free,
                key=lambda unit: (
                    bool(small) and not is_small(unit),
                    not any(_cache_of(topology, core) in caches for core in unit),
                    not any(_node_of(topology, core) in nodes for core in unit),
                    unit,
                ),
            ),
            host,
        )
    if any(not is_small(unit) for unit in free):
        for unit in [unit for unit in free if is_small(unit)]:
            take(unit, host)
    zones = _Zones(_joined(host), _joined(free), _joined(io))
    return _judged(topology, zones, near, wishes, half=half)


def _judged(
    topology: Topology, zones: _Zones, near: frozenset[int], wishes: Wishes, *, half: bool
) -> tuple[_Zones | None, str]:
    total = len(topology.cores)
    if not zones.io or not zones.vcpu or len(zones.host) < wishes.host_cores or len(zones.io) < wishes.io_cores:
        wanted = f"{_count(wishes.host_cores, 'core')} for HOST and {wishes.io_cores} for IO"
        return None, f"{wanted} leave none of {total} for VCPU; give them fewer"
    if half and 2 * len(zones.vcpu) < total:
        return None, f"whole ones would leave VCPU {len(zones.vcpu)} of {_count(total, 'core')}"
    if half and not any(cpu in near for cpu in _flat(zones.io)):
        return None, "whole ones would put IO far from its devices"
    return zones, ""


def _units(topology: Topology, boundary: str) -> list[tuple[Core, ...]]:
    """The cores in groups that stay together: those of a node, of a last-level cache, or each by itself."""
    groups: dict[object, list[Core]] = {}
    for core in topology.cores:
        key: object = core
        if boundary == "node":
            key = _node_of(topology, core)
        elif boundary == "cache":
            key = _cache_of(topology, core)
        groups.setdefault(key, []).append(core)
    return [tuple(cores) for cores in groups.values()]


def _near_devices(topology: Topology) -> tuple[frozenset[int], str]:
    """The CPUs that are local to most of the network and NVMe devices (other storage decides ties), and a sentence.

    All CPUs where nothing tells them apart.
    """
    votes: Counter[tuple[int, ...]] = Counter()
    names: dict[tuple[int, ...], list[str]] = {}
    for device in topology.devices:
        if len(device.cpus) < len(topology.online):
            votes[device.cpus] += 1 if device.kind == "storage" else 100
            names.setdefault(device.cpus, []).append(f"{device.kind} {device.address}")
    if not votes:
        return frozenset(topology.online), ""
    cpus = min(votes, key=lambda local: (-votes[local], local))
    return frozenset(cpus), f"IO is near to {', '.join(names[cpus])} (CPUs {_cpu_list.render(cpus)})"


# --- overridden -----------------------------------------------------------------------------------------------------


def _overridden(topology: Topology, wishes: Wishes) -> CpuPlan:
    """The operator's lists, and the rest of the machine for the zones that they do not name."""
    given = wishes.overridden
    _refuse_impossible(topology, given)
    online = set(topology.online)
    usable = {zone: tuple(cpu for cpu in cpus if cpu in online) for zone, cpus in given.items()}
    faults = _faults(topology, given)
    if faults and not wishes.force:
        raise PlanRefused("the wanted CPU lists are refused (force accepts them)", faults)
    for zone, cpus in usable.items():
        if not cpus:
            raise PlanRefused(f"{zone.upper()} has no CPU that is online", [_cpu_list.render(given[zone])])
    reasons = [f"{zone.upper()} is set by the operator" for zone in given]
    reasons += [f"forced: {fault}" for fault in faults]
    zones = _completed(topology, usable, wishes)
    taken = set().union(*zones.values())
    if online - taken:
        reasons.append(f"CPUs {_cpu_list.render(online - taken)} are in no zone: nothing is steered to them")
    return _result(topology, zones["host"], zones["vcpu"], zones["io"], reasons)


def _refuse_impossible(topology: Topology, given: dict[str, tuple[int, ...]]) -> None:
    """What no force can make true."""
    present = set(topology.present)
    faults = [
        f"{zone.upper()}: there is no CPU {_cpu_list.render(set(cpus) - present)} "
        f"(this machine has {_cpu_list.render(present)})"
        for zone, cpus in given.items()
        if set(cpus) - present
    ]
    zones = list(given)
    for number, one in enumerate(zones):
        for other in zones[number + 1 :]:
            both = set(given[one]) & set(given[other])
            if both:
                faults.append(f"CPUs {_cpu_list.render(both)} are in {one.upper()} and in {other.upper()}")
    if faults:
        raise PlanRefused("the wanted CPU lists cannot be used", faults)


def _faults(topology: Topology, given: dict[str, tuple[int, ...]]) -> list[str]:
    """What is refused unless forced."""
    online = set(topology.online)
    faults = [
        f"{zone.upper()}: CPUs {_cpu_list.render(set(cpus) - online)} are offline"
        for zone, cpus in given.items()
        if set(cpus) - online
    ]
    owner = {cpu: zone for zone, cpus in given.items() for cpu in cpus}
    for core in topology.cores:
        owners = {cpu: owner.get(cpu) for cpu in core}
        if len(set(owners.values())) > 1:
            where = ", ".join(f"{cpu} in {(zone or 'no zone').upper()}" for cpu, zone in owners.items())
            faults.append(f"the core of CPUs {_cpu_list.render(core)} is split: {where}")
    first = topology.online[0]
    elsewhere = owner.get(first)
    if "host" in given and first not in given["host"]:
        faults.append(f"CPU {first} is not in HOST: the kernel's own work stays there whatever is wanted")
    elif elsewhere not in (None, "host"):
        faults.append(f"CPU {first} is in {str(elsewhere).upper()}, and the kernel's own work stays there")
    return faults


def _completed(topology: Topology, usable: dict[str, tuple[int, ...]], wishes: Wishes) -> dict[str, tuple[int, ...]]:
    """Fill the zones that were not named from the cores that are wholly free: IO and HOST by size, VCPU with the rest.

    Without a rest to give (VCPU was named), HOST gets all that IO does not need.
    """
    zones = dict(usable)
    taken = set().union(*usable.values())
    free = [core for core in topology.cores if not set(core) & taken]
    near, _why = _near_devices(topology)
    small = set(topology.efficiency)
    first = topology.online[0]

    def pick(count: int, key: Mapping[Core, tuple[bool, ...]]) -> tuple[int, ...]:
        chosen = sorted(free, key=lambda core: (*key[core], core))[:count]
        free[:] = [core for core in free if core not in chosen]
        return _flat(chosen)

    named_host = "host" in zones
    if not named_host:
        zones["host"] = pick(1, {core: (first not in core, bool(small) and core[0] not in small) for core in free})
    if "io" not in zones:
        far = {core: (not near & set(core), bool(small) and core[0] not in small) for core in free}
        zones["io"] = pick(wishes.io_cores, far)
    if not named_host:
        more = len(free) if "vcpu" in zones else wishes.host_cores - 1
        kinds = {core: (bool(small) and core[0] not in small,) for core in free}
        zones["host"] = tuple(sorted(zones["host"] + pick(more, kinds)))
    if "vcpu" not in zones:
        zones["vcpu"] = _flat(free)
    empty = [zone.upper() for zone, cpus in zones.items() if not cpus]
    if empty:
        raise PlanRefused(f"the wanted CPU lists leave no whole core for {' and '.join(empty)}; name fewer CPUs")
    return zones


# --- both -----------------------------------------------------------------------------------------------------------


def _result(
    topology: Topology, host: tuple[int, ...], vcpu: tuple[int, ...], io: tuple[int, ...], reasons: list[str]
) -> CpuPlan:
    result = CpuPlan(
        host=host,
        vcpu=vcpu,
        io=io,
        cores=topology.cores,
        nodes=dict(topology.nodes),
        caches=topology.caches,
        efficiency=topology.efficiency,
        width=topology.width,
        reasons=tuple(reasons),
    )
    if result.shared:
        return result
    return CpuPlan(**{**vars(result), "reasons": (*result.reasons, *_shared(topology, result))})


def _shared(topology: Topology, made: CpuPlan) -> list[str]:
    """A sentence for the last-level caches and one for the nodes that several zones touch."""
    told = []
    for what, groups in (("last-level cache", topology.caches), ("NUMA node", tuple(topology.nodes.values()))):
        if len(groups) < 2:
            continue
        shared = []
        for cpus in groups:
            zones = [zone.upper() for zone in ("host", "vcpu", "io") if set(made.zone(zone)) & set(cpus)]
            if len(zones) > 1:
                shared.append(f"CPUs {_cpu_list.render(cpus)} ({', '.join(zones)})")
        if shared:
            told.append(f"zones share a {what}: {'; '.join(shared)}")
    return told


def _size_reason(zone: str, cores: tuple[Core, ...], wanted: int, boundary: str) -> str:
    if len(cores) <= wanted:
        return ""
    whole = "the efficiency cores that nobody else needs" if boundary == "core" else f"whole {_plural(boundary)}"
    return f"{zone} has {len(cores)} cores instead of {wanted}: {whole}"


def _cache_of(topology: Topology, core: Core) -> tuple[int, ...]:
    return next((cache for cache in topology.caches if core[0] in cache), ())


def _node_of(topology: Topology, core: Core) -> int | None:
    return next((node for node, cpus in topology.nodes.items() if core[0] in cpus), None)


def _cores_in(units: Iterable[tuple[Core, ...]]) -> int:
    return sum(len(unit) for unit in units)


def _joined(units: Iterable[tuple[Core, ...]]) -> tuple[Core, ...]:
    return tuple(sorted(core for unit in units for core in unit))


def _flat(cores: Iterable[Core]) -> tuple[int, ...]:
    return tuple(sorted(cpu for core in cores for cpu in core))


def _plural(boundary: str) -> str:
    return {"node": "NUMA nodes", "cache": "last-level caches"}.get(boundary, "cores")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
