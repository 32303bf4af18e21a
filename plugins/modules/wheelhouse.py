#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keeps a wheelhouse on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: wheelhouse
short_description: Build the wheels that the nodes of a pool need
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Fills a directory with the wheel of the C(organism) runtime, built from its sources, and with every wheel that it
    needs, C(nats-server) included, for each Python version that the nodes have. A node installs from it without a
    package index.
  - It runs on the controller, so use C(delegate_to=localhost). The Python that runs it must have C(pip) and
    C(setuptools).
  - The runtime's version names its sources, for example V(0.1.0+src.0123456789ab), so that changed sources are another
    version.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  dest:
    description:
      - Directory of the wheelhouse. It is replaced as a whole, in one step.
      - A directory that holds anything else is refused.
    type: path
    required: true
  runtime:
    description:
      - Directory of the runtime's sources (C(runtime) of this collection).
      - Required when O(state=present).
    type: path
  requirements:
    description:
      - Requirement file that pins everything beside the runtime, with hashes. Its lines are downloaded as they are;
        what they depend on must be listed too.
      - The default is C(requirements-node.txt) in O(runtime).
    type: path
  python_versions:
    description:
      - The Python versions of the nodes. Debian 12 has 3.11, Debian 13 and Proxmox VE 9 have 3.13.
    type: list
    elements: str
    default: ["3.11", "3.13"]
  state:
    description:
      - V(present) builds the wheelhouse unless it is already the one that these inputs give, whole and unaltered.
      - V(absent) removes it.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Build the wheels for the nodes
  organism.proxmox.wheelhouse:
    dest: ~/.cache/organism/wheels
    runtime: "{{ role_path }}/../../runtime"
  delegate_to: localhost
  run_once: true
  register: organism_wheelhouse
"""

RETURN = r"""
version:
  description: Version of the runtime's wheel.
  type: str
  returned: when O(state=present)
  sample: 0.1.0+src.0123456789ab
path:
  description: Directory of the wheelhouse.
  type: str
  returned: always
  sample: /home/admin/.cache/organism/wheels
wheel:
  description: File name of the runtime's wheel; in check mode the one that would be built.
  type: str
  returned: when O(state=present)
  sample: organism-0.1.0+src.0123456789ab-py3-none-any.whl
"""

import os
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._wheelhouse import (
    WheelhouseError,
    build,
    plan,
    present,
    refuse_foreign,
    remove,
    wanted,
)


def run(module: AnsibleModule) -> None:
    """Bring the wheelhouse to the declared state."""
    params: dict[str, Any] = module.params
    dest = Path(os.path.abspath(params["dest"]))  # noqa: PTH100 - resolve() would follow a link to another disk
    refuse_foreign(dest)
    if params["state"] == "absent":
        difference = plan(present(dest), None)
        if difference and not module.check_mode:
            remove(dest)
        finish(module, difference, header=str(dest), path=str(dest))
    runtime = Path(params["runtime"]).resolve()
    requirements = Path(params["requirements"] or runtime / "requirements-node.txt")
    versions: list[str] = params["python_versions"]
    want = wanted(runtime, requirements, versions)
    difference = plan(present(dest), want)
    if difference and not module.check_mode:
        build(dest, runtime, requirements, versions, want)
    wheel = f"organism-{want.version}-py3-none-any.whl"
    finish(module, difference, header=str(dest), path=str(dest), version=want.version, wheel=wheel)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "runtime": {"type": "path"},
            "requirements": {"type": "path"},
            "python_versions": {"type": "list", "elements": "str", "default": ["3.11", "3.13"]},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        required_if=[("state", "present", ["runtime"])],
        supports_check_mode=True,
    )
    try:
        run(module)
    except (WheelhouseError, OSError) as error:
        refuse(module, f"wheelhouse {module.params['dest']}: {error}")


if __name__ == "__main__":
    main()
