#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Asks the guard before each start of a VM."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_guard
short_description: Ask a guard before each start of a VM of Proxmox VE
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Writes the settings of C(organism-guard) and its entries in the hook of VMs (M(organism.proxmox.vm_hook)). From then
    on each start of a VM that calls the hook is asked for, from the GUI, the command line or the API.
  - Of an exclusive group one VM runs. A GPU belongs to one running VM, by its physical function, whatever alternatives
    a PCI mapping has. All that may claim memory at once fits into the host - VMs that run, the VM that starts, the ARC
    at its upper limit, hugepages and a reserve.
  - A start that breaks a rule is refused, with the reason and the way out in the log of its task. Nothing is ever
    started.
  - With O(state=absent) settings and entries are gone. VMs go on as they are.
requirements:
  - The tools of M(organism.proxmox.host_tools).
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description: With V(absent) everything is taken back.
    type: str
    choices: [present, absent]
    default: present
  groups:
    description: Exclusive groups; of each one VM runs at a time.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the group, of letters, digits, C(_) and C(-).
        type: str
        required: true
      policy:
        description:
          - V(preempt) stops the VM of the group that runs before another starts, and of several requests the last wins.
          - V(refuse) refuses the start of another.
        type: str
        choices: [preempt, refuse]
        default: preempt
      members:
        description: VMs by name or VMID. A name is looked up at each start.
        type: list
        elements: str
        required: true
  memory:
    description: Whether the memory budget is a rule.
    type: bool
    default: true
  reserve_mib:
    description: Memory that the host itself needs, in MiB.
    type: int
    default: 2048
  limit_mib:
    description: Limit for the sum of the memory of all running VMs, in MiB; V(0) is none beside the budget.
    type: int
    default: 0
  claims_mib:
    description: What else takes memory, such as RAM layers - name to MiB.
    type: dict
    default: {}
  share_functions:
    description: Virtual functions and mediated devices of one GPU may go to different running VMs.
    type: bool
    default: false
  shutdown_timeout:
    description: Seconds for C(qm shutdown) of a VM that has to give way. Then it is stopped.
    type: float
    default: 60
  stop_timeout:
    description: Seconds for C(qm stop) after that. Then the start is refused.
    type: float
    default: 30
  lock_wait:
    description: Seconds that a start waits for another one to be decided.
    type: float
    default: 150
  start_wait:
    description: Seconds that a start waits for the end of another one which has to give way to it.
    type: float
    default: 180
  deadline:
    description: Seconds for a decision as a whole.
    type: float
    default: 240
  watchdog:
    description: Whether the watchdog stops a VM that runs against the rules, or only reports it.
    type: str
    choices: [enforce, report]
    default: enforce
  modes:
    description: VMs of C(mlmode), by its words V(train) and V(infer). One group has to have all of them.
    type: dict
    default: {}
  profile:
    description:
      - What C(mlmode apply-profile) sets and C(mlmode check) demands, by the name of a VM.
      - A C(balloon) that is not given is V(0) for VMs with passed-through devices, else equal to C(memory).
    type: dict
    default: {}
  host_total_mib:
    description: Memory of the host for which the profile was made, in MiB. V(0) when that is not to be checked.
    type: int
    default: 0
seealso:
  - module: organism.proxmox.vm_hook
  - module: organism.proxmox.host_tools
"""

EXAMPLES = r"""
- name: One of two VMs runs, whatever is clicked
  organism.proxmox.vm_guard:
    groups:
      - name: ml
        policy: preempt
        members: [vm-train, vm-infer]
    modes: {train: vm-train, infer: vm-infer}
    reserve_mib: 30720

- name: Ask no guard any more
  organism.proxmox.vm_guard:
    state: absent
"""

RETURN = r"""
unguarded:
  description: VMs of this node that do not call the hook, and so start without asking.
  returned: O(state=present)
  type: list
  elements: int
  sample: [105]
kept_by_others:
  description: What was not taken back, because somebody else has changed it since.
  returned: always
  type: list
  elements: dict
  sample: []
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _guard_config, _guard_host
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierState, EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root

RENAMED = {"reserve_mib": "reserve", "limit_mib": "limit", "claims_mib": "claims", "host_total_mib": "host_total"}
"""Options to the names of settings, where they differ: there all sizes are MiB."""


def settings(params: dict[str, Any]) -> _guard_config.Config:
    """Raises GuardConfigError."""
    raw = {RENAMED.get(name, name): value for name, value in params.items() if name != "state"}
    return _guard_config.from_dict(raw, "vm_guard")


def converge(module: AnsibleModule, root: Root) -> None:
    """Plan, and carry it out unless only a prediction is asked for."""
    earlier = EarlierState(_guard_host.CAPABILITY, root)
    result: dict[str, Any] = {}
    if module.params["state"] == "present":
        plan = _guard_host.plan_present(root, earlier, settings(module.params))
        result["unguarded"] = plan.unguarded
    else:
        plan = _guard_host.plan_absent(root, earlier)
    if not module.check_mode:
        _guard_host.apply(root, earlier, plan)
    finish(module, plan.difference, header="guard of VMs", kept_by_others=plan.kept_by_others, **result)


def main() -> None:
    group = {
        "name": {"type": "str", "required": True},
        "policy": {"type": "str", "choices": ["preempt", "refuse"], "default": "preempt"},
        "members": {"type": "list", "elements": "str", "required": True},
    }
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "groups": {"type": "list", "elements": "dict", "default": [], "options": group},
            "memory": {"type": "bool", "default": True},
            "reserve_mib": {"type": "int", "default": 2048},
            "limit_mib": {"type": "int", "default": 0},
            "claims_mib": {"type": "dict", "default": {}},
            "share_functions": {"type": "bool", "default": False},
            "shutdown_timeout": {"type": "float", "default": 60},
            "stop_timeout": {"type": "float", "default": 30},
            "lock_wait": {"type": "float", "default": 150},
            "start_wait": {"type": "float", "default": 180},
            "deadline": {"type": "float", "default": 240},
            "watchdog": {"type": "str", "choices": ["enforce", "report"], "default": "enforce"},
            "modes": {"type": "dict", "default": {}},
            "profile": {"type": "dict", "default": {}},
            "host_total_mib": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    try:
        converge(module, Root())
    except (_guard_config.GuardConfigError, EarlierStateError, ValueError, TypeError, OSError) as error:
        refuse(module, f"guard of VMs: {error}")


if __name__ == "__main__":
    main()
