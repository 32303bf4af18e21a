# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ansible-playbook on the lab, with the settings of this checkout and no others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import REPO, Settings, require_state
from .errors import LabError

INVENTORY = REPO / "inventories" / "lab"
SITE = REPO / "playbooks" / "site.yml"


def environment(where: Settings) -> dict[str, str]:
    """The environment of Ansible: this checkout's ansible.cfg, its virtual environment first, this lab's folder."""
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"),
        "ANSIBLE_HOME": str(where.cache / "ansible"),
        "ANSIBLE_COLLECTIONS_PATH": str(where.cache / "collections"),
        "ORGANISM_CACHE": str(where.cache),
        "ORGANISM_LAB_NAME": where.name,
        "PATH": os.pathsep.join([binaries, os.environ.get("PATH", os.defpath)]),
    }


def command(arguments: Sequence[str]) -> list[str]:
    """The ansible-playbook command line; site.yml where the arguments name no playbook of their own."""
    program = Path(sys.executable).parent / "ansible-playbook"
    if not program.exists():
        raise LabError(f"{program} does not exist", "install what the lab needs: ./run setup")
    own = [word for word in arguments if word.endswith((".yml", ".yaml")) and not word.startswith(("-", "@"))]
    return [str(program), "--inventory", str(INVENTORY), *arguments, *([] if own else [str(SITE)])]


def playbook(where: Settings, arguments: Sequence[str]) -> int:
    """Run it on this terminal; gives ansible-playbook's exit code."""
    require_state(where)
    sys.stdout.flush()
    return subprocess.run(command(arguments), cwd=REPO, env=environment(where), check=False).returncode


_RECAP = re.compile(r"^(?P<host>\S+)\s*:\s*(?P<counts>(?:\w+=\d+\s*)+)$", re.MULTILINE)


def recap(output: str) -> dict[str, dict[str, int]]:
    """The figures of PLAY RECAP: host -> ok, changed, unreachable, failed, skipped, rescued, ignored."""
    _, _, last = output.rpartition("PLAY RECAP")
    return {
        match["host"]: {key: int(value) for key, value in (pair.split("=") for pair in match["counts"].split())}
        for match in _RECAP.finditer(last)
    }


def changes(output: str) -> dict[str, list[str]]:
    """Tasks that changed (or would change) something -> hosts, in order of appearance; handlers follow from tasks."""
    found: dict[str, list[str]] = {}
    task = ""
    for line in output.splitlines():
        if line.startswith("RUNNING HANDLER ["):
            task = ""
        elif line.startswith("TASK ["):
            task = line.split("[", 1)[1].rsplit("]", 1)[0]
        elif task and (match := re.match(r"changed: \[([^\]]+)]", line)):
            host = match[1].split(" -> ")[0]
            if host not in found.setdefault(task, []):
                found[task].append(host)
    return found
