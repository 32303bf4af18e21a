#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: power_plan
short_description: Work out which power states cost latency on a host, and the settings that lock them
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Looks at the processor's drivers (frequency scaling, turbo, idle states, temperature sensors) and returns arguments
    for M(organism.proxmox.host_settings) and M(organism.proxmox.kernel_cmdline). Changes nothing itself.
  - Refuses what would run hot without anybody noticing.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  governor:
    description:
      - Governor of cpufreq for all CPUs. Empty leaves it.
    type: str
    default: performance
  lock_frequency:
    description:
      - With intel_pstate, raise the lower limit of performance to the upper one, 100 percent.
    type: bool
    default: true
  turbo:
    description:
      - Whether CPUs may run above their base frequency. V(allowed) undoes an earlier V(forbidden), V(keep) leaves the
        switch alone.
    type: str
    choices: [allowed, forbidden, keep]
    default: allowed
  vcpu_latency:
    description:
      - How long the CPUs of O(vcpu_cpus) may take to wake up. V(c1) is the exit latency of their first idle state, a
        number is microseconds from 1, V(poll) never lets them sleep and needs a temperature sensor, V(keep) sets
        nothing.
    type: str
    default: c1
  vcpu_cpus:
    description:
      - The CPUs that O(vcpu_latency) is for, as a list. Empty means those of the zone VCPU in the stored plan.
    type: str
    default: ""
  dma_latency_us:
    description:
      - Microseconds that any CPU may take to wake up, as the keeper C(organism-dma-latency) holds it. V(0) makes idle
        CPUs poll. V(-1) runs no keeper.
    type: int
    default: 0
  release_above:
    description:
      - Degrees Celsius of the processor at which the keeper lets go until it has cooled down by 10. V(0) is never.
    type: int
    default: 90
  shallow_idle:
    description:
      - No idle state deeper than C1 from the next boot on.
    type: bool
    default: true
  aspm:
    description:
      - Power states of PCI Express links. V(performance) switches them off, now and at boot. V(off) makes the kernel
        leave links as the firmware set them. V(keep) sets nothing.
    type: str
    choices: [performance, "off", keep]
    default: performance
  nvme_latency_us:
    description:
      - What NVMe drives' autonomous power states may cost, V(0) for none of them, V(-1) sets nothing.
    type: int
    default: 0
  idle_poll:
    description:
      - CPUs never sleep, from the next boot on. Refused where the processor has no temperature sensor, or without the
        keeper and its limit.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: See what locking power states would mean here
  organism.proxmox.power_plan:
  register: plan

- name: Lock them
  organism.proxmox.host_settings:
    capability: power
    sysfs: "{{ plan.sysfs }}"
    sysfs_optional: "{{ plan.sysfs_optional }}"
    modules: "{{ plan.modules }}"
    files: "{{ plan.files }}"
    units: "{{ plan.units }}"
"""

RETURN = r"""
sysfs:
  description: Values that every host has.
  returned: success
  type: dict
  sample: {"/sys/devices/system/cpu/cpu2/power/pm_qos_resume_latency_us": "2"}
sysfs_optional:
  description: Values that not every host has.
  returned: success
  type: dict
  sample: {"/sys/devices/system/cpu/cpufreq/policy*/scaling_governor": "performance"}
modules:
  description: Kernel modules that have to be there before values are set at boot.
  returned: success
  type: list
  elements: str
  sample: [acpi-cpufreq]
files:
  description: The keeper's unit.
  returned: success
  type: list
  elements: dict
  sample: []
units:
  description: The keeper.
  returned: success
  type: list
  elements: dict
  sample: []
tokens:
  description: Kernel parameters.
  returned: success
  type: dict
  sample: {"processor.max_cstate": "1"}
reasons:
  description: Sentences on what this machine lacks and what the settings cost.
  returned: success
  type: list
  elements: str
  sample: ["this machine has no frequency scaling, so there is nothing to lock"]
hottest:
  description: Highest temperature of the processor in degrees Celsius, none without a sensor.
  returned: success
  type: float
  sample: 52.0
kernel:
  description: Release of the running kernel.
  returned: success
  type: str
  sample: 6.17.2-1-pve
"""

from dataclasses import asdict
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import (
    _cpu_list,
    _cpu_plan,
    _cpu_zones,
    _power,
    _topology,
)
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import refuse
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root

ARGUMENTS: dict[str, Any] = {
    "governor": {"type": "str", "default": "performance"},
    "lock_frequency": {"type": "bool", "default": True},
    "turbo": {"type": "str", "choices": ["allowed", "forbidden", "keep"], "default": "allowed"},
    "vcpu_latency": {"type": "str", "default": "c1"},
    "vcpu_cpus": {"type": "str", "default": ""},
    "dma_latency_us": {"type": "int", "default": 0},
    "release_above": {"type": "int", "default": 90},
    "shallow_idle": {"type": "bool", "default": True},
    "aspm": {"type": "str", "choices": ["performance", "off", "keep"], "default": "performance"},
    "nvme_latency_us": {"type": "int", "default": 0},
    "idle_poll": {"type": "bool", "default": False},
}


def vcpu_zone(text: str, root: Root, *, check: bool) -> tuple[tuple[int, ...], list[str]]:
    """The CPUs to keep awake, and what to say of them. Raises ValueError.

    In check mode level 1 may be pending in the same run: then the plan is computed with its defaults.
    """
    if text.strip():
        cpus = _cpu_list.parse(text)
        absent = set(cpus) - set(_topology.read(root).present)
        if absent:
            raise ValueError(f"vcpu_cpus: there is no CPU {_cpu_list.render(absent)} here")
        return cpus, []
    stored = _cpu_plan.load(root)
    if stored is not None:
        return stored.vcpu, []
    if not check:
        raise ValueError(f"there is no {_cpu_plan.PATH}: run level 1 first, or give vcpu_cpus")
    return _cpu_zones.plan(_topology.read(root)).vcpu, ["there is no CPU plan yet: this is for the one by default"]


def run(params: dict[str, Any], root: Root, *, check: bool) -> dict[str, Any]:
    """The module's result. Raises ValueError."""
    wishes = _power.PowerWishes(
        governor=params["governor"],
        lock_frequency=params["lock_frequency"],
        turbo=params["turbo"],
        vcpu_latency=params["vcpu_latency"],
        dma_latency_us=None if params["dma_latency_us"] == -1 else params["dma_latency_us"],
        release_above=params["release_above"],
        shallow_idle=params["shallow_idle"],
        aspm=params["aspm"],
        nvme_latency_us=None if params["nvme_latency_us"] == -1 else params["nvme_latency_us"],
        idle_poll=params["idle_poll"],
    )
    facts = _power.gather(root)
    cpus, said = ((), []) if wishes.vcpu_latency == "keep" else vcpu_zone(params["vcpu_cpus"], root, check=check)
    made = _power.plan(wishes, facts, cpus)
    kernel = root.read_or_none("/proc/sys/kernel/osrelease") or ""
    return {**asdict(made), "reasons": [*said, *made.reasons], "hottest": facts.hottest, "kernel": kernel}


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    try:
        result = run(module.params, Root(), check=module.check_mode)
    except (ValueError, OSError) as error:
        refuse(module, f"power plan: {error}")
    module.exit_json(changed=False, msg="; ".join(result["reasons"]) or "nothing special here", **result)


if __name__ == "__main__":
    main()
