# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The CPU plan and the locks of level 4 on a real kernel: foretold, done, seen by other tools, kept, taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig
from tests.rig.playing import etc, module, play, role

PLAN = "/etc/organism/cpu_plan.json"
DMA = "od -An -td4 -N4 /dev/cpu_dma_latency"
# the kernel's own values, by cat; and whether systemd knows the keeper
SEEN = """
grep . /sys/devices/system/cpu/cpufreq/policy*/scaling_governor
grep . /sys/devices/system/cpu/cpu*/power/pm_qos_resume_latency_us
cat /sys/module/pcie_aspm/parameters/policy
systemctl show --property=LoadState,ActiveState,UnitFileState organism-dma-latency.service
find /var/lib/organism/earlier /run/organism/reboot-required.d -type f 2>/dev/null | sort
"""
TOKENS = (
    "intel_idle.max_cstate=0",
    "processor.max_cstate=1",
    "pcie_aspm.policy=performance",
    "nvme_core.default_ps_max_latency_us=0",
)
BOTH = (role("cpu_plan"), role("power"))


def held(rig: Rig) -> int:
    return int(rig.must(DMA))


def locked(rig: Rig) -> None:
    governors = rig.must("cat /sys/devices/system/cpu/cpufreq/policy*/scaling_governor").split()
    assert governors and set(governors) == {"performance"}
    plan = json.loads(rig.must(["cat", PLAN]))
    limits = rig.must("grep . /sys/devices/system/cpu/cpu*/power/pm_qos_resume_latency_us").split()
    for path, limit in (line.split(":") for line in limits):
        cpu = int(path.split("/")[5].removeprefix("cpu"))
        assert (int(limit) >= 1) == (cpu in plan["vcpu"]), path
    assert "[performance]" in rig.must("cat /sys/module/pcie_aspm/parameters/policy")
    assert held(rig) == 0
    shown = rig.must("systemctl show --property=ActiveState,UnitFileState,SubState organism-dma-latency.service")
    assert set(shown.split()) == {"ActiveState=active", "UnitFileState=enabled", "SubState=running"}


@pytest.mark.fast
def test_zones_are_whole_cores_of_this_kernel(rig: Rig, tmp_path: Path) -> None:
    told = play(rig, tmp_path, module("cpu_plan"), check=True, result="said.plan").result
    assert play(rig, tmp_path, role("cpu_plan")).changed == 1
    plan = json.loads(rig.must(["cat", PLAN]))
    assert plan == told
    assert sorted(plan["host"] + plan["vcpu"] + plan["io"]) == list(range(12))
    listed = rig.must("lscpu --parse=CPU,CORE | grep -v '^#'").split()  # util-linux's own reading of the topology
    cores: dict[str, set[int]] = {}
    for cpu, core in (line.split(",") for line in listed):
        cores.setdefault(core, set()).add(int(cpu))
    assert len(cores) == 6
    for siblings in cores.values():
        assert sum(bool(siblings & set(plan[zone])) for zone in ("host", "vcpu", "io")) == 1
    assert play(rig, tmp_path, role("cpu_plan")).changed == 0
    refused = play(
        rig, tmp_path, role("cpu_plan", cpu_plan_host_cpus="0", cpu_plan_io_cpus="1", cpu_plan_force=False), fails=True
    )
    assert "the core of CPUs 0-1 is split" in refused.said
    play(rig, tmp_path, role("cpu_plan", cpu_plan_state="absent"))
    assert rig.must(f"test -e {PLAN} && echo there || echo gone").strip() == "gone"


def test_locks_are_foretold_done_kept_and_taken_back(rig: Rig, tmp_path: Path) -> None:
    rig.must("mkdir -p /opt/organism")
    before, seen = etc(rig), rig.must(SEEN)
    foretold = play(rig, tmp_path, *BOTH, check=True, result="power_settings_result.settings")
    assert (etc(rig), rig.must(SEEN)) == (before, seen)
    done = play(rig, tmp_path, *BOTH, result="power_settings_result.settings")
    assert wanted(done.result) == wanted(foretold.result)
    assert done.changed == foretold.changed
    locked(rig)
    coming = rig.must("grep -m1 -o 'linux.*vmlinuz.*' /boot/grub/grub.cfg").split()
    assert all(coming.count(token) == 1 for token in TOKENS)
    assert play(rig, tmp_path, *BOTH).changed == 0
    play(rig, tmp_path, role("power", power_state="absent"), role("cpu_plan", cpu_plan_state="absent"))
    assert etc(rig) == before
    assert rig.must(SEEN) == seen
    assert held(rig) > 0


def wanted(settings: list[dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(row["kind"], row["key"], row["wanted"]) for row in settings if row["kind"] in ("sysfs", "module")]


def test_the_keeper_comes_back_when_it_is_killed_and_lets_go_when_it_is_stopped(rig: Rig, tmp_path: Path) -> None:
    play(rig, tmp_path, *BOTH)
    first = rig.must("systemctl show --property=MainPID --value organism-dma-latency.service").strip()
    rig.must(f"kill -KILL {first}")
    rig.must(
        "timeout 60 sh -c 'until systemctl is-active -q organism-dma-latency.service "
        f'&& test "$(systemctl show --property=MainPID --value organism-dma-latency.service)" != {first}; '
        "do sleep 0.2; done'"
    )
    assert held(rig) == 0
    rig.must("systemctl stop organism-dma-latency.service")
    assert held(rig) > 0
    play(rig, tmp_path, role("power", power_state="absent"), role("cpu_plan", cpu_plan_state="absent"))


def test_polling_for_ever_is_refused_where_nobody_would_notice_the_heat(rig: Rig, tmp_path: Path) -> None:
    before = etc(rig)
    refused = play(rig, tmp_path, role("power", power_idle_poll=True, power_vcpu_cpus="2-5"), fails=True)
    assert "shows no temperature of its processor" in refused.said
    assert etc(rig) == before


@pytest.mark.whole
def test_after_a_reboot_all_of_it_holds(rig: Rig, tmp_path: Path) -> None:
    play(rig, tmp_path, *BOTH)
    rig.reboot()
    line = rig.must("cat /proc/cmdline").split()
    assert all(line.count(token) == 1 for token in TOKENS)
    locked(rig)
    assert rig.must("cat /sys/module/nvme_core/parameters/default_ps_max_latency_us").strip() == "0"
    assert not rig.must("ls -A /run/organism/reboot-required.d 2>/dev/null | cat").strip()
    assert play(rig, tmp_path, *BOTH).changed == 0
    rig.restore()
