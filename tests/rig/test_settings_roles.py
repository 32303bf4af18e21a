# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles memory, io_scheduler and profile on the rig: foretold, done, kept, seen by other tools, taken back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig

PLAYBOOK = Path(__file__).parent / "plays/settings.yml"
SYSCTL = {
    "vm.swappiness": "10",
    "vm.vfs_cache_pressure": "100",
    "vm.dirty_background_ratio": "5",
    "vm.dirty_ratio": "15",
}
DISKS = "lsblk -dnro NAME,TYPE,ROTA,SCHED"
# /etc with owners and modes (the boot loader's menu is made anew), and all that the roles touch
SNAPSHOT = f"""
find /etc /boot/grub/grub.cfg -printf '%p %y %m %u:%g %l\\n' | sort
find /etc -type f -exec sha256sum {{}} + | sort -k2
grep -v '^#' /boot/grub/grub.cfg | sha256sum
sysctl {" ".join(SYSCTL)} vm.nr_hugepages
grep . /sys/kernel/mm/ksm/run /sys/kernel/mm/transparent_hugepage/enabled
{DISKS}
swapon --show=NAME,SIZE,PRIO --noheadings --bytes
systemctl show --property=Id,UnitFileState,ActiveState fstrim.timer dev-zram0.swap systemd-zram-setup@zram0.service
find /var/lib/organism/earlier /run/organism/reboot-required.d -type f 2>/dev/null | sort
"""

Play = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def play(rig: Rig) -> Iterator[Play]:
    """Runs the roles; the results of the tasks that said something, by the tasks' names."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ANSIBLE_STDOUT_CALLBACK", "ansible.posix.json")
    # a cache that is not the checkout's has the collection all the same
    patch.setenv("ANSIBLE_COLLECTIONS_PATH", str(rig.where.cache / "collections"))

    def run(*words: str, fails: bool = False, **variables: Any) -> dict[str, dict[str, Any]]:
        done = rig.play(PLAYBOOK, "--diff", "-e", json.dumps(variables), *words)
        assert "{" in done.stdout, done.stdout + done.stderr
        told = json.loads(done.stdout[done.stdout.index("{") :])
        tasks = [task for play in told["plays"] for task in play["tasks"]]
        results = {task["task"]["name"]: next(iter(task["hosts"].values())) for task in tasks if task["hosts"]}
        failed = {name: result["msg"] for name, result in results.items() if result.get("failed")}
        assert bool(failed) is fails, failed
        return results

    yield run
    patch.undo()


def changes(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the tasks changed, or foretold: their differences by name."""
    return {name: result.get("diff") for name, result in results.items() if result.get("changed")}


