# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Host settings: predicted, set, kept, taken back; on a tree with a kernel and a systemctl of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from unit.host_settings.trees import Host, Unit

from organism.core._host_settings_apply import SettingsFailed

LATENCY = "/sys/devices/system/cpu/cpu%s/power/pm_qos_resume_latency_us"
WISH: dict[str, Any] = {
    "sysctl": {"vm.swappiness": 10, "net.ipv4.tcp_rmem": "4096 87380 6291456"},
    "sysfs": {"/sys/kernel/mm/transparent_hugepage/enabled": "madvise", LATENCY % "[2-3]": 2},
    "sysfs_optional": {"/sys/devices/system/cpu/intel_pstate/no_turbo": 1},
    "files": [{"path": "/etc/new.d/deep/organism.conf", "content": "a\n", "mode": "0600"}],
    "modules": ["zram"],
    "units": [
        {"name": "irqbalance.service", "enabled": "masked", "active": False},
        {"name": "late.timer", "enabled": True, "active": True},
        {"name": "nowhere.service", "enabled": False, "optional": True},
    ],
}


@pytest.fixture
def full(host: Host) -> Host:
    host.units = {"irqbalance.service": Unit("enabled", "active"), "late.timer": Unit()}
    return host


def test_it_is_predicted_done_and_then_kept(full: Host) -> None:
    earlier = full.snapshot()
    predicted = full.call(check=True, **WISH)
    assert full.snapshot() == earlier
    assert not full.record().exists()
    done = full.call(**WISH)
    assert done.difference.changes == predicted.difference.changes
    assert len(done.difference.changes) == 13
    assert all(row["ok"] for row in done.settings)
    assert not any(row["ok"] for row in predicted.settings)
    assert full.text("/proc/sys/vm/swappiness") == "10\n"
    assert full.text("/sys/kernel/mm/transparent_hugepage/enabled") == "always [madvise] never\n"
    assert [full.text(LATENCY % cpu) for cpu in range(4)] == ["0\n", "0\n", "2\n", "2\n"]
    assert full.text("/etc/sysctl.d/99-organism-test.conf").splitlines()[1:] == [
        "net.ipv4.tcp_rmem = 4096 87380 6291456",
        "vm.swappiness = 10",
    ]
    assert full.text("/etc/tmpfiles.d/organism-test.conf").splitlines()[1:] == [
        f"w {LATENCY % '[2-3]'} - - - - 2",
        "w /sys/kernel/mm/transparent_hugepage/enabled - - - - madvise",
    ]
    assert full.text("/etc/modules-load.d/organism-test.conf").splitlines()[1:] == ["zram"]
    order = full.text("/etc/systemd/system/systemd-tmpfiles-setup.service.d/organism-test.conf")
    assert order.endswith("\n[Unit]\nAfter=systemd-modules-load.service\n")
    assert full.units["irqbalance.service"] == Unit("enabled", "inactive", masked=True)
    assert full.units["late.timer"] == Unit("enabled", "active")
    assert [lacking["path"] for lacking in done.unsupported] == [
        "/sys/devices/system/cpu/intel_pstate/no_turbo",
        "nowhere.service",
    ]
    after = full.snapshot()
    again = full.call(**WISH)
    assert (again.difference.changes, again.done) == ([], [])
    assert not [call for call in full.ran if not call.startswith("systemctl show")]
    assert full.snapshot() == after


def test_absent_restores_all_of_it(full: Host) -> None:
    full.put("etc/sysctl.d/99-organism-test.conf", "# mine\n", mode=0o640)
    earlier = full.snapshot()
    full.call(**WISH)
    predicted = full.call(check=True)
    assert full.record().exists()
    undone = full.call()
    assert undone.difference.changes == predicted.difference.changes
    assert undone.kept_by_others == []
    assert full.snapshot() == earlier
    assert not full.record().exists()
    assert not full.call().difference


def test_a_smaller_wish_takes_back_just_what_it_no_longer_names(full: Host) -> None:
    full.call(**WISH)
    less = {**WISH, "sysctl": {"vm.swappiness": 10}, "sysfs": {LATENCY % "2": 2}, "files": [], "units": []}
    done = full.call(**less)
    assert full.text("/proc/sys/net/ipv4/tcp_rmem") == "4096\t131072\t6291456\n"
    assert full.text("/proc/sys/vm/swappiness") == "10\n"
    assert [full.text(LATENCY % cpu) for cpu in (2, 3)] == ["2\n", "0\n"]
    assert full.text("/sys/kernel/mm/transparent_hugepage/enabled") == "[always] madvise never\n"
    assert not (full.top / "etc/new.d").exists()
    assert full.units["irqbalance.service"] == Unit("enabled", "active")
    assert not full.call(**less).difference
    assert done.kept_by_others == []
    full.call()
    assert full.text("/proc/sys/vm/swappiness") == "60\n"


