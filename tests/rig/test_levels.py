# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Levels 1 to 4 as a user plays them: foretold, done, kept, seen by other tools, both profiles, a boot, all taken back.

The tests of this file are one story on one machine and build on each other; each begins where the last one ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from rig.driver import Rig
from tests.rig import levels
from tests.rig.steering import interrupts

pytestmark = pytest.mark.whole

RISKY = {
    "organism_unsafe_mitigations_off": True,
    "zfs_layout_unsafe_sync_disabled_on": ["scratch/organism/tmp"],
    "nic_steering_offloads": {"gro": False},
}


# Level 3 closes queues; what level 2 has set on them by then goes with them, and in a check level 2 has set nothing.
SEQUEL = "nic_steering : present | Set channels, coalescing, offloads and queueing discipline"
# Until it is masked, irqbalance goes on moving interrupts: which of them are elsewhere differs from minute to minute.
MOVING = "irq_affinity : present | Steer all interrupts"


@dataclass
class Story:
    rig: Rig
    before: dict[str, list[str]] = field(default_factory=dict)

    def site(self, *words: str, **variables: object) -> levels.Ran:
        return levels.play(self.rig, "site.yml", "--tags", f"level0,{levels.LEVELS}", *words, **variables)


@pytest.fixture(scope="module")
def story(able: None) -> Iterator[Story]:
    with Rig("levels") as rig:
        levels.make_pools(rig)
        rig.reboot()  # the snapshot's devices were plugged in while it ran; from here on it is a machine that booted
        yield Story(rig)


def test_a_check_foretells_what_the_run_does(story: Story) -> None:
    levels.play(story.rig, "site.yml", "--tags", "level0")  # the baseline, which no rollback takes back
    story.before = levels.state(story.rig)
    foretold = story.site("--check")
    assert levels.differences(story.before, levels.state(story.rig)) == {}
    done = story.site()
    assert list(done.changes) == list(foretold.changes)
    for change, after in done.changes.items():
        if change[0].endswith(MOVING):
            said, did = (_values(text) for text in (foretold.changes[change], after))
            assert {name: said[name] for name in said.keys() & did} == {name: did[name] for name in said.keys() & did}
        elif not change[0].endswith(SEQUEL):
            assert foretold.changes[change] == after, change


def _values(after: str) -> dict[str, object]:
    """What a module's difference leads to, by name."""
    return {name: value for part in json.loads(after) if part for name, value in json.loads(part).items()}


def _common(rig: Rig) -> None:
    """What both profiles have, by the kernel's files and Debian's tools."""
    zones = levels.zones(rig)
    assert zones["host"] | zones["vcpu"] | zones["io"] == set(range(12)) and 0 in zones["host"]
    for name, value in {"vm.swappiness": "10", "vm.dirty_ratio": "15"}.items():
        assert rig.must(f"sysctl -n {name}").strip() == value
    disks = [line.split() for line in rig.must("lsblk -dnro NAME,ROTA,SCHED").splitlines()]
    for name, rotating, *scheduler in disks:
        if name.startswith(("sd", "nvme", "vd")):
            assert scheduler == [{"0": "none", "1": "mq-deadline"}[rotating]], name
    assert rig.must("zfs get -H -o value atime fast/organism/base").strip() == "off"
    # packets and interrupts
    port = rig.must("ls /sys/class/net/vmbr0/brif | head -1").strip()
    virtio = rig.must(f"basename $(readlink -f /sys/class/net/{port}/device)").strip()
    assert int(rig.must(f"cat /sys/class/net/{port}/queues/rx-0/rps_cpus").replace(",", ""), 16) == sum(
        1 << cpu for cpu in zones["io"]
    )
    seen = {name: levels.cpus(effective) for name, (_mask, effective) in interrupts(rig).items() if effective}
    assert any(name.startswith(f"{virtio}-input") for name in seen)
    for name, effective in seen.items():
        if name.startswith((f"{virtio}-input", f"{virtio}-output", "nvme0q0")):
            assert effective <= zones["io"], name
    shown = rig.must("systemctl show irqbalance.service -p UnitFileState -p ActiveState").split()
    assert set(shown) == {"ActiveState=inactive", "UnitFileState=masked"}
    # power
    governors = rig.must("cat /sys/devices/system/cpu/cpufreq/policy*/scaling_governor").split()
    assert set(governors) == {"performance"}
    assert int(rig.must("od -An -t d4 /dev/cpu_dma_latency")) == 0
    for unit in ("organism-steer", "organism-dma-latency", "organism-qemu-pin"):
        assert rig.ssh(["systemctl", "is-active", unit]).stdout.strip() == "active", unit
    assert rig.must("systemctl --failed --no-legend --plain").strip() == ""


