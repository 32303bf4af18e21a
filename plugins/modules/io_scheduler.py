#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: io_scheduler
short_description: I/O schedulers of all disks, by what they are
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Gives each disk the scheduler for its kind, told by the kernel's rotational flag and not by its name, now and by a
    udev rule at boot and for disks that appear later. Loop, device mapper, RAID, ZFS volume and memory devices pass
    requests on and are left out.
  - Switches C(fstrim.timer) on where a mounted file system has a use for it. It does not trim ZFS, which has
    C(autotrim) for that.
  - What was there before is recorded and restored by O(state=absent).
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - V(absent) takes rules, schedulers and timer back to what they were.
    type: str
    choices: [present, absent]
    default: present
  rotational:
    description:
      - Scheduler of disks that turn.
    type: str
    choices: [none, mq-deadline, kyber, bfq]
    default: mq-deadline
  non_rotational:
    description:
      - Scheduler of NVMe and SSD.
    type: str
    choices: [none, mq-deadline, kyber, bfq]
    default: none
  fstrim:
    description:
      - Whether C(fstrim.timer) is enabled and runs. V(auto) switches it on where a mounted file system other than ZFS
        lies on a device that takes discards, and leaves it as it is elsewhere.
    type: str
    choices: [auto, "true", "false"]
    default: auto
seealso:
  - module: organism.proxmox.host_settings
"""

EXAMPLES = r"""
- name: None for flash, mq-deadline for hard disks
  organism.proxmox.io_scheduler:

- name: Take it back
  organism.proxmox.io_scheduler:
    state: absent
"""

RETURN = r"""
settings:
  description: Each thing that is wanted or was taken back, as module M(organism.proxmox.host_settings) tells it.
  returned: success
  type: list
  elements: dict
  sample: [{"kind": "sysfs", "key": "/sys/block/sda/queue/scheduler", "before": "none", "wanted": "mq-deadline",
            "after": "mq-deadline", "ok": true}]
unsupported:
  description: Disks whose scheduler cannot be had, and why.
  returned: success
  type: list
  elements: dict
  sample: [{"path": "/sys/block/sda/queue/scheduler", "reason": "this kernel has no scheduler bfq"}]
kept_by_others:
  description: What was not taken back, because somebody else has changed it since.
  returned: success
  type: list
  elements: dict
  sample: [{"key": "/sys/block/sda/queue/scheduler", "now": "bfq", "reason": "somebody else has changed it since"}]
done:
  description: What was done, in order; with a failure, what had been done before it.
  returned: when something was to be done
  type: list
  elements: str
  sample: ["wrote /etc/udev/rules.d/60-organism-io.rules", "udevadm control --reload"]
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _io_scheduler as schedulers
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings import SettingsRefused, Wish
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings_apply import SettingsFailed, converge
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "rotational": {"type": "str", "choices": list(schedulers.SCHEDULERS), "default": "mq-deadline"},
            "non_rotational": {"type": "str", "choices": list(schedulers.SCHEDULERS), "default": "none"},
            "fstrim": {"type": "str", "choices": ["auto", "true", "false"], "default": "auto"},
        },
        supports_check_mode=True,
    )
    wish = Wish(schedulers.CAPABILITY)
    lacking: list[dict[str, str]] = []
    try:
        if module.params["state"] == "present":
            wish, lacking = schedulers.wish(
                Root(),
                rotational=module.params["rotational"],
                non_rotational=module.params["non_rotational"],
                fstrim=module.params["fstrim"],
            )
        outcome = converge(wish, check=module.check_mode)
    except SettingsRefused as error:
        refuse(module, "io_scheduler: nothing was changed. " + "\n".join(error.problems), done=[])
    except SettingsFailed as error:
        refuse(module, f"io_scheduler: {error}", done=error.done)
    except (EarlierStateError, CommandError, OSError) as error:
        refuse(module, f"io_scheduler: nothing was changed. {error}", done=[])
    finish(
        module,
        outcome.difference,
        header="I/O schedulers",
        settings=outcome.settings,
        unsupported=[*lacking, *outcome.unsupported],
        kept_by_others=outcome.kept_by_others,
        done=outcome.done,
    )


if __name__ == "__main__":
    main()
