# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which locks fit which machine, from recordings, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.organism.proxmox.plugins.module_utils._host_settings_apply import converge
from ansible_collections.organism.proxmox.plugins.module_utils._host_settings_wish import wish_from
from ansible_collections.organism.proxmox.plugins.module_utils._root import Root as ModuleRoot
from ansible_collections.organism.proxmox.plugins.modules import cpu_plan as cpu_plan_module
from ansible_collections.organism.proxmox.plugins.modules import power_plan as module
from organism.core import _power, _thermal, _unit_state
from organism.core._power import PowerRefused, PowerWishes
from organism.core._root import Root

Machines = Callable[[str], Root]
REPO = Path(__file__).resolve().parents[3]
CPU = "/sys/devices/system/cpu"
DEFAULTS = {name: option["default"] for name, option in module.ARGUMENTS.items()}


def made(root: Root, vcpu: tuple[int, ...] = (2, 8), **wishes: Any) -> _power.PowerPlan:
    return _power.plan(PowerWishes(**wishes), _power.gather(root), vcpu)


def test_intel_pstate_is_locked_at_both_ends(machine: Machines) -> None:
    plan = made(machine("coffee_lake_12_gpus"))
    assert plan.sysfs_optional == {
        f"{CPU}/cpufreq/policy*/scaling_governor": "performance",
        f"{CPU}/intel_pstate/max_perf_pct": "100",
        f"{CPU}/intel_pstate/min_perf_pct": "100",
        f"{CPU}/intel_pstate/no_turbo": "0",
        "/sys/module/pcie_aspm/parameters/policy": "performance",
    }
    assert plan.sysfs == {f"{CPU}/cpu{cpu}/power/pm_qos_resume_latency_us": "2" for cpu in (2, 8)}
    assert plan.tokens == {
        "intel_idle.max_cstate": "0",
        "processor.max_cstate": "1",
        "pcie_aspm.policy": "performance",
        "nvme_core.default_ps_max_latency_us": "0",
    }
    assert plan.modules == []


def test_amd_has_neither_intel_idle_nor_intel_pstate(machine: Machines) -> None:
    plan = made(machine("amd_apu"))
    assert f"{CPU}/cpufreq/boost" in plan.sysfs_optional
    assert not any("intel" in name for name in (*plan.sysfs_optional, *plan.tokens))
    assert plan.sysfs[f"{CPU}/cpu2/power/pm_qos_resume_latency_us"] == "1"  # the exit latency of Zen's C1


def test_a_driver_that_may_be_a_module_is_there_before_values_are_set_at_boot(machine: Machines) -> None:
    root = machine("epyc_two_sockets")
    plan = made(root)
    assert plan.modules == ["acpi-cpufreq"]
    root.path("/sys/module/acpi_cpufreq").mkdir(parents=True)
    parts = {"sysfs_optional": plan.sysfs_optional, "modules": plan.modules}
    converge(wish_from({"capability": "power", **parts}), check=False, root=ModuleRoot(root.top))
    assert root.read("/etc/modules-load.d/organism-power.conf").endswith("acpi-cpufreq")
    order = root.read("/etc/systemd/system/systemd-tmpfiles-setup.service.d/organism-power.conf")
    assert "After=systemd-modules-load.service" in order


@pytest.mark.parametrize(
    ("shape", "turbo", "value"),
    [
        ("coffee_lake_12_gpus", "allowed", "0"),
        ("coffee_lake_12_gpus", "forbidden", "1"),
        ("epyc_two_sockets", "allowed", "1"),
        ("epyc_two_sockets", "forbidden", "0"),
    ],
)
def test_turbo_is_brought_about_in_both_directions(machine: Machines, shape: str, turbo: str, value: str) -> None:
    """no_turbo and boost mean the opposite of each other."""
    root = machine(shape)
    switch = _power.turbo_switch(root)
    assert switch is not None
    assert made(root, turbo=turbo).sysfs_optional[switch[0]] == value
    assert switch[0] not in made(root, turbo="keep").sysfs_optional


