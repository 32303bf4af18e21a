# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""CPU sets as the kernel's lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.module_utils import _cpu_list

DOCUMENTATION = r"""
name: cpu_list
short_description: Write a set of CPUs as the kernel's list
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - The shortest list of a set of CPUs, in ascending order, so that two sets are equal when their lists are.
  - A list that is not one is an error, and never a shorter set.
options:
  _input:
    description: A list in text (V(8,0-3)) or CPU numbers. A single number is a set of one.
    type: raw
    required: true
seealso:
  - plugin: organism.proxmox.cpu_numbers
    plugin_type: filter
  - plugin: organism.proxmox.cpu_mask
    plugin_type: filter
"""

EXAMPLES = r"""
affinity: "{{ [8, 0, 1, 2, 3] | organism.proxmox.cpu_list }}"
# => 0-3,8

same: "{{ '8,0,1-3' | organism.proxmox.cpu_list == '0-3,8' }}"
# => true
"""

RETURN = r"""
_value:
  description: The list.
  type: str
"""


def numbers(cpus: str | int | Iterable[Any]) -> tuple[int, ...]:
    """The CPU numbers of what a template gives. Raises AnsibleFilterError."""
    try:
        if isinstance(cpus, bool):
            raise _cpu_list.CpuListError(f"{cpus} is no CPU")
        if isinstance(cpus, (str, int)):
            return _cpu_list.parse(str(cpus))
        return tuple(sorted({cpu for part in cpus for cpu in _cpu_list.parse(str(part))}))
    except (_cpu_list.CpuListError, TypeError) as error:
        raise AnsibleFilterError(f"cpu_list: {error}") from error


def cpu_list(cpus: str | int | Iterable[Any]) -> str:
    return _cpu_list.render(numbers(cpus))


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"cpu_list": cpu_list}
