#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keeps the map from logical GPU ids to devices."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_map
short_description: Lasting ids for the GPUs of a machine
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Finds the GPUs of a machine by PCI class, and writes which logical id each of them has. Caches, queues and workers
    are named by that id, never by the order in which the cards were found.
  - An id once given stays with its card, by UUID where the card has one, else by PCI address. A card that vanishes
    keeps its id reserved, and has C(present) false until it returns. A new card gets the lowest id that is free.
  - Cards that a virtual machine has (driver C(vfio-pci)), or that have no driver, are left out and named in
    RV(ignored).
  - An NVIDIA card that is split into MIG instances gives way to them, if C(nvidia-smi) is installed.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description: With V(absent) the map is removed, and with it the memory of who had which id.
    type: str
    choices: [present, absent]
    default: present
  path:
    description: The map.
    type: path
    default: /etc/organism/gpus.json
  prefix:
    description: New ids are this and a number. It makes ids unique in a pool of several machines.
    type: str
    default: gpu
  vendors:
    description: Makers whose cards belong to the pool. An empty list takes none.
    type: list
    elements: str
    choices: [amd, nvidia, intel]
    default: [amd, nvidia]
  exclude:
    description: PCI addresses (C(0000:00:02.0)) or UUIDs of cards outside the pool, such as the console's.
    type: list
    elements: str
    default: []
  simulated:
    description: How many devices without hardware to add, to try a pool out. Each says openly that it is simulated.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Give each card of this machine an id
  organism.proxmox.gpu_map:
    exclude: ["0000:00:02.0"]

- name: Try the pool without a card
  organism.proxmox.gpu_map:
    vendors: []
    simulated: 2

- name: Forget all ids
  organism.proxmox.gpu_map:
    state: absent
"""

RETURN = r"""
gpus:
  description: The map's entries, in check mode as they would be.
  type: list
  elements: dict
  returned: always
  sample:
    - id: gpu0
      backend: amdgpu
      address: "0000:03:00.0"
      uuid:
      model: Ellesmere [Radeon RX 470/480/570/570X/580/580X/590]
      vram_mb: 8192
      present: true
ignored:
  description: Cards that were found and left out, with the reason.
  type: dict
  returned: when O(state=present)
  sample: {"0000:04:00.0": "it is reserved for a virtual machine (driver vfio-pci)"}
"""

import shutil
from dataclasses import asdict
from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _gpu, _gpu_map
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._atomic import write_atomic
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command


def found(root: Root) -> list[_gpu.Gpu]:
    """The machine's cards, MIG instances included. Raises CommandError."""
    cards = _gpu.discover(root)
    if root.exists("/proc/driver/nvidia") and shutil.which("nvidia-smi"):
        cards = _gpu.mig_instances(run_command(["nvidia-smi", "-L"]), cards)
    return cards


def present(module: AnsibleModule, root: Root) -> NoReturn:
    """The map as the machine is now, ids kept."""
    params = module.params
    path: str = params["path"]
    if params["simulated"] < 0:
        refuse(module, f"simulated must be 0 or more, not {params['simulated']}")
    known = _gpu_map.load_map(root, path) if root.exists(path) else []
    plan = _gpu_map.plan_map(
        known,
        found(root),
        prefix=params["prefix"],
        simulated=params["simulated"],
        exclude=params["exclude"],
        vendors=params["vendors"],
    )
    missing = not root.exists(path)
    plan.difference.add(path, None if missing else "there", "there")
    if plan.difference and not module.check_mode:
        real = root.path(path)
        real.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(real, _gpu_map.render_map(plan.entries))
    gpus = [asdict(entry) for entry in plan.entries]
    finish(module, plan.difference, header=path, gpus=gpus, ignored=plan.ignored)


def absent(module: AnsibleModule, root: Root) -> NoReturn:
    """No map."""
    path: str = module.params["path"]
    difference = Difference()
    difference.add(path, root.read_or_none(path), None)
    if difference and not module.check_mode:
        root.path(path).unlink()
    finish(module, difference, header=path, gpus=[])


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "path": {"type": "path", "default": _gpu_map.PATH},
            "prefix": {"type": "str", "default": "gpu"},
            "vendors": {
                "type": "list",
                "elements": "str",
                "choices": ["amd", "nvidia", "intel"],
                "default": ["amd", "nvidia"],
            },
            "exclude": {"type": "list", "elements": "str", "default": []},
            "simulated": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "present":
            present(module, Root())
        absent(module, Root())
    except (ValueError, CommandError, OSError) as error:  # MapError is a ValueError
        refuse(module, f"map of GPUs: {error}")


if __name__ == "__main__":
    main()
