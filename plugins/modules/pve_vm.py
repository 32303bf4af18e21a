#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: pve_vm
short_description: A VM of Proxmox VE as its options say, and nothing else of it changed
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Creates a VM, or adopts one and brings the options that are named to their values. What is not named stays as it
    is, sub-options of one string included. The MAC of a network device stays, too, and volumes are neither replaced
    nor shrunk.
  - Compares by meaning, so that a second run changes nothing. What is a default of Proxmox VE need not be written
    there.
  - Changes are sent together and under the digest of what was read. If somebody else was faster, it reads and plans
    anew, and gives up with a report after four times.
  - What Proxmox VE takes without a word and refuses at the next start is refused before anything is sent. Of that kind
    are a PCI mapping that does not exist or does not fit the hardware, hugepages without NUMA, C(pcie=1) without q35,
    and more vCPUs than the node has. Where a mistake was there before, it is a warning.
  - Says which options are live and which wait for a cold start. M(organism.proxmox.pve_vm_power) does one.
  - What it adds to M(community.proxmox.proxmox_kvm) is check mode, diff mode, no change without a difference, updates
    of single sub-options, the options C(affinity) and PCI mappings, and a way to keys that only root may set.
extends_documentation_fragment:
  - organism.proxmox.attributes
  - organism.proxmox.pve
