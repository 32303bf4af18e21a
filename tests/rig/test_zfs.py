# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""ZFS on a real kernel: limits that the module really uses, datasets as zfs(8) shows them, and all of it back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig
from tests.rig.playing import etc, module, play, role

MIB = 1 << 20
DISK = "/dev/disk/by-id"


@pytest.fixture
def zfs(rig: Rig) -> Iterator[Rig]:
    """The module is loaded as it is by itself; pools that a test has made are gone afterwards."""
    rig.must("modprobe zfs")
    yield rig
    rig.must("for pool in $(zpool list -H -o name); do zpool destroy -f $pool; done; rm -rf /mnt/fast /mnt/scratch")


def arcstats(rig: Rig) -> dict[str, int]:
    """c_min, c_max and size as the kernel's own file says."""
    rows = [line.split() for line in rig.must("cat /proc/spl/kstat/zfs/arcstats").splitlines()[2:]]
    return {name: int(value) for name, _kind, value in rows if name in ("c_min", "c_max", "size")}


def parameters(rig: Rig) -> list[str]:
    return rig.must("cat /sys/module/zfs/parameters/zfs_arc_min /sys/module/zfs/parameters/zfs_arc_max").split()


def limits(**more: Any) -> dict[str, Any]:
    """The role, without a boot image at each change: that takes a minute, and has a test of its own."""
    sizes = {"zfs_arc_min": "96M", "zfs_arc_day": "512M", "zfs_arc_night": "128M", "zfs_arc_hard": "256M"}
    return role("zfs_arc", **sizes, zfs_arc_boot_image="never", **more)


def arc(**arguments: Any) -> dict[str, Any]:
    return module("zfs_arc", take_over=["/etc/modprobe.d/zfs.conf"], boot_image="never", **arguments)


def test_arc_limits_are_used_and_given_back(zfs: Rig, tmp_path: Path) -> None:
    rig = zfs
    rig.must("echo 'options zfs zfs_arc_max=268435456 zfs_txg_timeout=5' > /etc/modprobe.d/zfs.conf")
    files, before, texts = etc(rig), arcstats(rig), parameters(rig)

    foretold = play(rig, tmp_path, limits(), check=True)
    assert (etc(rig), arcstats(rig)["c_max"]) == (files, before["c_max"])
    done = play(rig, tmp_path, limits())
    assert done.changed == foretold.changed == 1
    now = arcstats(rig)
    assert (now["c_min"], now["c_max"]) == (96 * MIB, 512 * MIB)
    # what the next load of the module gets, by modprobe's own reckoning
    coming = rig.must("modprobe --showconfig | grep '^options zfs '")
    assert f"zfs_arc_max={512 * MIB}" in coming and "268435456" not in coming and "zfs_txg_timeout=5" in coming
    assert play(rig, tmp_path, limits()).changed == 0

    hard = play(rig, tmp_path, limits(zfs_arc_profile="hard"))
    assert hard.changed == 1 and arcstats(rig)["c_max"] == 256 * MIB

    # below the minimum of now: the kernel would say yes and do nothing
    play(rig, tmp_path, arc(arc_min="64M", arc_max="80M"))
    assert (arcstats(rig)["c_min"], arcstats(rig)["c_max"]) == (64 * MIB, 80 * MIB)

    for bad in ({"arc_min": "9M", "arc_max": "1G"}, {"arc_min": "2G", "arc_max": "1G"}, {"arc_max": "900G"}):
        held = etc(rig)
        refused = play(rig, tmp_path, arc(**bad), fails=True)
        assert "ARC limits" in refused.said and etc(rig) == held and arcstats(rig)["c_max"] == 80 * MIB

    play(rig, tmp_path, limits(zfs_arc_state="absent"))
    after = arcstats(rig)
    assert (after["c_min"], after["c_max"]) == (before["c_min"], before["c_max"])
    assert (etc(rig), parameters(rig)) == (files, texts)
    assert play(rig, tmp_path, limits(zfs_arc_state="absent")).changed == 0
    rig.must("rm /etc/modprobe.d/zfs.conf")


def test_the_boot_image_counts_only_where_zfs_is_in_it(zfs: Rig, tmp_path: Path) -> None:
    carries = zfs.must("lsinitramfs /boot/initrd.img-$(uname -r) | grep -c '/zfs.ko'; true").strip() != "0"
    told = play(zfs, tmp_path, module("zfs_arc", arc_min="64M", arc_max="80M"), check=True, result="said")
    assert told.result["boot_image"] == carries


def test_the_cache_comes_down_when_told(zfs: Rig, tmp_path: Path) -> None:
    rig = zfs
    rig.must(f"zpool create -f -O compression=off -m /mnt/fast fill {DISK}/nvme-QEMU_NVMe_Ctrl_fast")
    rig.must("dd if=/dev/urandom of=/mnt/fast/data bs=1M count=300 status=none; cat /mnt/fast/data > /dev/null")
    full = arcstats(rig)["size"]
    assert full > 200 * MIB
    down = arc(arc_min="64M", arc_max="128M", shrink=True, drop_caches=True, shrink_timeout=120)
    done = play(rig, tmp_path, down, result="said")
    assert arcstats(rig)["size"] < 176 * MIB
    assert done.result["shrink"]["converged"] and done.result["arc"]["c_max"] == 128 * MIB
    play(rig, tmp_path, limits(zfs_arc_state="absent"))


