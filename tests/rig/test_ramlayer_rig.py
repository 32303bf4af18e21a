# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The RAM layer over a real reboot, a press of the reset button and a cut of the power, on ext4 and on ZFS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig
from tests.rig.playing import play, role

BY_ID = "/dev/disk/by-id"
# how the persistent side comes to be, and comes back at boot
DISKS = {
    "ext4": f"""disk={BY_ID}/scsi-0QEMU_QEMU_HARDDISK_scratch
wipefs -aq $disk; mkfs.ext4 -q -F -L layer $disk; mkdir -p /mnt/layer
grep -q LABEL=layer /etc/fstab || echo 'LABEL=layer /mnt/layer ext4 defaults 0 2' >> /etc/fstab
systemctl daemon-reload; mount /mnt/layer""",
    "zfs": f"""modprobe zfs; mkdir -p /mnt/layer
zpool create -f -o ashift=12 -O xattr=sa -O acltype=posixacl -m /mnt/layer layer {BY_ID}/nvme-QEMU_NVMe_Ctrl_fast
zpool set cachefile=/etc/zfs/zpool.cache layer
systemctl enable --now zfs-import-cache.service zfs-mount.service zfs.target""",
}
WRITE = """cd /fast/active
mkdir -p out/deep; printf saved > out/deep/file; ln out/deep/file out/twin; ln -s deep/file out/link
printf x > owned; chown 1234:4321 owned; chmod 640 owned; rm gone; rm -r full; mkdir full; printf new > full/new
truncate -s 50M sparse; printf end >> sparse"""
SHOW = r"""cd /fast/active
find . \( -type d -printf '%p %m %U:%G %T@\n' -o -printf '%p %y %m %U:%G %s %n %T@ %l\n' \) | sort
find . -type f | sort | xargs -d '\n' sha256sum"""


def answer(rig: Rig, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rig.must(["ramlayer", "--json", *words]))
    return found


@pytest.mark.whole
@pytest.mark.parametrize("kind", sorted(DISKS))
def test_the_layer_outlives_reboot_reset_and_power_cut(rig: Rig, tmp_path: Path, kind: str) -> None:
    rig.restore()
    rig.must(DISKS[kind], timeout=300)
    rig.must("mkdir -p /mnt/layer/base/full; cd /mnt/layer/base; printf old > gone; printf old > full/old")
    play(
        rig,
        tmp_path,
        role("host_tools"),
        role(
            "ramlayer",
            ramlayer_lowerdir="/mnt/layer/base",
            ramlayer_persist_dir="/mnt/layer/persist",
            ramlayer_archive_dir="",
            ramlayer_ram_mb=256,
            ramlayer_sync_sec=3600,
        ),
    )
    rig.must(WRITE)

    # a reboot: what no timer has saved is saved by the stop, before the file system goes
    seen = rig.must(SHOW)
    rig.reboot()
    rig.must("timeout 120 bash -c 'until mountpoint -q /fast/active; do sleep 0.5; done'", timeout=150)
    assert rig.must(SHOW) == seen
    found = rig.must("cat /fast/active/full/new; ls /fast/active/full; test -e /fast/active/gone || echo gone")
    assert found.split() == ["newnew", "gone"]

    # reset and power: the last sync, no more and no less
    for power in (False, True):
        rig.must(f"printf {power} > /fast/active/synced")
        number = answer(rig, "sync")["number"]
        seen = rig.must(SHOW)
        rig.must("printf lost > /fast/active/lost; rm /fast/active/out/twin")
        rig.hard_reset(power=power)
        rig.must("timeout 120 bash -c 'until mountpoint -q /fast/active; do sleep 0.5; done'", timeout=150)
        assert rig.must(SHOW) == seen
        status = answer(rig, "status")
        assert status["generation"] == number
