# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""CPU sets as the kernel's bitmaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.filter.cpu_list import numbers
from ansible_collections.organism.proxmox.plugins.module_utils import _cpu_list

DOCUMENTATION = r"""
name: cpu_mask
short_description: Write a set of CPUs as the kernel's bitmap
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - The bitmap of a set of CPUs as C(/proc/irq/*/smp_affinity) and C(rps_cpus) have it, in groups of eight hexadecimal
    digits.
positional: width
options:
  _input:
    description: A list in text (V(0-3,8)) or CPU numbers.
    type: raw
    required: true
  width:
    description:
      - Number of possible CPUs, so that the mask is as wide as the kernel prints it. V(0) is as narrow as it can be.
    type: int
    default: 0
seealso:
  - plugin: organism.proxmox.cpu_list
    plugin_type: filter
"""

EXAMPLES = r"""
mask: "{{ '0-3,8' | organism.proxmox.cpu_mask(36) }}"
# => 0,0000010f
"""

RETURN = r"""
_value:
  description: The bitmap.
  type: str
"""


def cpu_mask(cpus: str | int | Iterable[Any], width: int = 0) -> str:
    try:
        return _cpu_list.mask(numbers(cpus), int(width))
    except (_cpu_list.CpuListError, TypeError) as error:
        raise AnsibleFilterError(f"cpu_mask: {error}") from error


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"cpu_mask": cpu_mask}
