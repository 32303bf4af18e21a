# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The simulated node under systemd: its VMs are QEMU in scopes of qemu.slice, as Proxmox VE's are."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rig.driver import Rig

REPO = Path(__file__).resolve().parents[2]
NODE = "PATH=/root/node/bin:$PATH"


@pytest.fixture
def node(rig: Rig, tmp_path: Path) -> Iterator[Rig]:
    """A rig with a simulated node on it."""
    archive = tmp_path / "pvesim.tar"
    subprocess.run(["tar", "-C", REPO / "tests", "--exclude=__pycache__", "-cf", archive, "pvesim"], check=True)
    rig.put(archive, "/root/pvesim.tar")
    rig.must("mkdir -p /root/sim && tar -C /root/sim -xf /root/pvesim.tar")
    serve = "python3 -m pvesim --dir /root/node --port 0 --qemu"
    rig.must(f"systemd-run --quiet --unit=pvesim --working-directory=/root/sim {serve}")
    rig.must(f"timeout 120 sh -c 'until {NODE} qm list >/dev/null 2>&1; do sleep 0.5; done'")
    yield rig
    rig.must("systemctl stop pvesim; rm -rf /root/node /root/sim /root/pvesim.tar")


def test_a_vm_is_qemu_in_a_scope_of_its_slice_until_it_is_stopped(node: Rig) -> None:
    node.must(f"{NODE} qm create 100 --name tenant --cores 2 --memory 512 --balloon 0")
    assert node.ssh("systemctl is-active qemu.slice").stdout.strip() == "inactive"
    node.must(f"{NODE} qm start 100", timeout=300)
    pid = node.must("cat /root/node/run/qemu-server/100.pid").strip()
    assert node.must(f"cat /proc/{pid}/cgroup").strip() == "0::/qemu.slice/100.scope"
    assert node.must(f"basename $(readlink /proc/{pid}/exe)").strip() == "qemu-system-x86_64"
    shown = node.must("systemctl show -P Slice -P KillMode -P SendSIGKILL -P Description 100.scope").split("\n")
    assert shown[:4] == ["qemu.slice", "process", "no", "Proxmox VE VM 100"]
    threads = node.must(f"cat /proc/{pid}/task/*/comm")
    assert threads.count("CPU ") == 2  # a thread for each core
    assert "100" in node.must(f"{NODE} qm list") and "running" in node.must(f"{NODE} qm status 100")

    node.must(f"{NODE} qm stop 100", timeout=300)
    assert node.ssh(f"test -d /proc/{pid}").returncode != 0
    node.must("timeout 60 sh -c 'while systemctl is-active -q 100.scope; do sleep 0.2; done'")
    assert "stopped" in node.must(f"{NODE} qm status 100")
