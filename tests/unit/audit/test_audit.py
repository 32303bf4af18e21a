# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The audit on hosts that the library itself has set up, whole and then with one thing broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from unit.host_settings.trees import Host as Tree
from unit.host_settings.trees import Unit
from unit.steer import trees
from unit.steer.nics import Driver, TrafficControl
from unit.steer.trees import NIC, NVME, SATA, ZONES, machine

from organism.core import _boot_tokens, _check, _host_audit, _levels, _steer_config, _steer_pass, _zfs_arc
from organism.core import _kernel_cmdline as kc
from organism.core._boot_loader import named
from organism.core._check import Check
from organism.core._earlier import EarlierState, Kept
from organism.core._host_audit_parts import judges
from organism.core._irq_plan import IrqWish
from organism.core._nic import Nics
from organism.core._nic_plan import NicWish
from organism.core._root import Root
from organism.core._systemd import CommandError
from organism.host import audit as command

MEMORY: dict[str, Any] = {
    "capability": "memory",
    "sysctl": {"vm.swappiness": 10, "vm.dirty_ratio": 15},
    "sysfs": {"/sys/kernel/mm/ksm/run": 1, "/sys/devices/system/cpu/cpu[23]/power/pm_qos_resume_latency_us": 2},
    "units": [{"name": "ksmtuned.service", "enabled": "true", "active": True}],
}
SYSCTL_FILE = "etc/sysctl.d/99-organism-memory.conf"
SWAPPINESS = "/proc/sys/vm/swappiness"


def look(tree: Tree, **parts: Any) -> list[Check]:
    return _host_audit.audit(_host_audit.Host(Root(tree.top), tree.run, **parts), judges())


def of(checks: list[Check], *subjects: str) -> dict[tuple[str, str], Check]:
    """The checks of records that begin with these names."""
    return {(each.check, each.subject): each for each in checks if each.subject.startswith(subjects)}


def verdicts(found: Mapping[tuple[str, str], Check]) -> dict[tuple[str, str], str]:
    return {key: each.verdict for key, each in found.items()}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    host = Tree(tmp_path, units={"ksmtuned.service": Unit()})
    host.put("proc/cmdline", "root=/dev/sda1 quiet\n")
    host.put("sys/devices/system/cpu/online", "0-3\n")
    return host


@pytest.fixture
def tuned(tree: Tree) -> Tree:
    tree.call(**MEMORY)
    return tree


def test_a_whole_capability_passes_for_now_and_for_the_boot(tuned: Tree) -> None:
    before = tuned.snapshot()
    found = of(look(tuned), "memory")
    assert verdicts(found) == {("host.now", "memory"): "PASS", ("host.boot", "memory"): "PASS"}
    assert found["host.now", "memory"].detail == "6 in force"
    assert tuned.snapshot() == before


@pytest.mark.parametrize(
    ("path", "text", "check", "thing", "said"),
    [
        (SWAPPINESS, "60\n", "host.now", SWAPPINESS, "is 60, wanted 10"),
        ("/sys/kernel/mm/ksm/run", "0\n", "host.now", "/sys/kernel/mm/ksm/run", "is 0, wanted 1"),
        (SYSCTL_FILE, None, "host.boot", SWAPPINESS, "no sysctl.d file of this capability sets it"),
        (SYSCTL_FILE, "vm.swappiness = 9\n", "host.boot", SWAPPINESS, "sets 9, wanted 10"),
        (SYSCTL_FILE, "# empty\n", "host.boot", f"/{SYSCTL_FILE}", "has another content"),
        ("etc/tmpfiles.d/organism-memory.conf", None, "host.boot", "/sys/kernel/mm/ksm/run", "no tmpfiles.d file"),
        ("etc/sysctl.d/99-z.conf", "vm.swappiness = 80\n", "host.boot", SWAPPINESS, "99-z.conf, line 1 wins over"),
    ],
)
def test_what_is_missing_is_named_with_what_was_wanted(
    tuned: Tree, path: str, text: str | None, check: str, thing: str, said: str
) -> None:
    if text is None:
        (tuned.top / path).unlink()
    else:
        tuned.put(path, text)
    found = of(look(tuned), "memory")
    wrong = found[check, f"memory {thing}"]
    assert wrong.ok is False and said in wrong.detail
    assert wrong.next == "ansible-playbook organism.proxmox.site --tags memory"
    assert (check, "memory") not in found  # no sum that sounds as if all were well
    other = "host.boot" if check == "host.now" else "host.now"
    assert found[other, "memory"].ok


