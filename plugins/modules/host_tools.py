#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Installs the keepers and commands of a tuned host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_tools
short_description: Install the keepers and commands of a tuned host
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Puts C(organism-hook), C(organism-qemu-pin) and the other tools of the host into a folder C(/opt/organism/host-ID),
    has the link C(/opt/organism/host) point at it, and links the commands into C(/usr/local/sbin).
  - They run under the system's Python with nothing but its standard library, so this needs neither the virtual
    environment of M(organism.proxmox.runtime_venv) nor any package.
  - The files come from the controller's copy of the collection, in one call. The set before stays, for processes that
    still run from it.
  - Keepers (C(organism-qemu-pin), C(organism-steer), C(organism-dma-latency)) that run from an earlier set are
    restarted.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - With V(absent) the tools are removed. Refused while the snippet that Proxmox VE starts at each start of a VM is
        there, since every VM that names it could not start any more (see M(organism.proxmox.vm_hook)).
    type: str
    choices: [present, absent]
    default: present
  archive:
    description: The files. Leave it out, the action plugin of the same name fills it in.
    type: str
seealso:
  - module: organism.proxmox.vm_hook
  - module: organism.proxmox.qemu_pin
"""

EXAMPLES = r"""
- name: Install the tools of the host
  organism.proxmox.host_tools:
"""

RETURN = r"""
set:
  description: The set in use, a folder of C(/opt/organism).
  type: str
  returned: when O(state=present)
  sample: host-0a1b2c3d4e5f
commands:
  description: Commands that are there (or would be, in check mode).
  type: list
  elements: str
  returned: always
  sample: [organism-hook, organism-qemu-pin]
restarted:
  description: Keepers that ran from an earlier set and were restarted (or would be).
  type: list
  elements: str
  returned: always
  sample: [organism-qemu-pin.service]
"""

from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _host_tools as tools
from ansible_collections.organism.proxmox.plugins.module_utils import _vm_hook
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, Systemctl, booted


def present(module: AnsibleModule, root: Root) -> NoReturn:
    """The set of the controller, and no keeper of an earlier one."""
    if not module.params["archive"]:
        raise tools.HostToolsError("no archive: call organism.proxmox.host_tools as a task, its action plugin packs it")
    files = tools.unpack(module.params["archive"])
    name = f"host-{tools.digest(files)}"
    have = tools.read(root)
    difference = tools.plan(have, files)
    stale: dict[str, str] = {}
    systemctl = Systemctl()
    if booted(root):
        units = systemctl.show(tools.UNITS)
        stale = tools.stale(root, {unit: state.main_pid for unit, state in units.items() if state.running}, name)
    changes = bool(difference)
    for unit, old in stale.items():
        difference.add(unit, f"runs {old}", f"runs {name}")
    if not module.check_mode:
        if changes:
            tools.apply(root, have, files)
        if stale:
            systemctl.call("restart", *stale)
    commands = sorted(command for command, target in tools.wanted_links(files).items() if target)
    finish(module, difference, header=tools.CURRENT, set=name, commands=commands, restarted=sorted(stale))


def absent(module: AnsibleModule, root: Root) -> NoReturn:
    """No tools, unless Proxmox VE would still start one."""
    if snippets := _vm_hook.snippets(root):
        raise tools.HostToolsError(
            f"{snippets[0]} starts organism-hook at each start of a VM: take vm_hook back first (state=absent)"
        )
    have = tools.read(root)
    difference = tools.plan(have, None)
    if difference and not module.check_mode:
        tools.apply(root, have, None)
    finish(module, difference, header=tools.CURRENT, commands=[], restarted=[])


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "archive": {"type": "str"},
        },
        supports_check_mode=True,
    )
    try:
        (present if module.params["state"] == "present" else absent)(module, Root())
    except (tools.HostToolsError, CommandError, OSError) as error:
        refuse(module, f"host tools: {error}")


if __name__ == "__main__":
    main()
