# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read from a run of a playbook: what it changed, and which of its tasks went to a host."""

from __future__ import annotations

from typing import Any

from bench import site

from tests.rig import levels


def task(name: str, action: str, **result: Any) -> dict[str, Any]:
    return {"task": {"name": name}, "hosts": {"rig": {"action": action, **result}} if action else {}}


def play(name: str, *tasks: dict[str, Any]) -> dict[str, Any]:
    return {"play": {"name": name}, "tasks": list(tasks)}


TOLD = {
    "plays": [
        play(
            "Level 1, organism",
            task("Validate arguments", "ansible.builtin.validate_argument_spec"),
            task("Include", "ansible.builtin.include_role"),
            task("Look", "ansible.builtin.stat", changed=False),
            task("Check", "assert"),
            task("Not here", "organism.proxmox.zfs_arc", skipped=True),
            task("Set", "organism.proxmox.host_settings", changed=True, diff={"before": "1", "after": "2"}),
            task("Set", "organism.proxmox.host_settings", changed=True, diff=[{"after": "2026-11-22T01:02:03Z"}]),
        ),
        play("Level 1, finish", task("Mark", "copy", failed=True, msg="no space left")),
        play("Level 2, extreme", task("Nobody", "")),
        play("Something else", task("Look", "stat")),
    ]
}


def test_tasks_that_went_to_a_host_are_counted_by_level() -> None:
    ran = levels._read(TOLD, "")
    assert ran.tasks == {"Level 1, organism": 3, "Level 1, finish": 1, "Level 2, extreme": 0, "Something else": 1}
    assert site._by_level(ran.tasks) == {"Level 1": 4}


def test_changes_are_told_apart_and_failures_named() -> None:
    ran = levels._read(TOLD, "")
    assert list(ran.changes) == [("Level 1, organism: Set", "0"), ("Level 1, organism: Set", "1")]
    assert "then" in ran.changes["Level 1, organism: Set", "1"]
    assert ran.failed == {"Level 1, finish: Mark": "no space left"}
