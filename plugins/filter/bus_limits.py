# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Sizes of the streams that fit into a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.module_utils import _bus, _nats_config

DOCUMENTATION = r"""
name: bus_limits
short_description: Size the streams so that they fit into the server's store
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - The declared sizes where they fit, else all of them scaled down alike.
positional: overrides
options:
  _input:
    description: The store's limit in bytes (C(max_file_store)), the smallest one of a cluster.
    type: int
    required: true
  overrides:
    description: Sizes (bytes) and ages (seconds) that a site wants otherwise, as for M(organism.proxmox.bus_topology).
    type: dict
    default: {}
"""

EXAMPLES = r"""
limits: "{{ 2147483648 | organism.proxmox.bus_limits({'results_age': 604800}) }}"
"""

RETURN = r"""
_value:
  description: Limits for M(organism.proxmox.bus_topology).
  type: dict
"""


def bus_limits(max_file_store: int, overrides: Mapping[str, int] | None = None) -> dict[str, int]:
    try:
        limits = _bus.Limits(**{name: int(value) for name, value in (overrides or {}).items()})
        return dataclasses.asdict(_nats_config.fitted(limits, int(max_file_store)))
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(f"bus_limits: {error}") from error


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., dict[str, int]]]:
        return {"bus_limits": bus_limits}
