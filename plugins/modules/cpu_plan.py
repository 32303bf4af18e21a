#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: cpu_plan
short_description: Divide a host's CPUs into the zones that every level uses
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Computes three zones of whole cores from what the kernel says of the machine, and stores them in
    C(/etc/organism/cpu_plan.json), where the other modules, the keepers and the report read them.
  - HOST keeps the house and always has CPU 0, VCPU runs virtual CPUs and nothing else, IO takes interrupts and their
    work.
  - Siblings of a core are never in two zones. Where there are several NUMA nodes or last-level caches, zones get whole
    ones if IO stays near its devices and VCPU keeps at least half of the cores. What is shared nevertheless is said in
    the reasons of the plan.
  - IO is near the NUMA node of most of the network and NVMe devices that host drivers hold.
  - Of hybrid processors, HOST (but for CPU 0's core) and IO get efficiency cores, and VCPU performance cores only.
  - A machine with fewer than three cores has no zones. Then each of them is all CPUs, which RV(plan.shared) tells.
  - Changes nothing but that file. A later call without overrides computes the zones anew.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - V(absent) restores what was at the file's place earlier, mostly nothing.
    type: str
    choices: [present, absent]
    default: present
  host_cores:
    description:
      - Cores that HOST gets at least.
    type: int
    default: 1
  io_cores:
    description:
      - Cores that IO gets at least.
    type: int
    default: 1
  boundary:
    description:
      - What zones do not share besides cores. V(auto) takes the widest boundary that is affordable, the others one that
        must hold, so they are refused where the machine has too few of them.
    type: str
    choices: [auto, node, cache, core]
    default: auto
  host_cpus:
    description:
      - CPUs of HOST as a list like V(0,6), instead of computed ones. Zones without a list get whole cores of the rest.
    type: str
    default: ""
  vcpu_cpus:
    description:
      - CPUs of VCPU, likewise.
    type: str
    default: ""
  io_cpus:
    description:
      - CPUs of IO, likewise.
    type: str
    default: ""
  force:
    description:
      - Accept lists that split the siblings of a core, name offline CPUs (these are left out) or keep CPU 0 from HOST.
      - Lists that overlap or name CPUs that do not exist are refused even so.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Divide the CPUs, one core each for the house and for interrupts
  organism.proxmox.cpu_plan:

- name: Give interrupts two cores
  organism.proxmox.cpu_plan:
    io_cores: 2

- name: Divide an i7-8700K by hand, siblings are N and N+6
  organism.proxmox.cpu_plan:
    host_cpus: "0,6"
    io_cpus: "1,7"
    vcpu_cpus: "2-5,8-11"
"""

RETURN = r"""
plan:
  description: The plan, with keys as in the file. Empty with O(state=absent).
  returned: success
  type: dict
  contains:
    format:
      description: Version of the file's format.
      type: int
      sample: 1
    host:
      description: CPUs of HOST.
      type: list
      elements: int
      sample: [0, 6]
    vcpu:
      description: CPUs of VCPU.
      type: list
      elements: int
      sample: [2, 3, 4, 5, 8, 9, 10, 11]
    io:
      description: CPUs of IO.
      type: list
      elements: int
      sample: [1, 7]
    lists:
      description: The zones as CPU lists, by their names in lower case.
      type: dict
      sample: {"host": "0,6", "vcpu": "2-5,8-11", "io": "1,7"}
    shared:
      description: Whether zones overlap, because the machine is too small for zones.
      type: bool
      sample: false
    cores:
      description: The CPUs of each core.
      type: list
      elements: list
      sample: [[0, 6], [1, 7]]
    nodes:
      description: The CPUs of each NUMA node, by its number.
      type: dict
      sample: {"0": [0, 1, 2, 3]}
    caches:
      description: The CPUs of each last-level cache.
      type: list
      elements: list
      sample: [[0, 1, 2, 3]]
    efficiency:
      description: The CPUs of efficiency cores. Empty where all cores are of one kind.
      type: list
      elements: int
      sample: []
    width:
      description: Number of possible CPUs, which is the width of the kernel's masks.
      type: int
      sample: 12
    reasons:
      description: Sentences that say why the plan is so.
      type: list
      elements: str
      sample: ["HOST is set by the operator"]
table:
  description: The plan as a small table, in lines. Empty with O(state=absent).
  returned: success
  type: list
  elements: str
  sample: ["zone  CPUs      cores  nodes", "HOST  0,6       1      0"]
kept_by_others:
  description: What somebody else has changed since and therefore stays, with O(state=absent).
  returned: success
  type: list
  elements: dict
  sample: []
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _cpu_list, _cpu_plan, _cpu_zones, _topology
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._host_files import FileWish
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings import SettingsRefused, Wish
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings_apply import (
    Outcome,
    SettingsFailed,
    converge,
)
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root

CAPABILITY = "cpu_plan"
ARGUMENTS: dict[str, Any] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "host_cores": {"type": "int", "default": 1},
    "io_cores": {"type": "int", "default": 1},
    "boundary": {"type": "str", "choices": ["auto", "node", "cache", "core"], "default": "auto"},
    "host_cpus": {"type": "str", "default": ""},
    "vcpu_cpus": {"type": "str", "default": ""},
    "io_cpus": {"type": "str", "default": ""},
    "force": {"type": "bool", "default": False},
}


def wishes(params: dict[str, Any]) -> _cpu_zones.Wishes:
    """The module's arguments as wishes. Raises ValueError that names the option."""
    lists: dict[str, tuple[int, ...] | None] = {}
    for zone in _cpu_plan.ZONES:
        try:
            lists[zone] = _cpu_list.parse(params[f"{zone}_cpus"]) or None
        except _cpu_list.CpuListError as error:
            raise ValueError(f"{zone}_cpus: {error}") from error
    return _cpu_zones.Wishes(
        host_cores=params["host_cores"],
        io_cores=params["io_cores"],
        boundary=params["boundary"],
        force=params["force"],
        host=lists["host"],
        vcpu=lists["vcpu"],
        io=lists["io"],
    )


def run(params: dict[str, Any], root: Root, *, check: bool) -> tuple[Outcome, _cpu_plan.CpuPlan | None]:
    """Compute the plan and bring the file to it, or take the file back.

    Raises ValueError (a wish that is refused, a topology that cannot be read), and what converge() raises.
    """
    if params["state"] == "absent":
        return converge(Wish(CAPABILITY), check=check, root=root), None
    made = _cpu_zones.plan(_topology.read(root), wishes(params))
    files = (FileWish(_cpu_plan.PATH, made.text()),)
    return converge(Wish(CAPABILITY, files=files), check=check, root=root), made


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    try:
        outcome, made = run(module.params, Root(), check=module.check_mode)
    except SettingsFailed as error:
        refuse(module, f"CPU plan: {error}")
    except (ValueError, SettingsRefused, EarlierStateError, OSError) as error:
        refuse(module, f"CPU plan: {error}. Nothing was changed", offenders=list(getattr(error, "offenders", ())))
    finish(
        module,
        outcome.difference,
        header=_cpu_plan.PATH,
        plan=made.as_dict() if made else {},
        table=made.table().splitlines() if made else [],
        kept_by_others=outcome.kept_by_others,
    )


if __name__ == "__main__":
    main()
