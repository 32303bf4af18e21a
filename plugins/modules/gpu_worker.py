#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Declares the workers of a machine's GPUs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_worker
short_description: A worker for each GPU of a machine
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Writes the workers' settings, the policy that says which types of job may run, and the template unit; then has one
    C(gpu-worker@ID) enabled and running for each GPU.
  - A running worker is restarted only when something that it reads at its start has changed, one after the other. Its
    job gets C(STOP_GRACE_SEC) to finish, and is given to another GPU otherwise.
  - Workers of GPUs that are no longer there are stopped and disabled.
  - Without systemd as the running manager only the files are written.
requirements:
  - The environment of role P(organism.proxmox.runtime#role), and a key for each worker in C(/etc/organism/keys).
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description: With V(absent) the workers are stopped, and their unit and settings removed.
    type: str
    choices: [present, absent]
    default: present
  gpus:
    description:
      - Ids of the GPUs that get a worker. Without it all that are present in the map, see M(organism.proxmox.gpu_map).
    type: list
    elements: str
  settings:
    description:
      - Settings by their names in C(/etc/organism/gpu-worker.conf), which explains each. An unknown name or a value out
        of its limits is refused.
    type: dict
    default: {}
  types:
    description: Types of job that may run on this machine. V(shell) hands users a shell.
    type: list
    elements: str
    default: [cmd, noop, python]
  memlock:
    description: Limit of locked memory of a worker, as systemd writes it. Empty where a container refuses to raise it.
    type: str
    default: infinity
  cache:
    description: Tie each worker to the cache of its GPU (C(gpucache@ID)).
    type: bool
    default: true
seealso:
  - module: organism.proxmox.gpu_map
  - module: organism.proxmox.gpucache
"""

EXAMPLES = r"""
- name: Serve every GPU of the map
  organism.proxmox.gpu_worker:
    settings:
      NATS_URL: ["tls://bus1:4222"]
      CA_FILE: /etc/organism/ca.pem

- name: Stop the workers for good
  organism.proxmox.gpu_worker:
    state: absent
"""

RETURN = r"""
gpus:
  description: The GPUs that have a worker, or had one with O(state=absent).
  type: list
  elements: str
  returned: always
  sample: [gpu0, gpu1]
done:
  description: What was done to the services.
  type: list
  elements: str
  returned: when something was done
  sample: ["gpu0: started", "gpu1: restarted (/etc/organism/gpu-worker.conf changed)"]
restarts:
  description: Why which running worker was (or would be) restarted.
  type: dict
  returned: when O(state=present)
  sample: {"gpu1": ["/etc/organism/gpu-worker.conf changed"]}
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _gpu_worker as units
from ansible_collections.organism.proxmox.plugins.module_utils import _worker_settings
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._keyvalue import SettingsError
from ansible_collections.organism.proxmox.plugins.module_utils._maestro_deploy import DeployRefusedError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, Systemctl


def present(module: AnsibleModule, root: Root, systemctl: Systemctl) -> NoReturn:
    """Files and services as declared."""
    params = module.params
    settings = _worker_settings.SCHEMA.coerce(params["settings"])
    served = params["gpus"]
    gpus = served if served is not None else units.present_gpus(root, settings.text("GPU_MAP"))
    gone = [gpu for gpu in units.instances(root) if gpu not in gpus]
    files = units.wanted_files(
        settings, gpus, params["types"], memlock=params["memlock"], cache=params["cache"], root=root
    )
    files |= {units.dropin_of(gpu): None for gpu in gone}
    facts = units.gather(root, files, [*gpus, *gone], systemctl)
    plan = units.plan(facts, files, gpus, gone)
    result: dict[str, Any] = {"gpus": list(gpus), "restarts": plan.restart}
    if plan.difference and not module.check_mode:
        if facts.systemd and not root.exists(units.DAEMON):
            raise DeployRefusedError([f"{units.DAEMON} is not installed: role runtime comes first"])
        result["done"] = units.apply(plan, root, systemctl)
    finish(module, plan.difference, header="GPU workers", **result)


def absent(module: AnsibleModule, root: Root, systemctl: Systemctl) -> NoReturn:
    """No worker; the policy stays where a conductor reads it, too."""
    gpus = units.instances(root)
    paths = [units.CONFIG, units.UNIT_FILE, *(units.dropin_of(gpu) for gpu in gpus)]
    if not root.exists("/etc/organism/maestro.conf"):
        paths.append(units.POLICY)
    plan = units.plan_absent(units.gather(root, paths, gpus, systemctl), gpus)
    result: dict[str, Any] = {"gpus": gpus}
    if plan.difference and not module.check_mode:
        result["done"] = units.apply(plan, root, systemctl)
    finish(module, plan.difference, header="GPU workers", **result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "gpus": {"type": "list", "elements": "str"},
            "settings": {"type": "dict", "default": {}},
            "types": {"type": "list", "elements": "str", "default": ["cmd", "noop", "python"]},
            "memlock": {"type": "str", "default": "infinity"},
            "cache": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    try:
        (present if module.params["state"] == "present" else absent)(module, Root(), Systemctl())
    except SettingsError as error:
        refuse(module, "\n".join(error.problems))
    except (DeployRefusedError, CommandError, ValueError, OSError) as error:
        refuse(module, f"GPU workers: {error}")


if __name__ == "__main__":
    main()