def test_a_pattern_in_a_boot_file_stands_for_each_path(tuned: Tree) -> None:
    latency = "/sys/devices/system/cpu/cpu3/power/pm_qos_resume_latency_us"
    tuned.put(latency, "0\n")
    assert of(look(tuned), "memory")["host.now", f"memory {latency}"].detail == "is 0, wanted 2"


def test_a_value_that_was_right_before_the_first_run_is_held_to_the_boot_file(tree: Tree) -> None:
    tree.put(SWAPPINESS, "10\n")
    tree.call(**MEMORY)
    assert SWAPPINESS not in EarlierState("memory", Root(tree.top)).kept
    tree.put(SWAPPINESS, "60\n")
    assert of(look(tree), "memory")["host.now", f"memory {SWAPPINESS}"].ok is False


def test_a_unit_is_judged_for_now_and_for_the_boot(tuned: Tree) -> None:
    tuned.units["ksmtuned.service"].active = "inactive"
    found = of(look(tuned), "memory")
    assert found["host.now", "memory ksmtuned.service"].detail == "is stopped, wanted running"
    tuned.units["ksmtuned.service"] = Unit("disabled", "active")
    found = of(look(tuned), "memory")
    assert found["host.now", "memory"].ok
    assert found["host.boot", "memory ksmtuned.service"].detail == "is disabled, wanted enabled"


def test_a_unit_for_the_boot_may_have_run_since_but_not_have_failed(tree: Tree) -> None:
    tree.units["organism-steer-boot.service"] = Unit("disabled", "inactive")
    tree.call(capability="steer", units=[{"name": "organism-steer-boot.service", "enabled": "true"}])
    assert verdicts(of(look(tree), "steer")) == {("host.now", "steer"): "PASS", ("host.boot", "steer"): "PASS"}
    tree.units["organism-steer-boot.service"] = Unit("enabled", "active")  # it stays so after a boot (RemainAfterExit=)
    assert verdicts(of(look(tree), "steer")) == {("host.now", "steer"): "PASS", ("host.boot", "steer"): "PASS"}
    tree.units["organism-steer-boot.service"] = Unit("disabled", "inactive")
    assert of(look(tree), "steer")["host.boot", "steer organism-steer-boot.service"].ok is False


def test_what_cannot_be_judged_is_skipped_and_counts_for_nothing(tuned: Tree) -> None:
    EarlierState("vm_hook", Root(tuned.top)).remember({"vm:100": Kept(None, "local:snippets/hook")})
    (tuned.top / "sys/devices/system/cpu/cpu2/power/pm_qos_resume_latency_us").unlink()
    found = look(tuned)
    assert verdicts(of(found, "vm_hook")) == {("host.now", "vm_hook vm:100"): "SKIP"}
    gone = of(found, "memory")["host.now", "memory /sys/devices/system/cpu/cpu2/power/pm_qos_resume_latency_us"]
    assert gone.ok is None and "has gone" in gone.detail
    (tuned.top / "run/systemd/system/.there").unlink()
    (tuned.top / "run/systemd/system").rmdir()
    unit = of(look(tuned), "memory")["host.now", "memory ksmtuned.service"]
    assert unit.ok is None and unit.detail == "systemd does not run here"


