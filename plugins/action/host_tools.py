# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Packs the host's tools on the controller and hands them to the module of the same name: one call, no copying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.organism.proxmox.plugins.module_utils import _host_tools

PACKAGE = Path(__file__).resolve().parents[2] / "runtime" / "src" / "organism"


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible ships no types
    """Adds ``archive`` to the arguments where the tools shall be present."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        if arguments.get("state", "present") == "present":
            try:
                arguments["archive"] = _host_tools.pack(_host_tools.collect(PACKAGE))
            except (_host_tools.HostToolsError, OSError) as error:
                raise AnsibleActionFail(f"host tools: {error}") from error
        result.update(
            self._execute_module(
                module_name="organism.proxmox.host_tools", module_args=arguments, task_vars=task_vars or {}
            )
        )
        # tens of kilobytes of base64 in every verbose output help nobody
        result.get("invocation", {}).get("module_args", {}).pop("archive", None)
        return result
