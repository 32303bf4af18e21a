#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: bus_topology
short_description: Have the streams and buckets of the GPU pool on the bus
version_added: 0.1.0
description:
  - Creates what is missing and changes what differs from the product's declaration, which is part of the collection.
    What the server cannot change in place is refused with the reason, since making it anew would destroy jobs.
  - In check mode it predicts that all is to be created when the command or the server is not there yet.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  servers:
    description: URLs of the bus.
    type: list
    elements: str
    required: true
  key_file:
    description: Seed of a component of kind C(admin).
    type: path
    default: /etc/organism/keys/admin-setup.nk
  ca_file:
    description: Certificate authority of the servers, for C(tls://) URLs. Without it the system's own are trusted.
    type: path
  name:
    description: Name of the component of kind C(admin) whose key it is.
    type: str
    default: setup
  replicas:
    description: Copies of each stream.
    type: int
    choices: [1, 3, 5]
    default: 1
  limits:
    description:
      - Sizes in bytes (C(queue_bytes), C(results_bytes), C(events_bytes), C(dead_bytes), C(telemetry_bytes),
        C(jobs_bytes), C(control_bytes), C(logs_bytes)) and ages in seconds (C(results_age), C(events_age),
        C(telemetry_age), C(logs_age), C(duplicate_window)).
    type: dict
    default: {}
  purge:
    description: Needed for O(state=absent), which destroys all jobs and results.
    type: bool
    default: false
  timeout:
    description: Seconds to wait for the bus.
    type: int
    default: 60
  command:
    description: Command that does it.
    type: path
    default: /opt/organism/venv/bin/organism-bus
  state:
    description: Whether the streams shall be there.
    type: str
    choices: [present, absent]
    default: present
requirements:
  - The environment of role P(organism.proxmox.runtime#role).
"""

EXAMPLES = r"""
- name: Have the streams
  organism.proxmox.bus_topology:
    servers: ["tls://bus1:4222"]
    ca_file: /etc/organism/tls/ca.pem
"""

RETURN = r"""# """

import json
import pathlib
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible, _bus, _bus_plan
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Change, Difference
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command


def arguments(params: dict[str, Any], action: str, check: bool) -> list[str]:
    words = [params["command"], "topology", action, "--json"]
    words += ["--replicas", str(params["replicas"]), "--timeout", str(params["timeout"])]
    words += ["--limits", json.dumps(params["limits"]), "--as", f"admin.{params['name']}"]
    for server in params["servers"]:
        words += ["--server", server]
    words += ["--key", params["key_file"]]
    if params["ca_file"]:
        words += ["--ca", params["ca_file"]]
    if action == "absent":
        words.append("--dry-run" if check else "--purge")
    return words


def predicted(wanted: _bus.Topology, present: bool) -> Difference:
    """Nothing is there yet, so all is to be created."""
    return _bus_plan.plan(_bus.Topology(), wanted).difference if present else Difference()


def wanted_topology(module: AnsibleModule) -> _bus.Topology:
    try:
        limits = _bus.Limits(**{name: int(value) for name, value in module.params["limits"].items()})
        return _bus.topology(replicas=module.params["replicas"], limits=limits)
    except (TypeError, ValueError) as error:
        _ansible.refuse(module, str(error))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "servers": {"type": "list", "elements": "str", "required": True},
            "key_file": {"type": "path", "default": "/etc/organism/keys/admin-setup.nk", "no_log": False},
            "ca_file": {"type": "path"},
            "name": {"type": "str", "default": "setup"},
            "replicas": {"type": "int", "choices": [1, 3, 5], "default": 1},
            "limits": {"type": "dict", "default": {}},
            "purge": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 60},
            "command": {"type": "path", "default": "/opt/organism/venv/bin/organism-bus"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    params = module.params
    present = params["state"] == "present"
    wanted = wanted_topology(module)
    if not present and not params["purge"]:
        _ansible.refuse(module, "state absent destroys all jobs and results; set purge to true if that is meant")
    files = [params["command"], params["key_file"], params["ca_file"]]
    if module.check_mode and not all(pathlib.Path(file).exists() for file in files if file):
        _ansible.finish(module, predicted(wanted, present), header="bus")
    action = ("plan" if module.check_mode else "apply") if present else "absent"
    if module.check_mode:
        # a server that is itself to be started later in this run shall not hold up the prediction
        params["timeout"] = min(params["timeout"], 5)
    try:
        report = json.loads(run_command(arguments(params, action, module.check_mode), timeout=params["timeout"] + 120))
    except CommandError as error:
        if module.check_mode and "no bus server answered" in str(error):
            _ansible.finish(module, predicted(wanted, present), header="bus")
        _ansible.refuse(module, str(error))
    if report["refusals"]:
        _ansible.refuse(module, "\n".join(report["refusals"]))
    difference = Difference([Change(**change) for change in report["changes"]])
    _ansible.finish(module, difference, header="bus")


if __name__ == "__main__":
    main()
