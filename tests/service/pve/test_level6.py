# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbook level6.yml as a whole on a simulated node, and its rollback: foretold, done, nothing twice, given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from service.pve.level6_inside import SHOWN, WRITTEN

TESTS = Path(__file__).resolve().parents[2]
HANG_S = 7200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a mount namespace"),
    pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="systemd is the manager here (the rig does that)"),
]


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    made = [path for path in (*WRITTEN, *SHOWN.values()) if not Path(path).exists()]
    for path in made:
        Path(path).mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(prefix="level6-") as top:
            done = subprocess.run(
                [
                    *("unshare", "--mount", "--propagation", "private"),
                    *(sys.executable, "-m", "service.pve.level6_inside", top),
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=HANG_S,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
    finally:
        for path in made:  # mount points, empty on the machine itself
            Path(path).rmdir()
    assert done.returncode == 0, done.stdout + done.stderr
    steps: dict[str, Any] = json.loads(done.stdout)
    for name, step in steps.items():
        assert not step.get("failed"), (name, step["failed"])
        assert step.get("code", 0) == 0, (name, step)
    return steps


def test_check_mode_foretells_and_changes_nothing(told: dict[str, Any]) -> None:
    assert told["foretold"]["node"] == told["before"]["node"]
    # what can be started, and what level may be called finished, is known only when there is a VM
    missing = [name for name in told["done"]["changed"] if name not in told["foretold"]["changed"]]
    assert [name for name in missing if "Start the VM" not in name] == [], missing
    assert set(told["foretold"]["changed"]) <= set(told["done"]["changed"])


def test_it_makes_a_vm_that_runs_guarded(told: dict[str, Any]) -> None:
    node = told["done"]["node"]
    assert node["running"] == ["200"]
    config = node["vms"]["200"]
    assert "hostpci0: mapping=gpu-0000-01-00,pcie=1" in config and "hostpci1: mapping=gpu-0000-02-00,pcie=1" in config
    assert "hookscript: local:snippets/" in config and "affinity: 1,7" in config
    assert "hookscript: local:snippets/" in node["vms"]["150"], "every VM asks"
    assert [Path(path).name for path in node["entries"]] == ["90-guard", "10-guard"]
    assert node["levels"] == ["4.json", "6.json"]


@pytest.mark.parametrize("step", ["again", "again foretold"])
def test_a_second_run_changes_nothing(told: dict[str, Any], step: str) -> None:
    assert told[step]["changed"] == []
    assert told[step]["node"] == told["done"]["node"]


def test_the_rollback_gives_back_what_the_level_took(told: dict[str, Any]) -> None:
    assert told["back foretold"]["node"] == told["done"]["node"]
    assert told["back foretold"]["changed"] != []
    node = told["back"]["node"]
    assert "hostpci" not in node["vms"]["200"], "the VM and its volumes stay, without cards"
    assert node["mappings"].strip() == told["before"]["node"]["mappings"].strip()
    assert node["entries"] == [] and node["levels"] == ["4.json"]
    assert told["back again"]["changed"] == []
    assert told["back again"]["node"] == node
