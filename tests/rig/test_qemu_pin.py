# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pinning on a real kernel with control groups: four QEMU processes in scopes of qemu.slice, as Proxmox VE starts VMs.

Read back by other tools than ours: taskset, the control groups' files, systemctl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig
from tests.rig.playing import Played, etc, play, role

VMS = (101, 102, 103, 104)
VCPUS = {"4", "5", "6", "7", "8", "9", "10", "11"}
IO = "2,3"

# The scope is made by the same call of systemd that Proxmox VE makes, with the same properties; the process is called
# kvm, and its I/O thread has the name that is too long for Linux. -S: a guest that runs would only slow the test down.
START = """\
#!/bin/sh
set -eu
mkdir -p /run/qemu-server
ln -sf /usr/bin/qemu-system-x86_64 /run/qemu-server/kvm
rm -f "/run/qemu-server/$1.pid"
systemd-run --quiet --scope --unit="$1.scope" --slice=qemu.slice -p KillMode=process -p SendSIGKILL=no \\
    -p CPUWeight=100 /run/qemu-server/kvm -name "vm$1,debug-threads=on" -machine pc -S \\
    -accel tcg,thread=multi,tb-size=8 -smp 2 -m 16 -nodefaults -display none \\
    -object iothread,id=iothread-virtioscsi0 -qmp "unix:/run/qemu-server/$1.qmp,server=on,wait=off" \\
    -pidfile "/run/qemu-server/$1.pid" -daemonize
"""
STOP = """\
#!/bin/sh
for id in "$@"; do
    kill -9 "$(cat /run/qemu-server/$id.pid)" && systemctl stop $id.scope
    while systemctl is-active --quiet $id.scope; do sleep 0.1; done
done
"""
MASKS = """\
for id in 101 102 103 104; do
    for task in /proc/$(cat /run/qemu-server/$id.pid)/task/*; do
        echo "$id $(cat $task/comm | tr ' ' _) $(taskset -cp ${task##*/} | sed 's/.*: //')"
    done
done
"""


@pytest.fixture
def vms(rig: Rig, tmp_path: Path) -> Iterator[Rig]:
    """Four VMs that run."""
    for name, text in (("start", START), ("stop", STOP)):
        (tmp_path / name).write_text(text)
        rig.put(tmp_path / name, f"/root/vm-{name}")
    rig.must("chmod 755 /root/vm-start /root/vm-stop; for id in 101 102 103 104; do /root/vm-start $id; done")
    yield rig
    rig.must("/root/vm-stop 101 102 103 104; rm -rf /run/qemu-server /root/vm-start /root/vm-stop")


def masks(rig: Rig) -> list[tuple[str, str, str]]:
    """(VM, name of the thread, CPUs), as taskset shows them; QEMU's pool of workers comes and goes by itself."""
    rows = [line.split(maxsplit=2) for line in rig.must(MASKS).splitlines()]
    return sorted((vm, name, cpus) for vm, name, cpus in rows if not name.startswith("worker"))


def bring(rig: Rig, folder: Path, state: str = "present", *, check: bool = False) -> Played:
    """Plan, tools, hook and pinning, as level 2 does."""
    variables: dict[str, Any] = {
        "cpu_plan_state": state,
        "host_tools_state": state,
        "vm_hook_state": state,
        "qemu_pin_state": state,
        "qemu_pin_vms": [{"vmid": vmid} for vmid in VMS],
    }
    names = ["cpu_plan", "host_tools", "vm_hook", "qemu_pin"]
    ordered = names if state == "present" else names[::-1]
    tasks = [role(name, **{key: value for key, value in variables.items() if key.startswith(name)}) for name in ordered]
    return play(rig, folder, *tasks, check=check, result="qemu_pin_result" if state == "present" else "")


def test_four_vms_are_pinned_confined_restarted_watched_and_released(vms: Rig, tmp_path: Path) -> None:
    rig = vms
    before, files = masks(rig), etc(rig)

    foretold = bring(rig, tmp_path, check=True)
    assert masks(rig) == before and etc(rig) == files, "check mode has changed something"
    done = bring(rig, tmp_path)
    assert done.changed == foretold.changed > 0
    assert predicted(foretold.result) == predicted(done.result)
    pinned = masks(rig)
    check_pinned(pinned)
    for vmid in VMS:
        cpus = rig.must(f"cat /sys/fs/cgroup/qemu.slice/{vmid}.scope/cpuset.cpus").strip()
        assert cpus == "2-11", "the host's zone is not the VMs'"
        assert "AllowedCPUs=2-11" in rig.must(f"systemctl show {vmid}.scope -p AllowedCPUs").replace(" ", ",")
    assert rig.must("systemctl is-active organism-qemu-pin.service").strip() == "active"
    assert bring(rig, tmp_path).changed == 0

    # a restart: the drop-in confines the new scope by itself, the hook pins it before post-start returns
    rig.must("/root/vm-stop 102; /root/vm-start 102")
    assert {cpus for vm, _name, cpus in masks(rig) if vm == "102"} == {"2-11"}
    said = rig.must("/usr/local/sbin/organism-hook 102 post-start")
    assert "50-pin: VM 102: vCPU:CPU" in said
    assert masks(rig) == pinned, "a VM keeps its CPUs over a restart"

    # drift, found and corrected
    rig.must("taskset -acp 2-11 $(cat /run/qemu-server/103.pid)")
    assert "drifted" in rig.must("organism-qemu-pin status; true")
    rig.must("systemctl kill -s HUP organism-qemu-pin.service")
    rig.must("timeout 120 sh -c 'until organism-qemu-pin status > /dev/null; do sleep 0.5; done'")
    assert masks(rig) == pinned
    assert "VM 103: " in rig.must("journalctl -u organism-qemu-pin.service -o cat --no-pager | grep drifted")

    back = bring(rig, tmp_path, "absent")
    assert back.changed > 0
    assert masks(rig) == before
    assert etc(rig) == files
    for vmid in VMS:  # with the last limit systemd takes the controller away, and the file with it
        scope = f"/sys/fs/cgroup/qemu.slice/{vmid}.scope"
        assert rig.must(f"cd {scope} && ! test -e cpuset.cpus || cat {scope}/cpuset.cpus").strip() == ""
        assert rig.must(f"systemctl show {vmid}.scope -p AllowedCPUs").strip() == "AllowedCPUs="
    assert rig.must("ls /opt/organism /usr/local/sbin/organism-* /run/organism/pins 2> /dev/null; true").split() == []
    assert bring(rig, tmp_path, "absent").changed == 0


def predicted(result: dict[str, Any]) -> str:
    """What shall be, without what was read back and without QEMU's pool of workers, which comes and goes by itself."""
    threads = [
        {**thread, "now": None}
        for vm in result["vms"]
        for thread in vm["threads"]
        if thread["role"] in ("vcpu", "iothread", "main")
    ]
    return json.dumps([threads, [vm["vcpus"] for vm in result["vms"]], result["zones"]["vcpu"]], indent=1)


def check_pinned(rows: list[tuple[str, str, str]]) -> None:
    vcpus = [(vm, cpus) for vm, name, cpus in rows if name.startswith("CPU_")]
    assert {cpus for _vm, cpus in vcpus} == VCPUS and len(vcpus) == 8, "a CPU for each"
    assert {cpus for _vm, name, cpus in rows if not name.startswith("CPU_")} == {IO}
    assert any(name == "kvm" and cpus == IO for _vm, name, cpus in rows)
