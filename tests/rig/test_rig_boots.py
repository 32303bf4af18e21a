# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Boots that are real: groups as on a host, a boot loader that rules, power cuts that lose what they must."""

from __future__ import annotations

import pytest

from rig.driver import Rig

pytestmark = pytest.mark.whole

EXT4 = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_scratch"
NVME = "/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_fast"


def _group(rig: Rig, slot: str) -> list[str]:
    """The functions of the IOMMU group that ``slot`` is in."""
    return sorted(rig.must(f"ls /sys/bus/pci/devices/{slot}/iommu_group/devices").split())


def _gpus(rig: Rig) -> list[str]:
    return [line.split()[0] for line in rig.must("lspci -nD -d 1002:67df").splitlines()]


def test_a_gpu_shares_its_group_with_its_audio_alone(cold_rig: Rig) -> None:
    known = cold_rig.status()
    assert known is not None
    assert known.how == "boot"
    twelve = [slot for slot in _gpus(cold_rig) if len(_group(cold_rig, slot)) == 2]
    assert len(twelve) == 12
    for slot in twelve:
        assert _group(cold_rig, slot) == [slot, slot.replace(".0", ".1")]


def test_the_thirteenth_gpu_shares_its_group_with_a_network_card(cold_rig: Rig) -> None:
    groups = [_group(cold_rig, slot) for slot in _gpus(cold_rig)]
    (shared,) = [group for group in groups if len(group) > 2]
    kinds = cold_rig.must("".join(f"cat /sys/bus/pci/devices/{slot}/class;" for slot in shared)).split()
    assert "0x030000" in kinds
    assert "0x020000" in kinds


def test_grub_rules_the_command_line(cold_rig: Rig) -> None:
    cold_rig.must(
        "mkdir -p /etc/default/grub.d && "
        "echo 'GRUB_CMDLINE_LINUX_DEFAULT=\"$GRUB_CMDLINE_LINUX_DEFAULT isolcpus=8-11\"' "
        "> /etc/default/grub.d/life.cfg && update-grub"
    )
    before = cold_rig.status()
    cold_rig.reboot()
    after = cold_rig.status()
    assert before is not None and after is not None
    assert after.life == before.life + 1
    assert after.ends[-1] == "guest-reset"
    assert "isolcpus=8-11" in cold_rig.must("cat /proc/cmdline").split()
    assert cold_rig.must("cat /sys/devices/system/cpu/isolated").strip() == "8-11"


def test_a_reset_loses_what_was_not_flushed_and_nothing_else(cold_rig: Rig) -> None:
    cold_rig.must(
        f"set -e; mkfs.ext4 -q {EXT4}; mkdir -p /mnt/journal; mount -o commit=300 {EXT4} /mnt/journal; "
        f"zpool create -f -O mountpoint=/mnt/pool pool {NVME}; "
        "echo kept > /mnt/journal/flushed; echo kept > /mnt/pool/flushed; zpool sync; sync; "
        "echo lost > /mnt/journal/dirty"
    )
    cold_rig.hard_reset()
    _check_the_disks(cold_rig)


def test_so_does_a_power_cut(cold_rig: Rig) -> None:
    cold_rig.must("rm -f /mnt/journal/dirty; sync; echo lost > /mnt/journal/dirty")
    cold_rig.hard_reset(power=True)
    _check_the_disks(cold_rig)
    known = cold_rig.status()
    assert known is not None
    assert known.ends[-2:] == ["reset", "power"]


def _check_the_disks(rig: Rig) -> None:
    rig.must(f"mkdir -p /mnt/journal; mount -o commit=300 {EXT4} /mnt/journal; zpool list pool || zpool import -f pool")
    assert rig.must("cat /mnt/journal/flushed /mnt/pool/flushed").split() == ["kept", "kept"]
    assert rig.ssh("cat /mnt/journal/dirty").stdout == ""
    assert rig.must("zpool list -H -o health pool").strip() == "ONLINE"
    assert "recovery" in rig.must("dmesg | grep -i 'EXT4-fs.*recover'")


def test_a_kernel_started_directly_has_the_callers_command_line(cold_rig: Rig) -> None:
    cold_rig.restart(append="console=ttyS0 panic=-1 tsc=reliable nohz_full=2-5")
    assert "nohz_full=2-5" in cold_rig.must("cat /proc/cmdline").split()
    assert cold_rig.must("cat /sys/devices/system/cpu/nohz_full").strip() == "2-5"
    cold_rig.restart()
    assert "isolcpus=8-11" in cold_rig.must("cat /proc/cmdline").split()  # through GRUB again


def test_a_panic_starts_it_again(cold_rig: Rig) -> None:
    before = cold_rig.status()
    assert before is not None
    cold_rig.ssh("sync; sleep 1; echo c > /proc/sysrq-trigger", timeout=60)
    after = cold_rig.wait(before.life + 1)
    assert after.ends[-1] == "kernel panic"
