#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: pve_vm_power
short_description: A VM that runs, that does not, or that has started cold
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Starts a VM, shuts it down with a deadline and then stops it, or does both, so that options which wait for a cold
    start come into force.
  - Is done when the VM itself is in that state, whatever its task said. A task of a VM under HA ends when the request
    is queued.
  - Refuses a start that cannot succeed, with the reason and the way out, as a PCI device that a running VM holds. A VM
    with a hookscript is not refused for that, since its hook may stop the other one first.
  - Can wait for the guest agent and for cloud-init.
  - What it adds to M(community.proxmox.proxmox_kvm) is the stop after a deadline, the restart only where something
    waits for it, refusals before the start, check mode, and waiting for the guest.
extends_documentation_fragment:
  - organism.proxmox.attributes
  - organism.proxmox.pve
attributes:
  idempotent:
    support: partial
    details: V(restarted) restarts each time, unless O(only_pending) is set.
options:
  vmid:
    description: Id of the VM.
    type: int
  name:
    description: Name of the VM, where no id is given.
    type: str
  state:
    description: V(restarted) shuts the VM down and starts it, which a reboot inside the guest does not replace.
    type: str
    choices: [started, stopped, restarted]
    required: true
  only_pending:
    description: Restart a VM that runs only if one of its options waits for it.
    type: bool
    default: false
  only_existing:
    description: A VM that is not there is nothing to do.
    type: bool
    default: false
  shutdown_timeout:
    description: Seconds for the guest to shut down.
    type: int
    default: 60
  force:
    description: Stop a guest that has not shut down by then. Otherwise this is a failure.
    type: bool
    default: true
  start_timeout:
    description: Seconds for the start. Much memory and many devices take minutes.
    type: int
    default: 300
  wait_guest:
    description: Seconds to wait for the guest agent of a VM that runs afterwards. V(0) does not wait.
    type: int
    default: 0
  cloud_init:
    description: Wait for the end of cloud-init, too.
    type: bool
    default: false
seealso:
  - module: organism.proxmox.pve_vm
"""

EXAMPLES = r"""
- name: Bring waiting options into force
  organism.proxmox.pve_vm_power:
    vmid: 200
    state: restarted
    only_pending: true

- name: Start a VM and wait until it can be used
  organism.proxmox.pve_vm_power:
    name: gpu-pool
    state: started
    wait_guest: 300
    cloud_init: true
"""

RETURN = r"""
vmid:
  description: Id of the VM.
  returned: success
  type: int
  sample: 200
steps:
  description: What was done, or would be in check mode.
  returned: success
  type: list
  elements: str
  sample: [shutdown, stop, start]
cold_start:
  description: Options that still wait for a cold start.
  returned: success
  type: list
  elements: str
  sample: []
guest:
  description: What cloud-init said at its end, where it was waited for.
  returned: success
  type: str
  sample: "status: done"
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import (
    _pve_client,
    _pve_find,
    _pve_guest,
    _pve_power,
)
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse

ARGUMENTS: dict[str, Any] = {
    **_pve_client.argument_spec(),
    "vmid": {"type": "int"},
    "name": {"type": "str"},
    "state": {"type": "str", "choices": ["started", "stopped", "restarted"], "required": True},
    "only_pending": {"type": "bool", "default": False},
    "only_existing": {"type": "bool", "default": False},
    "shutdown_timeout": {"type": "int", "default": 60},
    "force": {"type": "bool", "default": True},
    "start_timeout": {"type": "int", "default": 300},
    "wait_guest": {"type": "int", "default": 0},
    "cloud_init": {"type": "bool", "default": False},
}


def run(pve: _pve_client.Pve, params: dict[str, Any], *, check: bool) -> tuple[_pve_power.Outcome, str]:
    """Raises PveError and GuestFailed."""
    clock = _pve_power.Clock()
    asked = (params["vmid"], params["name"], params["node"])
    vm = _pve_find.vm(pve, *asked) if params["only_existing"] else _pve_find.existing_vm(pve, *asked)
    if not vm.exists:
        return _pve_power.Outcome(vm), ""
    limits = _pve_power.Limits(
        shutdown=params["shutdown_timeout"], start=params["start_timeout"], force=params["force"]
    )
    done = _pve_power.converge(
        pve, vm, params["state"], limits, only_pending=params["only_pending"], check=check, clock=clock
    )
    if check or params["state"] == "stopped" or not params["wait_guest"]:
        return done, ""
    end = clock.now() + params["wait_guest"]
    _pve_guest.wait_agent(pve, vm, end, clock)
    return done, _pve_guest.wait_cloud_init(pve, vm, end, clock) if params["cloud_init"] else ""


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True, required_one_of=[["vmid", "name"]])
    named = module.params["vmid"] or module.params["name"]
    try:
        done, guest = run(_pve_client.connect(module.params), module.params, check=module.check_mode)
    except (_pve_client.PveError, _pve_guest.GuestFailed) as error:
        refuse(module, f"VM {named}: {error}")
    finish(
        module,
        done.difference,
        header=str(done.vm),
        vmid=done.vm.vmid,
        steps=done.steps,
        cold_start=done.cold_start,
        guest=guest,
    )


if __name__ == "__main__":
    main()
