#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: pve_pci_mapping
short_description: Names for PCI devices that a VM may have, complete enough for it to start
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Creates, corrects and removes PCI mappings of a Proxmox VE cluster (C(/etc/pve/mapping/pci.cfg)). By them a user or
    token without root may give devices to VMs, with C(Mapping.Use).
  - Reads C(id), C(subsystem-id) and C(iommugroup) from the node, since the start of a VM wants each of them that the
    hardware has, and nothing earlier says so. When the firmware or the kernel has changed a group, another run corrects
    it.
  - Entries of nodes that are not named stay.
  - Everything is checked before anything is written. Afterwards Proxmox VE's own check is asked.
  - M(community.proxmox.proxmox_kvm) and its collection have no module for these mappings.
extends_documentation_fragment:
  - organism.proxmox.attributes
  - organism.proxmox.pve
options:
  mappings:
    description: The mappings.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the mapping. It begins with a letter.
        type: str
        required: true
      paths:
        description:
          - Devices on the node that is meant, as V(0000:01:00) for all functions, V(0000:01:00.0) for one, or joined by
            V(;) for some that belong together. Several are alternatives, of which a VM gets one that is free.
        type: list
        elements: str
        default: []
      devices:
        description: The same for any node.
        type: list
        elements: dict
        default: []
        suboptions:
          path:
            description: As in O(mappings[].paths).
            type: str
            required: true
          node:
            description: The node. Without it, the one that is meant.
            type: str
          description:
            description: A note.
            type: str
            default: ""
          id:
            description: Vendor and device that are expected there, as V(1002:67df). Another card is refused.
            type: str
          subsystem_id:
            description: The same for the subsystem.
            type: str
          iommugroup:
            description: The same for the IOMMU group.
            type: int
      description:
        description: A note on the mapping.
        type: str
      mdev:
        description: Whether VMs get mediated devices of it.
        type: bool
      live_migration_capable:
        description: Whether the device's driver can migrate it.
        type: bool
  state:
    description: V(absent) removes the mappings.
    type: str
    choices: [present, absent]
    default: present
  owned_prefix:
    description:
      - Mappings that begin like this and are not in O(mappings) are removed. With O(state=absent), all that begin like
        this but for O(keep). Without it, none is.
    type: str
    default: ""
  keep:
    description: With O(state=absent), mappings of O(owned_prefix) that stay.
    type: list
    elements: str
    default: []
  force:
    description: Remove a mapping although a VM has it. That VM does not start then.
    type: bool
    default: false
seealso:
  - module: organism.proxmox.pve_vm
"""

EXAMPLES = r"""
- name: Name two cards
  organism.proxmox.pve_pci_mapping:
    mappings:
      - {name: gpu-01, paths: ["0000:01:00"]}
      - {name: gpu-02, paths: ["0000:02:00"], description: RX 580 in the upper slot}

- name: One name for a card on each of two nodes
  organism.proxmox.pve_pci_mapping:
    mappings:
      - name: l40s
        devices:
          - {node: pve1, path: "0000:41:00.0", id: "10de:26b9"}
          - {node: pve2, path: "0000:81:00.0", id: "10de:26b9"}
"""

RETURN = r"""
pending:
  description:
    - Devices of the mappings that were written, or would be in check mode. For
      O(organism.proxmox.pve_vm#module:gpus.pending).
  returned: success
  type: dict
  sample: {"gpu-01": ["0000:01:00"]}
names:
  description: Names of the mappings.
  returned: success
  type: list
  elements: str
  sample: [gpu-01, gpu-02]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _pve_client, _pve_find, _pve_mapping
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse

DEVICE: dict[str, Any] = {
    "path": {"type": "str", "required": True},
    "node": {"type": "str"},
    "description": {"type": "str", "default": ""},
    "id": {"type": "str"},
    "subsystem_id": {"type": "str"},
    "iommugroup": {"type": "int"},
}
MAPPING: dict[str, Any] = {
    "name": {"type": "str", "required": True},
    "paths": {"type": "list", "elements": "str", "default": []},
    "devices": {"type": "list", "elements": "dict", "default": [], "options": DEVICE},
    "description": {"type": "str"},
    "mdev": {"type": "bool"},
    "live_migration_capable": {"type": "bool"},
}
ARGUMENTS: dict[str, Any] = {
    **_pve_client.argument_spec(),
    "mappings": {"type": "list", "elements": "dict", "required": True, "options": MAPPING},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "owned_prefix": {"type": "str", "default": ""},
    "keep": {"type": "list", "elements": "str", "default": []},
    "force": {"type": "bool", "default": False},
}


def wish(raw: dict[str, Any], node: str) -> _pve_mapping.Wish:
    """One mapping of the arguments. Raises MappingRefused."""
    devices = [_pve_mapping.Device(_pve_mapping.path_of(path), node) for path in raw["paths"]]
    for each in raw["devices"]:
        said = {"id": each["id"], "subsystem-id": each["subsystem_id"], "iommugroup": each["iommugroup"]}
        expected = {key: str(value) for key, value in said.items() if value is not None}
        path = _pve_mapping.path_of(each["path"])
        devices.append(_pve_mapping.Device(path, each["node"] or node, each["description"], expected))
    return _pve_mapping.Wish(
        raw["name"], tuple(devices), raw["description"], raw["mdev"], raw["live_migration_capable"]
    )


def run(pve: _pve_client.Pve, params: dict[str, Any], *, check: bool) -> _pve_mapping.Outcome:
    """Raises PveError and MappingRefused."""
    if params["state"] == "absent":
        names = [each["name"] for each in params["mappings"]]
        return _pve_mapping.remove(
            pve,
            names,
            owned_prefix=params["owned_prefix"],
            keep=params["keep"],
            force=params["force"],
            check_mode=check,
        )
    node = _pve_find.node_name(pve, params["node"])
    wishes = [wish(each, node) for each in params["mappings"]]
    return _pve_mapping.converge(
        pve, wishes, owned_prefix=params["owned_prefix"], force=params["force"], check_mode=check
    )


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    try:
        done = run(_pve_client.connect(module.params), module.params, check=module.check_mode)
    except (_pve_client.PveError, _pve_mapping.MappingRefused) as error:
        refuse(module, f"PCI mappings: {error}")
    if done.problems:
        refuse(
            module,
            "PCI mappings are written, and Proxmox VE finds them wrong, so that no VM with them would start: "
            + "; ".join(done.problems),
            changed=done.difference.changed,
        )
    names = [each["name"] for each in module.params["mappings"]]
    finish(module, done.difference, header="PCI mappings", pending=done.pending, names=names)


if __name__ == "__main__":
    main()
