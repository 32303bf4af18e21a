# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel parameters through a real GRUB: into its menu, through a reboot, and back to the letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rig.driver import Rig
from tests.rig.playing import etc, module, play, role

TOKENS: dict[str, Any] = {"isolcpus": "domain,managed_irq,4-11", "nohz_full": "4-11", "hugepages": {"2M": 16}}


def menu(rig: Rig) -> list[str]:
    """The command lines of GRUB's menu, without recovery entries."""
    lines = rig.must("grep -E '^[[:space:]]+linux' /boot/grub/grub.cfg").splitlines()
    return [" ".join(line.split()[2:]) for line in lines if " single" not in line]


def parameters(**more: Any) -> dict[str, Any]:
    return role("kernel_cmdline", kernel_cmdline_capability="profile", **more)


def test_the_menu_gets_the_parameters_and_loses_them(rig: Rig, tmp_path: Path) -> None:
    rig.must("update-grub")
    files, before = etc(rig), menu(rig)
    wanted = parameters(kernel_cmdline_tokens=TOKENS)
    foretold = play(rig, tmp_path, wanted, result="__kernel_cmdline_result", check=True)
    assert etc(rig) == files and menu(rig) == before
    done = play(rig, tmp_path, wanted, result="__kernel_cmdline_result")
    assert done.changed == foretold.changed == 1
    assert done.result["loader"] == "grub" and done.result["pending"] == foretold.result["pending"]
    tail = "hugepagesz=2M hugepages=16 isolcpus=domain,managed_irq,4-11 nohz_full=4-11"  # by their keys
    assert menu(rig) == [f"{line} {tail}" for line in before]
    assert rig.must("ls /run/organism/reboot-required.d").split() == ["profile"]
    assert play(rig, tmp_path, wanted).changed == 0

    # another capability cannot have one of them otherwise; a later edit by hand survives
    other = module("kernel_cmdline", capability="power", tokens={"isolcpus": "6"})
    assert "capability profile" in play(rig, tmp_path, other, fails=True).said
    rig.must("echo 'GRUB_TIMEOUT=1' >> /etc/default/grub")
    play(rig, tmp_path, parameters(kernel_cmdline_state="absent"))
    assert menu(rig) == before
    rig.must("sed -i '$ d' /etc/default/grub && update-grub")
    assert etc(rig) == files
    assert rig.must("ls /run/organism/reboot-required.d").split() == []


def test_what_cannot_be_is_refused_before_anything_changes(rig: Rig, tmp_path: Path) -> None:
    files, before = etc(rig), menu(rig)
    for arguments, said in (
        ({"tokens": {"root": "/dev/sda"}}, "not for tuning"),
        ({"tokens": {"a": "b c"}}, "boot loader"),
        ({"tokens": {"kthread_cpus": "0-1"}}, "accept_unknown"),
    ):
        refused = play(rig, tmp_path, module("kernel_cmdline", capability="profile", **arguments), fails=True)
        assert said in refused.said
        assert etc(rig) == files and menu(rig) == before
    # a line for systemd-boot that names no root file system
    rig.must("mkdir -p /etc/kernel; echo quiet > /etc/kernel/cmdline")
    try:
        blind = module("kernel_cmdline", capability="profile", tokens=TOKENS, loader="proxmox-boot-tool-systemd-boot")
        assert "no root=" in play(rig, tmp_path, blind, fails=True).said
        assert rig.must("cat /etc/kernel/cmdline") == "quiet\n"
    finally:
        rig.must("rm /etc/kernel/cmdline")
    # a file system that refuses writes
    rig.must("mkdir -p /etc/default/grub.d; mount -t tmpfs -o ro none /etc/default/grub.d")
    try:
        refused = play(rig, tmp_path, module("kernel_cmdline", capability="profile", tokens=TOKENS), fails=True)
        assert "read-only" in refused.said
    finally:
        rig.must("umount /etc/default/grub.d")
        if "/etc/default/grub.d\n" not in files:  # packages of the boot loader may bring it
            rig.must("rmdir /etc/default/grub.d")
    assert etc(rig) == files and rig.must("ls /var/lib/organism/earlier 2>/dev/null; true").strip() == ""


def test_a_refresh_that_fails_puts_the_file_back(rig: Rig, tmp_path: Path) -> None:
    files = etc(rig)
    broken = module("kernel_cmdline", capability="profile", tokens=TOKENS, refresh_command=["false"])
    assert "again as they were" in play(rig, tmp_path, broken, fails=True).said
    assert etc(rig) == files


@pytest.mark.whole
def test_parameters_come_with_one_reboot_and_go_with_another(cold_rig: Rig, tmp_path: Path) -> None:
    rig = cold_rig
    files, before = etc(rig), rig.must("cat /proc/cmdline")
    wanted = (parameters(kernel_cmdline_tokens=TOKENS), role("reboot", reboot_mode="auto"))
    foretold = play(rig, tmp_path, *wanted, check=True)
    told = play(rig, tmp_path, parameters(kernel_cmdline_tokens=TOKENS), role("reboot"))
    assert told.changed == 1 and "A reboot is needed and not allowed" in told.said
    boot = rig.must("cat /proc/sys/kernel/random/boot_id")
    done = play(rig, tmp_path, *wanted)
    assert told.changed + done.changed == foretold.changed == 2
    assert rig.must("cat /proc/sys/kernel/random/boot_id") != boot
    live = rig.must("cat /proc/cmdline").split()
    for word in ("isolcpus=domain,managed_irq,4-11", "nohz_full=4-11", "hugepagesz=2M", "hugepages=16"):
        assert live.count(word) == 1
    assert rig.must("cat /sys/devices/system/cpu/isolated /sys/devices/system/cpu/nohz_full").split() == ["4-11"] * 2
    assert "HugePages_Total:      16" in rig.must("cat /proc/meminfo")
    assert play(rig, tmp_path, *wanted).changed == 0

    play(rig, tmp_path, parameters(kernel_cmdline_state="absent"), role("reboot", reboot_mode="auto"))
    assert rig.must("cat /proc/cmdline") == before
    assert etc(rig) == files
