# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Do all hosts mean the same bus when they use the same names?"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence

DOCUMENTATION = r"""
name: bus_disagreements
short_description: Find hosts for which the bus's names lead elsewhere
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - Compares to which addresses each host resolves the names in the URLs of the bus. A host for which a name leads to
    another address would talk to another bus, or to none.
  - Its own loopback address is fine for the one host of the bus itself, and for nobody else.
positional: bus_hosts
options:
  _input:
    description: For each host, the addresses of each name.
    type: dict
    required: true
  bus_hosts:
    description: The hosts that run the bus.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
# -> ["pool1 would look for bus1 on itself (127.0.1.1)"]
problems: "{{ {'bus1': {'bus1': ['127.0.1.1']}, 'pool1': {'bus1': ['127.0.1.1']}}
              | organism.proxmox.bus_disagreements(['bus1']) }}"
"""

RETURN = r"""
_value:
  description: A line for each problem; none when all hosts agree.
  type: list
  elements: str
"""

Addresses = Mapping[str, Mapping[str, Sequence[str]]]


def bus_disagreements(resolved: Addresses, bus_hosts: Sequence[str]) -> list[str]:
    """A line for each host that would look for the bus in another place than the rest."""
    problems = []
    names = sorted({name for addresses in resolved.values() for name in addresses})
    for name in names:
        seen: dict[tuple[str, ...], list[str]] = {}
        for host, addresses in resolved.items():
            found = tuple(sorted(addresses.get(name, ())))
            if any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
                if list(bus_hosts) != [host]:
                    problems.append(f"{host} would look for {name} on itself ({', '.join(found)})")
                continue
            seen.setdefault(found, []).append(host)
        if len(seen) > 1:
            told = "; ".join(f"{', '.join(found) or 'nowhere'} on {', '.join(hosts)}" for found, hosts in seen.items())
            problems.append(f"{name} is not the same everywhere: {told}")
    return problems


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[[Addresses, Sequence[str]], list[str]]]:
        return {"bus_disagreements": bus_disagreements}