def test_what_others_have_changed_since_stays_and_is_named(full: Host) -> None:
    full.call(**WISH)
    full.put("proc/sys/vm/swappiness", "30\n")
    full.put("etc/new.d/deep/organism.conf", "theirs\n", 0o600)
    full.put("etc/tmpfiles.d/theirs.conf", "")
    full.units["late.timer"].masked = True
    done = full.call()
    assert [kept["key"] for kept in done.kept_by_others] == [
        "/etc/new.d/deep/organism.conf",
        "/proc/sys/vm/swappiness",
        "unit:late.timer",
        "folder:/etc/tmpfiles.d",
        "folder:/etc/new.d/deep",
        "folder:/etc/new.d",
    ]
    assert full.text("/proc/sys/vm/swappiness") == "30\n"
    assert full.text("/etc/new.d/deep/organism.conf") == "theirs\n"
    assert full.units["irqbalance.service"].active == "active"


def test_the_first_value_is_restored_whatever_was_set_in_between(host: Host) -> None:
    host.call(sysctl={"vm.swappiness": 10})
    host.put("proc/sys/vm/swappiness", "30\n")
    assert host.call(sysctl={"vm.swappiness": 5}).done
    host.call()
    assert host.text("/proc/sys/vm/swappiness") == "60\n"


def test_what_was_right_before_is_not_ours_to_take_back(host: Host) -> None:
    done = host.call(sysctl={"vm.swappiness": 60})
    assert [change.name for change in done.difference.changes] == ["/etc/sysctl.d/99-organism-test.conf"]
    host.put("proc/sys/vm/swappiness", "30\n")
    assert host.call().kept_by_others == []
    assert host.text("/proc/sys/vm/swappiness") == "30\n"


@pytest.mark.parametrize("lost", ["/proc/sys/vm/swappiness", "/etc/sysctl.d/99-organism-test.conf"])
def test_live_and_boot_are_both_compared(host: Host, lost: str) -> None:
    host.call(sysctl={"vm.swappiness": 10})
    host.put(lost, "60\n")
    done = host.call(check=True, sysctl={"vm.swappiness": 10})
    assert done.boot_differs == ["/proc/sys/vm/swappiness"]
    assert [change.name for change in done.difference.changes] == [lost]
    assert host.call(sysctl={"vm.swappiness": 10}).difference
    assert host.call(sysctl={"vm.swappiness": 10}).boot_differs == []


def test_the_half_of_a_pair_that_the_kernel_zeroes_comes_back(host: Host) -> None:
    host.put("proc/sys/vm/dirty_bytes", "1048576\n")
    host.put("proc/sys/vm/dirty_ratio", "0\n")
    earlier = host.snapshot()
    host.call(sysctl={"vm.dirty_ratio": 15})
    assert host.text("/proc/sys/vm/dirty_bytes") == "0\n"
    assert not host.call(sysctl={"vm.dirty_ratio": 15}).difference
    host.call()
    assert {name: now for name, now in host.snapshot().items() if now != earlier[name]} == {}


def test_values_are_compared_by_meaning(host: Host) -> None:
    wish = {"sysctl": {"net.ipv4.tcp_rmem": "4096 131072  6291456", "net.ipv4.conf.eth0/5.rp_filter": "02"}}
    done = host.call(**wish, live={"/sys/module/zfs/parameters/zfs_flag": False})
    assert [change.name for change in done.difference.changes] == ["/etc/sysctl.d/99-organism-test.conf"]


def test_units_go_off_first_and_on_last(full: Host) -> None:
    full.call(**WISH)
    calls = [call.removeprefix("systemctl --no-ask-password ") for call in full.ran if "systemctl show" not in call]
    assert calls[:2] == ["stop irqbalance.service", "mask irqbalance.service"]
    assert calls[-2:] == ["enable late.timer", "start late.timer"]
    assert "/proc/sys/vm/swappiness = 10" in calls[2:-2]


def test_a_unit_may_come_with_a_file_of_the_call_and_starts_again_when_it_changes(host: Host) -> None:
    path = "/etc/systemd/thing.conf"
    host.appear = {"thing.service": Unit("generated")}
    unit = {"name": "thing.service", "active": True, "expected": True, "restart_on": [path]}
    wish: dict[str, Any] = {"files": [{"path": path, "content": "size=1\n"}], "units": [unit]}
    predicted = host.call(check=True, **wish)
    assert host.call(**wish).difference.changes == predicted.difference.changes
    assert host.units["thing.service"].active == "active"
    assert not host.call(**wish).difference
    wish["files"] = [{"path": path, "content": "size=2\n"}]
    assert "systemctl restart thing.service" in host.call(**wish).done
    host.call()
    assert host.units["thing.service"].active == "inactive"
    assert not (host.top / "etc/systemd").exists()


def test_units_on_top_of_each_other_are_stopped_before_any_starts_again(host: Host) -> None:
    path = "/etc/systemd/thing.conf"
    names = ("dev-thing.swap", "thing-setup.service")
    host.units = {name: Unit("static", "active") for name in names}
    units = [{"name": name, "active": True, "restart_on": [path]} for name in names]
    host.call(files=[{"path": path, "content": "size=1\n"}], units=units)
    calls = [call.removeprefix("systemctl --no-ask-password ") for call in host.ran if "systemctl show" not in call]
    assert calls[-2:] == [f"stop {' '.join(names)}", f"start {' '.join(names)}"]


