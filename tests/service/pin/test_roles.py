# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles as Ansible runs them, on this machine with the folders that they write hidden: tools, hook, pinning.

What is hidden is a mount namespace of the test, so nothing of the machine itself is written.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import hidden
from service.hidden import changes, tasks
from service.pin import machines

CPUS = sorted(os.sched_getaffinity(0))
HIDDEN = ("/opt", "/usr/local/sbin", "/etc/organism", "/etc/systemd/system", "/var/lib/organism", "/run/organism")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a mount namespace"),
    pytest.mark.skipif(machines.QEMU is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="systemd is the manager here (the rig does that)"),
    pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs to tell one from the other"),
]

# Each step leaves its result; the hook is called with the words of Proxmox VE, as a program that was installed.
STEPS: list[dict[str, Any]] = [
    {"name": "foretold", "state": "present", "check": True},
    {"name": "done", "state": "present"},
    {"name": "again", "state": "present"},
    {"name": "start", "shell": "{start} && /usr/local/sbin/organism-hook 101 post-start && {masks}"},
    {"name": "status", "shell": "/usr/local/sbin/organism-qemu-pin status"},
    {"name": "taken back", "state": "absent"},
    {"name": "masks", "shell": "{masks}"},
    {"name": "left", "shell": "find /opt /usr/local/sbin /etc/organism /etc/systemd/system ! -type d"},
]


def play(state: str) -> list[dict[str, Any]]:
    roles = ["host_tools", "vm_hook", "qemu_pin"]
    variables = {
        **{f"{role}_state": state for role in roles},
        "qemu_pin_vms": [{"vmid": 101}],
        "qemu_pin_keeper": False,
        "qemu_pin_vcpu_cpus": str(CPUS[1]),
        "qemu_pin_io_cpus": str(CPUS[0]),
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    ordered = roles if state == "present" else roles[::-1]
    return [
        {
            "name": "Pinning",
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": variables,
            "roles": [f"organism.proxmox.{role}" for role in ordered],
        }
    ]


def test_from_nothing_to_pinned_and_back(tmp_path: Path) -> None:
    results = run(tmp_path)
    assert changes(results["foretold"]) == changes(results["done"])
    assert any(results["done"].values()), "nothing was done"
    assert not any(results["again"].values()), f"a second run changes something: {results['again']}"
    assert "50-pin: VM 101: vCPU:CPU" in results["start"]
    masks = results["start"].split("masks:")[1].split()
    assert masks.count(str(CPUS[1])) == 1, "the vCPU"
    assert set(masks) == {str(CPUS[0]), str(CPUS[1])}
    assert "pinned" in results["status"]
    assert set(results["masks"].split("masks:")[1].split()) == {everywhere()}
    assert results["left"].split() == []


def everywhere() -> str:
    """This process's own mask as taskset writes it."""
    done = subprocess.run(["taskset", "-cp", str(os.getpid())], capture_output=True, text=True, check=True)
    return done.stdout.rpartition(": ")[2].strip()


def run(tmp_path: Path) -> dict[str, Any]:
    """Carries out the steps in a namespace of their own; what each has said, or which tasks have changed something."""
    vm = machines.Vm(tmp_path, 101, vcpus=1)
    start = shlex.join(vm.words(Path("/run/qemu-server")))
    masks = (
        "echo masks: $(for t in /proc/$(cat /run/qemu-server/101.pid)/task/*; do "
        "taskset -cp ${t##*/} | sed 's/.*: //'; done)"
    )
    lines = ["trap 'kill -9 $(cat /run/qemu-server/101.pid)' EXIT"]
    for number, step in enumerate(STEPS):
        out = tmp_path / f"{number}.out"
        if "shell" in step:
            lines.append(f"{{ {step['shell'].format(start=start, masks=masks)}; }} > {out} 2>&1")
            continue
        book = tmp_path / f"{number}.yml"
        content = play(step.get("state", "present"))
        book.write_text(yaml.safe_dump(content))
        lines.append(f"ansible-playbook -i localhost, {'--check' if step.get('check') else ''} {book} > {out}")
    outputs = {step["name"]: tmp_path / f"{number}.out" for number, step in enumerate(STEPS)}
    hidden.run(tmp_path, [*HIDDEN, "/run/qemu-server"], lines, outputs, hang=300)
    return {
        step["name"]: outputs[step["name"]].read_text() if "shell" in step else tasks(outputs[step["name"]])
        for step in STEPS
    }
