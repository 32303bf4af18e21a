#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: zfs_layout
short_description: ZFS datasets and properties, parents first, nothing ever destroyed
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Creates file systems, sets properties of file systems and pools, and mounts what should be mounted. What is there is
    read with one C(zpool get) and one C(zfs get), and read again after a change, mount points included.
  - A property that ZFS does not know, a wrong value, a missing parent, a mount point with files in it or with another
    file system on it are refused before anything is changed.
  - Datasets of a pool that is missing or out of service are left out and named in RV(left_out).
  - No dataset is ever destroyed. O(state=absent) gives the properties that it has changed back, inherited ones as
    inherited, and names the datasets that it had created in RV(left_datasets).
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  datasets:
    description:
      - The file systems. Order does not matter, parents are created first.
      - What is no longer named is taken back as with O(state=absent).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: The dataset, with its pool.
        type: str
        required: true
      properties:
        description:
          - Properties by name. Sizes may have a binary unit (V(1M)).
          - V(sync=disabled) is refused here, see O(unsafe_sync_disabled_on).
        type: dict
        default: {}
  pools:
    description:
      - Properties of pools, by pool, for example C(autotrim).
    type: dict
    default: {}
  unsafe_sync_disabled_on:
    description:
      - Declared datasets that get C(sync=disabled). Programs are then told that data is on disk while it is not, and a
        power cut loses the last seconds of what was acknowledged. Only for scratch data.
    type: list
    elements: str
    default: []
  state:
    description:
      - V(absent) gives changed properties back. What somebody else has changed since stays, and is named in
        RV(kept_by_others).
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Datasets for fast and scratch data
  organism.proxmox.zfs_layout:
    pools:
      tank: {autotrim: true}
    datasets:
      - name: tank/organism
        properties: {mountpoint: /mnt/fast, compression: zstd, atime: false, xattr: sa, acltype: posixacl}
      - name: tank/organism/tmp
        properties: {recordsize: 1M, logbias: throughput}
    unsafe_sync_disabled_on: [tank/organism/tmp]

- name: Earlier properties again
  organism.proxmox.zfs_layout:
    state: absent
"""

RETURN = r"""
left_out:
  description: Pools that are left out, and why.
  type: list
  elements: dict
  returned: success
  sample: [{"name": "zarchive", "reason": "there is no pool zarchive here (zpool list shows those that are)"}]
left_datasets:
  description: Datasets that were created by this module and are no longer declared. They stay, with their data.
  type: list
  elements: str
  returned: success
  sample: [tank/organism/tmp]
kept_by_others:
  description: Properties that somebody else has changed since, and that stay.
  type: list
  elements: dict
  returned: success
commands:
  description: What was run, or in check mode would be run.
  type: list
  elements: str
  returned: success
  sample: [zpool set autotrim=on tank]
pools:
  description: The pools of this host with health, ashift, autotrim, autoexpand and listsnapshots.
  type: dict
  returned: success
  sample: {"tank": {"health": "ONLINE", "ashift": "12", "autotrim": "on"}}
"""

import shlex
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_layout as layout
from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_layout_host as host
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command


def run(argv: list[str]) -> str:
    return run_command(argv, timeout=300)


def converge(module: AnsibleModule, root: Root) -> None:
    params: dict[str, Any] = module.params
    wanted = layout.Wanted({}, {})
    if params["state"] == "present":
        wanted = layout.declare(params["datasets"], params["pools"], params["unsafe_sync_disabled_on"])
    facts = host.gather(root, wanted, run)
    plan = layout.make_plan(wanted, facts)
    if not module.check_mode:
        host.apply(root, plan, run)
        if plan.commands:
            facts = host.gather(root, wanted, run)
            missing = layout.unmet(wanted, facts)
            if missing:
                raise layout.LayoutError(f"ZFS took the commands and {'; '.join(missing)}")
    finish(
        module,
        plan.difference,
        header="ZFS layout",
        left_out=plan.skipped,
        left_datasets=plan.left,
        kept_by_others=plan.kept_by_others,
        commands=[shlex.join(command) for command in plan.commands],
        pools={
            pool: {name: values[name].value for name in layout.SURVEY if name in values}
            for pool, values in facts.pools.items()
        },
    )


def main() -> None:
    dataset = {"name": {"type": "str", "required": True}, "properties": {"type": "dict", "default": {}}}
    module = AnsibleModule(
        argument_spec={
            "datasets": {"type": "list", "elements": "dict", "default": [], "options": dataset},
            "pools": {"type": "dict", "default": {}},
            "unsafe_sync_disabled_on": {"type": "list", "elements": "str", "default": []},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    try:
        converge(module, Root())
    except (layout.LayoutError, EarlierStateError, CommandError, OSError) as error:
        refuse(module, f"ZFS layout: {error}")


if __name__ == "__main__":
    main()
