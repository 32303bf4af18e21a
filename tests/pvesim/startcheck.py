# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Proxmox VE finds only when a VM starts, in its order: processors, memory, then PCI devices."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import Died
from .formats import parse_cpuset
from .node import Node
from .pci import MAX_HOSTPCI, alternatives, fields, hostpci

MAX_NUMA = 8


def memory_of(config: Mapping[str, str]) -> int:
    """MiB; ``memory`` is a number or a property string with the default key ``current``."""
    found = fields(config.get("memory", "512"))
    return int(found.get("current", found.get("_", "512")))


def check(node: Node, config: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """The choices of each ``hostpciN``. Raises Died with the task's exit status."""
    threads = int(config.get("sockets", 1)) * int(config.get("cores", 1))
    if threads > node.host.cpus:
        raise Died(f"MAX {node.host.cpus} vcpus allowed per VM on this node")
    _memory(node, config)
    return _devices(node, config)


def _memory(node: Node, config: Mapping[str, str]) -> None:
    numa = config.get("numa", "0") == "1"
    if config.get("hugepages") and not numa:
        raise Died("numa needs to be enabled to use hugepages")
    if not numa:
        return
    total = 0
    for index in range(MAX_NUMA):
        text = config.get(f"numa{index}")
        if not text:
            continue
        cell = fields(text)
        if not cell.get("memory"):
            raise Died(f"missing NUMA node{index} memory value")
        size = int(float(cell["memory"]))
        total += size
        if "cpus" not in cell and "_" not in cell:
            raise Died(f"missing NUMA node{index} cpus")
        if config.get("hugepages"):
            _page_size(node, config["hugepages"], size)
        if "hostnodes" in cell:
            if not cell.get("policy"):
                raise Died(f"you need to define a policy for hostnode {cell['hostnodes']}")
        elif config.get("hugepages"):
            raise Died("numa hostnodes need to be defined to use hugepages")
    memory = memory_of(config)
    if total and total != memory:
        raise Died("total memory for NUMA nodes must be equal to vm static memory")
    if not total and config.get("hugepages"):
        sockets = int(config.get("sockets", 1))
        for index in range(sockets):
            if index >= node.host.numa_nodes:
                raise Died(f"host NUMA node{index} doesn't exist")
            _page_size(node, config["hugepages"], memory // sockets)


def _page_size(node: Node, wanted: str, size: int) -> int:
    supported = node.host.hugepages
    if size <= 0 or size & 1:
        raise Died(f"memory size '{size}' is not a positive even integer; cannot use for hugepages")
    if not supported:
        raise Died("your system doesn't support hugepages")
    if wanted == "any":
        return 1024 if 1024 in supported and size % 1024 == 0 else 2
    if int(wanted) not in supported:
        raise Died(f"your system doesn't support hugepages of {wanted} MB")
    if size % int(wanted):
        raise Died(f"Memory size {size} is not a multiple of the requested hugepages size {wanted}")
    return int(wanted)


def hugepages_needed(node: Node, config: Mapping[str, str]) -> tuple[int, int] | None:
    """Page size in MiB and how many of them a start takes, or None."""
    if not config.get("hugepages"):
        return None
    memory = memory_of(config)
    size = _page_size(node, config["hugepages"], memory // int(config.get("sockets", 1)))
    return size, memory // size


def _devices(node: Node, config: Mapping[str, str]) -> dict[str, list[list[str]]]:
    q35 = "q35" in config.get("machine", "")
    found = {}
    for index in range(MAX_HOSTPCI):
        text = config.get(f"hostpci{index}")
        if not text:
            continue
        found[f"hostpci{index}"] = alternatives(node.host, node.mappings, node.name, text)
        if hostpci(text).get("pcie") == "1" and not q35:
            raise Died("q35 machine model is not enabled")
    return found


def check_affinity(node: Node, config: Mapping[str, str]) -> None:
    """taskset refuses a list without any processor that there is: QEMU never starts."""
    if "affinity" in config and not parse_cpuset(config["affinity"]) & set(range(node.host.cpus)):
        raise Died("start failed: QEMU exited with code 1")
