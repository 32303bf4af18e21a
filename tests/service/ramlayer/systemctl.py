# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands for ``systemctl`` where no systemd runs: enables and starts units by their files, one at a time.

Test equipment: what systemd does about dependencies, conditions and shutdown only a real one shows. Drop-ins must be
there and readable; of a unit only ExecStart=, ExecStop= and PartOf= are followed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

UNITS = Path("/etc/systemd/system")
STATE = Path(os.environ["FAKE_SYSTEMD"])


def values(unit: str, key: str) -> list[str]:
    lines = (UNITS / unit).read_text(encoding="utf-8").splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def run(unit: str, key: str) -> None:
    for command in values(unit, key) if unit.endswith(".service") else ():
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{unit}: {done.stderr}")


def main(arguments: list[str]) -> None:
    state = (
        json.loads(STATE.read_text(encoding="utf-8")) if STATE.exists() else {"enabled": [], "active": [], "log": []}
    )
    words = [word for word in arguments if not word.startswith("-")]
    verb, names = words[0], words[1:]
    state["log"].append(" ".join(words))
    for name in names:
        there = (UNITS / name).exists()
        if verb == "show":
            active = "active" if name in state["active"] else "inactive"
            enabled = "enabled" if name in state["enabled"] else "disabled" if there else ""
            sys.stdout.write(f"Id={name}\nLoadState={'loaded' if there else 'not-found'}\nActiveState={active}\n"
                             f"UnitFileState={enabled}\nMainPID=0\n\n")  # fmt: skip
            continue
        if not there:
            sys.exit(f"Unit {name} not found.")
        kind = "enabled" if verb in ("enable", "disable") else "active"
        on = verb in ("enable", "start")
        if kind == "active" and on != (name in state[kind]):
            run(name, "ExecStart" if on else "ExecStop")
            if not on:
                others = [unit.name for unit in UNITS.iterdir() if unit.is_file()]
                state[kind] = [unit for unit in state[kind] if unit not in others or name not in values(unit, "PartOf")]
        state[kind] = [unit for unit in state[kind] if unit != name] + ([name] if on else [])
    STATE.write_text(json.dumps(state), encoding="utf-8")


main(sys.argv[1:])
