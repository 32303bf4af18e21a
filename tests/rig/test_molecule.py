# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The scenario of molecule/rig from create to destroy, as `./run molecule test -s rig` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rig.config import settings

REPO = Path(__file__).resolve().parents[2]
HANG_GUARD = 3 * 3600  # s: two plays of four levels, a reboot and a rollback, emulated


@pytest.mark.whole
def test_the_scenario_passes_and_leaves_no_machine(able: None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "molecule", "test", "--scenario-name", "rig"],
        cwd=REPO,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    assert not settings().named("molecule").run.exists()