def test_a_host_where_nothing_is_set_up_does_not_pass(tree: Tree) -> None:
    found = [each for each in look(tree) if each.check in ("host.now", "host.boot")]
    assert [each.verdict for each in found] == ["SKIP"] and "nothing is set up here" in found[0].detail


def test_a_record_that_is_none_fails_by_its_name(tuned: Tree) -> None:
    tuned.put("var/lib/organism/earlier/power.json", "{")
    assert of(look(tuned), "power")["host.now", "power"].ok is False


# Kernel parameters --------------------------------------------------------------------------------------------------


@pytest.fixture
def isolated(tree: Tree) -> Tree:
    """A host with systemd-boot whose next boot has two more parameters."""
    tree.put("sys/firmware/efi/there", "")
    tree.put("boot/efi/EFI/systemd/systemd-bootx64.efi", "")
    tree.put("etc/kernel/cmdline", "root=/dev/sda1 quiet\n")
    tree.put("boot/efi/loader/entries/1.conf", "options root=/dev/sda1 quiet nohz_full=2-3 mitigations=off\n")
    root = Root(tree.top)
    wanted = kc.wanted_words({"nohz_full": "2-3", "mitigations": "off"})
    loader = named("systemd-boot", root)
    facts = _boot_tokens.gather(root, "profile", loader)
    plan = _boot_tokens.make_plan("profile", wanted, facts)
    _boot_tokens.apply(root, "profile", wanted, facts, plan, [], tree.run)
    lines = _boot_tokens.coming(root, "profile", facts, plan, tree.run)
    _boot_tokens.write_pending(root, "profile", _boot_tokens.pending(facts, plan, lines))
    return tree


def test_parameters_that_wait_for_a_reboot_are_neither_passed_nor_failed(isolated: Tree) -> None:
    checks = look(isolated)
    found = of(checks, "kernel_cmdline-profile")
    assert verdicts(found) == {
        ("host.now", "kernel_cmdline-profile nohz_full"): "SKIP",
        ("host.now", "kernel_cmdline-profile mitigations"): "SKIP",
        ("host.boot", "kernel_cmdline-profile"): "PASS",
    }
    assert "waits for a reboot" in found["host.now", "kernel_cmdline-profile nohz_full"].detail
    waiting = [each.detail for each in checks if each.check == "host.reboot"]
    assert "waits for a reboot: profile: no nohz_full -> nohz_full=2-3" in waiting
    isolated.put("proc/cmdline", "root=/dev/sda1 quiet nohz_full=2-3 mitigations=off\n")
    checks = look(isolated)
    assert of(checks, "kernel_cmdline-profile")["host.now", "kernel_cmdline-profile"].detail == "2 in force"
    assert [each.ok for each in checks if each.check == "host.reboot"] == [True]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("etc/kernel/cmdline", "root=/dev/sda1 quiet\n", "/etc/kernel/cmdline is"),
        ("boot/efi/loader/entries/1.conf", "options root=/dev/sda1 quiet\n", "no entry has the new parameters"),
    ],
)
def test_parameters_that_the_next_boot_lacks_fail(isolated: Tree, file: str, text: str, said: str) -> None:
    isolated.put(file, text)
    found = of(look(isolated), "kernel_cmdline-profile")
    wrong = found["host.boot", "kernel_cmdline-profile"]
    assert wrong.ok is False and said.removesuffix(" is") in wrong.detail
    assert wrong.next == "ansible-playbook organism.proxmox.site --tags profile"
    assert found["host.now", "kernel_cmdline-profile nohz_full"].ok is False


# Interrupts and ports -----------------------------------------------------------------------------------------------