def test_other_tools_see_the_elastic_host(story: Story) -> None:
    rig = story.rig
    _common(rig)
    assert rig.must("cat /sys/kernel/mm/ksm/run").strip() == "1"
    name, kind, _size, _used, priority = rig.must("swapon --show --noheadings --bytes").split()
    assert (name, kind, priority) == ("/dev/zram0", "partition", "100")
    assert rig.must("awk '$1 == \"c_max\" {print $3}' /proc/spl/kstat/zfs/arcstats").strip() == str(512 << 20)
    assert rig.must("cat /sys/devices/system/cpu/isolated").strip() == ""


def test_one_reboot_by_consent_brings_the_hard_profile_with_all_that_is_risky(story: Story) -> None:
    rig = story.rig
    boot = rig.must("cat /proc/sys/kernel/random/boot_id")
    assert story.site(organism_profile="hard", **RISKY).changes
    assert rig.must("cat /proc/sys/kernel/random/boot_id") == boot, "a reboot without consent"
    levels.play(rig, "reboot.yml", organism_reboot="auto")
    assert rig.must("cat /proc/sys/kernel/random/boot_id") != boot
    assert rig.must("find /run/organism/reboot-required.d -type f 2>/dev/null; true").strip() == ""
    _hard(rig)


def test_the_second_run_after_it_changes_nothing(story: Story) -> None:
    assert story.site(organism_profile="hard", **RISKY).changes == {}
    _hard(story.rig)


def _hard(rig: Rig) -> None:
    zones = levels.zones(rig)
    _common(rig)
    line = rig.must("cat /proc/cmdline").split()
    for token in ("mitigations=off", "processor.max_cstate=1", "pcie_aspm.policy=performance"):
        assert line.count(token) == 1, line
    isolated = [word for word in line if word.startswith("isolcpus=")]
    assert len(isolated) == 1
    assert levels.cpus(rig.must("cat /sys/devices/system/cpu/isolated")) == zones["vcpu"]
    assert "[never]" in rig.must("cat /sys/kernel/mm/transparent_hugepage/enabled")
    assert rig.must("cat /sys/kernel/mm/ksm/run").strip() in ("0", "2")
    assert rig.must("awk '$1 == \"c_max\" {print $3}' /proc/spl/kstat/zfs/arcstats").strip() == str(256 << 20)
    assert rig.must("zfs get -H -o value sync scratch/organism/tmp").strip() == "disabled"
    for path in rig.must("grep -l . /sys/devices/system/cpu/vulnerabilities/spectre_v2").split():
        assert "Mitigation" not in rig.must(["cat", path])


def test_the_audit_finds_every_effect(story: Story) -> None:
    told = levels.play(story.rig, "validate.yml", organism_profile="hard", **RISKY)
    assert told.failed == {} and told.changes == {}


def test_panic_takes_all_that_is_risky_off_at_once_and_finds_nothing_to_do_then(story: Story) -> None:
    rig = story.rig
    boot = rig.must("cat /proc/sys/kernel/random/boot_id")
    told = levels.play(rig, "panic.yml")
    assert told.changes
    assert rig.must("cat /proc/sys/kernel/random/boot_id") == boot
    assert rig.must("zfs get -H -o value sync scratch/organism/tmp").strip() == "standard"
    assert int(rig.must("od -An -t d4 /dev/cpu_dma_latency")) > 0
    coming = rig.must("grep -m1 -o 'linux.*vmlinuz.*' /boot/grub/grub.cfg").split()
    assert not [word for word in coming if word.startswith(("mitigations=", "isolcpus=", "processor.max_cstate="))]
    assert "mitigations" in told.said, "what only a reboot undoes is listed"
    assert levels.play(rig, "panic.yml").changes == {}


def test_back_to_elastic_is_its_full_state(story: Story) -> None:
    story.site(organism_profile="elastic")
    assert story.site(organism_profile="elastic").changes == {}
    levels.play(story.rig, "reboot.yml", organism_reboot="auto")
    test_other_tools_see_the_elastic_host(story)


def test_the_rollback_leaves_the_very_earlier_host(story: Story) -> None:
    rig = story.rig
    levels.play(rig, "rollback.yml")
    assert levels.play(rig, "rollback.yml").changes == {}
    levels.play(rig, "reboot.yml", organism_reboot="auto")
    rig.ssh("systemctl is-system-running --wait")
    assert levels.differences(story.before, levels.state(rig)) == {}
