#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: pve_storage
short_description: Kinds of content that a storage of Proxmox VE may hold, and a ZFS pool as a storage
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Allows snippets, images for import and the like on a storage that exists. Kinds that are allowed already stay.
  - With O(zfs_pool) the storage is made where it is missing.
  - M(community.proxmox.proxmox_storage) creates and removes storages of other types, does not change one that is there,
    and knows no sparse volumes.
extends_documentation_fragment:
  - organism.proxmox.attributes
  - organism.proxmox.pve
options:
  storage:
    description: Name of the storage.
    type: str
    required: true
  content:
    description:
      - Kinds of content, as V(snippets), V(import), V(images), V(iso).
      - Required when O(state=present).
    type: list
    elements: str
  zfs_pool:
    description:
      - Pool or dataset that the storage is to be made of, as C(zfs list) names it.
      - A storage of that name which is something else is refused.
    type: str
  sparse:
    description: Volumes take room as they are written. Of a storage with O(zfs_pool) alone.
    type: bool
    default: true
  state:
    description:
      - V(absent) takes the entry of a storage with O(zfs_pool) away. Its data stay, and it is refused while there are
        volumes.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Allow hookscripts and cloud images
  organism.proxmox.pve_storage:
    storage: local
    content: [snippets, import]

- name: Let guests have their disks on the fast pool
  organism.proxmox.pve_storage:
    storage: nvme-vmdata
    zfs_pool: nvme-store/organism/vmdata
    content: [images, rootdir]
"""

RETURN = r"""
path:
  description: Folder of the storage. Empty for one that has none.
  returned: success
  type: str
  sample: /var/lib/vz
content:
  description: All kinds that are allowed.
  returned: success
  type: list
  elements: str
  sample: [iso, vztmpl, backup, snippets]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _pve_client, _pve_find, _pve_storage
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse

ARGUMENTS: dict[str, Any] = {
    **_pve_client.argument_spec(),
    "storage": {"type": "str", "required": True},
    "content": {"type": "list", "elements": "str"},
    "zfs_pool": {"type": "str"},
    "sparse": {"type": "bool", "default": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        required_if=[("state", "present", ["content"]), ("state", "absent", ["zfs_pool"])],
        supports_check_mode=True,
    )
    params = module.params
    storage, pool, check = params["storage"], params["zfs_pool"], module.check_mode
    try:
        pve = _pve_client.connect(params)
        if params["state"] == "absent":
            node = _pve_find.node_name(pve, params["node"])
            done = _pve_storage.withdraw(pve, node, storage, pool, check=check)
        elif pool:
            done = _pve_storage.offer(pve, storage, pool, params["content"], sparse=params["sparse"], check=check)
        else:
            done = _pve_storage.allow(pve, storage, params["content"], check=check)
    except _pve_client.PveError as error:
        refuse(module, f"storage {params['storage']}: {error}")
    finish(module, done.difference, header=f"storage {params['storage']}", path=done.path, content=list(done.content))


if __name__ == "__main__":
    main()
