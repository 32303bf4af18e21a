#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: pve_storage
short_description: Kinds of content that a storage of Proxmox VE may hold
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Allows snippets, images for import and the like on a storage that exists. Kinds that are allowed already stay.
  - M(community.proxmox.proxmox_storage) creates and removes storages, and does not change one that is there.
extends_documentation_fragment:
  - organism.proxmox.attributes
  - organism.proxmox.pve
options:
  storage:
    description: Name of the storage.
    type: str
    required: true
  content:
    description: Kinds of content, as V(snippets), V(import), V(images), V(iso).
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Allow hookscripts and cloud images
  organism.proxmox.pve_storage:
    storage: local
    content: [snippets, import]
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

from ansible_collections.organism.proxmox.plugins.module_utils import _pve_client, _pve_storage
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse

ARGUMENTS: dict[str, Any] = {
    **_pve_client.argument_spec(),
    "storage": {"type": "str", "required": True},
    "content": {"type": "list", "elements": "str", "required": True},
}


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    params = module.params
    try:
        pve = _pve_client.connect(params)
        done = _pve_storage.allow(pve, params["storage"], params["content"], check=module.check_mode)
    except _pve_client.PveError as error:
        refuse(module, f"storage {params['storage']}: {error}")
    finish(module, done.difference, header=f"storage {params['storage']}", path=done.path, content=list(done.content))


if __name__ == "__main__":
    main()
