# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a VM is, and what its node has: the questions that modules ask before they plan.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._pve_client import LOCAL, Pve, PveForbidden, PveNotFound, PveRefused
from ._pve_strings import StringError, parse
from ._pve_vm_check import NodeFacts, PciMapping
from ._pve_vm_plan import addresses

NOT_A_BRIDGE = "06"
"""Class of bridges, the only devices that nobody passes through; the API hides more by default."""


@dataclass(frozen=True)
class Vm:
    """A VM by its id. ``exists`` is False for one that is still to be made; then ``node`` is where."""

    vmid: int
    node: str
    exists: bool = False
    name: str = ""
    running: bool = False
    template: bool = False
    ha: bool = False

    @property
    def path(self) -> str:
        return f"/nodes/{self.node}/qemu/{self.vmid}"

    def __str__(self) -> str:
        return f"VM {self.vmid} ({self.name})" if self.name else f"VM {self.vmid}"


def vm(pve: Pve, vmid: int | None, name: str | None, node: str | None) -> Vm:
    """The VM by id, or by name where no id is given. One that is not there gets the id that is asked for, or 0.

    Raises PveRefused for a name that is not unique, an id that is a container's, or a VM that is on another node.
    """
    guests = [each for each in pve.get("/cluster/resources", type="vm") if each.get("type") in ("qemu", "lxc")]
    if vmid is not None:
        found = [each for each in guests if int(each["vmid"]) == vmid]
    else:
        found = [each for each in guests if each.get("name") == name and each["type"] == "qemu"]
        if len(found) > 1:
            where = ", ".join(f"{each['vmid']} on {each['node']}" for each in found)
            raise PveRefused(f"several VMs are named {name}: {where}; say vmid")
    if not found:
        return Vm(vmid or 0, node_name(pve, node), name=name or "")
    guest = found[0]
    if guest["type"] != "qemu":
        raise PveRefused(f"{vmid} is a container on node {guest['node']}, no VM; take another vmid")
    if node and guest["node"] != node:
        raise PveRefused(
            f"VM {guest['vmid']} is on node {guest['node']}, not on {node}: migrate it, or name the node where it is"
        )
    return Vm(
        int(guest["vmid"]),
        str(guest["node"]),
        True,
        str(guest.get("name") or ""),
        guest.get("status") == "running",
        _true(guest.get("template")),
        bool(guest.get("hastate")) and guest.get("hastate") not in ("ignored", "disabled"),
    )


def existing_vm(pve: Pve, vmid: int | None, name: str | None, node: str | None) -> Vm:
    """As `vm`, for one that must be there. Raises PveNotFound."""
    found = vm(pve, vmid, name, node)
    if not found.exists:
        asked = f"VM {vmid}" if vmid is not None else f"VM named {name}"
        raise PveNotFound(
            f"there is no {asked}, or the user lacks VM.Audit on it; see pvesh get /cluster/resources --type vm"
        )
    return found


def node_name(pve: Pve, node: str | None) -> str:
    """The node that is meant: the named one, the only one, or with backend local this one. Raises PveRefused."""
    nodes = {str(each["node"]): each for each in pve.get("/nodes")}
    if node:
        if node not in nodes:
            raise PveRefused(f"there is no node {node}; nodes are {', '.join(sorted(nodes))}")
        if nodes[node].get("status") == "offline":
            raise PveRefused(f"node {node} is offline")
        return node
    if len(nodes) == 1:
        return next(iter(nodes))
    here = os.uname().nodename.split(".")[0]
    if pve.backend == LOCAL and here in nodes:
        return here
    raise PveRefused(f"there are nodes {', '.join(sorted(nodes))}: say which one with node")


def mappings(pve: Pve, node: str) -> dict[str, PciMapping]:
    """The PCI mappings that the user may see, with their devices on a node and what Proxmox VE complains of them."""
    found: dict[str, PciMapping] = {}
    for each in pve.get("/cluster/mapping/pci", **{"check-node": node}):
        paths = []
        for text in each.get("map") or ():
            try:
                entry = parse(None, str(text))
            except StringError:
                continue  # an entry that this version cannot read is no device that it could compare
            if entry.get("node") == node and entry.get("path"):
                paths.append(addresses(str(entry.get("path"))))
        errors = tuple(
            str(check["message"]).strip() for check in each.get("checks") or () if check.get("severity") == "error"
        )
        found[str(each["id"])] = PciMapping(tuple(paths), errors)
    return found


def devices(pve: Pve, node: str) -> dict[str, Mapping[str, Any]] | None:
    """PCI devices of a node by address; None without Sys.Audit."""
    try:
        listed = pve.get(f"/nodes/{node}/hardware/pci", **{"pci-class-blacklist": NOT_A_BRIDGE})
    except PveForbidden:
        return None
    return {str(each["id"]).lower(): each for each in listed}


def facts(pve: Pve, node: str, config: Mapping[str, Any], known: Mapping[str, PciMapping] | None = None) -> NodeFacts:
    """What `_pve_vm_check` wants to know of a node for this configuration; only what it uses is asked for.

    ``known``: the node's mappings, where the caller has them (in check mode with those that would be made).
    """
    gpus = [str(value) for option, value in config.items() if option.startswith("hostpci") and value]
    raw = [value for value in gpus if "mapping=" not in value]
    if known is None and len(raw) < len(gpus):
        known = mappings(pve, node)
    listed = devices(pve, node) if raw else None
    cpus, memory = _size(pve, node)
    return NodeFacts(
        node=node,
        cpus=cpus,
        memory=memory,
        devices=frozenset(listed) if listed is not None else None,
        mappings=known,
        bridges=_bridges(pve, node)
        if any(option.startswith("net") and "bridge=" in str(value) for option, value in config.items())
        else None,
    )


def _size(pve: Pve, node: str) -> tuple[int | None, int | None]:
    """CPUs and MiB. Without Sys.Audit the list of nodes lacks the numbers."""
    for each in pve.get("/nodes"):
        if each.get("node") == node:
            cpus, memory = each.get("maxcpu"), each.get("maxmem")
            return int(cpus) if cpus else None, int(memory) // 1024**2 if memory else None
    return None, None


def _bridges(pve: Pve, node: str) -> frozenset[str] | None:
    """Bridges that the user may use; None for one whom the API may hide some from."""
    if not pve.is_root:
        return None
    return frozenset(str(each["iface"]) for each in pve.get(f"/nodes/{node}/network", type="any_bridge"))


def _true(value: Any) -> bool:
    return str(value) in ("1", "True", "true")
