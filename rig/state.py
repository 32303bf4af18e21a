# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is known of a rig, for every process that looks: its keeper writes it, in one step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import Settings
from .hardware import Disk, Machine

PHASES = ("starting", "up", "ended", "failed")


@dataclass
class State:
    """``phase``: one of PHASES. ``life`` counts QEMU's starts: it tells whether the rig was rebooted."""

    phase: str = "starting"
    life: int = 0
    how: str = ""
    port: int = 0
    keeper: int = 0
    qemu: int = 0
    accelerator: str = ""
    error: str = ""
    ends: list[str] = field(default_factory=list)
    """Why each earlier life ended: guest-reset, guest-shutdown, host-qmp-system-reset, power cut, kernel panic, ..."""
    seconds: list[float] = field(default_factory=list)
    """How long each life took until its sshd answered; 0 when it never did."""


def write(path: Path, state: State) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def from_dict(raw: dict[str, Any]) -> State:
    known = {each.name for each in fields(State)}
    return State(**{key: value for key, value in raw.items() if key in known})


def read(where: Settings) -> State | None:
    """The rig's last known state, or None when there is no rig of this name."""
    try:
        return from_dict(json.loads(where.state_file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def save_machine(where: Settings, machine: Machine) -> None:
    raw = asdict(machine)
    for disk in raw["disks"]:
        disk["path"] = str(disk["path"]) if disk["path"] else None
    (where.run / "machine.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def load_machine(where: Settings) -> Machine:
    raw = json.loads((where.run / "machine.json").read_text(encoding="utf-8"))
    disks = tuple(Disk(**{**disk, "path": Path(disk["path"]) if disk["path"] else None}) for disk in raw.pop("disks"))
    return Machine(**raw, disks=disks)