@pytest.fixture
def steered(tree: Tree) -> tuple[Tree, Nics]:
    machine(tree.top, NIC, NVME, SATA)
    trees.port(tree.top, "eth7", address="0000:09:00.0")
    root = Root(tree.top)
    irq = {"wish": IrqWish(ZONES, {"eno1": "io"}).as_dict(), "drift_check": 300}
    nic = {"wishes": {"packets": NicWish(("eth7",), (1, 7), rps=True).as_dict()}, "drift_check": 600}
    _steer_config.write_section(root, "irq", irq)
    _steer_config.write_section(root, "nic", nic)
    nics = Nics(root, Driver(tree.top), TrafficControl(tree.top, "eth7"))
    assert not _steer_pass.run(root, nics).problems
    for mask in tree.top.glob("proc/irq/*/smp_affinity_list"):  # each has fired since, so it has moved
        mask.with_name("effective_affinity_list").write_text(mask.read_text())
    tree.put("etc/systemd/system/organism-steer-boot.service", "[Unit]\n")
    return tree, nics


def test_managed_interrupts_are_told_as_such_and_never_as_done(steered: tuple[Tree, Nics]) -> None:
    tree, nics = steered
    found = of(look(tree, nics=nics), "irq_affinity", "nic_steering")
    assert verdicts(found) == {
        ("host.now", "irq_affinity"): "PASS",
        ("host.now", "irq_affinity managed"): "SKIP",
        ("host.now", "irq_affinity fixed"): "SKIP",
        ("host.boot", "irq_affinity"): "PASS",
        ("host.now", "nic_steering-packets"): "PASS",
        ("host.boot", "nic_steering-packets"): "PASS",
    }
    assert found["host.now", "irq_affinity managed"].detail.startswith("3 are managed by the kernel")


def test_a_moved_interrupt_and_a_changed_queue_fail_and_nothing_is_put_right(steered: tuple[Tree, Nics]) -> None:
    tree, nics = steered
    tree.put("proc/irq/25/smp_affinity_list", "3\n")
    tree.put("sys/class/net/eth7/queues/rx-0/rps_cpus", "0\n")
    checks = look(tree, nics=nics)
    wrong = [(each.subject.split()[0], each.detail) for each in checks if each.ok is False]
    assert ("irq_affinity", "is 3, wanted 0,6") in wrong
    assert [subject for subject, _ in wrong].count("nic_steering-packets") == 1
    assert tree.text("proc/irq/25/smp_affinity_list") == "3\n"


def test_nobody_steers_after_a_boot_without_the_unit_or_the_settings(steered: tuple[Tree, Nics]) -> None:
    tree, nics = steered
    (tree.top / "etc/systemd/system/organism-steer-boot.service").unlink()
    assert (
        "nothing steers after a boot" in of(look(tree, nics=nics), "irq_affinity")["host.boot", "irq_affinity"].detail
    )
    (tree.top / "etc/organism/steer.json").unlink()
    found = of(look(tree, nics=nics), "irq_affinity", "nic_steering-packets")
    assert {each.ok for each in found.values()} == {False}


# ZFS ----------------------------------------------------------------------------------------------------------------


def test_the_arc_is_judged_by_what_zfs_uses(tree: Tree) -> None:
    text = _zfs_arc.render(_zfs_arc.Limits(1 << 30, 8 << 30))
    EarlierState("zfs_arc", Root(tree.top)).remember({_zfs_arc.MODPROBE: Kept(None, text)})
    tree.put(_zfs_arc.MODPROBE, text)
    stats = "size 4 5\nc_min 4 1073741824\nc_max 4 {}\n"
    tree.put(_zfs_arc.ARCSTATS, stats.format(8 << 30))
    assert set(verdicts(of(look(tree), "zfs_arc")).values()) == {"PASS"}
    tree.put(_zfs_arc.ARCSTATS, stats.format(4 << 30))  # the parameter's file would still show the old number
    assert of(look(tree), "zfs_arc")["host.now", "zfs_arc zfs_arc_max"].ok is False
    tree.put("etc/modprobe.d/zfs.conf", "options zfs zfs_arc_max=1\n")
    assert of(look(tree), "zfs_arc")["host.boot", "zfs_arc /etc/modprobe.d/zfs.conf"].ok is False


