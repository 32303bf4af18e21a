# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Half a minute of ``./run chaos SUITE=jobs``, each kind of fault once; and its checker fails on a false history."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.support import HANG, REPO, nats_server_binary

SEED = 11
KINDS = 11
"""As many faults as there are kinds that are drawn: each comes once."""


def chaos(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it leaves this machine's network and mounts."""
    return subprocess.run(
        [sys.executable, "-m", "chaos.jobs", *words],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": f"{REPO}/tests", "ORGANISM_NATS_SERVER": nats_server_binary()},
        capture_output=True,
        text=True,
        timeout=10 * HANG,
        check=False,
    )  # fmt: skip


def test_no_promise_is_broken_under_each_kind_of_fault(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("networks and disks of its own need root")
    size = ["--minutes", "0.5", "--jobs", "80", "--faults", str(KINDS), "--servers", "1", "--order", "strict"]
    done = chaos("--seed", str(SEED), *size, "--keep", str(tmp_path))
    if "this machine cannot" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[:4000]}"
    assert "80 submissions acknowledged of 80" in done.stdout
    assert "every promise was kept" in done.stdout

    [folder] = tmp_path.iterdir()
    assert chaos("--check", str(folder)).returncode == 0, "a kept history is judged alike"
    book = folder / "history.jsonl"
    lines = book.read_text().splitlines(keepends=True)
    lost = next(line for line in lines if json.loads(line)["what"] == "result")
    book.write_text("".join(line for line in lines if line != lost))
    judged = chaos("--check", str(folder))
    assert judged.returncode == 1
    assert f"{json.loads(lost)['task_id']} was acknowledged and has 0 results" in judged.stdout
