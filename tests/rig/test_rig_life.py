# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rig is what its README promises, as its own kernel and tools tell it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from rig import control, state
from rig.driver import Rig
from rig.hardware import Machine


def _lines(rig: Rig, command: str) -> list[str]:
    return rig.must(command).splitlines()


def _links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_it_is_a_whole_system(rig: Rig) -> None:
    known = rig.status()
    assert known is not None
    assert (known.phase, known.how) == ("up", "snapshot")
    assert rig.must("systemctl is-system-running").strip() == "running"
    assert rig.must("systemctl list-units --failed --plain --no-legend") == ""
    assert "VERSION_CODENAME=trixie" in rig.must("cat /etc/os-release")


def test_its_clock_is_right_though_the_snapshot_is_old(rig: Rig) -> None:
    ours = int(subprocess.run(["date", "+%s"], capture_output=True, text=True, check=True).stdout)
    theirs = int(rig.must("date +%s"))
    assert abs(theirs - ours) < 120


def test_the_processors_are_six_cores_of_two_threads_under_one_cache(rig: Rig) -> None:
    cpu = "/sys/devices/system/cpu"
    assert rig.must(f"cat {cpu}/online").strip() == "0-11"
    siblings = set(_lines(rig, f"cat {cpu}/cpu*/topology/thread_siblings_list"))
    assert siblings == {"0-1", "2-3", "4-5", "6-7", "8-9", "10-11"}
    assert set(_lines(rig, f"cat {cpu}/cpu*/cache/index3/shared_cpu_list")) == {"0-11"}
    assert "i7-8700K" in rig.must("lscpu")
    assert rig.must("cat /sys/devices/system/node/online").strip() == "0"


def test_twelve_gpus_have_their_audio_beside_them(rig: Rig) -> None:
    functions = [line.split() for line in _lines(rig, "lspci -nD -d 1002:")]
    video = sorted(slot for slot, kind, ids, *_ in functions if (kind, ids) == ("0300:", "1002:67df"))
    audio = sorted(slot for slot, kind, ids, *_ in functions if (kind, ids) == ("0403:", "1002:aaf0"))
    assert len(video) == 12
    assert audio == [slot.replace(".0", ".1") for slot in video]


def test_each_gpu_has_a_group_and_a_reset(rig: Rig) -> None:
    groups = _lines(rig, "for d in $(lspci -nD -d 1002:67df | cut -d' ' -f1); do "
                         "basename $(readlink /sys/bus/pci/devices/$d/iommu_group); done")  # fmt: skip
    assert len(set(groups)) == 12
    assert rig.must("ls -d /sys/class/iommu/dmar0").strip() == "/sys/class/iommu/dmar0"


def test_vfio_takes_a_gpu_and_gives_it_back(rig: Rig) -> None:
    done = rig.must(
        "set -e; modprobe vfio-pci; d=$(lspci -nD -d 1002:67df | head -1 | cut -d' ' -f1); p=/sys/bus/pci/devices/$d; "
        "echo vfio-pci > $p/driver_override; echo $d > /sys/bus/pci/drivers_probe; basename $(readlink $p/driver); "
        "ls /dev/vfio | grep -c '[0-9]'; echo $d > $p/driver/unbind; echo > $p/driver_override"
    )
    assert done.split() == ["vfio-pci", "1"]


def test_the_port_has_four_queues_and_an_interrupt_for_each_direction(rig: Rig) -> None:
    port = rig.must("basename $(dirname $(grep -lx 52:54:00:0a:00:04 /sys/class/net/en*/address))").strip()
    assert port.startswith("enp")
    queues = rig.must(f"ls /sys/class/net/{port}/queues").split()
    assert queues == [f"{way}-{number}" for way in ("rx", "tx") for number in range(4)]
    irqs = sorted(map(int, rig.must(f"ls $(readlink -f /sys/class/net/{port}/device/..)/msi_irqs").split()))
    assert len(irqs) == 9  # configuration, four of each direction; the control queue has none
    assert rig.must(f"basename $(readlink /sys/class/net/{port}/master)").strip() == "vmbr0"
    place = f"/proc/irq/{irqs[3]}"
    before = rig.must(f"cat {place}/smp_affinity_list").strip()
    assert rig.must(f"echo 3 > {place}/smp_affinity_list; cat {place}/effective_affinity_list").strip() == "3"
    rig.must(f"echo {before} > {place}/smp_affinity_list")