def shown(rig: Rig, dataset: str, *names: str) -> list[str]:
    return rig.must(["zfs", "get", "-H", "-o", "value", ",".join(names), dataset]).split("\n")[:-1]


def test_datasets_are_laid_out_and_properties_given_back(zfs: Rig, tmp_path: Path) -> None:
    rig = zfs
    rig.must(f"zpool create -f -m none fast {DISK}/nvme-QEMU_NVMe_Ctrl_fast")
    rig.must(f"zpool create -f -m none scratch {DISK}/scsi-0QEMU_QEMU_HARDDISK_scratch")
    rig.must("zfs create -o compression=lz4 fast/organism; zfs create fast/organism/base")
    rig.must("zfs set recordsize=64K fast/organism")
    before = rig.must("zfs get -H -o name,property,value,source all fast/organism fast/organism/base "
                      "| grep -E 'compression|recordsize|atime|xattr|acltype|mountpoint|canmount'")  # fmt: skip

    foretold = play(rig, tmp_path, role("zfs_layout"), check=True)
    assert not rig.must("zfs list -H -o name").count("vmdata")
    done = play(rig, tmp_path, role("zfs_layout"), result="__zfs_layout_result")
    assert done.changed == foretold.changed == 1
    assert [entry["name"] for entry in done.result["left_out"]] == ["archive"]
    again = play(rig, tmp_path, role("zfs_layout"), result="__zfs_layout_result")
    assert again.changed == 0 and again.result["commands"] == []

    names = ("compression", "recordsize", "atime", "acltype", "mounted")
    assert shown(rig, "fast/organism", *names) == ["zstd", "128K", "off", "posix", "yes"]
    assert shown(rig, "fast/organism", "xattr") in (["sa"], ["on"])  # two names of one value since OpenZFS 2.3
    assert shown(rig, "fast/organism/vmdata", "compression", "primarycache", "secondarycache") == [
        "lz4", "metadata", "metadata"
    ]  # fmt: skip
    assert shown(rig, "fast/organism/ram-persist", "recordsize", "compression") == ["1M", "zstd"]
    assert shown(rig, "scratch/organism/tmp", "logbias", "sync", "recordsize") == ["throughput", "standard", "1M"]
    assert rig.must("zpool get -H -o value autotrim fast scratch").split() == ["on", "on"]
    assert rig.must("findmnt -no SOURCE /mnt/fast/base").strip() == "fast/organism/base"

    unsafe = role("zfs_layout", zfs_layout_unsafe_sync_disabled_on=["scratch/organism/tmp"])
    assert play(rig, tmp_path, unsafe).changed == 1
    assert shown(rig, "scratch/organism/tmp", "sync") == ["disabled"]
    assert play(rig, tmp_path, role("zfs_layout")).changed == 1
    assert shown(rig, "scratch/organism/tmp", "sync") == ["standard"]

    rig.must("mkdir -p /mnt/precious; touch /mnt/precious/file")
    names_before = rig.must("zfs list -H -o name")
    for name, properties, said in (
        ("fast/x", {"frobnicate": "on"}, "invalid property"),
        ("fast/x", {"used": "1"}, "cannot be set"),
        ("fast/x", {"mountpoint": "/mnt/precious"}, "would hide"),
        ("fast/x/y", {}, "parent"),
    ):
        extra = role("zfs_layout", zfs_layout_datasets=[{"name": name, "properties": properties}])
        assert said in play(rig, tmp_path, extra, fails=True).said
    assert rig.must("zfs list -H -o name") == names_before

    rig.must("zfs set atime=on fast/organism/base")  # somebody's later edit
    back = play(rig, tmp_path, role("zfs_layout", zfs_layout_state="absent"), result="__zfs_layout_result")
    assert back.changed == 1 and "scratch/organism/tmp" in back.result["left_datasets"]
    assert [entry["name"] for entry in back.result["kept_by_others"]] == ["fast/organism/base atime"]
    rig.must("zfs inherit atime fast/organism/base")
    after = rig.must("zfs get -H -o name,property,value,source all fast/organism fast/organism/base "
                     "| grep -E 'compression|recordsize|atime|xattr|acltype|mountpoint|canmount'")  # fmt: skip
    assert after == before
    assert rig.must("zpool get -H -o value autotrim fast scratch").split() == ["off", "off"]
    assert rig.must("zfs list -H -o name") == names_before
    assert play(rig, tmp_path, role("zfs_layout", zfs_layout_state="absent")).changed == 0
    rig.must("rm -r /mnt/precious")
