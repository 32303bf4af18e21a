#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: host_settings
short_description: Settings of a host that hold now and after a boot, and can be taken back exactly
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Sets in one call what one capability needs of a host, kernel values (sysctl and sysfs), whole files, kernel modules
    and units. Kernel values are set live and in a file that sets them at boot, and both are compared each time.
  - What was there earlier is recorded before it is changed. O(state=absent) restores it, and so does a later call that
    no longer names a setting. What somebody else has changed meanwhile stays, and is named in RV(kept_by_others).
  - Everything is looked up before anything is changed, so an unknown name, a read-only value or a unit that does not
    exist is refused with the host as it was. A value that the kernel refuses or alters is a failure.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  capability:
    description:
      - Name of the capability, also of its record of earlier state, C(/var/lib/organism/earlier/NAME.json), and of its
        boot files C(organism-NAME.conf) in C(/etc/sysctl.d) (where C(99-) comes first), C(/etc/tmpfiles.d) and
        C(/etc/modules-load.d).
    type: str
    required: true
  state:
    description:
      - V(present) has exactly the settings below, and takes back those that an earlier call of this capability made.
      - V(absent) takes everything back.
    type: str
    choices: [present, absent]
    default: present
  sysctl:
    description:
      - Values by their names, for example C(vm.swappiness). Write-only ones are refused, they have no state.
      - A file that is read later at boot and sets another value is refused too, as it would win.
    type: dict
    default: {}
  sysctl_file:
    description:
      - Where they are kept for the next boot, instead of C(/etc/sysctl.d/99-organism-NAME.conf).
    type: path
  sysfs:
    description:
      - Values by their paths below C(/sys), which may be shell patterns; a pattern must match. Of files that show a
        choice (C(always [madvise] never)) the chosen word counts.
    type: dict
    default: {}
  sysfs_optional:
    description:
      - The same for what not all hardware has. What is not there, or cannot be set, is told in RV(unsupported).
    type: dict
    default: {}
  live:
    description:
      - Values like O(sysfs) that are only set now, because one of O(files), for example a udev rule, sets them at boot.
    type: dict
    default: {}
  files:
    description:
      - Whole files that this capability owns. A file that was there is kept in the record and restored.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description:
          - Where it is. Folders are made as needed, and removed with the file when they are empty then.
        type: path
        required: true
      content:
        description:
          - All of its content.
        type: str
        required: true
      mode:
        description:
          - Its permissions, in octal.
        type: str
        default: "0644"
  modules:
    description:
      - Kernel modules to load, now and at boot.
    type: list
    elements: str
    default: []
  units:
    description:
      - Units of systemd. Those that shall be off are stopped before anything else is changed, and those that shall be
        on are started after everything else.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description:
          - Full name of the unit, not an alias.
        type: str
        required: true
      enabled:
        description:
          - V(true), V(false) or V(masked). Left alone when it is not given.
        type: str
        choices: ["true", "false", masked]
      active:
        description:
          - Whether it runs. Left alone when it is not given.
        type: bool
      optional:
        description:
          - A host without the unit is no error, it is told in RV(unsupported).
        type: bool
        default: false
      expected:
        description:
          - The unit is not there yet but will be, through O(files) of this call, or in check mode through a package
            that an earlier task would install.
        type: bool
        default: false
      restart_on:
        description:
          - Paths among O(files) whose change makes the unit start again if it runs.
        type: list
        elements: path
        default: []
  udev_trigger:
    description:
      - When a rule in C(/etc/udev/rules.d) among O(files) changes, udev reads its rules again, and the devices of these
        subsystems get a change event, which is waited for.
    type: list
    elements: str
    default: []
seealso:
  - module: ansible.posix.sysctl
"""

EXAMPLES = r"""
- name: Swap late, and merge no pages
  organism.proxmox.host_settings:
    capability: memory
    sysctl:
      vm.swappiness: 10
    sysfs:
      /sys/kernel/mm/ksm/run: 2
    units:
      - name: ksmtuned.service
        enabled: false
        active: false
        optional: true