def test_nvme_has_twelve_queues_whose_interrupts_are_the_kernels(rig: Rig) -> None:
    assert len(rig.must("ls /sys/block/nvme0n1/mq").split()) == 12
    irq = rig.must("grep 'nvme0q3$' /proc/interrupts | cut -d: -f1").strip()
    refused = rig.ssh(f"echo 1 > /proc/irq/{irq}/smp_affinity_list")
    assert refused.returncode != 0
    assert "Operation not permitted" in refused.stderr or "write error" in refused.stderr
    assert "[none]" in rig.must("cat /sys/block/nvme0n1/queue/scheduler")


def test_disks_say_whether_they_turn(rig: Rig) -> None:
    disks = {line.split()[0]: line.split()[1] for line in _lines(rig, "lsblk -dno SERIAL,ROTA | grep -v '^ '")}
    assert (disks["fast"], disks["scratch"], disks["archive"]) == ("0", "0", "1")


def test_zfs_makes_a_pool(rig: Rig) -> None:
    disk = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_scratch"
    rig.must(f"zpool create -f -O mountpoint=/mnt/life life {disk}")
    try:
        assert rig.must("zpool list -H -o health life").strip() == "ONLINE"
        rig.must("dd if=/dev/urandom of=/mnt/life/file bs=1M count=8 status=none")
        rig.must(f"echo {256 << 20} > /sys/module/zfs/parameters/zfs_arc_max")
        assert rig.must("awk '$1 == \"c_max\" { print $3 }' /proc/spl/kstat/zfs/arcstats").strip() == str(256 << 20)
    finally:
        rig.must("zpool destroy life; echo 0 > /sys/module/zfs/parameters/zfs_arc_max")


def test_governors_and_idle_states_are_real(rig: Rig) -> None:
    policy = "/sys/devices/system/cpu/cpufreq/policy5"
    assert rig.must(f"cat {policy}/scaling_driver").strip() == "acpi-cpufreq"
    before = rig.must(f"cat {policy}/scaling_governor").strip()
    rig.must(f"echo performance > {policy}/scaling_governor")
    assert rig.must(f"cat {policy}/scaling_governor").strip() == "performance"
    rig.must(f"echo {before} > {policy}/scaling_governor")
    assert rig.must("cat /sys/devices/system/cpu/cpu0/cpuidle/state*/name").split() == ["POLL", "C1"]


def test_a_nested_qemu_has_a_thread_for_each_processor(rig: Rig) -> None:
    names = rig.must(
        "set -e; qemu-system-x86_64 -name vm101,debug-threads=on -machine q35 -accel tcg,thread=multi -smp 4 -m 64 -S "
        "-nodefaults -display none -pidfile /run/life.pid -daemonize; "
        "cat /proc/$(cat /run/life.pid)/task/*/comm; kill $(cat /run/life.pid)"
    )
    assert [f"CPU {number}/TCG" in names for number in range(4)] == [True] * 4


def test_the_tools_that_tests_lean_on_are_there(rig: Rig) -> None:
    wanted = "cyclictest fio ethtool cpupower numactl nvme zpool update-grub update-initramfs irqbalance taskset chrt"
    assert rig.must(f"for tool in {wanted}; do command -v $tool > /dev/null || echo $tool; done") == ""
    assert rig.must("systemctl is-active irqbalance").strip() == "active"


def test_files_go_in_and_out(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("and back\n")
    rig.put(tmp_path / "there", "/root/there")
    rig.get("/root/there", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "and back\n"


def test_ansible_reaches_it(rig: Rig, tmp_path: Path) -> None:
    playbook = tmp_path / "ping.yml"
    playbook.write_text("- hosts: pve\n  gather_facts: false\n  tasks: [{ansible.builtin.ping: }]\n")
    done = rig.play(playbook)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test                       : ok=1" in done.stdout


def test_restore_forgets_what_was_done(rig: Rig) -> None:
    rig.must("touch /root/trace; sysctl -q vm.swappiness=7")
    before = rig.must("cat /proc/sys/kernel/random/boot_id")
    rig.restore()
    assert rig.ssh("test -e /root/trace").returncode == 1
    assert rig.must("sysctl -n vm.swappiness").strip() != "7"
    assert rig.must("cat /proc/sys/kernel/random/boot_id") == before  # the snapshot's moment, not a boot


def test_down_leaves_nothing(able: None) -> None:
    links = _links()
    rig = Rig("brief", Machine(gpus=1))
    rig.start()
    known = rig.status()
    assert known is not None
    processes = (known.keeper, known.qemu)
    assert all(Path(f"/proc/{process}").exists() for process in processes)
    assert _links() == links  # its tap lies in a name space of its own
    rig.down()
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert not rig.where.run.exists()
    assert not rig.where.control_path.exists()
    assert not control.alive(rig.where)
    assert state.read(rig.where) is None
    rig.down()  # once more: nothing to do
