#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Has Proxmox VE call organism-hook for VMs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vm_hook
short_description: Have Proxmox VE call one hook for VMs
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - A VM of Proxmox VE has one hookscript. This makes it C(organism-hook), which runs the entries of
    C(/etc/organism/hook.d/PHASE/) in order (phases C(pre-start), C(post-start), C(pre-stop), C(post-stop)), each with a
    time limit, stops at the first failure before a start, and then runs the hookscript that the VM had before.
  - Writes the snippet, allows snippets on the storage, and sets the option C(hookscript) with C(qm), since only root
    may.
  - On a host without C(qm) only the settings are written, so that any other caller can use the hook.
  - A VM that is no longer named, and each VM with O(state=absent), gets back the hookscript of before.
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
  vmids:
    description: VMs of this node that call the hook.
    type: list
    elements: int
    default: []
  every_vm:
    description: All VMs of this node call the hook, templates aside.
    type: bool
    default: false
  storage:
    description: Storage that holds the snippet. It needs a path, and each node that VMs may migrate to needs it, too.
    type: str
    default: local
  entry_timeout:
    description:
      - Seconds that an entry may take. Proxmox VE has no limit, and a hook that hangs holds the lock of its VM.
    type: float
    default: 60
  total_timeout:
    description: Seconds that a phase may take, the hookscript of before included.
    type: float
    default: 300
  timeouts:
    description: Seconds for single entries by their names, instead of O(entry_timeout).
    type: dict
    default: {}
seealso:
  - module: organism.proxmox.host_tools
  - module: organism.proxmox.qemu_pin
"""

EXAMPLES = r"""
- name: Call the hook for two VMs
  organism.proxmox.vm_hook:
    vmids: [100, 101]
    timeouts:
      10-guard: 180

- name: Give each VM its own hookscript back
  organism.proxmox.vm_hook:
    state: absent
"""

RETURN = r"""
registered:
  description: VMs that call the hook.
  returned: always
  type: list
  elements: int
  sample: [100, 101]
chained:
  description: Hookscripts of before that the hook runs, too, by VM.
  returned: always
  type: dict
  sample: {"101": "local:snippets/mine.pl"}
kept_by_others:
  description: What was not taken back, because somebody else has changed it since.
  returned: always
  type: list
  elements: dict
  sample:
    - {"key": "hookscript of VM 100", "now": "local:snippets/new.pl", "reason": "somebody else has changed it since"}
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _hook, _vm_hook
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierState, EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command


def converge(module: AnsibleModule, root: Root) -> None:
    """Plan, and carry it out unless only a prediction is asked for."""
    params = module.params
    earlier = EarlierState(_vm_hook.CAPABILITY, root)
    facts = _vm_hook.read(root, params["storage"])
    registered: list[int] = []
    if params["state"] == "present":
        limits = _hook.Settings(
            params["entry_timeout"],
            params["total_timeout"],
            {str(name): float(seconds) for name, seconds in params["timeouts"].items()},
        )
        _hook.check_settings(limits)
        registered = sorted({*params["vmids"], *(facts.hookscripts if params["every_vm"] else ())})
        plan = _vm_hook.plan_present(root, earlier, facts, registered, limits, run_command)
    else:
        plan = _vm_hook.plan_absent(root, earlier, facts)
    if not module.check_mode:
        _vm_hook.apply(root, earlier, plan, run_command)
    finish(
        module,
        plan.difference,
        header="hook of VMs",
        registered=registered,
        chained={str(vmid): volume for vmid, volume in plan.chained.items()},
        kept_by_others=plan.kept_by_others,
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "vmids": {"type": "list", "elements": "int", "default": []},
            "every_vm": {"type": "bool", "default": False},
            "storage": {"type": "str", "default": "local"},
            "entry_timeout": {"type": "float", "default": 60},
            "total_timeout": {"type": "float", "default": 300},
            "timeouts": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    try:
        converge(module, Root())
    except (
        _vm_hook.HookRefusedError,
        _hook.HookError,
        CommandError,
        EarlierStateError,
        ValueError,
        TypeError,
        OSError,
    ) as error:
        refuse(module, f"hook of VMs: {error}")


if __name__ == "__main__":
    main()
