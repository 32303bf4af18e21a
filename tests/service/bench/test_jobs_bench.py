# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""``./run bench jobs`` still measures: a short look, whose figures are not judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from service.support import REPO, nats_server_binary

HANG = 300.0


def test_it_prints_a_table_and_keeps_what_it_measured(tmp_path: Path) -> None:
    env = {**os.environ, "ORGANISM_NATS_SERVER": nats_server_binary(), "ORGANISM_CACHE": str(tmp_path)}
    env["PYTHONPATH"] = str(REPO / "tests")
    words = ["--quick", "--only", "speed", "--peers", "", "--jobs", "60", "--singles", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.jobs", *words], env=env, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("speed") and "jobs/s" in line for line in lines), done.stdout
    assert any("no-op jobs/s in batches" in line and "goal" in line for line in lines), done.stdout
    [kept] = (tmp_path / "bench").glob("jobs-*.json")
    result = json.loads(kept.read_text())
    assert result["quick"] and result["machine"]["cores"] >= 1
    row = result["tables"]["speed"]["maestro"]
    assert all(row[key] > 0 for key in ("rate", "p50", "p99", "cpu"))
