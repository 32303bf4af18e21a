# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel says of processors: cores and their siblings, last-level caches, NUMA nodes, kinds of cores.

And where the devices of input and output are attached.

Sources: Documentation/ABI/stable/sysfs-devices-system-cpu (``topology/core_cpus_list``, once ``thread_siblings_list``),
Documentation/ABI/testing/sysfs-devices-system-cpu (``cache/index*``, ``cpu_capacity``, ``isolated``),
Documentation/ABI/stable/sysfs-devices-node, and ``/sys/devices/cpu_core|cpu_atom/cpus``, the performance counters that
hybrid Intel processors have for each kind of core (arch/x86/events/intel/core.c).

Numbers of CPUs are the firmware's choice: siblings are N and N+6 on one machine and 2N and 2N+1 on another. Nothing
here computes them.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from . import _cpu_list
from ._root import Root

CPU = "/sys/devices/system/cpu"
NODE = "/sys/devices/system/node"
PCI = "/sys/bus/pci/devices"

# PCI class codes (Documentation: PCI Code and ID Assignment Specification 1.16, section 1)
_KINDS = ((0x0108, "nvme"), (0x02, "nic"), (0x01, "storage"))
_GUESTS = "vfio-pci"


class TopologyError(ValueError):
    """The kernel's description is missing or contradicts itself; the message names the file."""


@dataclass(frozen=True)
class IoDevice:
    """A PCI device that the host itself uses. ``node``: its NUMA node, None when the firmware does not say.

    ``cpus``: the CPUs that are near to it (all, when nothing is known). ``kind``: ``nic``, ``nvme`` or ``storage``.
    """

    address: str
    kind: str
    node: int | None
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """``cores``: online CPUs of each core, in the order of their first CPU. ``caches``: online CPUs of each last-level
    cache (a CPU without a description of its caches is in none). ``nodes``: NUMA node to its online CPUs, nodes without
    any left out. ``efficiency``: CPUs of efficiency cores, empty where all cores are of one kind. ``possible``: CPUs
    that could ever be there; masks are as wide as the highest of them. ``isolated``: what ``isolcpus=`` took away.
    """

    online: tuple[int, ...]
    present: tuple[int, ...]
    possible: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    caches: tuple[tuple[int, ...], ...] = ()
    nodes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    efficiency: tuple[int, ...] = ()
    isolated: tuple[int, ...] = ()
    devices: tuple[IoDevice, ...] = ()

    @property
    def width(self) -> int:
        return max(self.possible) + 1

    def core_of(self, cpu: int) -> tuple[int, ...]:
        """All online CPUs of a CPU's core, itself included. Raises KeyError for one that is not online."""
        for core in self.cores:
            if cpu in core:
                return core
        raise KeyError(cpu)


def read(root: Root | None = None) -> Topology:
    """The topology of a machine or of a recording of one. Raises TopologyError."""
    root = root or Root()
    online = _list(root, f"{CPU}/online")
    if not online:
        raise TopologyError(f"{root.path(CPU)}/online is missing or empty: is /sys mounted?")
    present = _list(root, f"{CPU}/present") or online
    return Topology(
        online=online,
        present=present,
        possible=_list(root, f"{CPU}/possible") or present,
        cores=_cores(root, online),
        caches=_caches(root, online),
        nodes=_nodes(root, online),
        efficiency=_efficiency(root, online),
        isolated=_list(root, f"{CPU}/isolated"),
        devices=_devices(root, online),
    )


def _list(root: Root, path: str) -> tuple[int, ...]:
    text = root.read_or_none(path)
    try:
        return _cpu_list.parse(text or "")
    except _cpu_list.CpuListError as error:
        raise TopologyError(f"{root.path(path)}: {error}") from error


