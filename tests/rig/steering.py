# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plays one role on the rig, and reads interrupts and queues there by other tools than ours."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rig.driver import Rig

ZONES = {"host": "0-1", "vcpu": "4-11", "io": "2-3"}
IO = {2, 3}
RESULT = "/run/steering-result.json"


def play(rig: Rig, folder: Path, role: str, *arguments: str, **variables: Any) -> tuple[int, dict[str, Any]]:
    """Tasks that changed something, and the module's own result; a failed play is an assertion."""
    zones = {f"{role}_{zone}_cpus": cpus for zone, cpus in ZONES.items() if role == "irq_affinity" or zone == "io"}
    registered = "irq_affinity_result" if role == "irq_affinity" else "nic_steering_hardware"
    document = [
        {
            "name": "One role",
            "hosts": "pve",
            "become": True,
            "gather_facts": False,
            "vars": {**zones, **variables},
            "tasks": [
                {"name": "Play it", "ansible.builtin.include_role": {"name": f"organism.proxmox.{role}"}},
                {
                    "name": "Keep what the module said",
                    "ansible.builtin.copy": {
                        "content": f"{{{{ {registered} | to_json }}}}",
                        "dest": RESULT,
                        "mode": "0600",
                    },
                    "changed_when": False,  # no part of what is counted
                    "check_mode": False,
                },
            ],
        }
    ]
    file = folder / "play.yml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    done = rig.play(file, *arguments, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    recap = next(line for line in done.stdout.splitlines() if "changed=" in line)
    changed = int(recap.split("changed=")[1].split()[0])
    result: dict[str, Any] = json.loads(rig.must(["cat", RESULT]))
    return changed, result


def interrupts(rig: Rig) -> dict[str, tuple[str, str]]:
    """(mask, effective) by action name (the second of a name is ``name#2``), as the kernel's files say."""
    script = """cd /proc/irq
for n in $(ls | grep '^[0-9]' | sort -n); do
  test -s /sys/kernel/irq/$n/actions || continue
  name=$(cat /sys/kernel/irq/$n/actions); test -n "$name" || continue
  echo "$name|$(cat $n/smp_affinity_list)|$(cat $n/effective_affinity_list)"
done"""
    found: dict[str, tuple[str, str]] = {}
    seen: Counter[str] = Counter()
    for line in rig.must(script).splitlines():
        name, mask, effective = line.split("|")
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name}#{seen[name]}"] = (mask, effective)
    return found


def cpus(text: str) -> set[int]:
    """The set of a CPU list, by a parser of this test's own."""
    found: set[int] = set()
    for part in text.split(","):
        first, _dash, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def until(rig: Rig, condition: str, seconds: int = 600, otherwise: str = "true") -> None:
    """Wait inside the rig until a shell condition holds; the time is a guard against waiting for ever.

    Emulated on an idle core a look of the keeper takes eight seconds of processor time, beside ten busy processes
    minutes; and what asks too often takes its core away. ``otherwise``: shown when the guard strikes.
    """
    loop = f"timeout {seconds} bash -c 'until {condition}; do sleep 1; done'"
    rig.must(f"{loop} || {{ {otherwise}; exit 1; }}", timeout=seconds + 60)


def heard(rig: Rig) -> dict[str, Any]:
    """What the keeper tells after its first look that an event has caused; it writes that when the look is over."""
    until(
        rig,
        'grep -qE "\\"event\\": [1-9]" /run/organism/steer.json',
        otherwise="grep -A5 passes /run/organism/steer.json; journalctl -u organism-steer --no-pager | tail -5",
    )
    state: dict[str, Any] = json.loads(rig.must("cat /run/organism/steer.json"))
    return state
