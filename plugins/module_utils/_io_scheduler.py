# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""I/O schedulers by what a disk is: none where nothing turns, mq-deadline where something does.

A udev rule sets them at boot and for disks that appear later; the disks that are there get the same values now. Devices
that pass their requests on to others, or live in memory, have no disk behind them and are left out.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from . import _kernel_modules, _kernel_value
from ._host_files import FileWish
from ._host_settings import Wish
from ._root import Root
from ._unit_state import UnitWish

CAPABILITY = "io_scheduler"
RULES = "/etc/udev/rules.d/60-organism-io.rules"
FSTRIM = "fstrim.timer"
# zd: ZFS volumes; nvme*c*n*: the paths behind a multipath NVMe namespace
EXCLUDED = (
    "loop*",
    "ram*",
    "zram*",
    "dm-*",
    "md*",
    "zd*",
    "nbd*",
    "rbd*",
    "drbd*",
    "bcache*",
    "sr*",
    "fd*",
    "nvme*c*n*",
)
SCHEDULERS = ("none", "mq-deadline", "kyber", "bfq")
_MODULES = {"mq-deadline": "mq-deadline", "kyber": "kyber-iosched", "bfq": "bfq"}
# what fstrim works on; ZFS trims by itself (autotrim, zpool-trim(8)) and is passed over by fstrim
_TRIMMED = ("ext4", "xfs", "btrfs", "f2fs", "vfat")


@dataclass(frozen=True)
class Disk:
    """A disk with a request queue. ``offered``: the schedulers that the kernel lists, the present one among them."""

    name: str
    rotational: bool
    offered: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"/sys/block/{self.name}/queue/scheduler"


def disks(root: Root) -> list[Disk]:
    """All disks whose scheduler can be chosen, by name."""
    found = []
    for name in root.listdir("/sys/block"):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDED):
            continue
        offered = _kernel_value.choices(root.read_or_none(f"/sys/block/{name}/queue/scheduler") or "")
        rotational = root.read_int(f"/sys/block/{name}/queue/rotational")
        if offered is not None and rotational is not None:
            found.append(Disk(name, rotational == 1, tuple(offered)))
    return found


def available(root: Root, disk: Disk, scheduler: str) -> bool:
    """Does the kernel have it, or can it load it when it is asked for?"""
    return scheduler in disk.offered or _kernel_modules.exists(root, _MODULES.get(scheduler, scheduler))


def rules(rotational: str, non_rotational: str, header: str = "") -> str:
    """The udev rules; the first assignment of a scheduler to a disk that has none would be an error in udev's log."""
    match = 'ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk"'
    disk = f'{match}, KERNEL!="{"|".join(EXCLUDED)}", ATTR{{queue/scheduler}}=="*[[]*"'
    return (
        f'{header}{disk}, ATTR{{queue/rotational}}=="0", ATTR{{queue/scheduler}}="{non_rotational}"\n'
        f'{disk}, ATTR{{queue/rotational}}=="1", ATTR{{queue/scheduler}}="{rotational}"\n'
    )


def trimmed_mounts(root: Root) -> list[str]:
    """Mount points of file systems that fstrim works on and whose device takes discards."""
    found = []
    for line in (root.read_or_none("/proc/self/mounts") or "").splitlines():
        device, where, kind = line.split()[:3]
        if kind in _TRIMMED and device.startswith("/dev/") and _discards(root, device):
            found.append(where)
    return found


def _discards(root: Root, device: str) -> bool:
    name = root.link_name(device) or device.rsplit("/", 1)[-1]
    block = f"/sys/class/block/{name}"
    top = f"{block}/.." if root.exists(f"{block}/partition") else block
    return (root.read_int(f"{top}/queue/discard_max_bytes") or 0) > 0


def wish(root: Root, *, rotational: str, non_rotational: str, fstrim: str) -> tuple[Wish, list[dict[str, str]]]:
    """What this host shall have, and the disks that cannot have it (path and reason).

    ``fstrim``: true, false, or auto: on where a mounted file system has a use for it, else left as it is.
    """
    values: dict[str, str] = {}
    unsupported: list[dict[str, str]] = []
    for disk in disks(root):
        scheduler = rotational if disk.rotational else non_rotational
        if available(root, disk, scheduler):
            values[disk.path] = scheduler
        else:
            unsupported.append({"path": disk.path, "reason": f"this kernel has no scheduler {scheduler}"})
    switched = {"true": True, "false": False}.get(fstrim, True if trimmed_mounts(root) else None)
    units: tuple[UnitWish, ...] = ()
    if switched is not None:
        enabled = "enabled" if switched else "disabled"
        units = (UnitWish(FSTRIM, enabled=enabled, active=switched, optional=fstrim == "auto"),)
    text = rules(rotational, non_rotational, Wish(CAPABILITY).header)
    made = Wish(CAPABILITY, live=values, files=(FileWish(RULES, text),), units=units, udev_trigger=("block",))
    return made, unsupported
