# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The configuration file of nats-server as a filter, for role nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.organism.proxmox.plugins.module_utils import _nats_config

DOCUMENTATION = r"""
name: nats_config
short_description: Write the configuration file of nats-server
version_added: 0.1.0
author: The organism.proxmox authors (!UNKNOWN)
description:
  - The whole file, with a key and just its subjects for each component, nobody anonymous, and a store that is on disk
    before a message is acknowledged.
positional: pending
options:
  _input:
    description:
      - Settings C(server_name), C(store_dir), C(max_file_store) (bytes) and C(components) (a list of C(kind), C(name)
        and C(public_key)).
      - May have C(host), C(port), C(http_port), C(tls) (C(cert), C(key), C(ca)), C(cluster) (C(name), C(routes),
        C(host), C(port)) and C(extra).
    type: dict
    required: true
  pending:
    description: Leave out components whose key is still to be made. For check mode.
    type: bool
    default: false
"""

EXAMPLES = r"""
text: "{{ {'server_name': 'bus1', 'store_dir': '/var/lib/nats', 'max_file_store': 1073741824,
           'components': [{'kind': 'conductor', 'name': 'bus1', 'public_key': key}]} | organism.proxmox.nats_config }}"
"""

RETURN = r"""
_value:
  description: The text of the file.
  type: str
"""


def nats_config(settings: Mapping[str, Any], pending: bool = False) -> str:
    """Settings as a mapping to the file's text; a ValueError of the library becomes a filter error."""
    values = dict(settings)
    rows = values.pop("components")
    known = [row for row in rows if row.get("public_key")]
    if pending and not known:
        return "# written as soon as the components have keys\n"
    try:
        tls, cluster = values.pop("tls", None), values.pop("cluster", None)
        return _nats_config.render(
            _nats_config.Settings(
                members=_nats_config.members(known if pending else rows),
                tls=_nats_config.Tls(**tls) if tls else None,
                cluster=_nats_config.Cluster(**{**cluster, "routes": tuple(cluster["routes"])}) if cluster else None,
                **values,
            )
        )
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(f"nats_config: {error}") from error


class FilterModule:
    """Filters of this file, by the name that a template uses."""

    def filters(self) -> dict[str, Callable[..., str]]:
        return {"nats_config": nats_config}
