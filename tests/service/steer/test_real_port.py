# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Steering on a real kernel's network stack, in namespaces of its own: queues, channels, offloads, events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("in_namespace.py")
REPO = Path(__file__).resolve().parents[3]


def inside(folder: Path, case: str) -> dict[str, Any]:
    if os.geteuid() != 0:
        pytest.skip("needs root for a network namespace")
    make = ["unshare", "--net", "--mount", "sh", "-c"]
    probe = subprocess.run(
        [*make, "mount -t sysfs none /sys && ip link add v0 type veth peer name v1"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"no network namespace with sysfs and veth here: {probe.stderr.decode().strip()}")
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, str(SCRIPT), str(folder), case],
        env={**os.environ, "PYTHONPATH": str(REPO / "runtime/src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def mask(cpus: set[int]) -> int:
    return sum(1 << cpu for cpu in cpus)


def test_a_port_is_steered_read_back_and_restored(tmp_path: Path) -> None:
    result = inside(tmp_path, "library")
    every = mask(os.sched_getaffinity(0))
    assert int(result["held"]["rps_cpus"].replace(",", ""), 16) == every
    assert int(result["held"]["xps_cpus"].replace(",", ""), 16) == every
    assert result["held"]["rps_flow_cnt"] == "4096"
    assert result["queues"] == ["rx-0", "rx-1", "tx-0", "tx-1"]
    # a veth has no LRO to switch on: told, and not a change
    assert "lro" in result["unsupported"]["offload/lro"] and "lro" not in result["done"]
    assert "channels/rx: 4 -> 2" in result["done"] and "offload/gro: false -> true" in result["done"]
    assert result["again"] == "nothing to change"
    assert len(result["queues_back"]) == 8
    assert int(result["rps_back"].replace(",", ""), 16) == 0
    assert not result["record"]


def test_the_keeper_hears_of_new_queues_and_steers_them(tmp_path: Path) -> None:
    result = inside(tmp_path, "keeper")
    assert result["ready"].startswith("READY=1")
    assert int(result["first"].replace(",", ""), 16) == int(result["second"].replace(",", ""), 16) != 0
    # an event brought it (the next look without one is an hour away), and the log says which
    assert "(event: " in result["heard"]
    before, after = result["passes"]
    assert (before["start"], after["drift"]) == (1, 0) and after["event"] >= 1
    assert result["code"] == 0 and not result["reports_left"] and result["problems"] == []
