#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Steers the interrupts of a host, all of them in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: irq_affinity
short_description: Which CPUs handle which device's interrupts
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Moves every interrupt of a host to the CPU zone where it belongs, in one call. Vectors of network cards and NVMe
    drives are spread over the I/O zone, both directions of a queue on one CPU and each queue on another, and all others
    go to the host's zone. New interrupts begin in the host's zone, too (C(default_smp_affinity)).
  - Vectors are found through their device's C(msi_irqs) in sysfs, never by the beginning of a name.
  - Vectors that the kernel manages itself, such as NVMe's I/O queues, refuse to be moved. They are told as
    C(managed) in RV(irqs) and never counted as done. The kernel parameter C(isolcpus=managed_irq,...) moves them.
  - Masks that are right are not written again. Where the interrupts run is read back (C(effective_affinity_list)).
  - The wish is kept in C(/etc/organism/steer.json), by which C(organism-steer) sets it at boot and holds it when a
    device appears. Earlier masks are recorded by device, position and action name, since interrupt numbers change at
    every boot.
extends_documentation_fragment:
  - organism.proxmox.attributes
attributes:
  check_mode:
    support: full
    details:
      - On kernels before 6.12 only a write shows that a vector is managed. There, check mode knows this of NVMe's
        queues alone until a real run has tried, and may predict a change of another vector that is reported as
        C(managed) then.
options:
  state:
    description:
      - With V(absent) all masks return to what they were, except those that somebody else has changed since, which are
        named in RV(kept_by_others).
    type: str
    choices: [present, absent]
    default: present
  host_cpus:
    description:
      - The host's zone as a CPU list (V(0,6)). Without it, that of the CPU plan (M(organism.proxmox.cpu_plan)).
    type: str
  vcpu_cpus:
    description: The zone of virtual CPUs, for devices that O(devices) or O(kinds) sends there.
    type: str
  io_cpus:
    description: The I/O zone.
    type: str
  kinds:
    description:
      - The zone (V(host), V(vcpu), V(io), a CPU list, or V(leave)) of each kind of device, where it differs from the
        default. Kinds are C(nic), C(nvme), C(passthrough) (bound to vfio), and C(other).
      - The default is C(nic) and C(nvme) in C(io), the others in C(host).
    type: dict
    default: {}
  devices:
    description:
      - The zone, a CPU list, or V(leave) for single devices, by PCI address, network interface, NVMe controller, or,
        for an interrupt without a PCI device, by its name in C(/proc/interrupts).
      - It holds for a card's virtual functions too, unless they are named. An unknown device is refused.
    type: dict
    default: {}
  default_affinity:
    description: Let interrupts that are requested later begin in the zone of kind C(other).
    type: bool
    default: true
  drift_check:
    description: Seconds after which C(organism-steer) looks without having heard of a change.
    type: int
    default: 600
seealso:
  - module: organism.proxmox.nic_steering
  - module: organism.proxmox.cpu_plan
"""

EXAMPLES = r"""
- name: Steer all interrupts as the CPU plan says
  organism.proxmox.irq_affinity:

- name: Keep a disk controller's interrupts near to its pool, and one card's where they are
  organism.proxmox.irq_affinity:
    devices:
      "0000:00:17.0": io
      eno2: leave

- name: Put all interrupts back
  organism.proxmox.irq_affinity:
    state: absent
"""

RETURN = r"""
irqs:
  description:
    - One entry for each interrupt that a driver has requested, as it is now (in check mode, as it was).
    - C(state) is V(ok), V(pending) (set, and the chip moves it with its next interrupt), V(managed) or V(fixed) (the
      kernel refuses to move it), V(left) (by wish) or V(wrong).
  type: list
  elements: dict
  returned: when O(state=present)
  sample:
    - irq: 41
      device: "0000:03:00.0"
      owner: eno1
      name: virtio2-input.0
      zone: io
      wanted: "1"
      affinity: "1"
      effective: "1"
      managed: false
      state: ok
      ok: true