def test_what_a_virtual_machine_lacks_is_said(machine: Machines) -> None:
    plan = made(machine("single_core_vm"), vcpu=(0,))
    assert list(plan.sysfs_optional) == ["/sys/module/pcie_aspm/parameters/policy"]
    said = "\n".join(plan.reasons)
    for part in ("no frequency scaling", "no switch for turbo", "no idle states", "no sensor"):
        assert part in said
    assert "--release-above" not in plan.files[0]["content"]


def test_heat_needs_a_sensor(machine: Machines) -> None:
    blind, seeing = machine("single_core_vm"), machine("coffee_lake_12_gpus")
    for wishes in ({"idle_poll": True}, {"vcpu_latency": "poll"}):
        with pytest.raises(PowerRefused, match="shows no temperature of its processor"):
            made(blind, vcpu=(0,), **wishes)
    hot = made(seeing, idle_poll=True, vcpu_latency="poll", release_above=85)
    assert hot.tokens["idle"] == "poll"
    assert set(hot.sysfs.values()) == {"n/a"}
    assert "--release-above 85 --slow-down" in hot.files[-1]["content"]
    for wishes in ({"dma_latency_us": None}, {"release_above": 0}):
        with pytest.raises(PowerRefused, match="needs the keeper and its temperature limit"):
            made(seeing, idle_poll=True, **wishes)


def test_wishes_that_mean_nothing_are_refused(machine: Machines) -> None:
    root = machine("coffee_lake_12_gpus")
    for wishes, said in (
        ({"vcpu_latency": "0"}, "from 1, not '0'"),
        ({"vcpu_latency": "C1"}, "not 'C1'"),
        ({"dma_latency_us": -2}, "0 or more"),
        ({"nvme_latency_us": -2}, "0 or more"),
        ({"turbo": "off"}, "turbo is one of"),
        ({"aspm": "powersave"}, "aspm one of"),
    ):
        with pytest.raises(PowerRefused, match=said):
            made(root, **wishes)


def test_everything_can_be_left_alone(machine: Machines) -> None:
    plan = made(
        machine("coffee_lake_12_gpus"),
        governor="",
        lock_frequency=False,
        turbo="keep",
        vcpu_latency="keep",
        dma_latency_us=None,
        shallow_idle=False,
        aspm="keep",
        nvme_latency_us=None,
    )
    assert plan == _power.PowerPlan()


def test_aspm_off_says_what_it_does_not_do(machine: Machines) -> None:
    plan = made(machine("coffee_lake_12_gpus"), aspm="off")
    assert plan.tokens["pcie_aspm"] == "off" and "pcie_aspm.policy" not in plan.tokens
    assert _power.ASPM not in plan.sysfs_optional
    assert any("as the firmware set them" in reason for reason in plan.reasons)


def test_temperatures_are_those_of_processors(machine: Machines) -> None:
    assert max(_thermal.processors(machine("coffee_lake_12_gpus")).values()) == 52.0  # the drive's 41 is not among them
    assert _thermal.processors(machine("epyc_two_sockets")) == {"k10temp Tctl": 58.0, "k10temp Tccd1": 51.0}
    root = machine("single_core_vm")
    assert _thermal.processors(root) == {}
    zone = root.path("/sys/class/thermal/thermal_zone0")
    zone.mkdir(parents=True)
    (zone / "type").write_text("acpitz\n")
    (zone / "temp").write_text("27800\n")
    assert _thermal.processors(root) == {}
    (zone / "type").write_text("x86_pkg_temp\n")
    assert _thermal.processors(root) == {"x86_pkg_temp 0": 27.8}


# --- the module, and its result carried out -------------------------------------------------------------------------


