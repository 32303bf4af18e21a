#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's inventory: the nodes `./run lab up` made.

While no lab is up it names the two default nodes, so that lint, --syntax-check and ansible-inventory work.

Look at it with: ansible-inventory -i inventories/lab --graph --vars
It says who the nodes are and how to reach them; what they shall be is in group_vars/ beside this file.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.config import DEFAULT_GPUS, State, load_state, plan_nodes, settings
from lab.errors import LabError

# Every group the playbooks know, so that `hosts:` patterns match without a warning. The lab leaves the last two empty.
GROUPS = ("bus", "conductor", "gpu_pool", "pve", "cortex")


def inventory() -> dict[str, object]:
    """The structure Ansible's script inventories print for --list, with all variables in ``_meta``."""
    where = settings()
    subnet = "10.99.0.0/24"
    state = load_state(where) or State(where.name, subnet, DEFAULT_GPUS, plan_nodes(subnet, bus=1, pool=1))
    connection = {
        "ansible_user": "root",
        "ansible_ssh_args": shlex.join(where.ssh_options()),
        "ansible_pipelining": True,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    hostvars: dict[str, dict[str, object]] = {}
    for node in state.nodes:
        hostvars[node.name] = {"ansible_host": node.address}
        if "gpu_pool" in node.groups:
            hostvars[node.name]["organism_gpu_simulated"] = state.gpus
    groups = {name: {"hosts": [node.name for node in state.nodes if name in node.groups]} for name in GROUPS}
    return {"_meta": {"hostvars": hostvars}, "all": {"children": list(GROUPS), "vars": connection}, **groups}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(inventory(), indent=2) + "\n")
    except LabError as error:
        sys.exit(f"{error}: {error.hint}")
