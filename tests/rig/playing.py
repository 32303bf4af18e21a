# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plays tasks on the rig and hands back what they said; and looks at files there without any of our tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rig.driver import Rig

RESULT = "/run/organism-test-result.json"


@dataclass(frozen=True)
class Played:
    """``changed``: tasks that changed something. ``result``: what the variable asked for held."""

    changed: int
    result: Any
    said: str


def role(name: str, **variables: Any) -> dict[str, Any]:
    """A task that plays a role of the collection with these variables."""
    return {
        "name": f"Play {name}",
        "ansible.builtin.include_role": {"name": f"organism.proxmox.{name}"},
        "vars": variables,
    }


def module(name: str, **arguments: Any) -> dict[str, Any]:
    """A task that calls a module of the collection; its result is the variable ``said``."""
    return {"name": f"Call {name}", f"organism.proxmox.{name}": arguments, "register": "said"}


def play(
    rig: Rig, folder: Path, *tasks: dict[str, Any], check: bool = False, result: str = "", fails: bool = False
) -> Played:
    """Run tasks as one play. ``result``: a variable to bring back. ``fails``: the play must end so."""
    steps = list(tasks)
    if result:
        keep = {"content": f"{{{{ {result} | to_json }}}}", "dest": RESULT, "mode": "0600"}
        steps.append(
            {
                "name": "Keep a result",
                "ansible.builtin.copy": keep,
                "changed_when": False,  # no part of what is counted
                "check_mode": False,
            }
        )
    document = [{"name": "A test", "hosts": "pve", "become": True, "gather_facts": False, "tasks": steps}]
    file = folder / "play.yml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    done = rig.play(file, *(["--check"] if check else []), timeout=1800)
    assert (done.returncode != 0) == fails, done.stdout[-6000:] + done.stderr[-3000:]
    recap = next(line for line in done.stdout.splitlines() if "changed=" in line)
    found = json.loads(rig.must(["cat", RESULT])) if result and not fails else None
    return Played(int(recap.split("changed=")[1].split()[0]), found, done.stdout + done.stderr)


def etc(rig: Rig, *more: str) -> str:
    """Names, modes and digests of all files below /etc (and ``more``), and the names of all folders."""
    places = " ".join(["/etc", *more])
    return rig.must(
        f"find {places} -type d | sort; find {places} -type l -printf '%p %l\\n' | sort; "
        f"find {places} -type f -printf '%m %u %g ' -exec sha256sum {{}} \\; | sort -k 5"
    )