def test_a_unit_that_ran_before_starts_again_on_its_earlier_file(host: Host) -> None:
    path = "/etc/systemd/thing.conf"
    host.put(path, "size=9\n")
    host.units = {"thing.service": Unit("static", "active")}
    earlier = host.snapshot()
    unit = {"name": "thing.service", "active": True, "restart_on": [path]}
    host.call(files=[{"path": path, "content": "size=1\n"}], units=[unit])
    assert "systemctl --no-ask-password restart thing.service" in host.ran
    assert not host.call(files=[{"path": path, "content": "size=1\n"}], units=[unit]).difference
    assert "systemctl restart thing.service" in host.call().done
    assert (host.snapshot(), host.record().exists()) == (earlier, False)


def test_udev_reads_its_rules_again_and_values_it_sets_are_not_set_twice(host: Host) -> None:
    rule = {"path": "/etc/udev/rules.d/60-x.rules", "content": "x\n"}
    host.call(files=[rule], udev_trigger=["block"], live={"/sys/kernel/mm/ksm/run": 1})
    assert host.ran == [
        "udevadm control --reload",
        "udevadm trigger --action=change --settle --subsystem-match=block",
        "/sys/kernel/mm/ksm/run = 1",
    ]
    assert not (host.top / "etc/tmpfiles.d").exists()


def test_a_loaded_module_that_is_in_use_stays_and_is_named(host: Host) -> None:
    host.call(modules=["zram"])
    host.put("sys/module/zram/refcnt", "1\n")
    done = host.call()
    assert [kept["key"] for kept in done.kept_by_others] == ["module:zram"]
    assert (host.top / "sys/module/zram").exists()
    assert not (host.top / "etc/modules-load.d").exists()


def test_a_kernel_that_refuses_fails_with_what_was_done_and_can_be_taken_back(host: Host) -> None:
    earlier = host.snapshot()
    host.refuses = {"/sys/kernel/mm/ksm/run"}
    with pytest.raises(SettingsFailed, match="ksm/run: the kernel refused '2' .EINVAL") as failed:
        host.call(sysctl={"vm.swappiness": 10}, sysfs={"/sys/kernel/mm/ksm/run": 2})
    assert failed.value.done == ["/proc/sys/vm/swappiness 60 -> 10"]
    assert not (host.top / "etc/sysctl.d/99-organism-test.conf").exists()  # no boot with a value that is refused
    host.call()
    assert host.snapshot() == earlier


def test_a_kernel_that_alters_a_value_fails_with_both_and_the_earlier_one_is_back(host: Host) -> None:
    host.alters = {"/proc/sys/vm/swappiness": "60"}
    with pytest.raises(SettingsFailed, match="swappiness: wrote '250', and the kernel made it '60'.*nothing had been"):
        host.call(sysctl={"vm.swappiness": 250})
    assert host.text("/proc/sys/vm/swappiness") == "60\n"


def test_a_unit_that_does_not_get_there_is_a_failure(host: Host) -> None:
    host.units = {"a.service": Unit()}
    host.fails = {"start"}
    with pytest.raises(SettingsFailed, match="start -- a.service|start a.service"):
        host.call(units=[{"name": "a.service", "active": True}])


def test_a_unit_that_was_left_half_way_is_taken_back(host: Host) -> None:
    host.units = {"a.service": Unit("enabled", "active")}
    host.fails = {"mask"}
    with pytest.raises(SettingsFailed, match="mask a.service.*done before that: systemctl stop a.service"):
        host.call(units=[{"name": "a.service", "enabled": "masked", "active": False}])
    assert host.units["a.service"].active == "inactive"
    assert host.call().kept_by_others == []
    assert host.units["a.service"] == Unit("enabled", "active")


def test_a_unit_that_a_boot_has_started_is_still_as_it_was_left(host: Host) -> None:
    host.units = {"a.service": Unit("disabled", "inactive")}
    host.call(units=[{"name": "a.service", "enabled": "true"}])
    host.units["a.service"].active = "active"
    assert host.call().kept_by_others == []
    assert host.units["a.service"] == Unit("disabled", "inactive")


def test_a_unit_that_somebody_disabled_and_started_is_left_alone(host: Host) -> None:
    host.units = {"a.service": Unit("static", "inactive")}
    host.call(units=[{"name": "a.service", "enabled": "masked"}])
    host.units["a.service"] = Unit("disabled", "active")
    assert [kept["key"] for kept in host.call().kept_by_others] == ["unit:a.service"]
    assert host.units["a.service"] == Unit("disabled", "active")


def test_the_record_is_written_before_the_change(host: Host) -> None:
    host.refuses = {"/proc/sys/vm/swappiness"}
    with pytest.raises(SettingsFailed):
        host.call(sysctl={"vm.swappiness": 10})
    kept = json.loads(host.record().read_text())["kept"]
    assert kept["/proc/sys/vm/swappiness"] == {"before": "60", "set": "10"}
