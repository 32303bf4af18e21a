# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""How much of a disk the bus may use."""

from __future__ import annotations

from collections.abc import Callable

from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.module_utils import _nats_config

DOCUMENTATION = r"""
name: bus_room
short_description: Compute the server's store limit from the size of its disk
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - A full disk stops nats-server until it is restarted, so its own limit has to be reached first.
positional: share
options:
  _input:
    description: Size of the file system in bytes.
    type: int
    required: true
  share:
    description: How much of it the bus may use, from 0 to 1.
    type: float
    default: 0.5
"""

EXAMPLES = r"""
max_file_store: "{{ 107374182400 | organism.proxmox.bus_room(0.5) }}"
"""

RETURN = r"""
_value:
  description: Bytes, for C(max_file_store) of nats-server.
  type: int
"""


def bus_room(disk_bytes: int, share: float = 0.5) -> int:
    try:
        return _nats_config.room(int(disk_bytes), float(share))
    except ValueError as error:
        raise AnsibleFilterError(f"bus_room: {error}") from error


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., int]]:
        return {"bus_room": bus_room}
