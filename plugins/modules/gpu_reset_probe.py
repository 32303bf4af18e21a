#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_reset_probe
short_description: Start and stop a VM again and again, and say which of its cards survive that
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - An operation, no state. It starts and stops a VM O(cycles) times and judges each of its cards after each start and
    stop, so that the reset bug of some cards shows before the VM is relied on.
  - A card has failed when its configuration space is all ones, when it has left C(vfio-pci) or the bus, when its link
    has other lanes than before, when the kernel complains of it, or, with O(agent), when the guest does not see it.
  - It runs on the node that the cards are in. The VM has to be stopped, unless O(interrupt) allows to stop it.
  - Fails when a card failed, with the whole report.
extends_documentation_fragment:
  - organism.proxmox.attributes
  - organism.proxmox.pve
attributes:
  check_mode:
    support: full
    details: Refuses what a run would refuse, names the cards, and starts nothing.
  diff_mode:
    support: none
    details: It leaves things as they were.
options:
  vmid:
    description: The VM's id. One of O(vmid) and O(name) is needed.
    type: int
  name:
    description: The VM's name, when it is unique.
    type: str
  cycles:
    description: How often the VM is started and stopped.
    type: int
    default: 10
  run_seconds:
    description:
      - How long the VM is left running in each cycle. Its driver has to have used the card, or the probe proves little.
    type: int
    default: 30
  agent:
    description: Wait for the guest agent in each cycle, and count the cards inside by C(lspci), which must be there.
    type: bool
    default: false
  agent_timeout:
    description: Seconds after which a guest whose agent does not answer has failed.
    type: int
    default: 300
  start_timeout:
    description: Seconds that a start may take.
    type: int
    default: 300
  shutdown_timeout:
    description: Seconds for the guest to end by itself, before it is stopped.
    type: int
    default: 60
  interrupt:
    description: Stop a VM that runs, and start it again when all was well.
    type: bool
    default: false
  go_on:
    description: Go on with further cycles after one that failed.
    type: bool
    default: false
seealso:
  - module: organism.proxmox.pve_vfio
  - module: organism.proxmox.pve_vm_power
"""

EXAMPLES = r"""
- name: Ten starts and stops of the pool VM
  organism.proxmox.gpu_reset_probe:
    name: gpu-pool
    agent: true
"""

RETURN = r"""
cards:
  description: The VM's cards.
  type: list
  elements: dict
  returned: when the VM and its cards were found
  contains:
    address:
      description: The PCI address on the node.
      type: str
      sample: "0000:03:00.0"
    id:
      description: Vendor and device.
      type: str
      sample: 1002:67df
    model:
      description: The name from pci.ids, or the id.
      type: str
    reset:
      description: The ways to reset it that the kernel would try.
      type: list
      elements: str
      sample: [bus]
    passed:
      description: Cycles without trouble.
      type: int
      sample: 10
    failed:
      description: Cycles with trouble, and what it was.
      type: list
      elements: dict
      sample: [{"cycle": 4, "reasons": ["does not answer after the stop (its configuration space is all ones)"]}]
    good:
      description: Whether no cycle failed.
      type: bool
cycles_done:
  description: How many cycles were begun.
  type: int
  returned: when the VM and its cards were found
  sample: 10
passed:
  description: Whether all was well.
  type: bool
  returned: when the VM and its cards were found
table:
  description: The same for people, a line each.
  type: list
  elements: str
  returned: when the VM and its cards were found
  sample: ["ok    0000:03:00.0  10 of 10  reset bus"]
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _pve_client, _pve_find, _vfio_reset
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import refuse
from ansible_collections.organism.proxmox.plugins.module_utils._pve_client import Pve
from ansible_collections.organism.proxmox.plugins.module_utils._pve_power import Limits
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def connect(params: dict[str, Any]) -> Pve:
    return _pve_client.connect(params)


def run(module: AnsibleModule) -> NoReturn:
    """Refuse, or probe and report."""
    params = module.params
    pve = connect(params)
    wish = _vfio_reset.Wish(
        params["cycles"],
        float(params["run_seconds"]),
        params["agent"],
        float(params["agent_timeout"]),
        params["interrupt"],
        params["go_on"],
        Limits(shutdown=float(params["shutdown_timeout"]), start=float(params["start_timeout"])),
    )
    vm = _pve_find.existing_vm(pve, params["vmid"], params["name"], params["node"])
    node = _vfio_reset.Node(Root())
    report = _vfio_reset.prepare(pve, vm, node, wish)
    if not module.check_mode:
        _vfio_reset.probe(pve, report, node, wish)
    shown: dict[str, Any] = {
        "cards": [card.as_dict() for card in report.cards],
        "cycles_done": report.done,
        "passed": report.good,
        "table": report.lines(),
    }
    if not report.good:
        refuse(module, f"{vm}: not every card survives: {'; '.join(report.lines())}", changed=True, **shown)
    word = (
        f"would start and stop {vm} {wish.cycles} times" if module.check_mode else f"{len(report.cards)} cards are well"
    )
    module.exit_json(changed=True, msg=word, **shown)
    raise SystemExit  # exit_json never returns; this tells the type checker


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_pve_client.argument_spec(),
            "vmid": {"type": "int"},
            "name": {"type": "str"},
            "cycles": {"type": "int", "default": _vfio_reset.CYCLES},
            "run_seconds": {"type": "int", "default": 30},
            "agent": {"type": "bool", "default": False},
            "agent_timeout": {"type": "int", "default": 300},
            "start_timeout": {"type": "int", "default": 300},
            "shutdown_timeout": {"type": "int", "default": 60},
            "interrupt": {"type": "bool", "default": False},
            "go_on": {"type": "bool", "default": False},
        },
        required_one_of=[("vmid", "name")],
        mutually_exclusive=[("vmid", "name")],
        supports_check_mode=True,
    )
    try:
        run(module)
    except _vfio_reset.ERRORS as error:
        refuse(module, f"reset probe: {error}")


if __name__ == "__main__":
    main()
