# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the guard sees and would decide, for people and for machines; and which mode a node is in.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from . import _guard, _guard_devices
from ._guard import Decision, State, Vm
from ._guard_config import Config
from ._guard_pve import VmConfig

IDLE, CONFLICT = "idle", "conflict"
HOOK_VOLUME = "snippets/organism-hook"


def guarded(config: VmConfig) -> bool:
    """Does the VM call the dispatcher, and so the guard, at its start?"""
    return config.options.get("hookscript", "").endswith(HOOK_VOLUME)


def mode_of(state: State, config: Config, known: Mapping[int, VmConfig]) -> str:
    """The word of ``mlmode`` whose VM runs, ``idle`` when none does, ``conflict`` when more than one does (S0-004)."""
    active = [mode for mode, name in sorted(config.modes.items()) if any(_active(state, known, name))]
    return IDLE if not active else CONFLICT if len(active) > 1 else active[0]


def _active(state: State, known: Mapping[int, VmConfig], name: str) -> list[Vm]:
    return [vm for vmid, vm in state.vms.items() if vm.active and vmid in named(known, name)]


def named(known: Mapping[int, VmConfig], name: str) -> list[int]:
    """VMIDs of the VMs that a name or a number means (S0-013)."""
    return sorted(vmid for vmid, config in known.items() if name in (config.name, str(vmid)))


def status(state: State, known: Mapping[int, VmConfig], busy: str | None) -> dict[str, Any]:
    """The document of ``organism-guard status``. ``busy``: who has the lock, None: nobody."""
    conflicts = _guard.conflicts(state)
    return {
        "ok": not conflicts,
        "vms": [
            {
                "vmid": vm.vmid,
                "name": vm.name,
                "phase": vm.phase,
                "memory_mib": vm.memory,
                "gpus": _gpus(vm),
                "groups": [group.name for group in state.groups_of(vm.vmid)],
                "lock": vm.lock,
                "guarded": guarded(known[vm.vmid]),
            }
            for vmid, vm in sorted(state.vms.items())
            if vmid in known
        ],
        "groups": [
            {
                "name": group.name,
                "policy": group.policy,
                "members": sorted(group.members),
                "active": [vm.vmid for vm in state.active() if vm.vmid in group.members],
            }
            for group in state.groups
        ],
        "memory": memory(state),
        "conflicts": [asdict(conflict) for conflict in conflicts],
        "busy": busy,
    }


def _gpus(vm: Vm) -> list[str]:
    """What it has; for a VM that does not run what it may have."""
    keys = vm.held if vm.held is not None else frozenset[str]().union(*(k for d in vm.devices for k in d.alternatives))
    return sorted(key for key in keys if not key.startswith("iommu:"))


def memory(state: State, vm: Vm | None = None, without: Iterable[int] = ()) -> dict[str, Any] | None:
    """The memory budget, with one more VM and without others, or as it is; None where that rule is off."""
    if state.memory is None:
        return None
    others = state.active(but=[*without, *([] if vm is None else [vm.vmid])])
    sums = _guard.budget(state.memory, vm, others)
    return {
        "total_mib": sums.memory,
        "claimed_mib": sums.total,
        "free_mib": sums.free,
        "fits": sums.fits,
        "vms_mib": sum(each.memory for each in others) + (vm.memory if vm else 0),
        "limit_mib": state.memory.limit or None,
        "claims": {claim.name: claim.mib for claim in sums.claims},
    }


def explained(state: State, decision: Decision) -> dict[str, Any]:
    """The document of ``organism-guard explain``: what would happen if the VM were started now."""
    vm = state.vms.get(decision.request.vmid)
    return {
        "vmid": decision.request.vmid,
        "name": vm.name if vm else "",
        "phase": vm.phase if vm else None,
        "may_start": not decision.refused,
        "stops_first": list(decision.stop),
        "gpus": sorted(key for key in decision.keys if not key.startswith("iommu:")),
        "reasons": [asdict(reason) for reason in decision.reasons],
        "memory": memory(state, vm, decision.stop),
    }


def explain_lines(state: State, decision: Decision) -> list[str]:
    """The same for people."""
    vm = state.vms.get(decision.request.vmid)
    label = vm.label if vm else f"VM {decision.request.vmid}"
    if decision.refused:
        return [f"{label} must not start now:", *(f"  {reason.rule}: {reason}" for reason in decision.reasons)]
    lines = [f"{label} may start now" + (", it runs already" if vm and vm.phase == _guard.RUNNING else "")]
    lines += [f"  first stops {state.vms[vmid].label}, of the same group" for vmid in decision.stop]
    keys = sorted(key for key in decision.keys if not key.startswith("iommu:"))
    lines += [f"  {', '.join(map(_guard_devices.told, keys))}"] if keys else []
    sums = memory(state, vm, decision.stop)
    if sums is not None:
        lines.append(f"  memory: {sums['claimed_mib']} of {sums['total_mib']} MiB claimed with it")
    return lines


def status_lines(document: Mapping[str, Any]) -> list[str]:
    """``organism-guard status`` for people."""
    rows = [("VM", "name", "phase", "MiB", "groups", "devices")]
    for vm in document["vms"]:
        phase = vm["phase"] + (f" ({vm['lock']})" if vm["lock"] else "") + ("" if vm["guarded"] else " UNGUARDED")
        cells = (str(vm["vmid"]), vm["name"], phase, str(vm["memory_mib"]))
        rows.append((*cells, ",".join(vm["groups"]) or "-", ",".join(vm["gpus"]) or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sums = document["memory"]
    if sums is not None:
        lines.append(f"memory: {sums['claimed_mib']} of {sums['total_mib']} MiB claimed, {sums['free_mib']} free")
    lines += [f"CONFLICT: {conflict['text']}" for conflict in document["conflicts"]]
    if document["busy"]:
        lines.append(f"busy: {document['busy']}")
    return lines
