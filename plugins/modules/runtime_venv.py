#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: runtime_venv
short_description: Install the runtime of the pool on a node, from pushed wheels
version_added: 0.1.0
description:
  - Keeps one virtual environment a set of wheels below C(/opt/organism), a link C(/opt/organism/venv) to the one in
    use, and links to its commands in C(/usr/local/bin). Needs no package index.
  - A new environment is built beside the old one, and the link is switched in one step. Daemons that run go on in the
    old one until they are restarted (O(state=restarted)).
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - V(planned) only returns the wheels that this host needs and lacks (RV(missing)).
      - V(present) installs, switches and removes what is superfluous.
      - V(restarted) restarts those of O(units) that still run from another environment than the current one.
      - V(absent) removes environments, links and wheels. Refused while a process runs from them.
    type: str
    choices: [planned, present, restarted, absent]
    default: present
  version:
    description: Version of the runtime, as M(organism.proxmox.wheelhouse) returned it.
    type: str
  files:
    description:
      - The wheels of the wheelhouse, file name and SHA-256, as its C(wheelhouse.json) has them.
      - Empty in check mode before the first wheelhouse was built. The module then predicts an installation.
    type: dict
    default: {}
  leave_out:
    description: Distributions that this host does not need.
    type: list
    elements: str
    default: []
  commands:
    description: Commands to link into C(/usr/local/bin).
    type: list
    elements: str
    default: [maestroctl, gpucache-ctl, gpu-worker-ctl, organism-validate, organism-bus]
  keep:
    description: How many environments stay, the current one included.
    type: int
    default: 2
  python:
    description: The Python that the environments are made with. Its version must be the one that runs this module.
    type: path
    default: /usr/bin/python3
  units:
    description: Units that O(state=restarted) looks at. Shell patterns are allowed.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Ask which wheels this node lacks
  organism.proxmox.runtime_venv:
    state: planned
    version: "{{ wheelhouse.version }}"
    files: "{{ manifest.files }}"
  register: needed

- name: Restart the workers that still run the version before
  organism.proxmox.runtime_venv:
    state: restarted
    units: ["gpu-worker@*.service"]
"""

RETURN = r"""
missing:
  description: Wheels that have to be pushed to C(/opt/organism/wheels) first.
  returned: when O(state=planned)
  type: list
  elements: str
  sample: [organism-0.1.0+src.0123456789ab-py3-none-any.whl]
files:
  description: Those of O(files) that this host needs.
  returned: when O(state=planned)
  type: dict
  sample: {organism-0.1.0+src.0123456789ab-py3-none-any.whl: 0a1b2c3d}
environment:
  description: Name of the virtual environment that is wanted, below C(/opt/organism).
  returned: when O(state=planned) or O(state=present)
  type: str
  sample: venv-0.1.0+src.0123456789ab-0a1b2c3d
restarted:
  description: Units that were restarted, or would be in check mode.
  returned: when O(state=restarted)
  type: list
  elements: str
  sample: [gpu-worker@gpu0.service]
"""

import platform
import sys

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible, _runtime, _systemd
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def restart(module: AnsibleModule, root: Root) -> None:
    """Restart what still runs from an environment that is no longer the current one."""
    current = root.link_name(_runtime.CURRENT)
    difference = Difference()
    if current is not None:
        systemctl = _systemd.Systemctl()
        for name, unit in sorted(systemctl.matching(module.params["units"]).items()):
            venv = _systemd.venv_of(root, unit.main_pid)
            if venv is not None and venv.startswith(f"{_runtime.TOP}/venv-"):
                difference.add(name, venv.rpartition("/")[2], current)
    names = [change.name for change in difference.changes]
    if names and not module.check_mode:
        systemctl.call("restart", *names)
    _ansible.finish(module, difference, restarted=names)


def remove(module: AnsibleModule, root: Root) -> None:
    """Remove environments, links and wheels."""
    used = sorted(_runtime.in_use(root))
    if used:
        raise _runtime.RuntimeRefusedError(
            f"processes still run from {', '.join(used)}: stop the daemons first (organism.proxmox.rollback does)"
        )
    have = _runtime.read(root, module.params["commands"])
    difference = _runtime.plan(have, None, {}, [*have.environments, *have.broken])
    if difference and not module.check_mode:
        _runtime.apply(root, difference, lambda: None)
    _ansible.finish(module, difference, header=_runtime.TOP)


def install(module: AnsibleModule, root: Root) -> None:
    """Plan, or bring about, the environment of the given wheels."""
    params = module.params
    have = _runtime.read(root, params["commands"])
    if params["files"]:
        python = (sys.version_info[0], sys.version_info[1])
        wheels = _runtime.select(params["files"], python, platform.machine(), params["leave_out"])
        name = _runtime.environment_name(params["version"], wheels)
    elif module.check_mode:
        wheels, name = {}, f"venv-{params['version']}"
    else:
        raise _runtime.RuntimeRefusedError("no wheels were named: build the wheelhouse on the controller first")
    if params["state"] == "planned":
        # all of them, even where the environment is whole: other roles install from these wheels, too
        missing = _runtime.missing(have.wheels, wheels)
        module.exit_json(changed=False, missing=missing, files=wheels, environment=name)
        return
    drop = _runtime.superfluous(have, name, params["keep"], _runtime.in_use(root))
    difference = _runtime.plan(have, name, wheels, drop)
    if difference and not module.check_mode:
        run = _systemd.run_command
        _runtime.apply(root, difference, lambda: _runtime.install(root, name, wheels, params["python"], run))
    _ansible.finish(module, difference, header=_runtime.TOP, environment=name)


def main() -> None:
    commands = ["maestroctl", "gpucache-ctl", "gpu-worker-ctl", "organism-validate", "organism-bus"]
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["planned", "present", "restarted", "absent"], "default": "present"},
            "version": {"type": "str"},
            "files": {"type": "dict", "default": {}},
            "leave_out": {"type": "list", "elements": "str", "default": []},
            "commands": {"type": "list", "elements": "str", "default": commands},
            "keep": {"type": "int", "default": 2},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "units": {"type": "list", "elements": "str", "default": []},
        },
        required_if=[("state", "planned", ["version"]), ("state", "present", ["version"])],
        supports_check_mode=True,
    )
    root = Root()
    steps = {"restarted": restart, "absent": remove}
    try:
        steps.get(module.params["state"], install)(module, root)
    except (_runtime.RuntimeRefusedError, _systemd.CommandError, OSError) as error:
        _ansible.refuse(module, f"runtime in {_runtime.TOP}: {error}")


if __name__ == "__main__":
    main()
