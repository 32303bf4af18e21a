#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: preflight
short_description: Check that a host is fit, before anything is changed on it
version_added: 0.1.0
description:
  - Looks at system, kernel, systemd, Python, CPU, memory, disks, IOMMU, GPUs, Proxmox VE and clock in one call, and
    fails with all reasons at once when the host cannot be used. Changes nothing.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
attributes:
  diff_mode:
    support: none
    details: It changes nothing.
options:
  groups:
    description: Inventory groups of the host. They decide what is worth a warning.
    type: list
    elements: str
    default: []
  persistent:
    description: Folders that should be file systems of their own. One that is not is a warning.
    type: list
    elements: path
    default: [/data]
  min_memory_mib:
    description: Less memory than this, in MiB, is a failure.
    type: int
    default: 512
  min_free_mib:
    description: Less free room than this, in MiB, on C(/), C(/opt), C(/var) or one of O(persistent) is a failure.
    type: int
    default: 1024
  packages:
    description: Debian packages to look for. The missing ones are returned and are no failure.
    type: list
    elements: str
    default: []
  names:
    description: Host names to resolve as this host does. One that cannot be resolved is a failure.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Look at the host
  organism.proxmox.preflight:
    groups: "{{ group_names }}"
    packages: [python3-venv]
  register: preflight

- name: Show what was found
  ansible.builtin.debug:
    msg: "{{ preflight.table }}"
"""

RETURN = r"""
records:
  description: One record a check.
  returned: always
  type: list
  elements: dict
  contains:
    check:
      description: What was looked at.
      type: str
      sample: clock
    status:
      description: V(ok), V(warn) or V(fail).
      type: str
      sample: warn
    detail:
      description: What was found.
      type: str
      sample: not synchronised
    next:
      description: What to do about it; empty where nothing has to be done.
      type: str
      sample: "run a time service (Debian: apt-get install chrony)"
table:
  description: The same for people, a line each.
  returned: always
  type: list
  elements: str
  sample: ["ok    kernel  6.12.57 on x86_64"]
packages_missing:
  description: Those of O(packages) that are not installed.
  returned: success
  type: list
  elements: str
  sample: [python3-venv]
addresses:
  description: The addresses of each of O(names), sorted.
  returned: success
  type: dict
  sample: {bus1: [192.0.2.11]}
"""

import socket

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible, _preflight
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def resolve(names: list[str]) -> tuple[dict[str, list[str]], list[_preflight.Record]]:
    """Addresses by name, and a record for each name without any."""
    addresses: dict[str, list[str]] = {}
    records = []
    for name in names:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            advice = "mend the name in organism_bus_servers, or /etc/hosts and DNS of this host"
            records.append(_preflight.Record(name, _preflight.FAIL, f"cannot be resolved: {error.strerror}", advice))
            continue
        addresses[name] = sorted({str(entry[4][0]) for entry in found})
    return addresses, records


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "groups": {"type": "list", "elements": "str", "default": []},
            "persistent": {"type": "list", "elements": "path", "default": ["/data"]},
            "min_memory_mib": {"type": "int", "default": 512},
            "min_free_mib": {"type": "int", "default": 1024},
            "packages": {"type": "list", "elements": "str", "default": []},
            "names": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    root = Root()
    params = module.params
    wanted = _preflight.Wanted(
        groups=tuple(params["groups"]),
        persistent=tuple(params["persistent"]),
        min_memory_mib=params["min_memory_mib"],
        min_free_mib=params["min_free_mib"],
    )
    addresses, unresolved = resolve(params["names"])
    records = [*_preflight.check(root, wanted), *unresolved]
    shown = {"records": _preflight.as_dicts(records), "table": _preflight.table(records)}
    reasons = _preflight.failures(records)
    if reasons:
        _ansible.refuse(module, f"this host cannot be used: {reasons}", **shown)
    installed = _preflight.dpkg_versions(root) if params["packages"] else {}
    missing = [name for name in params["packages"] if name not in installed]
    module.exit_json(changed=False, packages_missing=missing, addresses=addresses, **shown)


if __name__ == "__main__":
    main()
