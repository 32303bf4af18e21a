# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles played on this machine in a mount namespace that hides the folders they write: nothing of it is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, hidden: Sequence[str], lines: Sequence[str], outputs: dict[str, Path], *, hang: float) -> None:
    """Carries out lines of shell with ``hidden`` empty; they end with 0, or the test fails with all ``outputs``."""
    script = ["set -eu", *(f"mkdir -p {path}; mount -t tmpfs none {path}" for path in hidden), *lines]
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(_collection(tmp_path)),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_HOME": str(tmp_path / "ansible"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    made = [path for path in hidden if not Path(path).exists()]
    try:
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", "\n".join(script)],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=hang,
            check=False,
        )
    finally:
        for path in made:  # mount points, empty on the machine itself
            Path(path).rmdir()
    told = "\n".join(f"--- {name}\n{path.read_text()}" for name, path in outputs.items() if path.exists())
    assert done.returncode == 0, f"{done.stderr}\n{told[-6000:]}"


def _collection(tmp_path: Path) -> Path:
    """A copy, as an installed collection is one: the host's tools are packed from what lies beside the plugins."""
    top = tmp_path / "collections"
    here = top / "ansible_collections/organism/proxmox"
    for name in ("plugins", "roles", "runtime", "meta"):
        shutil.copytree(
            REPO / name, here / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    return top


def tasks(path: Path) -> dict[str, bool]:
    """Task to whether it changed something, by a play's own report."""
    text = path.read_text()
    report = json.loads(text[text.index("{\n") :])
    return {
        task["task"]["name"]: bool(task["hosts"]["localhost"].get("changed"))
        for each in report["plays"]
        for task in each["tasks"]
    }


def changes(result: dict[str, bool]) -> list[str]:
    return [name for name, changed in result.items() if changed]
