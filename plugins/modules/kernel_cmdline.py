#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: kernel_cmdline
short_description: Kernel parameters of a capability, set at the next boot and taken back exactly
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Brings parameters onto the kernel's command line by key, so that earlier values and duplicates of the same
    parameter go and no part of another one is mistaken for it. Each capability has its own set, which is there or not
    there as a whole; two capabilities that want one parameter otherwise are refused by name.
  - With GRUB the set is a file of its own in C(/etc/default/grub.d), which also takes earlier values out. With
    systemd-boot the first line of C(/etc/kernel/cmdline) is edited parameter by parameter. Which of them a host uses
    is found out the way C(proxmox-boot-tool) does it.
  - The boot loader's menu is written anew only when something has changed, and checked. When that fails, the files are
    put back.
  - Nothing changes in the running kernel. What waits for a reboot is told in RV(pending) and left in
    C(/run/organism/reboot-required.d), for the role P(organism.proxmox.reboot#role).
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  capability:
    description:
      - The name of this set of parameters, for example V(profile). It becomes part of file names.
    type: str
    required: true
  tokens:
    description:
      - Parameters by key. A value is text or a number; V(null) removes the parameter, a list repeats it (C(console)).
      - C(hugepages) also takes a mapping of page size to count, which becomes pairs C(hugepagesz=) C(hugepages=).
      - Parameters that are no longer named are taken back.
    type: dict
    default: {}
  flags:
    description:
      - Parameters without a value, for example V(threadirqs).
    type: list
    elements: str
    default: []
  state:
    description:
      - V(absent) takes the set back. What somebody else has changed since stays and is named in RV(kept_by_others).
    type: str
    choices: [present, absent]
    default: present
  loader:
    description:
      - The boot loader. V(auto) finds it out.
    type: str
    choices: [auto, grub, proxmox-boot-tool-grub, proxmox-boot-tool-systemd-boot, proxmox-boot-tool-mixed, systemd-boot]
    default: auto
  refresh_command:
    description:
      - The command that makes the boot loader read the change, as a list of words. By default the loader's own,
        C(update-grub), C(proxmox-boot-tool refresh) or C(kernel-install add) for each kernel.
    type: list
    elements: str
  accept_unknown:
    description:
      - Parameters that ordinary kernels do not have, and this host's kernel has, for example V(kthread_cpus). Others
        of that kind are refused, since the kernel passes them to init without a word.
    type: list
    elements: str
    default: []
notes:
  - Parameters that find the system which boots (C(root), C(ro), C(initrd), C(init)) are refused.
seealso:
  - name: The kernel's command-line parameters
    description: What each parameter means.
    link: https://docs.kernel.org/admin-guide/kernel-parameters.html
"""

EXAMPLES = r"""
- name: Isolate CPUs for virtual machines from the next boot on
  organism.proxmox.kernel_cmdline:
    capability: profile
    tokens:
      isolcpus: domain,managed_irq,2-5
      nohz_full: 2-5
      irqaffinity: 0-1
      hugepages: {1G: 20}
    flags: [threadirqs]

- name: Let the firmware's choice of mitigations stand
  organism.proxmox.kernel_cmdline:
    capability: mitigations
    tokens:
      mitigations: null

- name: Take the parameters of a profile back
  organism.proxmox.kernel_cmdline:
    capability: profile
    state: absent
"""

RETURN = r"""
loader:
  description:
    - The boot loader that was found, by the names of O(loader).
    - V(none) when O(state=absent), none was found, and nothing was ever set.
  type: str
  returned: success
  sample: grub
reboot_required:
  description: Does the running kernel lack something that the next boot will have, or have something that it will not?
  type: bool
  returned: success
pending:
  description: The parameters of this capability that wait for a reboot.
  type: list
  elements: dict
  returned: success
  contains:
    key:
      description: The parameter.
      type: str
      sample: isolcpus
    live:
      description: What counts in the running kernel; none when it is not there.
      type: str
      sample: isolcpus=2-11
    coming:
      description: What will count at the next boot; none when it will not be there.
      type: str
      sample: isolcpus=domain,managed_irq,2-5
cmdline:
  description:
    - The parameters of the next boot as far as settings make them, one line for each place that they come from.
      C(root=) and what else GRUB adds is not among them.
  type: list
  elements: str
  returned: success
  sample: ["quiet isolcpus=domain,managed_irq,2-5"]
refreshed:
  description: The commands that ran to let the boot loader read the change.
  type: list
  elements: str
  returned: when something has changed, not in check mode
  sample: [update-grub]
kept_by_others:
  description: What was changed by somebody else since, and stays.
  type: list
  elements: dict
  returned: success
  contains:
    name:
      description: File, and parameter.
      type: str
      sample: "/etc/kernel/cmdline: isolcpus"
    reason:
      description: Why it stays.
      type: str
      sample: "`isolcpus=3` was put there by somebody else since"
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _boot_loader as loaders
from ansible_collections.organism.proxmox.plugins.module_utils import _boot_tokens as boot
from ansible_collections.organism.proxmox.plugins.module_utils import _kernel_cmdline as kc
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command

REFRESH_SECONDS = 550.0
"""update-grub and kernel-install walk all kernels; an Ansible task on a slow disk still ends within ten minutes."""


def refresh(argv: list[str]) -> str:
    return run_command(argv, timeout=REFRESH_SECONDS)


def converge(module: AnsibleModule, root: Root) -> None:
    params: dict[str, Any] = module.params
    wanted: boot.Words = {}
    if params["state"] == "present":
        wanted = kc.wanted_words(params["tokens"], params["flags"], params["accept_unknown"])
    name, capability = params["loader"], params["capability"]
    try:
        loader = loaders.detect(root) if name == "auto" else loaders.named(name, root)
    except loaders.BootLoaderError:
        if params["state"] == "present" or boot.record(root, capability).kept:
            raise
        # a rollback on a host that never had any of it, such as a container: nothing to look for, nothing to take back
        nothing: dict[str, Any] = {"reboot_required": False, "pending": [], "cmdline": [], "kept_by_others": []}
        finish(module, Difference(), header=f"kernel parameters of {capability}", loader="none", **nothing)
    facts = boot.gather(root, capability, loader)
    plan = boot.make_plan(capability, wanted, facts)
    lines = boot.coming(root, capability, facts, plan)
    lost = boot.overruled(wanted, lines)
    if lost:
        raise boot.BootTokensError(
            f"something that is read later has the last word: {'; '.join(lost)}. Look for it in the files of "
            "/etc/default/grub.d that sort behind this capability's, or behind a lone -- in the line"
        )
    boot.check_writable(root, capability, facts, plan)
    waiting = boot.pending(facts, plan, lines)
    result: dict[str, Any] = {
        "loader": loader.name,
        "reboot_required": bool(waiting),
        "pending": waiting,
        "cmdline": [line.render() for line in lines],
        "kept_by_others": plan.kept_by_others,
    }
    if not module.check_mode:
        commands = [params["refresh_command"]] if params["refresh_command"] else loader.refresh
        done = boot.apply(root, capability, wanted, facts, plan, commands, refresh)
        if done:
            result["refreshed"] = done
        boot.write_pending(root, capability, waiting)
    finish(module, plan.difference, header=f"kernel parameters of {capability}", **result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "capability": {"type": "str", "required": True},
            "tokens": {"type": "dict", "default": {}, "no_log": False},
            "flags": {"type": "list", "elements": "str", "default": []},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "loader": {"type": "str", "choices": ["auto", *loaders.LOADERS], "default": "auto"},
            "refresh_command": {"type": "list", "elements": "str"},
            "accept_unknown": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    if not boot.CAPABILITY.fullmatch(module.params["capability"]):
        refuse(module, f"capability {module.params['capability']!r}: letters, digits and _ only, it names files")
    try:
        converge(module, Root())
    except (
        kc.CmdlineError,
        loaders.BootLoaderError,
        boot.BootTokensError,
        EarlierStateError,
        CommandError,
        OSError,
    ) as error:
        refuse(module, f"kernel parameters of {module.params['capability']}: {error}")


if __name__ == "__main__":
    main()
