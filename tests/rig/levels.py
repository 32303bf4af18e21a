# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole levels on the rig: playing the product's own playbooks, and looking at the host with everybody's tools."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from rig.driver import REPO, Rig

LEVELS = "level1,level2,level3,level4"
POOLS = {
    "fast": "nvme-QEMU_NVMe_Ctrl_fast",
    "scratch": "scsi-0QEMU_QEMU_HARDDISK_scratch",
    "archive": "scsi-0QEMU_QEMU_HARDDISK_archive",
}
# What a tuned host differs in and a restored one must not: all of /etc and of the loader's folder, what the kernel
# has, what systemd has, what the drivers have. Counters and clocks among the sysctl values are left out by name; so are
# the masks of single interrupts, which irqbalance moves all the time on a host that is not tuned (test_irq has them).
# The kernel computes vm.*_reserve_kbytes at each boot from what is free then; ZFS writes zpool.cache at each import.
_CLOCKWORK = (
    "fs.dentry-state|fs.file-nr|fs.inode-nr|fs.inode-state|kernel.ns_last_pid|kernel.pty.nr|kernel.random|"
    "kernel.spl.kmem|kernel.spl.hostid|net.netfilter.nf_conntrack_count|fs.quota|kernel.tainted|kernel.slabinfo|"
    "vm.admin_reserve_kbytes|vm.user_reserve_kbytes"
)
_STATE = {
    "files": """
        find /etc /boot/grub /usr/local /opt -xdev -path /boot/grub/i386-pc -prune -o -printf '%p %y %m %u:%g %l\\n' |
            sort
        find /etc /usr/local /opt -type f ! -path /etc/zfs/zpool.cache -exec sha256sum {} + | sort -k 2
        grep -v '^#' /boot/grub/grub.cfg | sha256sum""",
    "sysctl": f"sysctl -a 2>&1 | grep -Ev '^({_CLOCKWORK})' | sort",
    "units": "systemctl list-unit-files --no-legend | grep -v transient | sort; systemctl --failed --no-legend --plain",
    "active": "systemctl list-units --state=active --type=service,timer,swap --no-legend --plain | awk '{print $1}' | "
    "grep -Ev '^(user@|session-|sshd@|user-runtime-dir@|apt-|e2scrub|man-db|dpkg-db|systemd-tmpfiles-clean)' | sort",
    "kernel": """
        cat /proc/cmdline | sed 's/BOOT_IMAGE=[^ ]* //'
        cat /sys/devices/system/cpu/isolated
        grep -H . /sys/kernel/mm/ksm/run /sys/kernel/mm/transparent_hugepage/* /proc/irq/default_smp_affinity
        grep -H . /sys/devices/system/cpu/cpu*/power/pm_qos_resume_latency_us
        grep -H . /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor /sys/module/pcie_aspm/parameters/policy
        grep -H . /sys/devices/system/cpu/cpufreq/boost
        for queue in /sys/block/*/queue; do
            echo $queue $(grep -o '\\[.*\\]' $queue/scheduler) $(cat $queue/read_ahead_kb); done
        grep -H . /sys/module/zfs/parameters/zfs_arc_m* /proc/sys/vm/nr_hugepages""",
    "network": """
        grep -rH . /sys/class/net/*/queues/*/[rx]ps_* /sys/class/net/*/queues/rx-*/rps_flow_cnt 2>&1
        for port in $(ls /sys/class/net | grep -v lo); do
            echo $port; ethtool -l $port 2>&1; ethtool -c $port 2>&1; ethtool -k $port | grep -v fixed
            tc -d qdisc show dev $port | sed 's/qdisc \\([a-z_]*\\) [0-9a-f]*:/qdisc \\1/; s/parent [0-9a-f]*:/parent /'
        done""",
    "datasets": "zfs get -H -o name,property,value,source all | grep -E '(local|received)$' | "
    "grep -v '/organism' | sort",  # datasets that we made stay: none is ever destroyed
    "swap": "swapon --show=NAME,SIZE,PRIO --noheadings --bytes",
}
Change = tuple[str, str]
# What the controller does by itself; tests/gates/test_level_budget.py has the same rule for tasks that are written.
_CONTROLLER = {"assert", "debug", "fail", "set_fact", "validate_argument_spec", "meta"} | {
    f"{verb}_{what}" for verb in ("include", "import") for what in ("role", "tasks", "playbook", "vars")
}


