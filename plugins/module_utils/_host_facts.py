# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a report says of a host beside its audit: versions, kernel, memory, pools, failed units, figures of the bench.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from . import _host_audit, _host_bench, _reboot
from ._cpu_plan import CpuPlanError
from ._cpu_plan import load as load_plan
from ._root import Root
from ._systemd import CommandError, Runner, booted

TOLERANCE_PERCENT, FLOOR_US = 25, 20
"""The defaults of the role host_bench."""

_COMMANDS = {
    "Proxmox VE": ["pveversion"],
    "ZFS pools": ["zpool", "list", "-H", "-o", "name,size,allocated,health"],
}


def _line(text: str, start: str) -> str:
    found = [line for line in text.splitlines() if line.startswith(start)]
    return found[0][len(start) :].strip(' "') if found else ""


def facts(root: Root, run: Runner) -> dict[str, str]:
    """Names for people to values; what a host does not have or tell is left out."""
    memory = root.read_or_none("/proc/meminfo") or ""
    swaps = (root.read_or_none("/proc/swaps") or "").splitlines()[1:]
    arc = [line.split()[2] for line in (root.read_or_none("/proc/spl/kstat/zfs/arcstats") or "").splitlines()
           if line.startswith("c_max ")]  # fmt: skip
    found = {
        "System": _line(root.read_or_none("/etc/os-release") or "", "PRETTY_NAME="),
        "Kernel": root.read_or_none("/proc/sys/kernel/osrelease") or "",
        "Command line": root.read_or_none("/proc/cmdline") or "",
        "Profile": _profile(root),
        "Memory": _line(memory, "MemTotal:"),
        "Memory available": _line(memory, "MemAvailable:"),
        "Swap": "; ".join(" ".join(line.split()) for line in swaps),
        "ARC at most": f"{int(arc[0]) // (1 << 20)} MiB" if arc else "",
    }
    for name, command in _COMMANDS.items():
        if any(root.exists(f"{folder}/{command[0]}") for folder in ("/usr/bin", "/usr/sbin", "/sbin")):
            found[name] = _said(command, run)
    if booted(root):
        found["Failed units"] = _said(["systemctl", "list-units", "--failed", "--plain", "--no-legend"], run) or "none"
    return {name: value for name, value in found.items() if value}


def _said(command: list[str], run: Runner) -> str:
    try:
        return "; ".join(" ".join(line.split()) for line in run(command).splitlines())
    except CommandError as error:
        return str(error)


def _profile(root: Root) -> str:
    try:
        profile = json.loads(root.read_or_none("/etc/organism/profile.json") or "{}")
        return str(profile.get("profile", ""))
    except (ValueError, AttributeError):
        return ""


def bench(root: Root) -> dict[str, Any]:
    """``baseline`` and ``last`` result of the bench (figures by name, and when), names of figures that are ``worse``
    than the role host_bench allows by default, and ``problem`` where a file is no result."""
    found: dict[str, Any] = {"baseline": None, "last": None, "worse": [], "problem": ""}
    names = [name for name in root.listdir(_host_bench.RESULTS) if name.endswith(".json")]
    last = max((name for name in names if name != _host_bench.BASELINE), default="")
    metrics = {}
    for role, name in (("baseline", _host_bench.BASELINE if _host_bench.BASELINE in names else ""), ("last", last)):
        if not name:
            continue
        try:
            text = root.read(f"{_host_bench.RESULTS}/{name}")
            metrics[role] = _host_bench.parse(text)[0]
            taken = str(json.loads(text).get("taken", name))
        except (_host_bench.BenchError, OSError) as error:
            found["problem"] = f"{name}: {error}"
            continue
        found[role] = {"taken": taken, "metrics": {metric: asdict(value) for metric, value in metrics[role].items()}}
    if len(metrics) == 2:
        worse = _host_bench.regressions(metrics["last"], metrics["baseline"], TOLERANCE_PERCENT, FLOOR_US)
        found["worse"] = [one.name for one in worse]
    return found


def gather(root: Root, run: Runner) -> dict[str, Any]:
    """All of it: ``facts``, ``plan`` (or none), ``levels``, ``pending`` reboots and ``bench``."""
    try:
        plan = load_plan(root)
    except CpuPlanError:
        plan = None  # the audit tells it
    levels = {str(number): None if marker is None else asdict(marker)
              for number, marker in _host_audit.markers(root).items()}  # fmt: skip
    try:
        pending = [_reboot.describe(entry) for entry in _reboot.waiting(root)]
    except OSError:
        pending = []
    return {
        "facts": facts(root, run),
        "plan": None if plan is None else plan.as_dict(),
        "levels": levels,
        "pending": pending,
        "bench": bench(root),
    }