- name: Let four CPUs wake up at once
  organism.proxmox.host_settings:
    capability: power
    sysfs_optional:
      "/sys/devices/system/cpu/cpu[2-5]/power/pm_qos_resume_latency_us": 2

- name: Take back what the capability memory has set
  organism.proxmox.host_settings:
    capability: memory
    state: absent
"""

RETURN = r"""
settings:
  description: Each thing that is wanted or was taken back.
  returned: success
  type: list
  elements: dict
  contains:
    kind:
      description: C(sysctl), C(sysfs), C(file), C(module) or C(unit).
      type: str
      sample: sysctl
    key:
      description: Its path or name.
      type: str
      sample: /proc/sys/vm/swappiness
    before:
      description: What it was.
      type: raw
      sample: "60"
    wanted:
      description: What it shall be.
      type: raw
      sample: "10"
    after:
      description: What was read back; in check mode what it still is.
      type: raw
      sample: "10"
    ok:
      description: Whether what was read back is what was wanted.
      type: bool
      sample: true
unsupported:
  description: What this host lacks of O(sysfs_optional) and of optional units, and why.
  returned: success
  type: list
  elements: dict
  sample: [{"path": "/sys/devices/system/cpu/intel_pstate/no_turbo", "reason": "does not exist on this kernel"}]
kept_by_others:
  description: What was not taken back, because somebody else has changed it since, or because it is in use.
  returned: success
  type: list
  elements: dict
  sample: [{"key": "/proc/sys/vm/swappiness", "now": "30", "reason": "somebody else has changed it since"}]
boot_differs:
  description: What was right live but not in the file that sets it at boot, or the other way round, before this call.
  returned: success
  type: list
  elements: str
  sample: [/proc/sys/vm/swappiness]
done:
  description: What was done, in order; with a failure, what had been done before it.
  returned: when something was to be done
  type: list
  elements: str
  sample: ["/proc/sys/vm/swappiness 60 -> 10", "wrote /etc/sysctl.d/99-organism-memory.conf"]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings import SettingsRefused, Wish
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings_apply import SettingsFailed, converge
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings_wish import wish_from
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError

UNIT = {
    "name": {"type": "str", "required": True},
    "enabled": {"type": "str", "choices": ["true", "false", "masked"]},
    "active": {"type": "bool"},
    "optional": {"type": "bool", "default": False},
    "expected": {"type": "bool", "default": False},
    "restart_on": {"type": "list", "elements": "path", "default": []},
}
FILE = {
    "path": {"type": "path", "required": True},
    "content": {"type": "str", "required": True},
    "mode": {"type": "str", "default": "0644"},
}
ARGUMENTS: dict[str, Any] = {
    "capability": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "sysctl": {"type": "dict", "default": {}},
    "sysctl_file": {"type": "path"},
    "sysfs": {"type": "dict", "default": {}},
    "sysfs_optional": {"type": "dict", "default": {}},
    "live": {"type": "dict", "default": {}},
    "files": {"type": "list", "elements": "dict", "default": [], "options": FILE},
    "modules": {"type": "list", "elements": "str", "default": []},
    "units": {"type": "list", "elements": "dict", "default": [], "options": UNIT},
    "udev_trigger": {"type": "list", "elements": "str", "default": []},
}


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    capability = module.params["capability"]
    try:
        wish = wish_from(module.params) if module.params["state"] == "present" else Wish(capability)
        outcome = converge(wish, check=module.check_mode)
    except SettingsRefused as error:
        refuse(module, f"{capability}: nothing was changed. " + "\n".join(error.problems), done=[])
    except SettingsFailed as error:
        refuse(module, f"{capability}: {error}", done=error.done)
    except (ValueError, EarlierStateError, CommandError, OSError) as error:
        refuse(module, f"{capability}: nothing was changed. {error}", done=[])
    finish(
        module,
        outcome.difference,
        header=capability,
        settings=outcome.settings,
        unsupported=outcome.unsupported,
        kept_by_others=outcome.kept_by_others,
        boot_differs=outcome.boot_differs,
        done=outcome.done,
    )


if __name__ == "__main__":
    main()