@dataclass(frozen=True)
class Ran:
    """``changes``: what each task changed or foretold, by its name and place: what comes after it, as text.

    ``tasks``: how many of each play went to a host: those that were skipped, and what the controller does by itself,
    cost no way there.
    """

    changes: dict[Change, str]
    tasks: dict[str, int]
    said: str
    failed: dict[str, str]


def make_pools(rig: Rig) -> None:
    for name, disk in POOLS.items():
        rig.must(f"zpool list {name} >/dev/null 2>&1 || zpool create -f {name} /dev/disk/by-id/{disk}")


def state(rig: Rig) -> dict[str, list[str]]:
    """The host as others' tools see it, by subject."""
    return {name: rig.ssh(script).stdout.splitlines() for name, script in _STATE.items()}


def differences(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[str]]:
    """Lines that came (+) or went (-), by subject; a subject without any is left out."""
    found = {}
    for name, lines in before.items():
        gone, came = set(lines) - set(after[name]), set(after[name]) - set(lines)
        if gone or came:
            found[name] = sorted([f"- {line}" for line in gone] + [f"+ {line}" for line in came])
    return found


def play(rig: Rig, playbook: str, *words: str, fails: bool = False, **variables: Any) -> Ran:
    """One of the product's playbooks, with what each of its tasks did."""
    words = (*words, "--diff", "-e", json.dumps(variables))
    kept = {name: os.environ.get(name) for name in ("ANSIBLE_STDOUT_CALLBACK", "ANSIBLE_COLLECTIONS_PATH")}
    os.environ["ANSIBLE_STDOUT_CALLBACK"] = "ansible.posix.json"
    os.environ["ANSIBLE_COLLECTIONS_PATH"] = str(rig.where.cache / "collections")
    try:
        done = rig.play(REPO / "playbooks" / playbook, *words, timeout=2400)
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    assert "{" in done.stdout, done.stdout + done.stderr
    ran = _read(json.loads(done.stdout[done.stdout.index("{") :]), done.stdout)
    assert (done.returncode != 0) is fails, ran.failed or done.stdout[-4000:] + done.stderr[-2000:]
    return ran


def _read(told: dict[str, Any], said: str) -> Ran:
    changes: dict[Change, str] = {}
    tasks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for part in told["plays"]:
        name = part["play"]["name"]
        tasks[name] = tasks.get(name, 0) + sum(map(_went_to_a_host, part["tasks"]))
        for task in part["tasks"]:
            for result in task["hosts"].values():
                if result.get("changed"):
                    place = f"{name}: {task['task']['name']}"
                    number = sum(known == place for known, _at in changes)
                    changes[place, str(number)] = _after(result.get("diff"))
                if result.get("failed") or result.get("unreachable"):
                    failed[f"{name}: {task['task']['name']}"] = str(result.get("msg", result))
    return Ran(changes, tasks, said, failed)


def _went_to_a_host(task: dict[str, Any]) -> bool:
    return any(
        not result.get("skipped") and str(result["action"]).rpartition(".")[2] not in _CONTROLLER
        for result in task["hosts"].values()
    )


def _after(diff: Any) -> str:
    """What a difference leads to, without the second in which a level was finished."""
    parts = diff if isinstance(diff, list) else [diff]
    text = json.dumps([part.get("after") for part in parts if part], indent=1)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "then", text)


def cpus(text: str) -> set[int]:
    """A kernel's CPU list ("0-1,4")."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _dash, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def zones(rig: Rig) -> dict[str, set[int]]:
    """The plan as its file has it."""
    plan = json.loads(rig.must("cat /etc/organism/cpu_plan.json"))
    return {name: set(plan[name]) for name in ("host", "vcpu", "io")}