def test_datasets_are_asked_for_their_properties(tree: Tree) -> None:
    changes = {
        "zfs fast/vm atime": Kept({"value": "on", "source": "default"}, "off"),
        "zfs gone": Kept(None, "created"),
    }
    EarlierState("zfs_layout", Root(tree.top)).remember(changes)
    tree.put("proc/self/mountinfo", "")
    atime = "off"

    def run(argv: list[str]) -> str:
        if argv[0] == "zpool":
            return "fast\thealth\tONLINE\t-\nfast\tautotrim\toff\tdefault\n"
        values = {"atime": atime, "type": "filesystem", "mounted": "yes", "mountpoint": "/fast/vm", "canmount": "on"}
        return "".join(f"fast/vm\t{name}\t{value}\tlocal\n" for name, value in values.items())

    def look_here() -> dict[tuple[str, str], Check]:
        return of(_host_audit.audit(_host_audit.Host(Root(tree.top), run), judges()), "zfs_layout")

    assert verdicts(look_here()) == {
        ("host.now", "zfs_layout"): "PASS",
        ("host.boot", "zfs_layout"): "PASS",
        ("host.now", "zfs_layout gone"): "SKIP",
    }
    atime = "on"
    assert look_here()["host.now", "zfs_layout"].detail == "fast/vm: atime is on and not off"

    def none(argv: list[str]) -> str:
        raise CommandError("`zpool` is not installed on this host")

    found = of(_host_audit.audit(_host_audit.Host(Root(tree.top), none), judges()), "zfs_layout")
    assert set(verdicts(found).values()) == {"SKIP"}


# Pins, levels, the plan ---------------------------------------------------------------------------------------------


def test_pins_without_their_settings_fail(tree: Tree) -> None:
    EarlierState("qemu_pin", Root(tree.top)).remember({"/etc/organism/qemu_pin.json": Kept(None, {"content": "x"})})
    found = of(look(tree), "qemu_pin")["host.boot", "qemu_pin"]
    assert found.ok is False and "no VM is pinned" in found.detail


def test_levels_and_the_gap_below_the_highest(tree: Tree) -> None:
    for number in (0, 2):
        tree.put(_levels.marker_path(number), _levels.Marker(number, _levels.COLLECTION_VERSION, "now").render())
    found = {each.subject: each for each in look(tree) if each.check == "host.level"}
    assert {subject: each.verdict for subject, each in found.items()} == {
        "0": "PASS", "1": "FAIL", "2": "PASS", "3": "SKIP", "4": "SKIP", "6": "SKIP",
    }  # fmt: skip
    assert found["1"].next == "ansible-playbook organism.proxmox.site --tags level1"


def test_a_plan_with_cpus_that_are_not_there_fails(tree: Tree) -> None:
    plan = {"format": 1, "host": [0], "vcpu": [1, 2], "io": [3]}
    tree.put("etc/organism/cpu_plan.json", json.dumps(plan))
    assert "VCPU 1-2" in next(each.detail for each in look(tree) if each.check == "host.cpu_plan" and each.ok)
    tree.put("sys/devices/system/cpu/online", "0-2\n")
    assert "CPUs 3" in next(each.detail for each in look(tree) if each.check == "host.cpu_plan" and each.ok is False)


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_ends_as_it_found_things(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    tree.call(capability="io_scheduler", sysfs={"/sys/kernel/mm/ksm/run": 1})
    assert command.main(["--root", str(tree.top)]) == 0
    said = capsys.readouterr().out
    assert "PASS  host.now io_scheduler" in said and "\x1b[" not in said
    tree.put("/sys/kernel/mm/ksm/run", "0\n")
    assert command.main(["--root", str(tree.top), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"ok", "passed", "failed", "skipped", "checks"} == set(_check.as_dict([]))
    assert {frozenset(each) for each in report["checks"]} == {
        frozenset({"check", "subject", "ok", "seconds", "detail", "next"})
    }
    with pytest.raises(SystemExit) as end:
        command.main(["--nonsense"])
    assert end.value.code == 2