def result(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [value for task, value in results.items() if task.endswith(name)]
    return found


SETTINGS = "Set sysctl values, compressed swap, page merging and hugepages"


def test_elastic_is_foretold_done_kept_and_taken_back(rig: Rig, play: Play) -> None:
    before = rig.must(SNAPSHOT)
    foretold = play("--check")
    assert rig.must(SNAPSHOT) == before
    done = play()
    assert changes(done) == changes(foretold)
    _memory_as_wanted(rig)
    _disks_as_wanted(rig)
    assert json.loads(rig.must("cat /etc/organism/profile.json"))["profile"] == "elastic"
    again = play()
    assert changes(again) == {}
    assert changes(play("--check", organism_state="absent")) != {}
    play(organism_state="absent")
    assert rig.must(SNAPSHOT).splitlines() == before.splitlines()


def _memory_as_wanted(rig: Rig) -> None:
    for name, value in SYSCTL.items():
        assert rig.must(f"sysctl -n {name}").strip() == value
    total = int(rig.must("awk '/^MemTotal/ {print $2}' /proc/meminfo")) * 1024
    name, kind, size, _, priority = rig.must("swapon --show --noheadings --bytes").split()
    assert (name, kind, priority) == ("/dev/zram0", "partition", "100")
    assert abs(int(size) - total * 0.30) < 4 << 20
    assert rig.must("zramctl --noheadings --output ALGORITHM /dev/zram0").strip() == "zstd"
    assert rig.must("cat /sys/kernel/mm/ksm/run").strip() == "1"


def _disks_as_wanted(rig: Rig) -> None:
    """By lsblk's own reading of the flag and of the scheduler."""
    rows = [line.split() for line in rig.must(DISKS).splitlines()]
    disks = [row for row in rows if row[1] == "disk" and not row[0].startswith(("zram", "zd"))]
    assert {rotating for _, _, rotating, *_ in disks} == {"0", "1"}, "the rig has disks of both kinds"
    for name, _, rotating, *scheduler in disks:
        assert scheduler == [{"0": "none", "1": "mq-deadline"}[rotating]], name


def test_udev_sets_the_schedulers_when_a_disk_appears(rig: Rig, play: Play) -> None:
    before = rig.must(DISKS)
    play("--tags", "io_scheduler")
    rig.must(
        "for disk in $(lsblk -dnro NAME,ROTA,TYPE | awk '/ 0 disk/ {print $1}' | grep -v zram); do "
        "echo mq-deadline > /sys/block/$disk/queue/scheduler; done"
    )
    rig.must(
        "for flag in $(grep -lx 1 /sys/block/[sv]d*/queue/rotational); do echo none > ${flag%rotational}scheduler; done"
    )
    rig.must("udevadm trigger --action=add --settle --subsystem-match=block")
    _disks_as_wanted(rig)
    assert not rig.must("udevadm verify /etc/udev/rules.d/60-organism-io.rules 2>&1 | grep -i 'warn\\|error' | cat")
    play("--tags", "io_scheduler", organism_state="absent")
    assert rig.must(DISKS) == before


def test_a_changed_size_of_the_swap_counts_at_once(rig: Rig, play: Play) -> None:
    play("--tags", "memory")
    play("--tags", "memory", memory_zram_percent=10)
    total = int(rig.must("awk '/^MemTotal/ {print $2}' /proc/meminfo")) * 1024
    assert abs(int(rig.must("swapon --show=SIZE --noheadings --bytes")) - total * 0.10) < 4 << 20
    play("--tags", "memory", organism_state="absent")


def test_a_budget_over_the_memory_is_refused_before_anything_changed(rig: Rig, play: Play) -> None:
    before = rig.must(SNAPSHOT)
    results = play(memory_vms=[{"name": "100", "memory": "24G"}], memory_arc_max="8G", fails=True)
    refused = result(results, "Require that everything fits into the memory at once")
    assert "GiB too much" in refused["msg"]
    assert "VM 100" in refused["msg"]
    assert rig.must(SNAPSHOT) == before


def test_zram_tools_beside_it_are_refused(rig: Rig, play: Play) -> None:
    rig.must("install -m 755 /dev/null /usr/sbin/zramswap")
    before = rig.must(SNAPSHOT)
    refused = result(play("--tags", "memory", fails=True), "Refuse a second manager of compressed swap")
    assert "apt purge zram-tools" in refused["msg"]
    assert rig.must(SNAPSHOT) == before
    rig.must("rm /usr/sbin/zramswap")


HARD: dict[str, Any] = {
    "organism_profile": "hard",
    "memory_arc_max": "512M",
    "memory_vms": [{"name": "100", "memory": "128M", "hugepages": True}],
    "profile_vcpu_cpus": "2-5",
    "profile_house_cpus": "0-1,6-11",
}


def test_hard_and_back_to_elastic_leaves_nothing_of_hard(rig: Rig, play: Play) -> None:
    before = rig.must(SNAPSHOT)
    foretold = play("--check", **HARD)
    done = play(**HARD)
    assert changes(done) == changes(foretold)
    assert rig.must("cat /sys/kernel/mm/ksm/run").strip() == "2"
    assert "[never]" in rig.must("cat /sys/kernel/mm/transparent_hugepage/enabled")
    coming = rig.must("grep -m1 -o 'linux.*vmlinuz.*' /boot/grub/grub.cfg").split()
    for token in (
        "isolcpus=domain,managed_irq,2-5",
        "nohz_full=2-5",
        "rcu_nocbs=2-5",
        "irqaffinity=0-1,6-11",
        "transparent_hugepage=never",
        "hugepagesz=2M",
        "hugepages=64",
    ):
        assert coming.count(token) == 1, token
    assert "kthread_cpus" not in " ".join(coming)
    assert rig.must("ls /run/organism/reboot-required.d").split() == ["profile"]
    assert changes(play(**HARD)) == {}

    play(memory_arc_max="512M")
    assert rig.must("cat /sys/kernel/mm/ksm/run").strip() == "1"
    assert "[never]" not in rig.must("cat /sys/kernel/mm/transparent_hugepage/enabled")
    assert not rig.must("grep -ho 'isolcpus\\|nohz_full\\|hugepages=64' /boot/grub/grub.cfg /etc/default -r | cat")
    assert json.loads(rig.must("cat /etc/organism/profile.json")) == {
        "format": 1,
        "profile": "elastic",
        "balloon": True,
        "isolated": "",
        "hugepages": {},
    }
    play(organism_state="absent")
    assert rig.must(SNAPSHOT).splitlines() == before.splitlines()


@pytest.mark.whole
def test_after_a_reboot_all_of_it_holds(rig: Rig, play: Play) -> None:
    play(**HARD)
    rig.reboot()
    line = rig.must("cat /proc/cmdline").split()
    assert "isolcpus=domain,managed_irq,2-5" in line
    assert rig.must("cat /sys/devices/system/cpu/isolated").strip() == "2-5"
    assert rig.must("cat /sys/devices/system/cpu/nohz_full").strip() == "2-5"
    assert "[never]" in rig.must("cat /sys/kernel/mm/transparent_hugepage/enabled")
    assert rig.must("awk '/HugePages_Total/ {print $2}' /proc/meminfo").strip() == "64"
    assert rig.must("cat /sys/kernel/mm/ksm/run").strip() == "2"
    assert rig.must("taskset -pc 1").strip().endswith(": 0,1,6-11")
    assert rig.must("sysctl -n vm.swappiness").strip() == "10"
    assert rig.must("swapon --show=NAME,PRIO --noheadings").split() == ["/dev/zram0", "100"]
    _disks_as_wanted(rig)
    assert changes(play(**HARD)) == {}
    rig.restore()
