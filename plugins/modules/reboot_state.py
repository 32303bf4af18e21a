#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: reboot_state
short_description: What waits for a reboot of a host, and whether a reboot has brought it
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Reads what capabilities have left in C(/run/organism/reboot-required.d) and compares it with the running kernel.
  - With O(verify), fails unless another boot is running and each kernel parameter is as it was to come.
  - Changes nothing.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  verify:
    description:
      - RV(waiting) of an earlier run, before the reboot.
    type: list
    elements: dict
    default: []
  boot_id:
    description:
      - RV(boot_id) of an earlier run, before the reboot. The same boot still running is then a failure.
    type: str
"""

EXAMPLES = r"""
- name: See what waits for a reboot
  organism.proxmox.reboot_state:
  register: before

- name: Check that a reboot has brought it
  organism.proxmox.reboot_state:
    verify: "{{ before.waiting }}"
    boot_id: "{{ before.boot_id }}"
"""

RETURN = r"""
required:
  description: Does anything wait?
  type: bool
  returned: success
waiting:
  description: What waits.
  type: list
  elements: dict
  returned: success
  contains:
    capability:
      description: Who waits for it.
      type: str
      sample: profile
    key:
      description: A kernel parameter.
      type: str
      returned: for kernel parameters
      sample: isolcpus
    live:
      description: What counts in the running kernel, if anything.
      type: str
      returned: for kernel parameters
    coming:
      description: What will count at the next boot, if anything.
      type: str
      returned: for kernel parameters
      sample: isolcpus=domain,managed_irq,2-5
    reason:
      description: Another reason, as text.
      type: str
      returned: for other reasons
described:
  description: The same, a line each, for people.
  type: list
  elements: str
  returned: success
  sample: ["profile: no isolcpus -> isolcpus=domain,managed_irq,2-5"]
boot_id:
  description: The kernel's own number of the running boot.
  type: str
  returned: success
  sample: 5f0e7d8a-3c0c-4f4e-9d6d-6a3b1c9a8f21
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _reboot as reboot
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "verify": {"type": "list", "elements": "dict", "default": []},
            "boot_id": {"type": "str"},
        },
        supports_check_mode=True,
    )
    root = Root()
    try:
        boot_id, live, waiting = reboot.boot_id(root), root.read("/proc/cmdline"), reboot.waiting(root)
    except OSError as error:
        refuse(module, f"this host does not say how it was booted: {error}")
    if module.params["boot_id"] == boot_id:
        refuse(module, "the host has not rebooted: the same boot is running", boot_id=boot_id)
    missing = reboot.unmet(module.params["verify"], live)
    if missing:
        refuse(
            module,
            "after the reboot the running kernel still has not what was to come: "
            f"{'; '.join(reboot.describe(entry) for entry in missing)}. Its command line is `{live}`: another boot "
            "entry or another disk may have been started",
            missing=missing,
        )
    described = [reboot.describe(entry) for entry in waiting]
    finish(
        module,
        Difference(),
        msg="; ".join(described) or "nothing waits for a reboot",
        required=bool(waiting),
        waiting=waiting,
        described=described,
        boot_id=boot_id,
    )


if __name__ == "__main__":
    main()