summary:
  description: Number of interrupts in each state.
  type: dict
  returned: when O(state=present)
  sample: {ok: 38, pending: 0, wrong: 0, managed: 12, fixed: 1, left: 0}
kept_by_others:
  description: Masks that are not restored because somebody else has changed them, with their value of now.
  type: dict
  returned: always
  sample: {"irq:0000:03:00.0/1/virtio2-input.0": "4"}
zones:
  description: The CPU lists that were used.
  type: dict
  returned: when O(state=present)
  sample: {host: "0,6", vcpu: "2-5,8-11", io: "1,7"}
keeper:
  description: Whether anything is left for C(organism-steer) to hold.
  type: bool
  returned: always
  sample: true
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import (
    _cpu_list,
    _irq_apply,
    _irq_plan,
    _steer_config,
    _steer_zones,
)
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root

SECTION = "irq"


def present(module: AnsibleModule, root: Root) -> NoReturn:
    """Everything steered, and the wish kept for the keeper."""
    params = module.params
    if params["drift_check"] < 1:
        refuse(module, f"drift_check must be 1 second or more, not {params['drift_check']}")
    given = {zone: params[f"{zone}_cpus"] for zone in ("host", "vcpu", "io")}
    zones = _steer_zones.zones(root, given, ("host", "io"), check=module.check_mode)
    wish = _irq_plan.IrqWish(
        zones,
        {str(name): str(place) for name, place in params["devices"].items()},
        {**_irq_plan.ZONE_OF_KIND, **{str(kind): str(zone) for kind, zone in params["kinds"].items()}},
        params["default_affinity"],
    )
    section = {"wish": wish.as_dict(), "drift_check": params["drift_check"]}
    with _steer_config.held(root, really=not module.check_mode):
        sections = _steer_config.load(root)
        outcome = _irq_apply.steer(root, wish, check=module.check_mode)
        if not module.check_mode and sections.get(SECTION) != section:
            _steer_config.write_section(root, SECTION, section)
    outcome.difference.add(f"{_steer_config.PATH} ({SECTION})", sections.get(SECTION), section)
    _leave(
        module,
        outcome,
        keeper=True,
        irqs=outcome.rows,
        summary=outcome.summary,
        zones={zone: _cpu_list.render(cpus) for zone, cpus in zones.items()},
    )


def absent(module: AnsibleModule, root: Root) -> NoReturn:
    """Everything where it was; the keeper is told first, so that it does not undo this."""
    difference = Difference()
    with _steer_config.held(root, really=not module.check_mode):
        sections = _steer_config.load(root)
        difference.add(f"{_steer_config.PATH} ({SECTION})", sections.get(SECTION), None)
        if SECTION in sections and not module.check_mode:
            _steer_config.write_section(root, SECTION, None)
        outcome = _irq_apply.restore(root, check=module.check_mode)
    outcome.difference.merge(difference)
    _leave(module, outcome, keeper=bool(set(sections) - {SECTION}))


def _leave(module: AnsibleModule, outcome: _irq_apply.Outcome, **result: Any) -> NoReturn:
    finish(module, outcome.difference, header="interrupts", kept_by_others=outcome.kept, **result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "host_cpus": {"type": "str"},
            "vcpu_cpus": {"type": "str"},
            "io_cpus": {"type": "str"},
            "kinds": {"type": "dict", "default": {}},
            "devices": {"type": "dict", "default": {}},
            "default_affinity": {"type": "bool", "default": True},
            "drift_check": {"type": "int", "default": _steer_config.DRIFT_CHECK},
        },
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "present":
            present(module, Root())
        absent(module, Root())
    except (ValueError, EarlierStateError, _irq_apply.SteeringError, OSError) as error:
        refuse(module, f"interrupts: {error}")


if __name__ == "__main__":
    main()
