# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Host settings that are refused: all reasons at once, and the host as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
from unit.host_settings.trees import Host, Unit

from organism.core._host_settings import SettingsRefused


@pytest.fixture
def odd(host: Host) -> Host:
    """A host with values that cannot be set."""
    host.put("proc/sys/vm/fixed", "1\n", 0o444)
    host.put("proc/sys/vm/drop_caches", "", 0o200)
    host.put("sys/kernel/fixed", "1\n", 0o444)
    host.put("sys/cpufreq/scaling_governor", "performance\n")
    host.put("sys/cpufreq/scaling_available_governors", "performance schedutil\n")
    (host.top / "etc/link.conf").symlink_to("/etc/other.conf")
    host.put("etc/sysctl.d/99-sysctl.conf", "# all mine\n  vm.swappiness=60\n-vm/dirty_ratio = 10\nnet.*.x = 1\n")
    host.put("etc/systemd/system/own.service", "[Service]\n")
    host.units = {
        "fixed.service": Unit("static"),
        "short.service": Unit("enabled", id="long.service"),
        "off.service": Unit(masked=True),
        "broken.service": Unit(load="bad-setting"),
        "own.service": Unit("enabled"),
    }
    return host


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sysctl": {"vm.swapiness": 1}}, "sysctl vm.swapiness (/proc/sys/vm/swapiness) does not exist"),
        ({"sysctl": {"vm.fixed": 1}}, "(/proc/sys/vm/fixed) is read-only"),
        ({"sysctl": {"vm.drop_caches": 3}}, "(/proc/sys/vm/drop_caches) is write-only"),
        ({"sysctl": {"vm": 1}}, "(/proc/sys/vm) is a folder"),
        ({"sysctl": {"vm/../../../etc/passwd": 1}}, "is not the name of a sysctl"),
        ({"sysctl": {"vm.*": 1}}, "is not the name of a sysctl"),
        ({"sysctl": {"vm.swappiness": ""}}, "has no value"),
        ({"sysctl": {"vm.swappiness": None}}, "sysctl vm.swappiness: a text, a number or a boolean is needed"),
        ({"sysctl": {"vm.dirty_bytes": 1, "vm/dirty_bytes": 1}}, "is named twice, also as vm.dirty_bytes"),
        (
            {"sysctl": {"vm.swappiness": 10}},
            "vm.swappiness = 60 in /etc/sysctl.d/99-sysctl.conf, line 2 would win over",
        ),
        ({"sysctl": {"vm.dirty_ratio": 15}}, "vm.dirty_ratio = 10 in /etc/sysctl.d/99-sysctl.conf, line 3"),
        ({"sysfs": {"/etc/passwd": 1}}, "'/etc/passwd' is not a path below /sys"),
        ({"sysfs": {"/sys/../etc/passwd": 1}}, "is not a path below /sys"),
        ({"sysfs": {"/proc/sys/vm/swappiness": 1}}, "is not a path below /sys"),
        ({"sysfs": {"/sys/kernel/nothing": 1}}, "/sys/kernel/nothing does not exist"),
        ({"sysfs": {"/sys/kernel/no*": 1}}, "/sys/kernel/no* matches nothing"),
        ({"sysfs": {"/sys/kernel/fixed": 2}}, "/sys/kernel/fixed is read-only"),
        ({"live": {"/sys/kernel/fixed": 2}}, "/sys/kernel/fixed is read-only"),
        (
            {"sysfs": {"/sys/kernel/mm/transparent_hugepage/enabled": "sometimes"}},
            "enabled offers always madvise never, and not sometimes",
        ),
        ({"sysfs": {"/sys/cpufreq/scaling_governor": "fast"}}, "offers performance schedutil, and not fast"),
        (
            {"sysfs": {"/sys/kernel/mm/ksm/run": 1, "/sys/kernel/mm/ksm/ru[n]": 2}},
            "/sys/kernel/mm/ksm/run is wanted as",
        ),
        ({"modules": ["zrum"]}, "kernel module zrum does not exist for the running kernel 6.12.0"),
        ({"files": [{"path": "etc/x", "content": ""}]}, "is not an absolute path"),
        ({"files": [{"path": "/proc/x", "content": ""}]}, "not a place for a file that stays"),
        ({"files": [{"path": "/etc/x", "content": "", "mode": "rw"}]}, "mode 'rw' is not octal"),
        ({"files": [{"path": "/etc/link.conf", "content": ""}]}, "/etc/link.conf is a link"),
        ({"files": [{"path": "/etc/sysctl.d", "content": ""}]}, "/etc/sysctl.d is a link, a folder"),
        ({"files": [{"path": "/etc/x", "content": ""}] * 2}, "/etc/x is wanted twice"),
        ({"units": [{"name": "nowhere.service", "active": True}]}, "unit nowhere.service does not exist"),
        ({"units": [{"name": "short.service", "enabled": True}]}, "is another name of long.service"),
        ({"units": [{"name": "fixed.service", "enabled": False}]}, "is static and cannot be disabled"),
        ({"units": [{"name": "off.service", "active": True}]}, "is masked, so it cannot be started"),
        ({"units": [{"name": "fixed.service", "enabled": "masked", "active": True}]}, "cannot be masked and running"),
        ({"units": [{"name": "own.service", "enabled": "masked"}]}, "/etc/systemd/system/own.service is its own file"),
        ({"units": [{"name": "broken.service", "active": True}]}, "cannot be loaded (bad-setting)"),
        ({"units": [{"name": "fixed.service", "enabled": "maybe"}]}, "enabled is true, false or masked, not 'maybe'"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_it_is_refused_with_the_host_as_it_was(odd: Host, arguments: dict[str, Any], reason: str, check: bool) -> None:
    earlier = odd.snapshot()
    with pytest.raises(SettingsRefused, match=re.escape(reason)):
        odd.call(check=check, **arguments)
    assert odd.snapshot() == earlier
    assert not odd.record().exists()


def test_all_reasons_are_told_at_once(odd: Host) -> None:
    with pytest.raises(SettingsRefused) as refused:
        odd.call(sysctl={"vm.fixed": 1, "vm.none": 1}, sysfs={"/sys/kernel/none": 1}, modules=["none"])
    assert len(refused.value.problems) == 4


def test_what_is_optional_is_told_and_does_not_stop_the_rest(odd: Host) -> None:
    done = odd.call(
        sysfs_optional={
            "/sys/kernel/none": 1,
            "/sys/kernel/fixed": 2,
            "/sys/cpufreq/scaling_governor": "powersave",
            "/sys/kernel/mm/ksm/run": 1,
        }
    )
    assert done.unsupported == [
        {"path": "/sys/cpufreq/scaling_governor", "reason": "offers performance schedutil, and not powersave"},
        {"path": "/sys/kernel/fixed", "reason": "is read-only"},
        {"path": "/sys/kernel/none", "reason": "does not exist on this kernel"},
    ]
    assert odd.text("/etc/tmpfiles.d/organism-test.conf").splitlines()[1:] == ["w /sys/kernel/mm/ksm/run - - - - 1"]


def test_a_later_file_with_the_same_value_is_no_conflict(odd: Host) -> None:
    assert odd.call(sysctl={"vm.swappiness": 60}, check=True).difference


def test_another_name_for_the_boot_file_settles_the_conflict(odd: Host) -> None:
    odd.call(sysctl={"vm.swappiness": 10}, sysctl_file="/etc/sysctl.d/99-z.conf")
    assert "vm.swappiness = 10\n" in odd.text("/etc/sysctl.d/99-z.conf")


def test_units_need_a_systemd_that_runs(host: Host) -> None:
    (host.top / "run/systemd/system/.there").unlink()
    (host.top / "run/systemd/system").rmdir()
    with pytest.raises(SettingsRefused, match=r"systemd does not run here, so a.service cannot be set"):
        host.call(units=[{"name": "a.service", "active": True}])
