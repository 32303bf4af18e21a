# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Proxmox VE accepts in a configuration and refuses only when the VM starts; pure.

Create and update take all of these without a word (seen on PVE 9.2), and the failure comes at the next boot of the
host, when nobody looks. So they are found here, from the whole configuration as it will be.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _pve_vm_keys as keys
from ._pve_strings import PropertyString, StringError, kind, parse_option
from ._pve_vm_plan import addresses

_CACHED = ("writeback", "writethrough", "unsafe")


@dataclass(frozen=True)
class PciMapping:
    """A PCI mapping on one node. ``paths``: the alternatives, each some addresses. ``errors``: PVE's own checks."""

    paths: tuple[tuple[str, ...], ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeFacts:
    """What the node has; None where it could not be asked (a privilege is missing), then nothing is said about it."""

    node: str = ""
    cpus: int | None = None
    memory: int | None = None
    """MiB."""
    devices: frozenset[str] | None = None
    mappings: Mapping[str, PciMapping] | None = None
    bridges: frozenset[str] | None = None


@dataclass(frozen=True)
class Problem:
    """``options``: the options that make it. ``fatal``: the VM would not start; otherwise something has no effect."""

    options: tuple[str, ...]
    text: str
    fatal: bool = True


@dataclass
class _Look:
    config: Mapping[str, Any]
    facts: NodeFacts
    strings: dict[str, PropertyString] = field(default_factory=dict)

    def get(self, option: str, default: str = "") -> str:
        value = self.config.get(option)
        return default if value is None else str(value)

    def sub(self, option: str, name: str, default: str = "") -> str:
        string = self.strings.get(option)
        return (string.get(name) if string else None) or default

    def of(self, *kinds: str) -> list[str]:
        """Options of these kinds in the order of their numbers."""
        found = [option for option in self.strings if kind(option) in kinds]
        return sorted(found, key=lambda option: (kind(option), int(option[len(kind(option)) :] or 0)))

    @property
    def vcpus(self) -> int:
        return int(self.get("cores", "1")) * int(self.get("sockets", "1"))

    @property
    def memory(self) -> int:
        return int(self.sub("memory", "current", "512"))


def problems(config: Mapping[str, Any], facts: NodeFacts) -> list[Problem]:
    """All problems of a configuration (option to text or number, as the API returns it)."""
    look = _Look(config, facts)
    found: list[Problem] = []
    for option, value in config.items():
        if not keys.is_string(option) or value is None:
            continue
        try:
            look.strings[option] = parse_option(option, str(value))
        except StringError as error:
            found.append(Problem((option,), f"{option}: {error}"))
    for part in (_cpus, _memory, _numa, _gpus, _drives, _nets, _firmware):
        found += part(look)
    return found


def _cpus(look: _Look) -> Iterator[Problem]:
    have = look.facts.cpus
    if have is not None and look.vcpus > have:
        yield Problem(("cores", "sockets"), f"{look.vcpus} vCPUs, and node {look.facts.node} has {have} CPUs")
    vcpus = int(look.get("vcpus", "0"))
    if vcpus > look.vcpus:
        yield Problem(("vcpus", "cores", "sockets"), f"vcpus {vcpus} is more than cores x sockets = {look.vcpus}")


def _memory(look: _Look) -> Iterator[Problem]:
    balloon = look.get("balloon")
    if balloon and int(balloon) > look.memory:
        yield Problem(("balloon", "memory"), f"balloon {balloon} is more than memory {look.memory}")
    have = look.facts.memory
    if have is not None and look.memory > have and (look.of("hostpci") or look.get("hugepages")):
        yield Problem(
            ("memory", *look.of("hostpci"), "hugepages"),
            f"memory {look.memory} MiB is taken whole at the start (hostpci, hugepages), and node {look.facts.node} "
            f"has {have} MiB",
        )
    if look.of("hostpci") and balloon != "0":
        yield Problem(
            ("balloon",),
            "balloon is not 0, and a VM with hostpci has all its memory pinned: ballooning frees nothing on the host",
            fatal=False,
        )
    huge = look.get("hugepages")
    if not huge:
        return
    if look.get("numa", "0") != "1":
        yield Problem(("hugepages", "numa"), "hugepages need numa: 1")
    size = 2 if huge == "any" else int(huge)
    if look.memory % size:
        yield Problem(("hugepages", "memory"), f"memory {look.memory} is no multiple of hugepages of {size} MiB")
    for option in look.of("numa"):
        if not look.sub(option, "hostnodes") or not look.sub(option, "policy"):
            yield Problem((option, "hugepages"), f"{option}: hugepages need hostnodes and policy in each NUMA node")


def _numa(look: _Look) -> Iterator[Problem]:
    nodes = look.of("numa")
    if not nodes:
        return
    if look.get("numa", "0") != "1":
        yield Problem((*nodes, "numa"), f"{nodes[0]} has no effect without numa: 1, and Proxmox VE does not say so")
        return
    total = sum(float(look.sub(option, "memory", "0")) for option in nodes)
    if total != look.memory:
        yield Problem((*nodes, "memory"), f"the NUMA nodes have {total:g} MiB together, and memory is {look.memory}")
    for option in nodes:
        if look.sub(option, "hostnodes") and not look.sub(option, "policy"):
            yield Problem((option,), f"{option}: hostnodes needs policy (bind, preferred or interleave)")


def _gpus(look: _Look) -> Iterator[Problem]:
    node, q35 = look.facts.node, "q35" in look.sub("machine", "type")
    owners: dict[str, str] = {}
    for option in look.of("hostpci"):
        if look.sub(option, "pcie", "0") == "1" and not q35:
            yield Problem((option, "machine"), f"{option}: pcie=1 needs machine: q35")
        name, host = look.sub(option, "mapping"), look.sub(option, "host")
        alternatives: tuple[tuple[str, ...], ...] = (addresses(host),) if host else ()
        if name and look.facts.mappings is not None:
            mapping = look.facts.mappings.get(name)
            if mapping is None:
                yield Problem((option,), f"{option}: there is no PCI mapping {name}; create it with pve_pci_mapping")
                continue
            if not mapping.paths:
                yield Problem((option,), f"{option}: PCI mapping {name} has no device on node {node}")
            yield from (Problem((option,), f"{option}: PCI mapping {name}: {error}") for error in mapping.errors)
            alternatives = mapping.paths
        elif not name and not host:
            yield Problem((option,), f"{option}: neither mapping nor host says which device")
        if host and look.facts.devices is not None:
            for address in addresses(host):
                if not exists(address, look.facts.devices):
                    yield Problem((option,), f"{option}: node {node} has no PCI device {address}")
        if len(alternatives) == 1:
            yield from _twice(option, alternatives[0], owners)


def _twice(option: str, wanted: tuple[str, ...], owners: dict[str, str]) -> Iterator[Problem]:
    """A device that two options assign; only where there is one alternative, else PVE may choose another."""
    for address in wanted:
        for taken, other in owners.items():
            if other != option and overlap(address, taken):
                yield Problem(
                    (option, other), f"{option} and {other} both assign {address}; one is enough for all functions"
                )
        owners.setdefault(address, option)


def _drives(look: _Look) -> Iterator[Problem]:
    single = look.get("scsihw", "lsi") == "virtio-scsi-single"
    for option in look.of("scsi", "virtio", "sata", "ide"):
        if look.sub(option, "iothread", "0") == "1" and kind(option) == "scsi" and not single:
            yield Problem(
                (option, "scsihw"), f"{option}: iothread has no effect without scsihw: virtio-scsi-single", fatal=False
            )
        if look.sub(option, "aio") == "native" and look.sub(option, "cache") in _CACHED:
            yield Problem((option,), f"{option}: aio=native does not go with cache={look.sub(option, 'cache')}")


def _nets(look: _Look) -> Iterator[Problem]:
    for option in look.of("net"):
        queues = int(look.sub(option, "queues", "0"))
        if queues > look.vcpus:
            yield Problem(
                (option,),
                f"{option}: {queues} queues for {look.vcpus} vCPUs; the rest is never used",
                fatal=False,
            )
        bridge = look.sub(option, "bridge")
        if bridge and look.facts.bridges is not None and bridge not in look.facts.bridges:
            yield Problem((option,), f"{option}: node {look.facts.node} has no bridge {bridge}")


def _firmware(look: _Look) -> Iterator[Problem]:
    if look.get("bios") == "ovmf" and "efidisk0" not in look.strings:
        yield Problem(
            ("bios", "efidisk0"), "bios: ovmf without efidisk0 forgets its variables at each start", fatal=False
        )
    found = re.fullmatch(r"serial([0-3])", look.sub("vga", "type"))
    if found and not look.get(f"serial{found[1]}"):
        yield Problem(("vga", f"serial{found[1]}"), f"vga: serial{found[1]} needs serial{found[1]}: socket")


def exists(address: str, devices: frozenset[str]) -> bool:
    """Whether the node has a device; an address without function means all functions."""
    return any(device == address or device.startswith(f"{address}.") for device in devices)


def overlap(one: str, other: str) -> bool:
    """Whether two addresses have a function in common."""
    return one == other or other.startswith(f"{one}.") or one.startswith(f"{other}.")
