# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""CPU lists as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ansible_collections.organism.proxmox.plugins.filter.cpu_list import numbers

DOCUMENTATION = r"""
name: cpu_numbers
short_description: The CPU numbers of a list
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - The CPU numbers that a list like V(0-3,8) names, in ascending order.
options:
  _input:
    description: A list in text, or CPU numbers.
    type: raw
    required: true
seealso:
  - plugin: organism.proxmox.cpu_list
    plugin_type: filter
"""

EXAMPLES = r"""
count: "{{ '0-3,8' | organism.proxmox.cpu_numbers | length }}"
# => 5
"""

RETURN = r"""
_value:
  description: The numbers.
  type: list
  elements: int
"""


def cpu_numbers(cpus: str | int | Iterable[Any]) -> list[int]:
    return list(numbers(cpus))


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., list[int]]]:
        return {"cpu_numbers": cpu_numbers}
