# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The profile of the guarded VMs (memory, CPU, agent): what differs, what ``qm set`` needs; and the acceptance checks.

Balloon: 0 for VMs with passed-through devices, whose memory is pinned at start, and equal to the memory for all others:
fixed either way.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import _guard, _guard_report, _pve_strings
from ._check import Check
from ._difference import Difference
from ._guard import State
from ._guard_config import Config
from ._guard_pve import VmConfig
from ._hook import FOLDER
from ._root import Root

APPLY = "mlmode apply-profile"
CPU_KEYS = ("cpu", "sockets", "numa", "cores")
ENTRIES = (f"{FOLDER}/pre-start/10-guard", f"{FOLDER}/post-stop/90-guard")
TIMER = "organism-guard-watchdog.timer"
_DEFAULTS = {"memory": "512", "cores": "1", "sockets": "1", "numa": "0", "cpu": "kvm64", "agent": "0"}
"""What Proxmox VE takes where an option is not set (qm.conf(5))."""
_PROPERTY = {"memory": "current", "cpu": "cputype", "agent": "enabled"}
"""Options that are property strings, with their default key."""


def wanted(config: VmConfig, values: Mapping[str, Any]) -> dict[str, str]:
    """Options as Proxmox VE writes them."""
    found = {key: str(int(value)) if isinstance(value, bool) else str(value) for key, value in values.items()}
    if found.get("balloon", "auto") == "auto" and "memory" in found:
        found["balloon"] = "0" if config.hostpci else found["memory"]
    return found


def present(config: VmConfig, key: str) -> str:
    """The value of an option that counts; for a property string that of its default key."""
    text = config.options.get(key)
    if text is None:
        return str(config.memory) if key == "balloon" else _DEFAULTS.get(key, "")
    if key in _PROPERTY:
        return _pve_strings.parse(_PROPERTY[key], text).get(_PROPERTY[key]) or _DEFAULTS[key]
    return text


def missing(config: VmConfig, values: Mapping[str, Any]) -> dict[str, str]:
    """Options to set: those that differ, whole property strings with all their other values."""
    found = {}
    for key, value in wanted(config, values).items():
        if present(config, key) == value:
            continue
        text = config.options.get(key)
        if key in _PROPERTY and text is not None:
            value = _pve_strings.parse(_PROPERTY[key], text).with_({_PROPERTY[key]: value}).render()
        found[key] = value
    return found


def command(qm: str, vmid: int, options: Mapping[str, str]) -> list[str]:
    """``qm set`` with all of them at once: memory and balloon are checked together."""
    return [qm, "set", str(vmid), *(word for key, value in sorted(options.items()) for word in (f"--{key}", value))]


def difference(config: VmConfig, options: Mapping[str, str]) -> Difference:
    found = Difference()
    for key, value in sorted(options.items()):
        found.add(f"{key} of VM {config.vmid} ({config.name})", config.options.get(key), value)
    return found


# Acceptance -----------------------------------------------------------------------------------------------------------


def checks(
    root: Root, state: State, config: Config, known: Mapping[int, VmConfig], active: Callable[[str], bool | None]
) -> Iterator[Check]:
    """The acceptance checks in their order (S0-030 to S0-032), then those of the guard itself. Changes nothing.

    ``active``: does a unit of systemd run, None where there is no systemd.
    """
    profiled = {name: _guard_report.named(known, name) for name in config.profile}
    for name, vmids in profiled.items():
        if len(vmids) != 1:
            yield Check("plan.vm", name, False, 0.0, _count(vmids), "create it, or correct vm_guard_profile")
    yield from _values(config, known, profiled, "plan.memory", ("memory",))
    yield _sum(state)
    yield from _values(config, known, profiled, "plan.cpu", CPU_KEYS)
    yield from _values(config, known, profiled, "plan.fixed", ("balloon",))
    yield from _values(config, known, profiled, "plan.agent", ("agent",))
    yield from _total(config)
    for group in config.groups:
        for member in group.members:
            vmids = _guard_report.named(known, member)
            ok = len(vmids) == 1
            after = "" if ok else "give each VM a name of its own, or correct vm_guard_groups"
            yield Check("guard.group", f"{group.name} {member}", ok, 0.0, _count(vmids), after)
    yield from _hooks(root, state, known)
    found = _guard.conflicts(state)
    for conflict in found:
        after = " or ".join(f"qm shutdown {vmid}" for vmid in conflict.losers)
        yield Check("guard.conflict", conflict.rule, False, 0.0, conflict.text, after)
    if not found:
        yield Check("guard.conflict", "", True, 0.0, "no two VMs run that exclude each other")
    runs = active(TIMER)
    detail = {None: "systemd does not run here", True: "runs", False: "does not run"}[runs]
    yield Check("guard.watchdog", TIMER, runs, 0.0, detail, f"systemctl enable --now {TIMER}" if runs is False else "")


