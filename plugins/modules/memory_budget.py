#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: memory_budget
short_description: Require that all that may claim a host's memory fits into it
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Adds up the most that each part may take (ARC, hugepages, virtual machines, RAM layers, zram, the host itself) and
    fails with a table when that is more than the host has. It changes nothing.
  - Virtual machines on hugepages live inside the pool where O(hugepages) sets one aside, and are counted once. Without
    a pool they allocate their hugepages when they start, and count like any other.
  - Of the virtual machines of one exclusive group only the largest counts.
  - Sizes are texts like V(8G), V(512M) or V(30%) of the host's memory; a plain number is MiB.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  arc_max:
    description:
      - Upper limit of the ZFS ARC. V(auto) is the largest of O(arc_planned) or, without one, the limit in force, and
        nothing where ZFS is not loaded.
    type: str
    default: auto
  arc_planned:
    description:
      - Limits that the ARC gets in turn, for example by day and by night. They count where O(arc_max=auto) and ZFS is
        loaded, whether they are in force yet or not.
    type: list
    elements: str
    default: []
  vms:
    description:
      - Virtual machines that may run, with the most memory that each may have.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description:
          - Its name or number.
        type: str
        required: true
      memory:
        description:
          - Its memory, of a ballooning one the upper end.
        type: str
        required: true
      hugepages:
        description:
          - Whether its memory is made of hugepages.
        type: bool
        default: false
      exclusive:
        description:
          - Name of a group of which one runs at a time.
        type: str
        default: ""
  hugepages:
    description:
      - V(pool) sets aside, from boot on, what the VMs with hugepages need. V(none) sets nothing aside.
    type: str
    choices: [none, pool]
    default: none
  hugepage_size:
    description:
      - Size of a hugepage of the pool.
    type: str
    choices: [2M, 1G]
    default: 2M
  ram_layers:
    description:
      - Sizes of tmpfs and RAM layers by name.
    type: dict
    default: {}
  zram:
    description:
      - Size of the compressed swap.
    type: str
    default: "0"
  reserve:
    description:
      - What the host itself needs.
    type: str
    default: 2G
  memory:
    description:
      - The host's memory, instead of what its kernel says.
    type: str
seealso:
  - module: organism.proxmox.host_settings
"""

EXAMPLES = r"""
- name: Require room for a VM of 20 GiB beside an ARC of 6
  organism.proxmox.memory_budget:
    arc_max: 6G
    vms:
      - {name: "100", memory: 20G}
    ram_layers:
      gpucache: 2G
    zram: 30%
"""

RETURN = r"""
fits:
  description: Whether all of it fits at once.
  returned: always, unless an argument is refused
  type: bool
claims:
  description: Each part with the most it may take (MiB) and what makes it less.
  returned: always, unless an argument is refused
  type: list
  elements: dict
  sample: [{"name": "ZFS ARC at most", "mib": 6144, "way_out": "a lower ARC limit (zfs_arc_max)"}]
memory:
  description: The host's memory (MiB).
  returned: always, unless an argument is refused
  type: int
  sample: 31987
free:
  description: What nobody claims (MiB).
  returned: always, unless an argument is refused
  type: int
  sample: 3315
table:
  description: The same for people, a line a part.
  returned: always, unless an argument is refused
  type: str
pages:
  description: Hugepages that the pool has, by size, for the kernel's command line; empty without a pool.
  returned: always, unless an argument is refused
  type: dict
  sample: {"2M": 10240}
allocated:
  description: Hugepages that the kernel has now, by size.
  returned: always, unless an argument is refused
  type: dict
  sample: {"2M": 0, "1G": 0}
"""

import dataclasses
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _memory_budget as budgets
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root

VM = {
    "name": {"type": "str", "required": True},
    "memory": {"type": "str", "required": True},
    "hugepages": {"type": "bool", "default": False},
    "exclusive": {"type": "str", "default": ""},
}


def judge(params: dict[str, Any], root: Root) -> tuple[budgets.Budget, dict[str, int]]:
    """The budget, and the pages of the pool by size."""
    memory = budgets.memory_mib(root)
    if params["memory"]:
        memory = budgets.size_mib(params["memory"], memory, "memory")
    vms = budgets.vms_from(params["vms"], memory)
    page: str = params["hugepage_size"]
    pages = budgets.pool_pages(vms, page) if params["hugepages"] == "pool" else 0
    budget = budgets.make(
        memory,
        arc_max=_arc(params, root, memory),
        vms=vms,
        pool=pages * budgets.PAGE_SIZES[page],
        layers=[
            (name, budgets.size_mib(size, memory, f"RAM layer {name}")) for name, size in params["ram_layers"].items()
        ],
        zram=budgets.size_mib(params["zram"], memory, "zram"),
        reserve=budgets.size_mib(params["reserve"], memory, "reserve"),
    )
    return budget, {page: pages} if pages else {}


def _arc(params: dict[str, Any], root: Root, memory: int) -> int:
    """The ARC's share in MiB. Raises BudgetError."""
    if params["arc_max"] != "auto":
        return budgets.size_mib(params["arc_max"], memory, "arc_max")
    now = budgets.arc_now_mib(root)
    planned = [budgets.size_mib(size, memory, "arc_planned") for size in params["arc_planned"]]
    return max(planned) if planned and now else now


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "arc_max": {"type": "str", "default": "auto"},
            "arc_planned": {"type": "list", "elements": "str", "default": []},
            "vms": {"type": "list", "elements": "dict", "default": [], "options": VM},
            "hugepages": {"type": "str", "choices": ["none", "pool"], "default": "none"},
            "hugepage_size": {"type": "str", "choices": ["2M", "1G"], "default": "2M"},
            "ram_layers": {"type": "dict", "default": {}},
            "zram": {"type": "str", "default": "0"},
            "reserve": {"type": "str", "default": "2G"},
            "memory": {"type": "str"},
        },
        supports_check_mode=True,
    )
    try:
        budget, pages = judge(module.params, Root())
    except budgets.BudgetError as error:
        refuse(module, f"memory budget: {error}")
    result: dict[str, Any] = {
        "fits": budget.fits,
        "claims": [dataclasses.asdict(claim) for claim in budget.claims],
        "memory": budget.memory,
        "free": budget.free,
        "table": budget.table(),
        "pages": pages,
        "allocated": {page: budgets.allocated_pages(Root(), page) for page in budgets.PAGE_SIZES},
    }
    if not budget.fits:
        refuse(module, f"memory budget: {budget.message()}\n{budget.table()}", **result)
    finish(module, Difference(), msg=budget.message(), **result)


if __name__ == "__main__":
    main()
