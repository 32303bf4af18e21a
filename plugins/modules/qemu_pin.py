#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Pins the threads of VMs, now and at each start."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_pin
short_description: Pin the threads of VMs to CPUs, now and at each start
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Gives each virtual CPU a CPU of the VCPU zone of its own, and all other threads of QEMU (main loop, I/O threads,
    vhost workers, helpers) the IO zone. Threads are told apart by QEMU's monitor, which is held for one exchange.
  - For the next starts it writes C(/etc/organism/qemu_pin.json), which the hook's entry
    C(/etc/organism/hook.d/post-start/50-pin) and the keeper C(organism-qemu-pin) read, and limits the control group of
    each VM of Proxmox VE by a drop-in C(/etc/systemd/system/VMID.scope.d/50-organism.conf).
  - VMs that run are pinned at once, and the masks are read back for each thread. A VM that does not run is pinned when
    it starts. A VM that is no longer named gets the masks of before.
  - A VM keeps its CPUs over restarts while they are free. Two VMs get no CPU in common.
  - A guest with threads on its cores gets each core on the siblings of one core; other guests are spread over cores.
requirements:
  - The tools of M(organism.proxmox.host_tools), for VMs that start later.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description: With V(absent) all threads get the masks of before, and the files go.
    type: str
    choices: [present, absent]
    default: present
  vms:
    description: The VMs to pin.
    type: list
    elements: dict
    default: []
    suboptions:
      vmid:
        description: Id of a VM of Proxmox VE.
        type: int
      name:
        description: Name of any other QEMU, with O(vms[].pidfile) and O(vms[].qmp).
        type: str
      pidfile:
        description: Its option C(-pidfile).
        type: path
      qmp:
        description: The unix socket of its option C(-qmp).
        type: path
      oversubscribe:
        description:
          - How many vCPUs to a CPU there may be in the zone. Without it, each vCPU has a CPU of its own, and more vCPUs
            than CPUs are refused.
        type: float
  every_vm:
    description: Also pin each VM of Proxmox VE that O(vms) does not name.
    type: bool
    default: false
  vcpu_cpus:
    description:
      - The CPUs for virtual CPUs, as a list (V(2-5,8-11)).
      - Without it, C(VCPU_CPUS) of C(/etc/organism/extreme.conf), else the VCPU zone of the CPU plan.
    type: str
    default: ""
  io_cpus:
    description:
      - The CPUs for all other threads of QEMU, as a list (V(1,7)).
      - Without it, C(IO_CPUS) of C(/etc/organism/extreme.conf), else the IO zone of the CPU plan.
    type: str
    default: ""
  confine:
    description:
      - Limit the control group of each VM of Proxmox VE to both zones, so that its other processes (swtpm, virtiofsd)
        do not run on CPUs of the host either.
    type: bool
    default: true
  hook:
    description: Write the hook's entry.
    type: bool
    default: true
  plan:
    description:
      - A CPU plan as M(organism.proxmox.cpu_plan) returns it, for check mode before any plan was stored. A stored plan
        wins.
    type: dict
seealso:
  - module: organism.proxmox.cpu_plan
  - module: organism.proxmox.vm_hook
  - module: organism.proxmox.host_tools
"""

EXAMPLES = r"""
- name: Pin two VMs, and let the second one share its CPUs
  organism.proxmox.qemu_pin:
    vms:
      - vmid: 100
      - vmid: 101
        oversubscribe: 2

- name: Pin a QEMU that Proxmox VE knows nothing of
  organism.proxmox.qemu_pin:
    vms:
      - name: builder
        pidfile: /run/builder.pid
        qmp: /run/builder.qmp

- name: Let all threads run where they like again
  organism.proxmox.qemu_pin:
    state: absent
"""

RETURN = r"""
vms:
  description: Each VM that is to be pinned.
  returned: when O(state=present)
  type: list
  elements: dict
  contains:
    name:
      description: VMID or name.
      type: str
      sample: "100"
    running:
      description: Whether it runs. One that does not is pinned at its start.
      type: bool
    pid:
      description: Its process.
      type: int
      sample: 4711
    vcpus:
      description: CPU of each vCPU.
      type: dict
      sample: {"0": 2, "1": 3}
    threads:
      description: Each thread with its role and its CPUs before, as wanted, and as read back (in check mode none).
      type: list
      elements: dict
      sample: [{"tid": 4715, "name": "CPU 0", "role": "vcpu", "vcpu": 0, "before": "0-11", "wanted": "2", "now": "2"}]
    scope:
      description: CPUs of its control group, before and as wanted.
      type: dict
      sample: {"before": "", "wanted": "1-5,7-11"}
    drifted:
      description: Threads that had been pinned and were found elsewhere.
      type: list
      elements: str
    notes:
      description: What is as it should be and yet worth knowing.
      type: list
      elements: str
