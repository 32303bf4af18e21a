#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Declares the RAM layer of a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ramlayer
short_description: RAM layer of a host
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Lays a tmpfs over a directory on disk, merged by overlayfs, so that programs write at the speed of memory. What was
    written is saved to disk regularly and at shutdown, as whole generations, and restored before the next mount.
  - Writes the configuration and what of the units depends on it, switches the units on, and mounts, resizes or
    unmounts the layer. Without systemd as the running manager the layer is mounted directly, and no unit is touched.
  - Refuses what would lose data or exceed the memory; the GPUs' caches of the same machine count as well.
requirements:
  - The units of role P(organism.proxmox.ramlayer#role) and the command C(ramlayer) that they start, where systemd
    runs.
  - rsync 3.1.3 or later, for the archive.
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  state:
    description:
      - V(present) has the layer configured, enabled and mounted.
      - V(absent) saves and unmounts it, switches its units off, puts back the configuration that was there before, and
        removes the directories that were made for it. What was saved stays on disk unless O(purge=true); without
        O(merge=true) it is no longer seen at the merged path.
    type: str
    choices: [present, absent]
    default: present
  settings:
    description:
      - The settings that differ from their defaults, by their names in the configuration file, for example C(RAM_MB).
        The file that this module writes explains each; an unknown name or a value out of its limits is refused.
    type: dict
    default: {}
  keep_existing:
    description:
      - Keep a configuration file that is there, and bring the layer to what it says instead of O(settings).
    type: bool
    default: false
  path:
    description:
      - The configuration file. The units read the default path.
    type: path
    default: /etc/organism/ramlayer.conf
  merge:
    description:
      - With O(state=absent), merge what was saved into the directory on disk, so that it has all that was seen.
    type: bool
    default: false
  purge:
    description:
      - With O(state=absent), also delete what the layer saved. This cannot be undone.
    type: bool
    default: false
seealso:
  - module: organism.proxmox.gpucache
  - module: ansible.posix.mount
"""

EXAMPLES = r"""
- name: Four GiB of RAM over the base on the fast pool, saved each minute
  organism.proxmox.ramlayer:
    settings:
      LOWERDIR: /mnt/fast/base
      PERSIST_DIR: /mnt/fast/ram-persist
      MERGED: /fast/active
      RAM_MB: 4096

- name: Keep the last five generations as ZFS snapshots, too
  organism.proxmox.ramlayer:
    settings:
      ZFS_SNAPSHOTS: 5

- name: Take the layer away and leave everything it held in the base
  organism.proxmox.ramlayer:
    state: absent
    merge: true
"""

RETURN = r"""
settings:
  description: The settings in force.
  type: dict
  returned: when O(state=present)
  sample: {"RAM_MB": 8192, "SYNC_SEC": 60}
done:
  description: What was done to the layer.
  type: list
  elements: str
  returned: when something was done
  sample: ["host: mounted, generation 12 restored"]
layer:
  description: Mounts, fill level, generations, timers, archive and memory of all layers after the change.
  type: dict
  returned: when O(state=present), not in check mode
  sample: {"layer": "host", "overlay": true, "level": "ok", "generation": 12}
archive:
  description: Where the daily archive goes, or why there is none.
  type: dict
  returned: when O(state=present)
  sample: {"folder": "/mnt/archive/ram-persist", "reason": null}
kept_by_others:
  description: Files that somebody changed after this module had written them, and that were therefore left alone.
  type: list
  elements: str
  returned: when O(state=absent)
  sample: []
"""

from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _gpucache_units
from ansible_collections.organism.proxmox.plugins.module_utils import _ramlayer as ramlayer
from ansible_collections.organism.proxmox.plugins.module_utils import _ramlayer_host as host
from ansible_collections.organism.proxmox.plugins.module_utils import _ramlayer_metrics as metrics
from ansible_collections.organism.proxmox.plugins.module_utils import _ramlayer_units as units
from ansible_collections.organism.proxmox.plugins.module_utils._ansible import finish, refuse
from ansible_collections.organism.proxmox.plugins.module_utils._earlier import EarlierState, EarlierStateError
from ansible_collections.organism.proxmox.plugins.module_utils._keyvalue import SettingsError
from ansible_collections.organism.proxmox.plugins.module_utils._overlay import LayerError
from ansible_collections.organism.proxmox.plugins.module_utils._ramlayer_content import commit
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root
from ansible_collections.organism.proxmox.plugins.module_utils._systemd import CommandError, Systemctl

HEADER = ("The RAM layer of this host. Comments stand on lines of their own.",)


def present(module: AnsibleModule, root: Root) -> NoReturn:
    """Configuration, units and mounts as declared."""
    path: str = module.params["path"]
    files: dict[str, str | None] = {}
    if module.params["keep_existing"] and root.exists(path):
        settings = host.load(root, path)
    else:
        settings = host.SCHEMA.coerce(module.params["settings"])
        files[path] = host.SCHEMA.render(settings, HEADER)
    told = host.problems(settings, root, path)
    lower = settings.text("LOWERDIR")
    if module.check_mode and not root.exists(lower):
        # a task before this one may be about to make it
        told = [text for text in told if not text.startswith(f"LOWERDIR {lower} does not exist")]
        module.warn(f"LOWERDIR {lower} is not there yet")
    if told:
        raise SettingsError(told)
    moved = units.moved(units.existing(root, path) or settings, settings, root)
    if moved:
        raise LayerError(f"{', '.join(moved)} would change underneath the mounted layer; run ramlayer disable first")
    for text in host.warnings(settings, root):
        module.warn(text)

    systemctl = Systemctl()
    facts = units.gather(settings, root, path, systemctl)
    if facts.units is not None:
        files |= units.dropins(settings, root)
    plan = units.plan(
        facts, wanted=units.wishes(settings, root, on=True), files=files, size_mb=settings.integer("RAM_MB"),
        merged=settings.text("MERGED"),
    )  # fmt: skip
    archive = {"folder": settings.text("ARCHIVE_DIR"), "reason": host.no_archive(settings, root)}
    result: dict[str, Any] = {"settings": dict(settings), "archive": archive}
    if not module.check_mode:
        if plan.difference:
            earlier = EarlierState(units.CAPABILITY, root)
            units.remember(earlier, plan, facts, settings, root, path)
            result["done"] = units.apply(plan, settings, root, systemctl)
        result["layer"] = units.overview(settings, root, systemctl)
    finish(module, plan.difference, header=path, **result)


def absent(module: AnsibleModule, root: Root) -> NoReturn:
    """Everything saved, unmounted and off; then the configuration goes, since stopping reads it."""
    path: str = module.params["path"]
    settings = units.existing(root, path) or host.SCHEMA.coerce(module.params["settings"])
    layer = host.layer(settings)
    systemctl = Systemctl()
    earlier = EarlierState(units.CAPABILITY, root)
    facts = units.gather(settings, root, path, systemctl)
    back, others = earlier.to_restore({path: facts.files[path]})
    files: dict[str, str | None] = dict.fromkeys(units.DROPINS)
    if path in back:
        files[path] = None if back[path] is None else f"{back[path]}\n"
    wanted = units.wishes(settings, root, on=False)
    plan = units.plan(facts, wanted=wanted, files=files, size_mb=None, merged=settings.text("MERGED"))
    stored = layer.store.current_number() is not None
    merging = module.params["merge"] and (plan.unmount or unmerged(layer))
    if merging:
        plan.difference.add(f"what is saved in {layer.persist}", "not in base", "in base")
    if module.params["purge"] and (stored or plan.unmount):
        plan.difference.add(f"what is saved in {layer.persist}, on disk", "kept", None)
    result: dict[str, Any] = {"kept_by_others": [key for key in others if key == path]}
    if plan.difference and not module.check_mode:
        afterwards, plan.files = plan.files, {}
        result["done"] = units.apply(plan, settings, root, systemctl)
        if merging and unmerged(layer):
            result["done"].append(
                f"{layer.name}: generation {commit(layer, root).number} begins after a merge into base"
            )
        if module.params["purge"]:
            units.purge(settings, root)
        _gpucache_units.write_files(afterwards, root)
        metrics.withdraw(root, settings.text("TEXTFILE_COLLECTOR"), layer.name)
        units.remove_folders(earlier, path, root)
        earlier.forget()
        if facts.units is not None:
            systemctl.call("daemon-reload")
    finish(module, plan.difference, header=path, **result)


def unmerged(layer: ramlayer.Layer) -> bool:
    """Is there a generation that base does not have yet?"""
    current = layer.store.current_number()
    record = None if current is None else layer.store.read(current)
    return current is not None and (record is None or not (record.merged and record.entries <= 1))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "settings": {"type": "dict", "default": {}},
            "keep_existing": {"type": "bool", "default": False},
            "path": {"type": "path", "default": host.CONFIG},
            "merge": {"type": "bool", "default": False},
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
    except (LayerError, CommandError, EarlierStateError) as error:
        refuse(module, f"ramlayer: {error}")


if __name__ == "__main__":
    main()
