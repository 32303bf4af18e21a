#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig's inventory: the one machine that `./run rig` started, named by ORGANISM_RIG_NAME (default: rig).

While there is none it names it all the same, so that lint, --syntax-check and ansible-inventory work.

Look at it with: ansible-inventory -i inventories/rig --graph --vars
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rig import remote, state
from rig.config import settings
from rig.errors import RigError

# Every group the playbooks know, so that `hosts:` patterns match without a warning. The rig is a Proxmox VE host only.
GROUPS = ("bus", "conductor", "gpu_pool", "pve", "cortex")


def inventory() -> dict[str, object]:
    """The structure Ansible's script inventories print for --list, with all variables in ``_meta``."""
    where = settings()
    known = state.read(where)
    connection = {
        "ansible_host": "127.0.0.1",
        "ansible_port": known.port if known else 22,
        "ansible_user": "root",
        "ansible_ssh_args": shlex.join(remote.options(where)),
        "ansible_pipelining": True,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    groups = {name: {"hosts": [where.name] if name == "pve" else []} for name in GROUPS}
    return {"_meta": {"hostvars": {where.name: connection}}, "all": {"children": list(GROUPS)}, **groups}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(inventory(), indent=2) + "\n")
    except RigError as error:
        sys.exit(f"{error}: {error.hint}")