def _cores(root: Root, online: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A partition of the online CPUs; a CPU whose siblings are not described is a core of its own."""
    found: dict[int, tuple[int, ...]] = {}
    for cpu in online:
        folder = f"{CPU}/cpu{cpu}/topology"
        siblings = _list(root, f"{folder}/core_cpus_list") or _list(root, f"{folder}/thread_siblings_list") or (cpu,)
        core = _among(siblings, online)
        if cpu not in core or any(found.get(other, core) != core for other in core):
            raise TopologyError(f"{root.path(folder)}: siblings {_cpu_list.render(siblings)} contradict other siblings")
        found.update(dict.fromkeys(core, core))
    return tuple(sorted(set(found.values())))


def _caches(root: Root, online: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The highest level that holds data, for each CPU: L3 mostly, L2 for small cores that have no share of the L3."""
    caches: list[set[int]] = []
    for cpu in online:
        best = 0
        shared: tuple[int, ...] = ()
        for index in root.glob(f"{CPU}/cpu{cpu}/cache/index*"):
            level = root.read_int(f"{index}/level") or 0
            if level > best and root.read_or_none(f"{index}/type") != "Instruction":
                cpus = _among(_list(root, f"{index}/shared_cpu_list"), online)
                if cpu in cpus:
                    best, shared = level, cpus
        # views of one cache that overlap without being equal (offline CPUs, firmware tables) are that one cache
        touched = [cache for cache in caches if cache & set(shared)]
        caches = [cache for cache in caches if cache not in touched]
        if shared:
            caches.append(set(shared).union(*touched))
    return tuple(sorted(tuple(sorted(cache)) for cache in caches))


def _nodes(root: Root, online: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    nodes = {}
    for path in root.glob(f"{NODE}/node[0-9]*"):
        cpus = _among(_list(root, f"{path}/cpulist"), online)
        if cpus:
            nodes[int(path.rsplit("node", 1)[1])] = cpus
    return dict(sorted(nodes.items())) or {0: online}


def _efficiency(root: Root, online: tuple[int, ...]) -> tuple[int, ...]:
    """By Intel's two kinds of counters, else by unequal ``cpu_capacity`` (Arm, and x86 kernels that have it).

    A preferred core is a little faster than its neighbours of the same kind, so a CPU counts as small below three
    quarters of the largest capacity.
    """
    fast = _among(_list(root, "/sys/devices/cpu_core/cpus"), online)
    slow = _among(
        (*_list(root, "/sys/devices/cpu_atom/cpus"), *_list(root, "/sys/devices/cpu_lowpower/cpus")),
        online,
    )
    if fast and slow:
        return slow
    capacity = {cpu: root.read_int(f"{CPU}/cpu{cpu}/cpu_capacity") for cpu in online}
    known = {cpu: value for cpu, value in capacity.items() if value}
    if len(known) < len(online):
        return ()
    return tuple(cpu for cpu in online if known[cpu] * 4 < max(known.values()) * 3)


def _devices(root: Root, online: tuple[int, ...]) -> tuple[IoDevice, ...]:
    """Network and mass storage on the PCI bus that a host driver holds; what is handed to guests has no say."""
    devices = []
    for path in root.glob(f"{PCI}/*"):
        kind = _kind(root.read_int(f"{path}/class"))
        driver = root.link_name(f"{path}/driver")
        if kind is None or driver is None or driver == _GUESTS:
            continue
        node = root.read_int(f"{path}/numa_node")
        cpus = _among(_list(root, f"{path}/local_cpulist"), online) or online
        devices.append(IoDevice(path.rsplit("/", 1)[1], kind, node if node is not None and node >= 0 else None, cpus))
    return tuple(devices)


def _kind(code: int | None) -> str | None:
    """The kind for a 24-bit class code."""
    if code is None:
        return None
    for prefix, kind in _KINDS:
        if code >> 8 == prefix or (prefix < 0x100 and code >> 16 == prefix):
            return kind
    return None


def _among(cpus: Iterable[int], online: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(cpus) & set(online)))