zones:
  description: The zones, and where they come from.
  returned: when O(state=present) and zones are known
  type: dict
  sample: {"vcpu": "2-5,8-11", "io": "1,7", "source": /etc/organism/cpu_plan.json}
affinity:
  description:
    - VMs of Proxmox VE whose option C(affinity) is not both zones. Only root@pam may set it and it counts from the next
      cold start on, so it is not changed here.
  returned: when O(state=present)
  type: list
  elements: dict
  sample: [{"vmid": 100, "now": "", "recommended": "1-5,7-11", "command": "qm set 100 --affinity 1-5,7-11"}]
kept_by_others:
  description: Masks and files that were not taken back, because somebody else has changed them since.
  returned: always
  type: list
  elements: dict
  sample: [{"key": "VM 100: CPUs of thread 4711 (kvm)", "now": "0-3", "reason": "somebody else has changed it since"}]
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _cpu_list, _cpu_plan, _qemu_host
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._qemu import QemuError
from ansible_collections.organism.proxmox.plugins.module_utils._qemu_pin import Hands
from ansible_collections.organism.proxmox.plugins.module_utils._qemu_plan import PinRefusedError
from ansible_collections.organism.proxmox.plugins.module_utils._qemu_records import Config
from ansible_collections.organism.proxmox.plugins.module_utils._qmp import QmpError
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError

VM = {
    "vmid": {"type": "int"},
    "name": {"type": "str"},
    "pidfile": {"type": "path"},
    "qmp": {"type": "path"},
    "oversubscribe": {"type": "float"},
}


def present(module: AnsibleModule, hands: Hands) -> NoReturn:
    """Settings and masks as declared."""
    params = module.params
    config = Config(
        wishes=_qemu_host.wishes_from(params["vms"]),
        every=params["every_vm"],
        vcpu=_cpu_list.normalise(params["vcpu_cpus"]),
        io=_cpu_list.normalise(params["io_cpus"]),
        confine=params["confine"],
    )
    foretold = _cpu_plan.from_dict(params["plan"], "option plan") if params["plan"] else None
    outcome = _qemu_host.present(hands, config, hook=params["hook"], foretold=foretold, dry=module.check_mode)
    result: dict[str, Any] = {
        "vms": [each.as_dict() for each in outcome.results],
        "affinity": _qemu_host.affinity_advice(hands.root, config, outcome.zones),
        "kept_by_others": outcome.kept_by_others,
    }
    if outcome.zones is not None:
        zones = outcome.zones
        result["zones"] = {
            "vcpu": _cpu_list.render(zones.vcpu),
            "io": _cpu_list.render(zones.io),
            "source": zones.source,
        }
    finish(module, outcome.difference, header="pinned VMs", **result)


def absent(module: AnsibleModule, hands: Hands) -> NoReturn:
    """Masks and files as they were before."""
    outcome = _qemu_host.absent(hands, dry=module.check_mode)
    finish(module, outcome.difference, header="pinned VMs", kept_by_others=outcome.kept_by_others)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "vms": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": VM,
                "mutually_exclusive": [("vmid", "name"), ("vmid", "pidfile"), ("vmid", "qmp")],
                "required_one_of": [("vmid", "name")],
                "required_by": {"name": ["pidfile", "qmp"]},
            },
            "every_vm": {"type": "bool", "default": False},
            "vcpu_cpus": {"type": "str", "default": ""},
            "io_cpus": {"type": "str", "default": ""},
            "confine": {"type": "bool", "default": True},
            "hook": {"type": "bool", "default": True},
            "plan": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    try:
        (present if module.params["state"] == "present" else absent)(module, Hands())
    except (PinRefusedError, QemuError, QmpError, CommandError, EarlierStateError, ValueError, OSError) as error:
        refuse(module, f"pinning: {error}")


if __name__ == "__main__":
    main()
