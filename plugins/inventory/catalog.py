# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
name: catalog
short_description: Hosts and groups of a catalog of VMs, clusters and GPUs
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - One file says which VMs there are, which cluster they belong to, and which GPUs they have. This plugin checks it as
    a whole and makes hosts and groups of it.
  - Each problem is told with its line, and all of them at once. The name of the file ends in C(catalog.yml).
  - Each VM is a host in the groups C(catalog_vms), C(cluster_NAME), C(role_ROLE) (as C(role_kubernetes_worker)),
    C(gpu_vms) where it has GPUs, C(auto_start) unless it says otherwise, and those of its C(groups).
  - Each node with VMs is in the group C(pve).
  - A VM that another VM shares a GPU with is not refused, since only one of them runs at a time. The plugin says who
    shares what with C(-v).
  - What it adds to P(community.proxmox.proxmox#inventory) is that it says what there should be, before there is any.
extends_documentation_fragment: []
options:
  plugin:
    description: Name of the plugin.
    type: str
    required: true
    choices: [organism.proxmox.catalog]
  catalog:
    description: Version of the file's format.
    type: int
    default: 1
  defaults:
    description:
      - What VMs have that do not say otherwise. Keys C(node), C(network), C(storage), C(bridge), C(image), C(template),
        C(cpu_cores), C(memory_gb) or C(memory_mib), C(disk_gb), C(agent), C(cloud_init), C(onboot).
    type: dict
    default: {}
  networks:
    description:
      - Networks by name, each with C(cidr), C(gateway), C(bridge), and C(ip_from_vmid) for addresses such as C(.140)
        of VM C(140).
    type: dict
    default: {}
  gpus:
    description: GPUs by name, each with C(node), C(pci_address), C(vendor_id), C(device_id), C(model).
    type: dict
    default: {}
  vms:
    description:
      - VMs by name. Keys of O(defaults), C(vmid), C(ip), C(auto_start) (default V(true)), C(gpus) (names of O(gpus)) or
        C(pcie_passthrough), C(groups), C(vars).
    type: dict
    default: {}
  clusters:
    description:
      - Clusters by name, with C(controller) and C(compute_nodes), or C(control_plane) and C(worker_nodes) with the
        lists C(cpu) and C(gpu). Each entry has the keys of a VM.
    type: dict
    default: {}
"""

EXAMPLES = r"""
# lab.catalog.yml
plugin: organism.proxmox.catalog
defaults: {node: pve1, storage: local-zfs, network: lan}
networks:
  lan: {cidr: 192.168.0.0/24, gateway: 192.168.0.1, ip_from_vmid: true}
gpus:
  upper: {pci_address: "0000:01:00", vendor_id: "1002", device_id: "67df"}
vms:
  vm-llm: {vmid: 140, cpu_cores: 32, memory_gb: 32, disk_gb: 500, gpus: [upper], groups: [gpu_pool]}
clusters:
  cloud-cluster:
    control_plane: {vmid: 201, memory_gb: 8, disk_gb: 100}
    worker_nodes:
      cpu:
        - {vmid: 211}
      gpu:
        - {vmid: 221, gpus: [upper], auto_start: false}
"""

import re
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin
from ansible.template import trust_as_template

from ansible_collections.organism.proxmox.plugins.module_utils import _catalog
from ansible_collections.organism.proxmox.plugins.module_utils._catalog_vm import arguments, host_vars
from ansible_collections.organism.proxmox.plugins.plugin_utils import lined_yaml


class InventoryModule(BaseInventoryPlugin):  # type: ignore[misc]  # ansible has no types
    """Hosts and groups of one file."""

    NAME = "organism.proxmox.catalog"

    def verify_file(self, path: str) -> bool:
        return bool(super().verify_file(path)) and path.endswith(("catalog.yml", "catalog.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - a path as Ansible gives it
            text = file.read()
        try:
            catalog = _catalog.read(lined_yaml.load(text, path), path)
        except _catalog.CatalogError as error:
            lines = "\n".join(f"  {path}:{each.line}: {each.where}: {each.text}" for each in error.problems)
            raise AnsibleParserError(f"the catalog has {len(error.problems)} problems:\n{lines}") from error
        for remark in catalog.remarks:
            self.display.v(f"{path}:{remark.line}: {remark.text}")
        self._fill(catalog)

    def _fill(self, catalog: _catalog.Catalog) -> None:
        shared = catalog.sharing()
        for vm in catalog.vms:
            self.inventory.add_host(vm.name)
            for group in groups_of(vm):
                self.inventory.add_group(group)
                self.inventory.add_child(group, vm.name)
            for name, value in host_vars(vm, shared).items():
                self.inventory.set_variable(vm.name, name, trusted(value))
        self.inventory.add_group("pve")
        for node in sorted({vm.node for vm in catalog.vms} | {gpu.node for gpu in catalog.gpus}):
            self.inventory.add_host(node)
            self.inventory.add_child("pve", node)
            ours = [arguments(vm) for vm in catalog.vms if vm.node == node]
            self.inventory.set_variable(node, "catalog_vms", trusted(ours))
            self.inventory.set_variable(node, "catalog_mappings", trusted(mappings(catalog, node)))


def trusted(value: Any) -> Any:
    """The file is as trusted as any inventory: templates in C(vars) work."""
    if isinstance(value, dict):
        return {key: trusted(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [trusted(each) for each in value]
    return trust_as_template(value) if isinstance(value, str) else value


def groups_of(vm: _catalog.CatalogVm) -> list[str]:
    """Names as Ansible wants them: letters, digits and _."""
    found = ["catalog_vms", *vm.groups]
    found += [f"cluster_{vm.cluster}"] if vm.cluster else []
    found += [f"role_{vm.role}"] if vm.role else []
    found += ["gpu_vms"] if vm.gpus else []
    found += ["auto_start"] if vm.auto_start else []
    return [re.sub(r"\W", "_", name) for name in found]


def mappings(catalog: _catalog.Catalog, node: str) -> list[dict[str, Any]]:
    """What pve_pci_mapping wants for the cards of a node."""
    cards = {
        gpu.key: gpu for gpu in (*catalog.gpus, *(gpu for vm in catalog.vms for gpu in vm.gpus)) if gpu.node == node
    }
    found = []
    for gpu in cards.values():
        device = {"node": gpu.node, "path": gpu.address}
        if gpu.vendor and gpu.device:
            device["id"] = f"{gpu.vendor}:{gpu.device}"
        found.append({"name": gpu.mapping, "devices": [device]} | ({"description": gpu.model} if gpu.model else {}))
    return found