def _count(vmids: list[int]) -> str:
    return f"is VM {vmids[0]}" if len(vmids) == 1 else f"{len(vmids)} VMs of this node have that name: {vmids}"


def _values(
    config: Config, known: Mapping[int, VmConfig], profiled: Mapping[str, list[int]], check: str, keys: tuple[str, ...]
) -> Iterator[Check]:
    for name, vmids in profiled.items():
        if len(vmids) != 1:
            continue
        vm = known[vmids[0]]
        aims = {key: value for key, value in wanted(vm, config.profile[name]).items() if key in keys}
        if not aims:
            continue
        wrong = [f"{key} is {present(vm, key)}, not {aim}" for key, aim in aims.items() if present(vm, key) != aim]
        detail = ", ".join(wrong) or ", ".join(f"{key}={aim}" for key, aim in aims.items())
        yield Check(check, name, not wrong, 0.0, detail, APPLY if wrong else "")


def _sum(state: State) -> Check:
    """Acceptance 2: what runs fits, into the limit and into the host."""
    sums = _guard_report.memory(state)
    if sums is None:
        return Check("plan.sum", "", None, 0.0, "the rule of memory is off (vm_guard_memory)")
    limit = sums["limit_mib"]
    ok = sums["fits"] and (limit is None or sums["vms_mib"] <= limit)
    detail = f"VMs that run have {sums['vms_mib']} MiB" + (f", their limit is {limit}" if limit else "")
    detail += f"; {sums['claimed_mib']} of {sums['total_mib']} MiB claimed"
    return Check("plan.sum", "", ok, 0.0, detail, "" if ok else "stop a VM: organism-guard status")


def _total(config: Config) -> Iterator[Check]:
    """S0-007: the plan and the reserve are the host that it was made for."""
    if not config.host_total:
        return
    plan = sum(int(values.get("memory", 0)) for values in config.profile.values())
    ok = plan + config.reserve == config.host_total
    detail = f"plan {plan} + reserve {config.reserve} {'=' if ok else 'is not'} {config.host_total} MiB"
    yield Check("plan.total", "", ok, 0.0, detail, "" if ok else "correct vm_guard_profile or vm_guard_reserve_mib")


def _hooks(root: Root, state: State, known: Mapping[int, VmConfig]) -> Iterator[Check]:
    for entry in ENTRIES:
        ok = root.exists(entry)
        yield Check("guard.hook", entry, ok, 0.0, "is there" if ok else "is missing", "" if ok else "run role vm_guard")
    deaf = [state.vms[vmid].label for vmid, config in sorted(known.items()) if not _guard_report.guarded(config)]
    if deaf:
        after = "run role vm_hook with vm_hook_every_vm: true, or with these in vm_hook_vmids"
        yield Check("guard.hook", "VMs", False, 0.0, f"start without asking the guard: {', '.join(deaf)}", after)
    else:
        yield Check("guard.hook", "VMs", True, 0.0, f"all {len(known)} VMs ask the guard before they start")
