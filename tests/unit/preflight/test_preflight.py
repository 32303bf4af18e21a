# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks of a host on made trees: what is fit, what is a warning, what is fatal and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from organism.core import _preflight
from organism.core._preflight import Probe, Record, Wanted
from organism.core._root import Root

GIB = 1024**3


def _statvfs(free: int) -> Callable[[str], os.statvfs_result]:
    return lambda _path: os.statvfs_result((4096, 4096, 10**9, free // 4096, free // 4096, 0, 0, 0, 0, 255))


def probe(*, free: int = 50 * GIB, clock: int | None = 0, python: tuple[int, int] = (3, 13)) -> Probe:
    return Probe(statvfs=_statvfs(free), clock_state=lambda: clock, python=python, machine="x86_64")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A Debian 13 guest with two RX 580 and an emulated display adapter, and /data as a mount."""
    files = {
        "etc/os-release": 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n',
        "proc/sys/kernel/osrelease": "6.12.57+deb13-amd64\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\n\nprocessor\t: 1\nmodel name\t: Some CPU\n",
        "proc/meminfo": "MemTotal:       32768000 kB\nMemFree: 1 kB\n",
        "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/vda rw\n23 22 8:2 / /data rw - ext4 /dev/vdb rw\n",
        "var/lib/dpkg/status": (
            "Package: python3-venv\nStatus: install ok installed\nVersion: 3.13\nDescription: x\n Package: pve\n"
            "\n"
            "Package: rsync\nStatus: deinstall ok config-files\nVersion: 3\n"
        ),
        "usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-257.so": "",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x1002\n",
        "sys/bus/pci/devices/0000:01:00.0/device": "0x67df\n",
        "sys/bus/pci/devices/0000:02:00.0/class": "0x030000\n",
        "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n",
        "sys/bus/pci/devices/0000:02:00.0/device": "0x67df\n",
        "sys/bus/pci/devices/0000:00:01.0/class": "0x030000\n",
        "sys/bus/pci/devices/0000:00:01.0/vendor": "0x1234\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in ("run/systemd/system", "data", "sys/devices/system/cpu/cpu0/topology"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def checks(tree: Path, wanted: Wanted | None = None, given: Probe | None = None) -> dict[str, Record]:
    records = _preflight.check(Root(tree), wanted or Wanted(groups=("gpu_pool",)), given or probe())
    return {record.check: record for record in records}


def test_a_fit_host_passes_every_check(tree: Path) -> None:
    found = checks(tree)
    assert {record.status for record in found.values()} == {"ok"}
    assert found["gpus"].detail == "2 x AMD 67df"
    assert found["systemd"].detail == "257"
    assert "31.2 GiB" in found["memory"].detail


def test_every_fatal_reason_is_told_at_once_with_its_way_out(tree: Path) -> None:
    (tree / "run/systemd/system").rmdir()
    (tree / "etc/os-release").write_text("ID=fedora\n")
    records = checks(tree, given=probe(free=GIB // 2, python=(3, 9))).values()
    reasons = _preflight.failures(records)
    for check, advice in (
        ("system: fedora", "use Debian"),
        ("systemd: is not the running system manager", "boot this host with systemd"),
        ("python: 3.9 is too old", "ansible_python_interpreter"),
        ("disk: free: / 0.5 GiB", "make 1024 MiB free"),
    ):
        assert check in reasons
        assert advice in reasons


@pytest.mark.parametrize("version", ["24.04", "12"])
def test_a_derivative_is_untested_and_said_to_be(tree: Path, version: str) -> None:
    (tree / "etc/os-release").write_text(f'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="{version}"\n')
    assert checks(tree)["system"].status == "warn"


def test_little_memory_is_fatal(tree: Path) -> None:
    (tree / "proc/meminfo").write_text("MemTotal: 409600 kB\n")
    assert checks(tree)["memory"] == Record("memory", "fail", "400 MiB", "give this host 512 MiB or more")


def test_data_without_a_mount_of_its_own_is_a_warning(tree: Path) -> None:
    (tree / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/vda rw\n")
    assert checks(tree)["/data"].status == "warn"


def test_mount_points_with_blanks_are_understood(tree: Path) -> None:
    (tree / "proc/self/mountinfo").write_text("22 1 8:1 / /my\\040data rw - ext4 /dev/vda rw\n")
    assert _preflight.mount_points(Root(tree)) == {"/my data"}


def test_emulated_display_adapters_are_no_gpus(tree: Path) -> None:
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (tree / f"sys/bus/pci/devices/{address}/class").write_text("0x020000\n")
    assert checks(tree)["gpus"].status == "warn"
    assert checks(tree, Wanted(groups=("bus",)))["gpus"].status == "ok"


@pytest.mark.parametrize(("state", "status"), [(0, "ok"), (5, "warn"), (None, "warn")])
def test_the_clock(tree: Path, state: int | None, status: str) -> None:
    assert checks(tree, given=probe(clock=state))["clock"].status == status


def test_only_a_proxmox_host_needs_iommu_groups_and_pve_manager(tree: Path) -> None:
    found = checks(tree, Wanted(groups=("pve",)))
    assert (found["iommu"].status, found["proxmox"].status) == ("warn", "warn")


def test_installed_packages_are_those_that_dpkg_calls_installed(tree: Path) -> None:
    assert _preflight.dpkg_versions(Root(tree)) == {"python3-venv": "3.13"}


def test_the_table_is_aligned_and_has_the_next_step() -> None:
    lines = _preflight.table([Record("cpu", "ok", "4 cores"), Record("memory", "fail", "1 MiB", "buy some")])
    assert lines == ["ok    cpu     4 cores", "fail  memory  1 MiB -> buy some"]
