#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Declares the RAM caches of a machine's GPUs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpucache
short_description: RAM caches of a machine's GPUs
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Gives each GPU a directory that is fast like memory and survives reboots. A tmpfs lies over a directory on disk,
    merged by overlayfs; what was written is saved to disk regularly and restored before the next mount.
  - Writes the configuration, switches the units of each GPU on, and mounts, resizes or unmounts the caches. GPUs that
    are no longer configured get a last sync and are unmounted; what they saved stays.
  - Without systemd as the running manager the caches are mounted directly, and no unit is touched.
requirements:
  - rsync 3.1.3 or later
  - The units of role P(organism.proxmox.gpucache#role) and the C(gpucache-ctl) that they start, where systemd runs.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - V(present) has the caches configured, enabled and mounted.
      - V(absent) saves and unmounts every cache, switches its units off, and removes the configuration. What was
        saved stays on disk unless O(purge=true).
    type: str
    choices: [present, absent]
    default: present
  settings:
    description:
      - The settings that differ from their defaults, by their names in the configuration file, for example C(CACHE_MB).
        The file that this module writes explains each; an unknown name or a value out of its limits is refused.
    type: dict
    default: {}
  keep_existing:
    description:
      - Keep a configuration file that is there, and bring the caches to what it says instead of O(settings).
    type: bool
    default: false
  path:
    description:
      - The configuration file. The units read the default path.
    type: path
    default: /etc/gpucache/gpucache.conf
  purge:
    description:
      - With O(state=absent), also delete what the caches saved on disk. This cannot be undone.
    type: bool
    default: false
seealso:
  - module: ansible.posix.mount
"""

EXAMPLES = r"""
- name: Give each GPU of the map a cache of 500 MiB, saved each minute
  organism.proxmox.gpucache:

- name: Two small caches, no agent on the bus
  organism.proxmox.gpucache:
    settings:
      GPU_IDS: [gpu0, gpu1]
      CACHE_MB: 256
      NATS_ENABLE: false

- name: Save and unmount everything, keep what was saved
  organism.proxmox.gpucache:
    state: absent
"""

RETURN = r"""
gpus:
  description: The GPUs that have a cache, or had one with O(state=absent).
  type: list
  elements: str
  returned: always
  sample: [gpu0, gpu1]
settings:
  description: The settings in force.
  type: dict
  returned: when O(state=present)
  sample: {"CACHE_MB": 500, "SYNC_SEC": 60}
done:
  description: What was done to each cache.
  type: list
  elements: str
  returned: when something was done
  sample: ["gpu0: mounted, generation 12 restored"]
caches:
  description: Mounts, fill level and generations of each cache after the change.
  type: list
  elements: dict
  returned: when O(state=present), not in check mode
  sample: [{"gpu": "gpu0", "overlay": true, "level": "ok", "generation": 12}]
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _gpucache as gpucache
from ansible_collections.organism.proxmox.plugins.module_utils import _gpucache_units as units
from ansible_collections.organism.proxmox.plugins.module_utils import _ramlayer_host as host
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._keyvalue import Settings, SettingsError
from ansible_collections.organism.proxmox.plugins.module_utils._overlay import LayerError
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, Systemctl

HEADER = ("The RAM caches of this machine's GPUs. Comments stand on lines of their own.",)


def existing(root: Root, path: str) -> Settings | None:
    """The settings of a file that is there and can be read, else None."""
    try:
        return gpucache.load(root, path)
    except SettingsError:
        return None


def wanted_gpus(module: AnsibleModule, settings: Settings, root: Root) -> gpucache.Gpus:
    """The GPUs to serve. In check mode the map of GPUs may be about to be written by a task before this one."""
    try:
        return gpucache.gpus(settings, root)
    except SettingsError as error:
        path = settings.text("GPU_MAP")
        if not module.check_mode or root.exists(path):
            raise
        module.warn(f"{path} is not there yet, so the caches cannot be predicted: {error}")
        return gpucache.Gpus((), "")


def present(module: AnsibleModule, root: Root) -> NoReturn:
    """Configuration, units and mounts as declared."""
    path: str = module.params["path"]
    files: dict[str, str | None] = {}
    if module.params["keep_existing"] and root.exists(path):
        settings = gpucache.load(root, path)
    else:
        settings = gpucache.SCHEMA.coerce(module.params["settings"])
        files[path] = gpucache.SCHEMA.render(settings, HEADER)
    found = wanted_gpus(module, settings, root)
    others_mb = host.configured_mb(root)
    gpucache.check(settings, found, root, others_mb=others_mb)
    old = existing(root, path) or settings
    known = {*found.ids, *units.instances(root), *units.mounted_gpus(old, root)}
    moved = units.moved(old, settings, sorted(known), root)
    if moved:
        raise LayerError(f"{', '.join(moved)} would move while mounted; run gpucache-ctl disable first")
    for text in gpucache.warnings(settings, found, root, others_mb=others_mb):
        module.warn(text)

    gone = sorted(known - set(found.ids))
    ids = [*found.ids, *gone]
    systemctl = Systemctl()
    facts = units.gather(settings, ids, root, path, systemctl)
    if facts.units is not None:
        files |= units.dropins(settings, root)
    facts = with_config(facts, path)
    wanted = units.wishes(settings, found.ids, gone)
    plan = units.plan(facts, wanted=wanted, files=files, ids=found.ids, size_mb=settings.integer("CACHE_MB"))
    result: dict[str, Any] = {"gpus": list(found.ids), "settings": dict(settings)}
    if not module.check_mode:
        if plan.difference:
            result["done"] = units.apply(plan, settings, root, systemctl)
        result["caches"] = units.overview(settings, found.ids, root, systemctl)
    finish(module, plan.difference, header=path, **result)


def with_config(facts: units.Facts, path: str) -> units.Facts:
    """The facts with the configuration file among the files."""
    return units.Facts(facts.config, {**facts.files, path: facts.config}, facts.units, facts.layers)


def absent(module: AnsibleModule, root: Root) -> NoReturn:
    """Everything saved, unmounted and off; then the configuration goes, since stopping reads it."""
    path: str = module.params["path"]
    settings = existing(root, path) or gpucache.SCHEMA.coerce(module.params["settings"])
    ids = sorted({*units.instances(root), *units.mounted_gpus(settings, root)})
    stored = units.persistent_gpus(settings) if module.params["purge"] else []
    systemctl = Systemctl()
    facts = with_config(units.gather(settings, ids, root, path, systemctl), path)
    wanted = {**units.wishes(settings, (), ids), units.AGENT: units.Wish(False, False)}
    files: dict[str, str | None] = dict.fromkeys((path, units.INTERVAL, *units.AFFINITY))
    plan = units.plan(facts, wanted=wanted, files=files, ids=(), size_mb=0)
    for gpu in stored:
        plan.difference.add(f"saved content of {gpu}", "on disk", None)
    result: dict[str, Any] = {"gpus": ids}
    if plan.difference and not module.check_mode:
        afterwards, plan.files = plan.files, {}
        result["done"] = units.apply(plan, settings, root, systemctl)
        units.write_files(afterwards, root)
        for gpu in stored:
            units.purge(gpucache.layer(settings, gpu), root)
        if facts.units is not None:
            systemctl.call("daemon-reload")
    finish(module, plan.difference, header=path, **result)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "settings": {"type": "dict", "default": {}},
            "keep_existing": {"type": "bool", "default": False},
            "path": {"type": "path", "default": gpucache.CONFIG},
            "purge": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        if module.params["state"] == "present":
            present(module, Root())
        absent(module, Root())
    except SettingsError as error:
        refuse(module, "\n".join(error.problems))
    except (LayerError, CommandError) as error:
        refuse(module, f"gpucache: {error}")


if __name__ == "__main__":
    main()