def test_the_zone_comes_from_the_plan(machine: Machines) -> None:
    root = machine("coffee_lake_12_gpus")
    with pytest.raises(ValueError, match="run level 1 first"):
        module.run(DEFAULTS, root, check=False)
    predicted = module.run(DEFAULTS, root, check=True)
    assert "there is no CPU plan yet" in predicted["reasons"][0]
    cpu_plan_module.run(
        {name: option.get("default") for name, option in cpu_plan_module.ARGUMENTS.items()}, root, check=False
    )
    settled = module.run(DEFAULTS, root, check=False)
    assert settled["sysfs"] == predicted["sysfs"]
    assert len(settled["sysfs"]) == 8 and settled["hottest"] == 52.0
    one = module.run({**DEFAULTS, "vcpu_cpus": "3"}, root, check=False)
    assert list(one["sysfs"]) == [f"{CPU}/cpu3/power/pm_qos_resume_latency_us"]
    with pytest.raises(ValueError, match="there is no CPU 40 here"):
        module.run({**DEFAULTS, "vcpu_cpus": "40"}, root, check=False)
    assert module.run({**DEFAULTS, "vcpu_latency": "keep"}, root, check=False)["sysfs"] == {}


@pytest.mark.parametrize("shape", ["coffee_lake_12_gpus", "alder_lake_hybrid", "amd_apu", "nvidia_mig"])
def test_the_settings_fit_the_recorded_machine_and_are_taken_back_exactly(machine: Machines, shape: str) -> None:
    """Through the real host_settings; units need a systemd and are left to the rig."""
    root = ModuleRoot(machine(shape).top)
    before = {path: path.read_bytes() for path in root.top.rglob("*") if path.is_file()}

    def settings(**params: Any) -> Any:
        plan = module.run({**DEFAULTS, "vcpu_cpus": "2-3", "dma_latency_us": -1, **params}, root, check=False)
        parts = {name: plan[name] for name in ("sysfs", "sysfs_optional", "modules", "files")}
        return converge(wish_from({"capability": "power", **parts}), check=False, root=root)

    assert settings().unsupported == []
    assert not settings().difference.changed
    assert root.read(f"{CPU}/cpufreq/policy3/scaling_governor") == "performance"
    switch = _power.turbo_switch(Root(root.top))
    if switch is not None:
        assert settings(turbo="forbidden").difference.changed
        assert root.read(switch[0]) == switch[2]
        assert settings().difference.changed
        assert root.read(switch[0]) == switch[1]
    converge(wish_from({"capability": "power"}), check=False, root=root)
    after = {path: path.read_bytes() for path in root.top.rglob("*") if path.is_file()}
    # the kernel shows the chosen word of a choice in brackets, a file in a tree keeps what was written last
    aspm = root.path(_power.ASPM)
    assert after.pop(aspm) == b"default\n" and before.pop(aspm)
    assert after == before


def test_limits_that_the_kernel_keeps_in_order_are_set_and_taken_back_in_order(machine: Machines) -> None:
    """intel_pstate raises max_perf_pct to min_perf_pct, and lowers min_perf_pct to max_perf_pct."""
    root = ModuleRoot(machine("coffee_lake_12_gpus").top)
    low, high = (f"{CPU}/intel_pstate/{name}_perf_pct" for name in ("min", "max"))
    root.path(high).write_text("80\n")

    def kernel(where: Any, path: str, value: str) -> None:
        if path == high:
            value = str(max(int(value), int(root.read(low))))
        if path == low:
            value = str(min(int(value), int(root.read(high))))
        where.path(path).write_text(f"{value}\n")

    wish = wish_from({"capability": "power", "sysfs": {low: 100, high: 100}})
    converge(wish, check=False, root=root, writer=kernel)
    assert (root.read(low), root.read(high)) == ("100", "100")
    converge(wish_from({"capability": "power"}), check=False, root=root, writer=kernel)
    assert (root.read(low), root.read(high)) == ("17", "80")


def test_the_roles_defaults_are_the_modules() -> None:
    role = yaml.safe_load((REPO / "roles/power/defaults/main.yml").read_text())
    assert {name: role[f"power_{name}"] for name in DEFAULTS} == DEFAULTS


def test_a_unit_that_came_with_us_leaves_no_links_when_it_goes() -> None:
    """Taken back, the keeper's unit does not exist: it is disabled while its file, which says where, is still there."""
    here, gone = {"enabled": "enabled", "active": True}, {"enabled": "", "active": False}
    calls = _unit_state.calls({_power.UNIT: here}, {_power.UNIT: gone})
    assert calls.first == [("stop", _power.UNIT), ("disable", _power.UNIT)]
    assert calls.last == []
