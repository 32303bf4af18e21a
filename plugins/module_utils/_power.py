# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Power states that cost latency, and how to keep processors, PCI Express links and NVMe drives out of them.

Facts in, settings out: what this processor's drivers offer decides which files are written. Sources:
Documentation/admin-guide/pm/ (``cpuidle.rst``, ``intel_idle.rst``, ``intel_pstate.rst``, ``amd-pstate.rst``,
``cpufreq.rst``), Documentation/power/pm_qos_interface.rst, Documentation/ABI/testing/sysfs-devices-power.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _cpu_list, _thermal
from ._root import Root

CPU = "/sys/devices/system/cpu"
ASPM = "/sys/module/pcie_aspm/parameters/policy"
POLICIES = f"{CPU}/cpufreq/policy*"
UNIT = "organism-dma-latency.service"
UNIT_PATH = f"/etc/systemd/system/{UNIT}"
KEEPER = "/usr/local/sbin/organism-dma-latency"
DEVICE = "/dev/cpu_dma_latency"

TURBO = ("allowed", "forbidden", "keep")
ASPM_CHOICES = ("performance", "off", "keep")


class PowerRefused(ValueError):
    """A wish that is not met on this host; the message says why and what else to do."""


@dataclass(frozen=True)
class PowerWishes:
    """``governor``: of cpufreq, empty leaves it. ``lock_frequency``: intel_pstate's lower limit is raised to the upper.

    ``turbo``: one of TURBO. ``vcpu_latency``: how long a CPU of the zone VCPU may take to wake up, ``c1`` (the exit
    latency of its first idle state), ``poll``, a number of microseconds, or ``keep``. ``dma_latency_us``: the same for
    all CPUs, held by the keeper while it runs; None runs none. ``release_above``: degrees Celsius at which the keeper
    lets go. ``shallow_idle``: no idle state deeper than C1 from the next boot on. ``aspm``: one of ASPM_CHOICES.
    ``nvme_latency_us``: what an NVMe drive's power states may cost, 0 for none of them, None leaves it. ``idle_poll``:
    never sleep at all, from the next boot on.
    """

    governor: str = "performance"
    lock_frequency: bool = True
    turbo: str = "allowed"
    vcpu_latency: str = "c1"
    dma_latency_us: int | None = 0
    release_above: int = 90
    shallow_idle: bool = True
    aspm: str = "performance"
    nvme_latency_us: int | None = 0
    idle_poll: bool = False


