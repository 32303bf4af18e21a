# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM of the catalog as variables of a host, and as arguments of the module pve_vm; pure.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._catalog import CatalogVm


def host_vars(vm: CatalogVm, shared: Mapping[tuple[str, str], list[str]]) -> dict[str, Any]:
    """``shared``: of Catalog.sharing()."""
    found: dict[str, Any] = {
        "catalog_vmid": vm.vmid,
        "catalog_node": vm.node,
        "catalog_cluster": vm.cluster,
        "catalog_role": vm.role,
        "catalog_auto_start": vm.auto_start,
        "catalog_cpu_cores": vm.cores,
        "catalog_memory_mib": vm.memory_mib,
        "catalog_gpus": [
            {
                "node": gpu.node,
                "pci_address": gpu.address,
                "mapping": gpu.mapping,
                "model": gpu.model,
                "shared_with": [name for name in shared.get(gpu.key, []) if name != vm.name],
            }
            for gpu in vm.gpus
        ],
        "catalog_pve_vm": arguments(vm),
        **vm.vars,
    }
    if vm.address:
        found.setdefault("ansible_host", vm.address)
    return found


def arguments(vm: CatalogVm) -> dict[str, Any]:
    """What pve_vm wants: memory fixed where a GPU pins it, drives and the first boot for a new VM only."""
    config: dict[str, Any] = {
        "cores": vm.cores,
        "memory": vm.memory_mib,
        "onboot": int(vm.onboot),
        "agent": {"enabled": int(vm.agent)},
        "net0": {"model": "virtio", "bridge": vm.bridge},
    }
    create: dict[str, Any] = {"ostype": "l26", "scsihw": "virtio-scsi-single"}
    if vm.gpus:
        config |= {"balloon": 0, "machine": "q35"}
        create |= {"bios": "ovmf", "cpu": "host", "efidisk0": {"file": f"{vm.storage}:1", "efitype": "4m"}}
    if not vm.template:
        disk: dict[str, Any] = {"file": f"{vm.storage}:{vm.disk_gib}", "iothread": 1, "discard": "on"}
        if vm.image:
            disk |= {"file": f"{vm.storage}:0", "import-from": vm.image, "size": f"{vm.disk_gib}G"}
        create |= {"scsi0": disk, "boot": {"order": "scsi0"}}
    if vm.cloud_init:
        create |= {"ipconfig0": {"ip": vm.ip} | ({"gw": vm.gateway} if vm.gateway else {})}
        if not vm.template:
            create["ide2"] = f"{vm.storage}:cloudinit"
    found: dict[str, Any] = {"name": vm.name, "node": vm.node, "config": config, "create": create}
    if vm.vmid:
        found["vmid"] = vm.vmid
    if vm.template:
        found["clone"] = {"name": vm.template, "storage": vm.storage}
    if vm.gpus:
        found["gpus"] = {"mappings": [gpu.mapping for gpu in vm.gpus], "options": {"pcie": 1}, "owned_prefix": "gpu-"}
    return found
