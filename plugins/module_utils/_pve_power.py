# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts, stops and cold-starts a VM, and looks at the VM itself before it says so.

A task of a VM under HA ends when the request is queued, and a guest may ignore a shutdown. So the state is read until
the deadline, and a stop follows a shutdown that was not heard, if that is allowed.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _pve_find, _pve_vm_check, _pve_vm_live
from ._difference import Difference
from ._pve_client import Pve, PveRefused, PveTaskFailed, PveTimeout
from ._pve_find import Vm
from ._pve_strings import parse
from ._pve_tasks import is_upid
from ._pve_vm_check import PciMapping, overlap
from ._pve_vm_plan import addresses

POLL = 1.0
"""Seconds between two looks; the API has no event for a VM's state."""

ALREADY = "already running"
"""What the task of a start says when another one came first."""


@dataclass(frozen=True)
class Limits:
    """Seconds. ``shutdown``: for the guest to end by itself; ``stop`` and ``start``: for Proxmox VE."""

    shutdown: float = 60.0
    stop: float = 60.0
    start: float = 300.0
    force: bool = True
    """Stop a guest that has not ended by itself."""


@dataclass
class Outcome:
    """``steps``: what was (or in check mode would be) done, in order: shutdown, stop, start."""

    vm: Vm
    difference: Difference = field(default_factory=Difference)
    steps: list[str] = field(default_factory=list)
    cold_start: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Clock:
    """Monotonic time and waiting, replaceable in tests."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def converge(
    pve: Pve, vm: Vm, state: str, limits: Limits, *, only_pending: bool = False, check: bool, clock: Clock | None = None
) -> Outcome:
    """``state``: started, stopped or restarted. ``only_pending``: restart only when an option waits for a cold start.

    Raises PveError, which names what holds the VM.
    """
    clock = clock or Clock()
    if vm.template:
        raise PveRefused(f"{vm} is a template, which neither starts nor stops; clone it")
    now = _running(pve, vm)
    outcome = Outcome(vm, cold_start=_pve_vm_live.waiting(pve.get(f"{vm.path}/pending")))
    if state == "restarted" and only_pending and now and not outcome.cold_start:
        return outcome
    stops = now and state in ("stopped", "restarted")
    starts = state == "restarted" or (state == "started" and not now)
    if starts:
        _refuse_start(pve, vm)
    if stops:
        outcome.steps += ["shutdown"] if check else _stop(pve, vm, limits, clock)
    if starts:
        outcome.steps.append("start")
        if not check:
            _start(pve, vm, limits, clock)
            outcome.cold_start = _pve_vm_live.waiting(pve.get(f"{vm.path}/pending"))
    if stops or starts:
        before, after = ("running" if now else "stopped"), ("running" if starts else "stopped")
        outcome.difference.add(str(vm), before, after if after != before else f"{after}, started cold")
    return outcome


def _running(pve: Pve, vm: Vm) -> bool:
    return bool(pve.get(f"{vm.path}/status/current").get("status") == "running")


def _stop(pve: Pve, vm: Vm, limits: Limits, clock: Clock) -> list[str]:
    end = clock.now() + limits.shutdown
    try:
        _task(pve, pve.post(f"{vm.path}/status/shutdown", timeout=int(limits.shutdown)), limits.shutdown + POLL * 5)
    except (PveTaskFailed, PveTimeout) as error:
        if not limits.force:
            raise PveTimeout(
                f"{vm} did not shut down within {limits.shutdown:g} s ({error}); it still runs. Look at its console, "
                "or allow force to stop it"
            ) from error
    if _until(pve, vm, False, end, clock):
        return ["shutdown"]
    if not limits.force:
        raise PveTimeout(
            f"{vm} still runs {limits.shutdown:g} s after its shutdown was asked for; allow force to stop it"
        )
    _task(pve, pve.post(f"{vm.path}/status/stop"), limits.stop)
    if not _until(pve, vm, False, clock.now() + limits.stop, clock):
        raise PveTimeout(
            f"{vm} still runs after a stop: look for its lock and task (qm config {vm.vmid}, pvesh get /cluster/tasks)"
        )
    return ["shutdown", "stop"]


def _start(pve: Pve, vm: Vm, limits: Limits, clock: Clock) -> None:
    end = clock.now() + limits.start
    try:
        _task(pve, pve.post(f"{vm.path}/status/start"), limits.start)
    except PveTaskFailed as error:
        # Somebody else's start came first (PVE/QemuServer.pm, vm_start_nolock): what was asked for is there.
        if ALREADY not in error.exitstatus:
            raise
    if not _until(pve, vm, True, end, clock):
        raise PveTimeout(
            f"{vm} does not run {limits.start:g} s after its start was asked for; see its task's log, or, where "
            "HA decides, ha-manager status"
        )


def _task(pve: Pve, answer: Any, timeout: float) -> None:
    if is_upid(answer):
        pve.wait(answer, timeout)


def _until(pve: Pve, vm: Vm, running: bool, end: float, clock: Clock) -> bool:
    while True:
        if _running(pve, vm) == running:
            return True
        if clock.now() >= end:
            return False
        clock.sleep(POLL)


def _refuse_start(pve: Pve, vm: Vm) -> None:
    """What Proxmox VE would find out half-way, with the way out. A VM with a hookscript is left to it for conflicts."""
    config = pve.get(f"{vm.path}/config")
    facts = _pve_find.facts(pve, vm.node, config)
    if fatal := [each.text for each in _pve_vm_check.problems(config, facts) if each.fatal]:
        raise PveRefused(f"{vm} would not start: {'; '.join(fatal)}")
    if config.get("hookscript"):
        return
    if taken := conflicts(pve, vm, config, facts.mappings or {}):
        raise PveRefused(f"{vm} would not start: {'; '.join(taken)}")


def conflicts(pve: Pve, vm: Vm, config: Mapping[str, Any], known: Mapping[str, PciMapping]) -> list[str]:
    """Devices that a running VM of the node has and this one needs; one free alternative of a mapping is enough."""
    wanted = {
        option: _alternatives(str(value), known)
        for option, value in config.items()
        if str(option).startswith("hostpci")
    }
    if not wanted:
        return []
    held = _held(pve, vm, known)
    found = []
    for option, alternatives in wanted.items():
        owners = [
            next((owner for part in path for taken, owner in held if overlap(part, taken)), None)
            for path in alternatives
        ]
        if owners and None not in owners:
            found.append(
                f"{option}: {'; '.join(alternatives[0])} is held by {owners[0]}, which runs; stop that VM first: "
                f"qm shutdown {owners[0].vmid if owners[0] else ''}"
            )
    return found


def _held(pve: Pve, vm: Vm, known: Mapping[str, PciMapping]) -> list[tuple[str, Vm]]:
    """Addresses that other running VMs have, as far as it is certain: with alternatives it is not."""
    held = []
    for guest in pve.get("/cluster/resources", type="vm"):
        other = Vm(int(guest["vmid"]), str(guest["node"]), True, str(guest.get("name") or ""), True)
        if (
            guest.get("type") != "qemu"
            or other.vmid == vm.vmid
            or other.node != vm.node
            or guest.get("status") != "running"
        ):
            continue
        for option, value in pve.get(f"{other.path}/config", current=True).items():
            if str(option).startswith("hostpci"):
                alternatives = _alternatives(str(value), known)
                if len(alternatives) == 1:
                    held += [(part, other) for part in alternatives[0]]
    return held


def _alternatives(text: str, known: Mapping[str, PciMapping]) -> tuple[tuple[str, ...], ...]:
    string = parse("host", text)
    if host := string.get("host"):
        return (addresses(host),)
    mapping = known.get(string.get("mapping") or "")
    return mapping.paths if mapping else ()
