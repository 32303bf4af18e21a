#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: nats_nkey
short_description: Have a component's nkey on the host that uses it
version_added: 0.1.0
description:
  - Makes an nkey seed (ed25519) in a file where there is none, and returns the public key, which goes into the
    configuration of nats-server. The seed never leaves the host.
  - An existing seed is kept. Remove it with O(state=absent) to give the component another key.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
  - ansible.builtin.files
attributes:
  diff_mode:
    details: Never shows the seed.
options:
  path:
    description: File of the seed.
    type: path
    required: true
  mode:
    description: Permissions of the file. Default is V(0400) for a new one.
  command:
    description: Command that makes and reads keys. In check mode it may be missing as long as there is no key.
    type: path
    default: /opt/organism/venv/bin/organism-bus
  state:
    description: Whether the key shall be there.
    type: str
    choices: [present, absent]
    default: present
requirements:
  - The environment of role P(organism.proxmox.runtime#role).
"""

EXAMPLES = r"""
- name: Have the key of a GPU worker
  organism.proxmox.nats_nkey:
    path: /etc/organism/keys/worker-gpu0.nk
    owner: organism
    group: organism
    mode: "0400"
  register: key
"""

RETURN = r"""
public_key:
  description: The public key; none in check mode when it is still to be made.
  returned: when O(state=present)
  type: str
  sample: UAXKO4OZPO7LC4VQFJ5EO4QXPIIW3BLTWXNPYDSA2UAEHY7ZPDW4MPNT
"""

import json
import pathlib

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible
from ansible_collections.organism.proxmox.plugins.module_utils._difference import ABSENT, Difference
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command


def call(command: str, action: str, path: str) -> str:
    """The public key. Raises CommandError."""
    return str(json.loads(run_command([command, "key", action, path, "--json"]))["public_key"])


def present(module: AnsibleModule) -> None:
    path, command = module.params["path"], module.params["command"]
    difference = Difference()
    exists = pathlib.Path(path).exists()
    public = None
    if not exists:
        difference.add(path, ABSENT, "a new nkey seed")
        if module.check_mode:
            _ansible.finish(module, difference, public_key=None)
        public = call(command, "create", path)
    file_arguments = module.load_file_common_arguments(module.params)
    if module.set_fs_attributes_if_different(file_arguments, False) and exists:
        difference.add(f"{path}: owner, group or mode", "as it was", "as asked for")
    if public is None:
        public = call(command, "show", path)
    _ansible.finish(module, difference, public_key=public)


def absent(module: AnsibleModule) -> None:
    path = pathlib.Path(module.params["path"])
    difference = Difference()
    if path.exists():
        difference.add(str(path), "an nkey seed", ABSENT)
        if not module.check_mode:
            path.unlink()
    _ansible.finish(module, difference)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "command": {"type": "path", "default": "/opt/organism/venv/bin/organism-bus"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        add_file_common_args=True,
        supports_check_mode=True,
    )
    try:
        (present if module.params["state"] == "present" else absent)(module)
    except CommandError as error:
        _ansible.refuse(module, str(error))
    except OSError as error:
        _ansible.refuse(module, f"{module.params['path']}: {error.strerror}")


if __name__ == "__main__":
    main()
