# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pinning as a state of a host: which VMs, what is written for their next start, and those that run now.

    /etc/organism/qemu_pin.json                          settings, for the hook and the keeper
    /etc/organism/hook.d/post-start/50-pin               pins a VM when it starts
    /etc/systemd/system/100.scope.d/50-organism.conf     limits VM 100's control group at its next start

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _cpu_list, _owned_files, _qemu, _qemu_pin, _qemu_records, _qemu_scope
from ._cpu_plan import CpuPlan
from ._difference import Difference
from ._earlier import EarlierState
from ._host_files import FileWish
from ._qemu_pin import Hands, Release, Result
from ._qemu_plan import PinRefusedError, Zones
from ._qemu_records import Config, Wish
from ._root import Root
from ._systemd import booted

CAPABILITY = "qemu_pin"
ENTRY = "/etc/organism/hook.d/post-start/50-pin"
ENTRY_TEXT = """\
#!/bin/sh
# Managed by Ansible (organism.proxmox, qemu_pin): changes made here are lost.
# Pins the threads of a VM that has just started; a VM that is not in /etc/organism/qemu_pin.json is left alone.
exec /usr/local/sbin/organism-qemu-pin pin --from-hook "$1"
"""
_PVE_CONFIGS = "/etc/pve/qemu-server"


@dataclass
class Outcome:
    """What was, or would be, done."""

    difference: Difference = field(default_factory=Difference)
    results: list[Result] = field(default_factory=list)
    released: list[Release] = field(default_factory=list)
    kept_by_others: list[dict[str, Any]] = field(default_factory=list)
    zones: Zones | None = None


def wishes_from(vms: Sequence[Mapping[str, Any]]) -> tuple[Wish, ...]:
    """VMs as the module's arguments name them. Raises PinRefusedError."""
    found: dict[str, Wish] = {}
    for vm in vms:
        if vm.get("vmid") is not None:
            target = _qemu.pve(int(vm["vmid"]))
            if not 100 <= int(vm["vmid"]) <= 999_999_999:
                raise PinRefusedError(f"{vm['vmid']} is no VMID (100 to 999999999)")
        elif vm.get("name") and vm.get("pidfile") and vm.get("qmp"):
            target = _qemu.Target(_qemu_records.check_name(vm["name"]), vm["pidfile"], vm["qmp"])
            if target.name.isdigit():
                raise PinRefusedError(f"the name {target.name} is a VMID's: give another, or vmid")
        else:
            raise PinRefusedError(f"{dict(vm)} names no VM: give vmid, or name, pidfile and qmp")
        ratio = vm.get("oversubscribe")
        if ratio is not None and ratio < 1:
            raise PinRefusedError(f"{target.label}: oversubscribe is vCPUs to CPUs, 1 or more, not {ratio:g}")
        if target.name in found:
            raise PinRefusedError(f"{target.label} is named twice")
        found[target.name] = Wish(target, ratio)
    return tuple(found.values())


def pve_vmids(root: Root) -> list[int]:
    """VMs that this node of Proxmox VE has, running or not."""
    names = [name.removesuffix(".conf") for name in root.listdir(_PVE_CONFIGS) if name.endswith(".conf")]
    return sorted({int(name) for name in names if name.isdigit()} | set(_qemu.pve_running(root)))


def files(root: Root, config: Config, zones: Zones | None, *, hook: bool) -> list[FileWish]:
    """Every file as it shall be. Without zones (check mode before any plan) those that need none."""
    wanted = [FileWish(_qemu_records.CONFIG, config.text())]
    if hook:
        wanted.append(FileWish(ENTRY, ENTRY_TEXT, "0755"))
    if config.confine and zones is not None:
        named = [wish.target.vmid for wish in config.wishes if wish.target.vmid is not None]
        vmids = sorted({*named, *(pve_vmids(root) if config.every else ())})
        text = _qemu_scope.dropin_text(zones.all)
        wanted += [FileWish(_qemu_scope.dropin_path(vmid), text) for vmid in vmids]
    return wanted