options:
  vmid:
    description:
      - Id of the VM. Without it, the VM is found by O(name), and a new one gets the next free id.
    type: int
  name:
    description:
      - Name of the VM. With O(vmid), the VM gets this name.
    type: str
  state:
    description:
      - V(absent) destroys a stopped VM with its volumes. A VM that runs or is protected is refused.
    type: str
    choices: [present, absent]
    default: present
  config:
    description:
      - Options of the VM, with the names that C(qm config) shows.
      - A value is text or a number. An option that is a property string may be a dict of the sub-options that matter,
        or text with the same meaning. V(null) removes an option or sub-option; a drive that is removed stays as unused
        disk.
      - A drive whose C(file) is C(STORAGE:GIB) gets a new volume only if it has none. C(size) lets a volume grow.
    type: dict
    default: {}
  create:
    description:
      - The same for a new VM only, as volumes, keys and users of the guest. O(config) wins.
    type: dict
    default: {}
  owned_config:
    description:
      - The same for a VM that this module has made, which O(owned_tag) tells. An adopted VM is not brought to it.
    type: dict
    default: {}
  owned_tag:
    description: Tag that a new VM gets.
    type: str
    default: ""
  expect_name:
    description: A VM of another name that lacks O(owned_tag) is refused. It is somebody else's.
    type: str
    default: ""
  only_existing:
    description: A VM that is not there is nothing to do.
    type: bool
    default: false
  cipassword:
    description: Password of the guest's user, for a new VM only, since Proxmox VE never shows it again.
    type: str
  clone:
    description:
      - The VM or template that a new VM is a clone of, instead of an empty VM. A clone that cannot be finished is
        removed.
    type: dict
    suboptions:
      vmid:
        description: Its id.
        type: int
      name:
        description: Its name, where no id is given.
        type: str
      full:
        description: Copy the volumes. Otherwise they build on the template's.
        type: bool
        default: true
      storage:
        description: Storage for copied volumes. Without it, that of the template.
        type: str
      snapshot:
        description: Snapshot that is cloned.
        type: str
  gpus:
    description:
      - PCI mappings that the VM has. A mapping that is there keeps its C(hostpciN), others get the lowest free one. A
        raw entry of the same device is converted in its place. Entries that are not ours are never touched.
    type: dict
    suboptions:
      mappings:
        description: Names of mappings, at most 16.
        type: list
        elements: str
        required: true
      options:
        description: Sub-options of each of them.
        type: dict
        default: {pcie: 1}
      owned_prefix:
        description:
          - A mapping that is attached, begins like this and is not in O(gpus.mappings) is taken off. Without it, none
            is.
        type: str
        default: ""
      pending:
        description:
          - RV(organism.proxmox.pve_pci_mapping#module:pending) of an earlier task. In check mode these mappings count
            as made.
        type: dict
        default: {}
  pool:
    description: Resource pool of a new VM.
    type: str
  root_only:
    description:
      - What becomes of options that only root@pam itself may set, as C(affinity), C(args), C(hookscript), C(hugepages)
        and a raw C(hostpciN), when the connection is an API token or another user.
      - V(refuse) refuses the whole change before anything is sent. V(local) sends these options, and no others, by
        C(pvesh). The module has to run as root on a node of the same cluster for that.
    type: str
    choices: [refuse, local]
    default: refuse
  guard_tag:
    description: With O(state=absent), a VM without this tag is refused.
    type: str
    default: ""
  task_timeout:
    description: Seconds that a task may take, as the import of an image.
    type: int
    default: 600
seealso:
  - module: organism.proxmox.pve_pci_mapping
  - module: organism.proxmox.pve_vm_power
  - module: community.proxmox.proxmox_kvm
"""

EXAMPLES = r"""
- name: Four queues and another bridge, the MAC stays
  organism.proxmox.pve_vm:
    vmid: 200
    config:
      net0: {bridge: vmbr1, queues: 4}

- name: By a token, with root's own option by pvesh on the node
  organism.proxmox.pve_vm:
    vmid: 200
    config:
      cores: 4
      affinity: "1,7"
    root_only: local
    api_host: 127.0.0.1
    api_user: ansible@pve
    api_token_id: setup
    api_token_secret: "{{ vault_pve_token }}"

- name: A VM for GPUs from a cloud image
  organism.proxmox.pve_vm:
    vmid: 200
    name: gpu-pool
    config:
      machine: q35
      bios: ovmf
      cores: 4
      memory: 16384
      balloon: 0
      scsihw: virtio-scsi-single
      net0: {model: virtio, bridge: vmbr0}
      scsi0: {size: 64G, iothread: true, discard: true, aio: io_uring}
      affinity: "1,7"
    create:
      efidisk0: {file: "local-zfs:1", efitype: 4m}
      scsi0: {file: "local-zfs:0", import-from: "local:import/debian-13-generic-amd64.qcow2"}
    gpus:
      mappings: [gpu-01, gpu-02]
      owned_prefix: gpu-
"""

RETURN = r"""
vmid:
  description: Id of the VM.
  returned: success
  type: int
  sample: 200
node:
  description: Node of the VM.
  returned: success
  type: str
  sample: pve1
created:
  description: Whether the VM is new.
  returned: success
  type: bool
  sample: false
running:
  description: Whether the VM runs.
  returned: success
  type: bool
  sample: true
live:
  description: Options of this change that act already.
  returned: success
  type: list
  elements: str
  sample: [onboot]
waiting:
  description: Options of this change that wait for a cold start. In check mode a prediction.
  returned: success
  type: list
  elements: str
  sample: [memory]
cold_start:
  description: All options that wait for a cold start, earlier changes included.
  returned: success
  type: list
  elements: str
  sample: [memory, net0]
kept:
  description: Sentences about what was named and stays as it is.
  returned: success
  type: list
  elements: str
  sample: []
warnings_of_vm:
  description: Mistakes that were there before and are not part of this change.
  returned: success
  type: list
  elements: str
  sample: ["VM 200 (gpu-pool) will not start: hugepages need numa: 1"]
config:
  description: The configuration after the change, pending values included, without passwords and keys.
  returned: success
  type: dict
  sample: {"cores": 4, "memory": "16384"}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _pve_client, _pve_vm, _pve_vm_plan
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._pve_vm_check import PciMapping

CLONE: dict[str, Any] = {
    "vmid": {"type": "int"},
    "name": {"type": "str"},
    "full": {"type": "bool", "default": True},
    "storage": {"type": "str"},
    "snapshot": {"type": "str"},
}
GPUS: dict[str, Any] = {
    "mappings": {"type": "list", "elements": "str", "required": True},
    "options": {"type": "dict", "default": {"pcie": 1}},
    "owned_prefix": {"type": "str", "default": ""},
    "pending": {"type": "dict", "default": {}},
}
ARGUMENTS: dict[str, Any] = {
    **_pve_client.argument_spec(),
    "vmid": {"type": "int"},
    "name": {"type": "str"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "config": {"type": "dict", "default": {}},
    "create": {"type": "dict", "default": {}},
    "owned_config": {"type": "dict", "default": {}},
    "owned_tag": {"type": "str", "default": ""},
    "expect_name": {"type": "str", "default": ""},
    "only_existing": {"type": "bool", "default": False},
    "cipassword": {"type": "str", "no_log": True},
    "clone": {"type": "dict", "options": CLONE, "mutually_exclusive": [["vmid", "name"]]},
    "gpus": {"type": "dict", "options": GPUS},
    "pool": {"type": "str"},
    "root_only": {"type": "str", "choices": ["refuse", "local"], "default": "refuse"},
    "guard_tag": {"type": "str", "default": ""},
    "task_timeout": {"type": "int", "default": 600},
}
HIDDEN = ("cipassword", "sshkeys")


def request(params: dict[str, Any], *, check: bool) -> _pve_vm.Request:
    """The module's arguments for the library. Raises WishRefused."""
    for given in ("config", "create", "owned_config"):
        if "cipassword" in params[given]:
            raise _pve_vm_plan.WishRefused(
                f"{given}: the password belongs into the option cipassword, which is not logged"
            )
    gpus = None
    if params["gpus"] is not None:
        options = _pve_vm_plan.read_wishes({"hostpci0": params["gpus"]["options"]})["hostpci0"]
        gpus = _pve_vm.Gpus(
            tuple(params["gpus"]["mappings"]),
            options if isinstance(options, dict) else {},
            params["gpus"]["owned_prefix"],
            {
                str(name): PciMapping(tuple(tuple(path.split(";")) for path in paths))
                for name, paths in params["gpus"]["pending"].items()
            }
            if check
            else {},
        )
    return _pve_vm.Request(
        vmid=params["vmid"],
        name=params["name"],
        node=params["node"],
        wishes=_pve_vm_plan.read_wishes(params["config"]),
        create=_pve_vm_plan.read_wishes(params["create"]),
        owned=_pve_vm_plan.read_wishes(params["owned_config"]),
        owned_tag=params["owned_tag"],
        only_existing=params["only_existing"],
        expect_name=params["expect_name"],
        secrets={"cipassword": params["cipassword"]} if params["cipassword"] else {},
        clone=_pve_vm.Clone(**params["clone"]) if params["clone"] is not None else None,
        gpus=gpus,
        pool=params["pool"],
        task_timeout=params["task_timeout"],
        root=_pve_client.connect({"backend": "local"}) if params["root_only"] == "local" else None,
    )


def run(pve: _pve_client.Pve, params: dict[str, Any], *, check: bool) -> _pve_vm.Outcome:
    """Raises PveError and WishRefused."""
    if params["state"] == "absent":
        return _pve_vm.remove(
            *(pve, params["vmid"], params["name"], params["node"]),
            guard_tag=params["guard_tag"],
            timeout=params["task_timeout"],
            check=check,
        )
    return _pve_vm.converge(pve, request(params, check=check), check=check)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True, required_one_of=[["vmid", "name"]])
    named = module.params["vmid"] or module.params["name"]
    try:
        done = run(_pve_client.connect(module.params), module.params, check=module.check_mode)
    except (_pve_client.PveError, _pve_vm_plan.WishRefused) as error:
        refuse(module, f"VM {named}: {error}")
    for warning in done.warnings:
        module.warn(warning)
    finish(
        module,
        done.difference,
        header=str(done.vm),
        vmid=done.vm.vmid,
        node=done.vm.node,
        created=done.created,
        running=done.vm.running,
        live=done.live,
        waiting=done.waiting,
        cold_start=done.cold_start,
        kept=done.kept,
        warnings_of_vm=done.warnings,
        config={key: value for key, value in done.config.items() if key not in HIDDEN},
    )


if __name__ == "__main__":
    main()
