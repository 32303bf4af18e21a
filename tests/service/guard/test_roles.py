# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The role as Ansible runs it, on this machine with the folders that it writes hidden in a mount namespace."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import hidden
from service.hidden import changes, tasks

HIDDEN = ("/opt", "/usr/local/sbin", "/etc/organism", "/var/lib/organism", "/run/organism")
ROLES = ["host_tools", "vm_hook", "vm_guard"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a mount namespace"),
    pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="systemd is the manager here (the rig does that)"),
]

STEPS: dict[str, str] = {
    "foretold": "present --check",
    "done": "present",
    "again": "present",
    "commands": "organism-guard status --json; organism-hook --list 100; mlmode status || echo ended $?",
    "refused": "wrong",
    "taken back": "absent",
    "left": "find /opt /usr/local/sbin /etc/organism /var/lib/organism ! -type d",
}


def play(state: str) -> list[dict[str, Any]]:
    groups = [{"name": "ml", "policy": "preempt", "members": ["vm-train", "vm-infer"] if state != "wrong" else ["a"]}]
    variables = {
        **{f"{role}_state": "absent" if state == "absent" else "present" for role in ROLES},
        "vm_guard_groups": groups,
        "vm_guard_watchdog": "off",
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    roles = [f"organism.proxmox.{role}" for role in (ROLES[::-1] if state == "absent" else ROLES)]
    common = {"hosts": "localhost", "connection": "local", "gather_facts": False}
    return [{"name": "Guard", **common, "vars": variables, "roles": roles}]


def test_from_nothing_to_a_guard_and_back(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert changes(tasks(said["foretold"])) == changes(tasks(said["done"])) != []
    assert not any(tasks(said["again"]).values())
    commands = said["commands"].read_text()
    assert json.JSONDecoder().raw_decode(commands)[0]["groups"][0]["policy"] == "preempt"
    assert "10-guard: runs" in commands and "90-guard: runs" in commands
    assert "no modes are set" in commands and "ended 1" in commands
    assert "group ml needs two VMs or more" in said["refused"].read_text()
    assert said["left"].read_text().split() == []


def run(tmp_path: Path) -> dict[str, Path]:
    """Carries out the steps; where each has written what it said."""
    lines = ["PATH=/usr/local/sbin:$PATH"]
    said = {name: tmp_path / f"{name.replace(' ', '-')}.out" for name in STEPS}
    for name, step in STEPS.items():
        state, _space, check = step.partition(" ")
        if state in ("present", "absent", "wrong"):
            book = tmp_path / f"{state}.yml"
            book.write_text(yaml.safe_dump(play(state)))
            expected = "! " if state == "wrong" else ""
            lines.append(f"{expected}ansible-playbook -i localhost, {check} {book} > {said[name]}")
        else:
            lines.append(f"{{ {step}; }} > {said[name]} 2>&1")
    hidden.run(tmp_path, HIDDEN, lines, said, hang=600)
    return said