def present(
    hands: Hands, config: Config, *, hook: bool = True, foretold: CpuPlan | None = None, dry: bool = False
) -> Outcome:
    """Settings written, VMs that run pinned, those that are no longer named released.

    All of it is planned, and refused, before anything is changed. Raises PinRefusedError, QemuError, QmpError,
    CpuPlanError, EarlierStateError, CommandError, ValueError, OSError.
    """
    root = hands.root
    outcome = Outcome()
    try:
        outcome.zones = _qemu_records.zones(root, config.vcpu, config.io, foretold)
    except _qemu_records.NoPlanError:
        if not dry:
            raise
    earlier = EarlierState(CAPABILITY, root)
    planned = _owned_files.plan(root, earlier, files(root, config, outcome.zones, hook=hook))
    wishes = _wishes(root, config)
    gone = [name for name in _qemu_records.records(root) if config.wish(name) is None]
    outcome.released = [_qemu_pin.release(hands, name, dry=True) for name in gone]
    zones, plans = outcome.zones, list[_qemu_pin.Plan]()
    if zones is not None:
        plans = _qemu_pin.plan_all(hands, wishes, zones, confine=config.confine, dry=dry, leaving=gone)
    outcome.results = [each.result for each in plans]
    _sum_up(outcome, planned)
    if dry:
        return outcome
    _owned_files.apply(root, earlier, planned)
    _reload(hands, planned)
    outcome.released = [_qemu_pin.release(hands, name) for name in gone]
    if zones is not None:
        outcome.results = [_qemu_pin.carry_out(hands, each, zones) for each in plans]
    return outcome


def absent(hands: Hands, *, dry: bool = False) -> Outcome:
    """All threads have the masks of before, and no file is left. Raises as `present` does."""
    earlier = EarlierState(CAPABILITY, hands.root)
    planned = _owned_files.plan(hands.root, earlier, [])
    outcome = Outcome()
    names = list(_qemu_records.records(hands.root))
    outcome.released = [_qemu_pin.release(hands, name, dry=True) for name in names]
    _sum_up(outcome, planned)
    if not dry:
        # the hook's entry first: a VM that starts meanwhile is not pinned again
        _owned_files.apply(hands.root, earlier, planned)
        _reload(hands, planned)
        outcome.released = [_qemu_pin.release(hands, name) for name in names]
        _qemu_records.clear(hands.root)
    return outcome


def _wishes(root: Root, config: Config) -> list[Wish]:
    """VMs to look at: those that hold CPUs already come first, so that the others are placed around them."""
    found = [wish for name in config.names(root) if (wish := config.wish(name)) is not None]
    held = _qemu_records.records(root)
    return sorted(found, key=lambda wish: wish.target.name not in held)


def _sum_up(outcome: Outcome, planned: _owned_files.FilePlan) -> None:
    outcome.difference.merge(planned.difference)
    for difference in (*(r.difference for r in outcome.released), *(r.difference for r in outcome.results)):
        outcome.difference.merge(difference)
    reason = "somebody else has changed it since"
    for key, now in planned.others.items():
        outcome.kept_by_others.append({"key": key, "now": now, "reason": reason})
    for release in outcome.released:
        outcome.kept_by_others += [
            {"key": label, "now": cpus, "reason": reason} for label, cpus in release.others.items()
        ]


def _reload(hands: Hands, planned: _owned_files.FilePlan) -> None:
    """systemd reads drop-ins anew; scopes that run are not changed by that."""
    if planned.touches("/etc/systemd/") and booted(hands.root):
        hands.run(["systemctl", "daemon-reload"])


def affinity_advice(root: Root, config: Config, zones: Zones | None) -> list[dict[str, Any]]:
    """VMs whose option ``affinity`` would start them outside the zones or not at all: its value and a better one.

    Only root@pam may set it, and it counts from the next cold start on, so it is advice and not done here.
    """
    advice = []
    vmids = [wish.target.vmid for wish in config.wishes if wish.target.vmid is not None]
    for vmid in sorted({*vmids, *(pve_vmids(root) if config.every else ())}) if zones is not None else ():
        text = root.read_or_none(f"{_PVE_CONFIGS}/{vmid}.conf")
        if text is None or zones is None:
            continue
        match = re.search(r"^affinity:\s*(\S+)\s*$", text.partition("\n[")[0], re.MULTILINE)
        now = _cpu_list.normalise(match[1]) if match else ""
        better = _cpu_list.render(zones.all)
        if now != better:
            advice.append(
                {"vmid": vmid, "now": now, "recommended": better, "command": f"qm set {vmid} --affinity {better}"}
            )
    return advice
