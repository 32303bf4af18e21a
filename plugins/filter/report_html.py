# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The report of hosts as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.module_utils import _host_report

DOCUMENTATION = r"""
name: report_html
short_description: Write the report of hosts as one HTML page
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - A page that needs no other file, with each host's checks, CPU plan, levels, pending reboots, bench and facts. All
    that comes from a host is escaped.
positional: taken, unreached
options:
  _input:
    description: By name of the host, RV(organism.proxmox.host_audit#module:host) of M(organism.proxmox.host_audit).
    type: dict
    required: true
  taken:
    description: When the report was made, as text.
    type: str
    required: true
  unreached:
    description: Hosts that gave no answer.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
page: "{{ hosts | organism.proxmox.report_html('2026-11-22T07:00:00Z') }}"
# -> "<!DOCTYPE html>..."
"""

RETURN = r"""
_value:
  description: The page.
  type: str
"""


def report_html(hosts: Mapping[str, Mapping[str, Any]], taken: str, unreached: Iterable[str] = ()) -> str:
    """The page. Raises AnsibleFilterError."""
    try:
        return _host_report.render(hosts, unreached, taken)
    except (KeyError, TypeError, AttributeError) as error:
        raise AnsibleFilterError(f"report_html: not what host_audit returns: {error!r}") from error


class FilterModule:
    """The entry point that Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"report_html": report_html}
