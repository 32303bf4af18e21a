#!/usr/bin/python
# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: level_marker
short_description: Record that a level has finished on a host, or require that the level before it has
version_added: 0.1.0
description:
  - The levels of the collection build on each other. Each leaves a marker in C(/etc/organism/levels) when its last task
    is through, and each refuses to start where the nearest lower level that applies to the host has left none.
  - A marker holds the level, the version of the collection and the time, and keeps them while the version stays the
    same, so that a second run changes nothing.
author: The organism.proxmox authors (!UNKNOWN)
extends_documentation_fragment:
  - organism.proxmox.attributes
options:
  level:
    description: Number of the level that runs.
    type: int
    required: true
  state:
    description:
      - V(present) records that O(level) has finished, V(absent) forgets it.
      - V(required) changes nothing and fails when the nearest lower level that exists and applies to O(groups) has not
        finished on this host with the same major and minor version of the collection.
    type: str
    choices: [present, absent, required]
    default: present
  groups:
    description: Inventory groups of the host. They decide which levels apply to it.
    type: list
    elements: str
    default: []
  pending:
    description:
      - Levels that went through on this host earlier in this very run. They count as finished in check mode, where no
        level leaves a marker, and mean nothing otherwise.
    type: list
    elements: int
    default: []
  skipped_tags:
    description:
      - Tags that the run leaves out. A level of which a capability was left out has not finished, so O(state=present)
        then records nothing and says so.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Refuse to build the fleet on an unprepared host
  organism.proxmox.level_marker:
    level: 7
    state: required
    groups: "{{ group_names }}"

- name: Record that level 7 has finished here
  organism.proxmox.level_marker:
    level: 7
    skipped_tags: "{{ ansible_skip_tags }}"
"""

RETURN = r"""
marker:
  description: The marker of O(level), or with O(state=required) of the level that it needs; none when there is none.
  returned: success
  type: dict
  contains:
    level:
      description: Number of the level.
      type: int
      sample: 7
    version:
      description: Version of the collection that finished it last.
      type: str
      sample: 0.1.0
    finished:
      description: When that was (UTC, ISO 8601).
      type: str
      sample: "2026-11-22T02:40:11Z"
"""

import dataclasses
import datetime
import pathlib

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.organism.proxmox.plugins.module_utils import _ansible, _atomic, _levels
from ansible_collections.organism.proxmox.plugins.module_utils._difference import Difference
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root


def read_marker(root: Root, level: int) -> _levels.Marker | None:
    text = root.read_or_none(_levels.marker_path(level))
    return None if text is None else _levels.parse_marker(text)


def shown(marker: _levels.Marker | None) -> dict[str, int | str] | None:
    return None if marker is None else dataclasses.asdict(marker)


def require(module: AnsibleModule, root: Root) -> None:
    """Leave with success when the level may run, with the reason and the command to run first when not."""
    needed = _levels.predecessor(module.params["level"], module.params["groups"])
    if needed is None:
        module.exit_json(changed=False, msg="no level comes before this one here", marker=None)
        return
    marker = read_marker(root, needed.number)
    if module.check_mode and needed.number in module.params["pending"]:
        module.exit_json(changed=False, msg=f"level {needed.number} goes before it in this run", marker=shown(marker))
    reason = _levels.obstacle(needed, marker, _levels.COLLECTION_VERSION)
    if reason:
        _ansible.refuse(module, reason)
    module.exit_json(changed=False, msg=f"level {needed.number} has finished", marker=shown(marker))


def record(module: AnsibleModule, root: Root) -> None:
    """Bring the marker to the wanted state."""
    level, wanted = module.params["level"], module.params["state"] == "present"
    path = root.path(_levels.marker_path(level))
    marker = read_marker(root, level)
    left_out = _levels.unfinished_parts(level, module.params["skipped_tags"])
    if wanted and left_out:
        message = f"level {level} was run without {', '.join(left_out)}: not recorded"
        module.exit_json(changed=False, msg=message, marker=shown(marker))
    difference = Difference()
    after = None
    if wanted:
        # the time of the first finish by this version stays, so a run that changes nothing reports nothing
        kept = marker is not None and (marker.level, marker.version) == (level, _levels.COLLECTION_VERSION)
        now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        after = marker if kept else _levels.Marker(level, _levels.COLLECTION_VERSION, now)
        difference.add(str(path), shown(marker), shown(after))
    elif path.exists():
        difference.add(str(path), shown(marker) or "unreadable", None)
    if difference.changed and not module.check_mode:
        write(path, after)
    _ansible.finish(module, difference, marker=shown(after), header=str(path))


def write(path: pathlib.Path, marker: _levels.Marker | None) -> None:
    if marker is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    _atomic.write_atomic(path, marker.render())


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "level": {"type": "int", "required": True},
            "state": {"type": "str", "choices": ["present", "absent", "required"], "default": "present"},
            "groups": {"type": "list", "elements": "str", "default": []},
            "pending": {"type": "list", "elements": "int", "default": []},
            "skipped_tags": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    root = Root()
    try:
        _levels.level(module.params["level"])
    except ValueError as error:
        _ansible.refuse(module, str(error))
    if module.params["state"] == "required":
        require(module, root)
    else:
        record(module, root)


if __name__ == "__main__":
    main()
