# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Schedulers by the rotational flag: which disks, which rule, when fstrim is of use."""

from __future__ import annotations

import pytest
from unit.host_settings.trees import Host, Unit

from organism.core import _io_scheduler as schedulers
from organism.core._host_settings import Wish
from organism.core._host_settings_apply import Outcome, converge
from organism.core._root import Root


def disk(host: Host, name: str, rotational: int, scheduler: str = "[none] mq-deadline", discard: int = 0) -> None:
    for file, text in (("rotational", rotational), ("scheduler", scheduler), ("discard_max_bytes", discard)):
        host.put(f"sys/block/{name}/queue/{file}", f"{text}\n")
    (host.top / "sys/class/block").mkdir(parents=True, exist_ok=True)
    (host.top / "sys/class/block" / name).symlink_to(f"../../block/{name}")


@pytest.fixture
def disks(host: Host) -> Host:
    disk(host, "nvme0n1", 0, "none [mq-deadline]", discard=1 << 30)
    disk(host, "sda", 0, "none [mq-deadline]")  # a SATA SSD has the name of a hard disk
    disk(host, "sdb", 1)
    disk(host, "zram0", 0, "none")
    disk(host, "loop0", 1)
    disk(host, "dm-0", 1)
    disk(host, "zd16", 0)
    disk(host, "pmem0", 0, "none")  # nothing to choose
    host.units = {"fstrim.timer": Unit()}
    return host


def converged(host: Host, *, check: bool = False, fstrim: str = "auto", rotational: str = "mq-deadline") -> Outcome:
    wish, _ = schedulers.wish(Root(host.top), rotational=rotational, non_rotational="none", fstrim=fstrim)
    return converge(wish, check=check, root=Root(host.top), run=host.run, writer=host.write)


def test_each_disk_gets_the_scheduler_of_its_kind(disks: Host) -> None:
    done = converged(disks)
    rows = {row["key"]: row["after"] for row in done.settings if row["kind"] == "sysfs"}
    assert rows == {
        "/sys/block/nvme0n1/queue/scheduler": "none",
        "/sys/block/sda/queue/scheduler": "none",
        "/sys/block/sdb/queue/scheduler": "mq-deadline",
    }
    assert disks.text("/sys/block/loop0/queue/scheduler") == "[none] mq-deadline\n"
    assert "udevadm trigger --action=change --settle --subsystem-match=block" in done.done
    assert not converged(disks).difference
    disks.put("sys/block/sdb/queue/scheduler", "[none] mq-deadline\n")
    assert [change.name for change in converged(disks, check=True).difference.changes] == [
        "/sys/block/sdb/queue/scheduler"
    ]


def test_absent_restores_schedulers_and_rule(disks: Host) -> None:
    earlier = disks.snapshot()
    converged(disks, fstrim="true")
    assert disks.snapshot() != earlier
    nothing = Wish(schedulers.CAPABILITY)
    converge(nothing, check=False, root=Root(disks.top), run=disks.run, writer=disks.write)
    assert disks.snapshot() == earlier


def test_the_rule_goes_by_the_flag_and_names_what_it_leaves_out() -> None:
    flash, turning = schedulers.rules("mq-deadline", "none").splitlines()
    assert 'ATTR{queue/rotational}=="0", ATTR{queue/scheduler}="none"' in flash
    assert 'ATTR{queue/rotational}=="1", ATTR{queue/scheduler}="mq-deadline"' in turning
    for word in ("loop*", "zram*", "dm-*", "zd*"):
        assert word in flash.split('KERNEL!="')[1].split('"')[0].split("|")
    assert "sd" not in flash


def test_a_scheduler_that_the_kernel_cannot_load_is_told(disks: Host) -> None:
    wish, lacking = schedulers.wish(Root(disks.top), rotational="bfq", non_rotational="none", fstrim="auto")
    assert lacking == [{"path": "/sys/block/sdb/queue/scheduler", "reason": "this kernel has no scheduler bfq"}]
    assert "/sys/block/sdb/queue/scheduler" not in wish.live


@pytest.mark.parametrize(
    ("mounts", "useful"),
    [
        ("/dev/nvme0n1 / ext4 rw 0 0", True),
        ("/dev/nvme0n1p2 / ext4 rw 0 0", True),
        ("/dev/mapper/pve-root / ext4 rw 0 0", True),
        ("/dev/sdb / ext4 rw 0 0", False),
        ("rpool/ROOT / zfs rw 0 0", False),
        ("tmpfs /run tmpfs rw 0 0", False),
        ("", False),
    ],
)
def test_fstrim_is_for_file_systems_on_devices_that_take_discards(disks: Host, mounts: str, useful: bool) -> None:
    disks.put("proc/self/mounts", f"{mounts}\n")
    disks.put("sys/block/nvme0n1/nvme0n1p2/partition", "2\n")
    (disks.top / "sys/class/block/nvme0n1p2").symlink_to("../../block/nvme0n1/nvme0n1p2")
    disk(disks, "dm-1", 0, discard=4096)
    (disks.top / "dev/mapper").mkdir(parents=True)
    (disks.top / "dev/mapper/pve-root").symlink_to("../dm-1")
    assert bool(schedulers.trimmed_mounts(Root(disks.top))) is useful
    converged(disks)
    assert disks.units["fstrim.timer"] == (Unit("enabled", "active") if useful else Unit())


def test_fstrim_can_be_switched_off(disks: Host) -> None:
    disks.units["fstrim.timer"] = Unit("enabled", "active")
    converged(disks, fstrim="false")
    assert disks.units["fstrim.timer"] == Unit("disabled", "inactive")