@dataclass(frozen=True)
class PowerFacts:
    """``vendor``: of cpuinfo. ``drivers``: cpufreq's, of all policies. ``pstate``: intel_pstate's status, or empty.

    ``turbo_switch``: path, value that allows turbo, value that forbids it. ``idle``: name and exit latency (us) of the
    idle states of each CPU. ``hottest``: degrees Celsius, None without a sensor.
    """

    vendor: str = ""
    drivers: tuple[str, ...] = ()
    pstate: str = ""
    turbo_switch: tuple[str, str, str] | None = None
    idle: Mapping[int, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    hottest: float | None = None


@dataclass
class PowerPlan:
    """Arguments for host_settings (``sysfs`` to ``units``) and kernel_cmdline (``tokens``), and why they are so."""

    sysfs: dict[str, str] = field(default_factory=dict)
    sysfs_optional: dict[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    files: list[dict[str, str]] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def gather(root: Root | None = None) -> PowerFacts:
    """What this machine's processors and drivers offer."""
    root = root or Root()
    drivers = {root.read_or_none(f"{policy}/scaling_driver") or "" for policy in root.glob(POLICIES)}
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", root.read_or_none("/proc/cpuinfo") or "", re.MULTILINE)
    idle: dict[int, tuple[tuple[str, int], ...]] = {}
    for path in root.glob(f"{CPU}/cpu[0-9]*"):
        states = sorted(root.glob(f"{path}/cpuidle/state*"), key=lambda state: int(state.rsplit("state", 1)[1]))
        rows = [(root.read_or_none(f"{state}/name") or "", root.read_int(f"{state}/latency") or 0) for state in states]
        idle[int(path.rsplit("cpu", 1)[1])] = tuple(rows)
    temperatures = _thermal.processors(root).values()
    return PowerFacts(
        vendor=vendor[1] if vendor else "",
        drivers=tuple(sorted(drivers - {""})),
        pstate=root.read_or_none(f"{CPU}/intel_pstate/status") or "",
        turbo_switch=turbo_switch(root),
        idle=idle,
        hottest=max(temperatures, default=None),
    )


def turbo_switch(root: Root) -> tuple[str, str, str] | None:
    """Where turbo is switched: path, the value that allows it, the value that forbids it (the files are opposite)."""
    for path, allowed, forbidden in ((f"{CPU}/intel_pstate/no_turbo", "0", "1"), (f"{CPU}/cpufreq/boost", "1", "0")):
        if root.read_or_none(path) is not None:
            return path, allowed, forbidden
    return None


def plan(wishes: PowerWishes, facts: PowerFacts, vcpu: tuple[int, ...]) -> PowerPlan:
    """The settings for these wishes on this machine. Raises PowerRefused."""
    if wishes.turbo not in TURBO or wishes.aspm not in ASPM_CHOICES:
        raise PowerRefused(f"turbo is one of {', '.join(TURBO)}, aspm one of {', '.join(ASPM_CHOICES)}")
    made = PowerPlan()
    _frequency(wishes, facts, made)
    _turbo(wishes, facts, made)
    _vcpu_latency(wishes, facts, vcpu, made)
    _dma_latency(wishes, facts, made)
    _tokens(wishes, facts, made)
    if wishes.aspm == "performance":
        made.sysfs_optional[ASPM] = "performance"
    return made


def _frequency(wishes: PowerWishes, facts: PowerFacts, made: PowerPlan) -> None:
    if not facts.drivers:
        if wishes.governor or wishes.lock_frequency:
            made.reasons.append("this machine has no frequency scaling, so there is nothing to lock")
        return
    if wishes.governor:
        made.sysfs_optional[f"{POLICIES}/scaling_governor"] = wishes.governor
    if wishes.lock_frequency and facts.pstate in ("active", "passive"):
        made.sysfs_optional[f"{CPU}/intel_pstate/max_perf_pct"] = "100"
        made.sysfs_optional[f"{CPU}/intel_pstate/min_perf_pct"] = "100"
    if "acpi-cpufreq" in facts.drivers:
        # It may be a module, which udev would load at any time: host_settings loads it before values are set at boot.
        made.modules.append("acpi-cpufreq")


def _turbo(wishes: PowerWishes, facts: PowerFacts, made: PowerPlan) -> None:
    if wishes.turbo == "keep":
        return
    if facts.turbo_switch is None:
        made.reasons.append(f"this machine has no switch for turbo, so it cannot be {wishes.turbo}")
        return
    path, allowed, forbidden = facts.turbo_switch
    made.sysfs_optional[path] = allowed if wishes.turbo == "allowed" else forbidden


def _vcpu_latency(wishes: PowerWishes, facts: PowerFacts, vcpu: tuple[int, ...], made: PowerPlan) -> None:
    wish = wishes.vcpu_latency
    if wish == "keep":
        return
    if wish == "poll":
        _refuse_heat(facts, "vcpu_latency poll")
        value = "n/a"
    elif wish.isdigit() and int(wish) > 0:
        value = wish
    elif wish != "c1":
        raise PowerRefused(f"vcpu_latency is c1, poll, keep or a number of microseconds from 1, not {wish!r}")
    else:
        value = ""
    for cpu in vcpu:
        made.sysfs[f"{CPU}/cpu{cpu}/power/pm_qos_resume_latency_us"] = value or str(first_latency(facts, cpu))
    if not any(states for cpu, states in facts.idle.items() if cpu in vcpu):
        zone = _cpu_list.render(vcpu)
        made.reasons.append(f"CPUs {zone} have no idle states here: their latency limit is set and has no effect yet")


def first_latency(facts: PowerFacts, cpu: int) -> int:
    """Exit latency of a CPU's first idle state after polling, at least 1 us (0 in this file means no limit)."""
    sleeping = [latency for name, latency in facts.idle.get(cpu, ()) if name != "POLL"]
    return max(1, min(sleeping, default=2))


def _dma_latency(wishes: PowerWishes, facts: PowerFacts, made: PowerPlan) -> None:
    if wishes.dma_latency_us is None:
        return
    if wishes.dma_latency_us < 0:
        raise PowerRefused("dma_latency_us is 0 or more microseconds")
    if wishes.dma_latency_us == 0:
        made.reasons.append("idle CPUs poll while the keeper holds a latency of 0: fastest, and as warm as under load")
    guard = wishes.release_above if facts.hottest is not None else 0
    if wishes.release_above and not guard:
        made.reasons.append("no sensor for the processor's temperature here: the keeper runs without its limit")
    text = unit_text(wishes.dma_latency_us, guard, slow_down=wishes.idle_poll)
    made.files.append({"path": UNIT_PATH, "content": text})
    made.units.append(
        {"name": UNIT, "enabled": "true", "active": True, "expected": True, "restart_on": [UNIT_PATH]},
    )


def unit_text(latency_us: int, release_above: int, *, slow_down: bool) -> str:
    """The keeper's unit."""
    words = [KEEPER, "--latency-us", str(latency_us)]
    if release_above:
        words += ["--release-above", str(release_above)]
    if slow_down and release_above:
        words.append("--slow-down")
    return f"""\
# Written by organism.proxmox for its capability power; changes made here are overwritten.
[Unit]
Description=Hold the CPUs' wake-up latency at {latency_us} microseconds
Documentation=https://docs.kernel.org/power/pm_qos_interface.html
ConditionPathExists={DEVICE}

[Service]
Type=notify
ExecStart={" ".join(words)}
Restart=always
RestartSec=1
NoNewPrivileges=yes
CapabilityBoundingSet=
DevicePolicy=closed
DeviceAllow={DEVICE} rw
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


UNIT_TEXT = unit_text(0, 90, slow_down=False)
"""As the defaults make it; verified by systemd-analyze in the test suite."""


def _tokens(wishes: PowerWishes, facts: PowerFacts, made: PowerPlan) -> None:
    if wishes.idle_poll:
        _refuse_heat(facts, "idle=poll")
        if wishes.dma_latency_us is None or not wishes.release_above:
            raise PowerRefused(
                "idle=poll needs the keeper and its temperature limit: set dma_latency_us, release_above"
            )
        made.tokens["idle"] = "poll"
    if wishes.shallow_idle:
        # Without intel_idle the kernel falls back to ACPI's table, which processor.max_cstate limits: both are needed.
        if facts.vendor == "GenuineIntel":
            made.tokens["intel_idle.max_cstate"] = "0"
        made.tokens["processor.max_cstate"] = "1"
    if wishes.aspm == "off":
        made.tokens["pcie_aspm"] = "off"
        made.reasons.append("pcie_aspm=off leaves links as the firmware set them, which may be power saving")
    elif wishes.aspm == "performance":
        made.tokens["pcie_aspm.policy"] = "performance"
    if wishes.nvme_latency_us is not None:
        if wishes.nvme_latency_us < 0:
            raise PowerRefused("nvme_latency_us is 0 or more microseconds")
        made.tokens["nvme_core.default_ps_max_latency_us"] = str(wishes.nvme_latency_us)


def _refuse_heat(facts: PowerFacts, what: str) -> None:
    if facts.hottest is None:
        raise PowerRefused(
            f"{what} lets CPUs run hot for ever, and this machine shows no temperature of its processor "
            "(no coretemp or k10temp in /sys/class/hwmon): load that driver first, or leave it out"
        )
