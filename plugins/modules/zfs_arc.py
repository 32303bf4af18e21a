#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: zfs_arc
short_description: Limits of the ZFS cache (ARC), now and at the next boot
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Sets the least and the most memory that the ARC uses, in C(/etc/modprobe.d/zfs-organism.conf) and in the running
    module, and reads back what the module really uses. ZFS ignores a wrong limit without an error; this module refuses
    it before anything is written.
  - The file has one owner. Another file that sets a limit, such as the C(zfs.conf) of Proxmox VE's installer, is
    refused unless O(take_over) names it; then its limits are commented out, and put back with O(state=absent).
  - The boot image is made anew where the module is loaded out of it.
  - Where the zfs module is not loaded, only the file is written, and RV(notes) says so.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  arc_max:
    description:
      - The most, in bytes or with a binary unit (V(8G)). At least 64 MiB, below the memory, above the minimum.
      - Needed with O(state=present).
    type: str
  arc_min:
    description:
      - The least, at least 32 MiB and below O(arc_max). Left to ZFS by default (1/32 of the memory).
    type: str
  state:
    description:
      - V(absent) restores files and running limits. What somebody else has changed since stays and is named in
        RV(kept_by_others).
    type: str
    choices: [present, absent]
    default: present
  take_over:
    description:
      - Files that may be taken over when they set a limit.
    type: list
    elements: path
    default: []
  boot_image:
    description:
      - Whether a changed file makes a new boot image. V(auto) does when the root file system is on ZFS or the running
        kernel's image carries zfs.
    type: str
    choices: [auto, always, never]
    default: auto
  boot_image_command:
    description:
      - The command for it, as a list of words.
    type: list
    elements: str
    default: [update-initramfs, -u, -k, all]
  shrink:
    description:
      - Wait until the cache is down at its limit, which ZFS does by itself only under memory pressure.
    type: bool
    default: false
  drop_caches:
    description:
      - With O(shrink), ask the kernel to reclaim slabs (C(vm.drop_caches=2)), which presses the ARC. It also drops
        cached directory entries and inodes of other file systems.
    type: bool
    default: false
  shrink_timeout:
    description:
      - How long to wait for it, in seconds. A cache that is still above its limit then fails the task.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Between 2 and 8 GiB, taking over the installer's limit
  organism.proxmox.zfs_arc:
    arc_min: 2G
    arc_max: 8G
    take_over: [/etc/modprobe.d/zfs.conf]

- name: Make room for a large virtual machine now
  organism.proxmox.zfs_arc:
    arc_min: 1G
    arc_max: 4G
    shrink: true
    drop_caches: true

- name: As it was before
  organism.proxmox.zfs_arc:
    state: absent
"""

RETURN = r"""
arc:
  description: What the running module uses, in bytes, and its parameters; none when it is not loaded.
  type: dict
  returned: success
  contains:
    c_min:
      description: The least that counts.
      type: int
      sample: 2147483648
    c_max:
      description: The most that counts.
      type: int
      sample: 8589934592
    size:
      description: What is cached now.
      type: int
    zfs_arc_min:
      description: The parameter's text, which counts only when the rules allow.
      type: str
    zfs_arc_max:
      description: The parameter's text, which counts only when the rules allow.
      type: str
boot_image:
  description: Was, or in check mode would be, the boot image made anew?
  type: bool
  returned: success
notes:
  description: What could not be done and why.
  type: list
  elements: str
  returned: success
  sample: ["the zfs module is not loaded; the limits count when it is"]
kept_by_others:
  description: What was changed by somebody else since, and stays.
  type: list
  elements: dict
  returned: success
shrink:
  description: How the cache came down (bytes), with samples of its size on the way.
  type: dict
  returned: when O(shrink=true), the module is loaded and more is cached than allowed, not in check mode
  sample: {"before": 9663676416, "after": 4294967296, "target": 4294967296, "converged": true, "samples": []}
"""

import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_arc as arc
from ansible_collections.organism.proxmox.plugins.module_utils import _zfs_arc_host as host
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, run_command

IMAGE_SECONDS = 580.0
PAUSE = 0.5  # seconds between two looks at arcstats, which tell of no change by themselves


def run(argv: list[str]) -> str:
    return run_command(argv, timeout=IMAGE_SECONDS)


def limits(params: dict[str, Any]) -> arc.Limits:
    """Raises ArcError."""
    if not params["arc_max"]:
        raise arc.ArcError("arc_max is needed with state=present")
    try:
        low = arc.parse_size(params["arc_min"]) if params["arc_min"] else None
        return arc.Limits(low, arc.parse_size(params["arc_max"]))
    except ValueError as error:
        raise arc.ArcError(str(error)) from None


def loaded(root: Root) -> arc.Live:
    now = arc.live(root)
    if now is None:
        raise arc.ArcError("the zfs module went away")
    return now


def shrink(module: AnsibleModule, root: Root) -> arc.Shrink:
    """Raises ArcError when the cache does not come down in time."""
    deadline: float = time.monotonic() + module.params["shrink_timeout"]

    def reclaim() -> None:
        if module.params["drop_caches"]:
            root.path("/proc/sys/vm/drop_caches").write_text("2", encoding="ascii")

    def wait() -> bool:
        time.sleep(PAUSE)
        return time.monotonic() < deadline

    done = arc.shrink(lambda: loaded(root), reclaim, wait)
    if not done.converged:
        hint = "" if module.params["drop_caches"] else "; set drop_caches, since only memory pressure shrinks the ARC"
        raise arc.ArcError(
            f"the ARC holds {arc.human(done.after)} after {module.params['shrink_timeout']} s, and its limit is "
            f"{arc.human(done.target)}; it held {arc.human(done.before)} before{hint}"
        )
    return done


def converge(module: AnsibleModule, root: Root) -> None:
    params: dict[str, Any] = module.params
    facts = host.gather(root)
    present = params["state"] == "present"
    plan = host.plan_present(limits(params), facts, params["take_over"]) if present else host.plan_absent(facts)
    image = plan.image and host.image_needed(root, params["boot_image"], run)
    if image:
        plan.difference.add("boot image", "made before the change", "made anew")
    too_much = False
    if present and params["shrink"] and facts.live is not None and plan.limits is not None:
        coming = arc.Live(facts.live.c_min, plan.limits.maximum, facts.live.size, {})
        too_much = arc.over(coming)
    host.check_writable(root, facts, plan)
    result: dict[str, Any] = {"boot_image": image, "notes": plan.notes, "kept_by_others": plan.kept_by_others}
    if not module.check_mode:
        host.apply(root, facts, plan, params["boot_image_command"] if image else None, run)
    if too_much and facts.live is not None and plan.limits is not None:
        plan.difference.add("ARC size", f"{arc.human(facts.live.size)} cached", "at the limit")
        if not module.check_mode:
            result["shrink"] = shrink(module, root).as_result()
    result["arc"] = host.as_result(arc.live(root))
    finish(module, plan.difference, header=arc.MODPROBE, **result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "arc_max": {"type": "str"},
            "arc_min": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "take_over": {"type": "list", "elements": "path", "default": []},
            "boot_image": {"type": "str", "choices": ["auto", "always", "never"], "default": "auto"},
            "boot_image_command": {"type": "list", "elements": "str", "default": list(host.IMAGE_COMMAND)},
            "shrink": {"type": "bool", "default": False},
            "drop_caches": {"type": "bool", "default": False},
            "shrink_timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    try:
        converge(module, Root())
    except (arc.ArcError, EarlierStateError, CommandError, OSError) as error:
        refuse(module, f"ARC limits: {error}")


if __name__ == "__main__":
    main()
