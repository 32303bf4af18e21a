# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard as a state of a host: its settings, and its entries in the hook of VMs.

    /etc/organism/guard.json                  settings
    /etc/organism/hook.d/pre-start/10-guard   may this VM start?
    /etc/organism/hook.d/post-stop/90-guard   its lease ends

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import _guard_pve, _guard_report, _owned_files
from ._difference import Difference
from ._earlier import EarlierState
from ._guard_config import CONFIG, Config
from ._guard_profile import ENTRIES
from ._host_files import FileWish
from ._root import Root

CAPABILITY = "vm_guard"
COMMAND = "/usr/local/sbin/organism-guard"
_HEAD = """\
#!/bin/sh
# Managed by Ansible (organism.proxmox, vm_guard): changes made here are lost.
"""
_SLACK_S = 30
"""What the hook gives the guard beyond its own deadline, to end and to say why."""


def pre_start_text(config: Config) -> str:
    """The entry that refuses."""
    limit = int(config.deadline) + _SLACK_S
    return f'{_HEAD}# organism-hook: timeout={limit}\nexec {COMMAND} hook "$1" pre-start\n'


POST_STOP_TEXT = f'{_HEAD}exec {COMMAND} hook "$1" post-stop\n'


@dataclass
class Plan:
    """``unguarded``: VMs that start without asking."""

    files: _owned_files.FilePlan = field(default_factory=_owned_files.FilePlan)
    unguarded: list[int] = field(default_factory=list)

    @property
    def difference(self) -> Difference:
        return self.files.difference

    @property
    def kept_by_others(self) -> list[dict[str, Any]]:
        """Files that are not taken back."""
        reason = "somebody else has changed it since"
        return [{"key": path, "now": now, "reason": reason} for path, now in self.files.others.items()]


def wishes(config: Config) -> list[FileWish]:
    """Every file as it shall be. The settings come first: an entry without them would refuse each start."""
    return [
        FileWish(CONFIG, config.text()),
        FileWish(ENTRIES[0], pre_start_text(config), "0755"),
        FileWish(ENTRIES[1], POST_STOP_TEXT, "0755"),
    ]


def plan_present(root: Root, earlier: EarlierState, config: Config) -> Plan:
    """Raises ValueError, OSError."""
    deaf = [vmid for vmid, vm in sorted(_guard_pve.configs(root).items()) if not _guard_report.guarded(vm)]
    return Plan(_owned_files.plan(root, earlier, wishes(config)), deaf)


def plan_absent(root: Root, earlier: EarlierState) -> Plan:
    """No entry and no settings of ours are left. Raises OSError."""
    made = Plan(_owned_files.plan(root, earlier, []))
    # the entries go before the settings that they read, so that no start between the two is refused
    writes = made.files.writes
    made.files.writes = {path: writes[path] for path in sorted(writes, key=lambda path: path == CONFIG)}
    return made


def apply(root: Root, earlier: EarlierState, made: Plan) -> None:
    """Carry it out. Raises OSError."""
    _owned_files.apply(root, earlier, made.files)
