# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The steps by which the guard serves a request, as generators: each step is yielded, its answer sent back.

What carries the steps out (`_guard_run` on a host, a model in tests) may stop between any two of them, as a killed
process does. Nothing needs to be undone then: the kernel gives the lock back, and a lease counts only as long as its VM
runs or the task that starts it lives.

Locks are always taken in the same order: a VM's own (by Proxmox VE, before its hook), then the guard's, then those of
VMs that *run* (to stop them). A VM that runs is in no hook before its start, and no other hook waits for the guard's
lock, so no two wait for each other (S0-D04).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ._guard import (
    BACKUP,
    GROUP,
    KEPT,
    MIGRATION,
    RUNNING,
    START,
    STARTING,
    Conflict,
    Decision,
    Reason,
    Request,
    State,
    conflicts,
    decide,
)

BUSY, STUCK = "busy", "stuck"
"""Rules of reasons that are not `_guard`'s: the lock was not free in time, a VM did not stop in time."""

ROUNDS = 20
"""How often a request looks again after it has stopped something."""


@dataclass(frozen=True)
class Acquire:
    """Wait for the host-wide lock. Answer: None, or who has had it all the time."""


@dataclass(frozen=True)
class Release:
    """Give the lock back."""


@dataclass(frozen=True)
class Look:
    """Read what is, now. Answer: State. Leases of what neither runs nor starts are gone afterwards."""


@dataclass(frozen=True)
class Settle:
    """Wait until the start of a VM that is under way has ended, well or not. Answer: None, or why it did not end."""

    vmid: int


@dataclass(frozen=True)
class Stop:
    """Shut a VM down, then stop it, and wait until it and its devices are free. Answer: None, or why it still runs."""

    vmid: int
    why: str


@dataclass(frozen=True)
class Grant:
    """Write the lease of a VM that may start. Answer: None, or why there is nobody any more who starts it."""

    decision: Decision


@dataclass(frozen=True)
class Say:
    """A line for the task's log."""

    text: str


Step: TypeAlias = "Acquire | Release | Look | Settle | Stop | Grant | Say"
Steps = Generator[Step, object, tuple[Reason, ...]]
"""Ends with the reasons why the request was not served; with none when it was."""


def start(request: Request) -> Steps:
    """A VM is about to start: may it, and who has to be stopped first?

    The request has been announced before, so that whoever has the lock sees that there is a later one.
    """
    busy = yield Acquire()
    if busy is not None:
        after = "Try again; see: organism-guard status"
        return (Reason(BUSY, f"the guard is busy with something else: {busy}", after),)
    for _round in range(ROUNDS):
        state = _state((yield Look()))
        decision = decide(state, request)
        if decision.refused:
            yield Release()
            return decision.reasons
        if decision.allowed:
            gone = yield Grant(decision)
            yield Release()
            return () if gone is None else (Reason(STUCK, str(gone), "Start it again"),)
        trouble = yield from _make_way(state, request, decision.stop)
        if trouble:
            yield Release()
            return trouble
    yield Release()
    text = f"after {ROUNDS} rounds others of its group still run"
    return (Reason(STUCK, text, "Something starts them again and again: see the cluster's task log"),)


def _make_way(state: State, request: Request, vmids: Iterable[int]) -> Generator[Step, object, tuple[Reason, ...]]:
    """Stop VMs of the same group. After each it is looked again: meanwhile the world has moved."""
    wanted = state.vms[request.vmid]
    rivals = [state.vms[vmid] for vmid in vmids]
    starting = [vm for vm in rivals if vm.phase == STARTING]
    if starting:
        rival = starting[0]
        yield Say(f"waiting for the start of {rival.label} to end, to stop it for {wanted.label}")
        trouble = yield Settle(rival.vmid)
    else:
        rival = rivals[0]
        yield Say(f"stopping {rival.label} for {wanted.label}")
        trouble = yield Stop(rival.vmid, f"for {wanted.label}")
    if trouble is None:
        return ()
    text = f"{rival.label} has to be stopped first, and {trouble}"
    return (Reason(STUCK, text, f"Stop it by hand: qm stop {rival.vmid}; then start {wanted.label} again"),)


def stop_group(name: str) -> Steps:
    """Nothing of a group runs afterwards; that was announced before. Ends with what could not be stopped."""
    busy = yield Acquire()
    if busy is not None:
        return (Reason(BUSY, f"the guard is busy with something else: {busy}", "Try again"),)
    for _round in range(ROUNDS):
        state = _state((yield Look()))
        members = {vmid for group in state.groups if group.name == name for vmid in group.members}
        left = [vm for vm in state.active() if vm.vmid in members]
        if not left:
            yield Release()
            return ()
        vm = left[0]
        if vm.lock or vm.phase == KEPT:
            yield Release()
            text = f"{vm.label} is locked ({vm.lock or 'backup'}) and cannot be stopped now"
            return (Reason(STUCK, text, f"Try again when that is done, or: qm unlock {vm.vmid}"),)
        yield Say(f"stopping {vm.label}")
        trouble = yield Settle(vm.vmid) if vm.phase == STARTING else Stop(vm.vmid, "as asked")
        if trouble is not None:
            yield Release()
            return (Reason(STUCK, f"{vm.label}: {trouble}", f"Stop it by hand: qm stop {vm.vmid}"),)
    yield Release()
    return (Reason(STUCK, f"after {ROUNDS} rounds VMs of group {name} still run", "See the cluster's task log"),)


def watch(*, enforce: bool) -> Steps:
    """One look of the watchdog: leases put right, and where two of a group run, the loser stopped. Never starts
    anything.

    While somebody has the lock a request is being served: there is nothing to watch.
    """
    busy = yield Acquire()
    if busy is not None:
        return ()
    found: list[Conflict] = []
    reasons: list[Reason] = []
    for _round in range(ROUNDS):
        state = _state((yield Look()))
        found = conflicts(state)
        losers = [state.vms[vmid] for conflict in found if conflict.rule == GROUP for vmid in conflict.losers]
        able = [vm for vm in losers if vm.phase == RUNNING and not vm.lock]
        if not found or not enforce or not able:
            break
        yield Say(f"{'; '.join(conflict.text for conflict in found)}: stopping {able[0].label}")
        trouble = yield Stop(able[0].vmid, "as only one VM of its group may run")
        if trouble is not None:
            reasons.append(Reason(STUCK, f"{able[0].label}: {trouble}", f"Stop it by hand: qm stop {able[0].vmid}"))
            break
    yield Release()
    reasons += [Reason(conflict.rule, conflict.text, _after(conflict)) for conflict in found]
    return tuple(reasons)


def _after(conflict: Conflict) -> str:
    return "Stop one of them: " + " or ".join(f"qm shutdown {vmid}" for vmid in conflict.losers)


def _state(answer: object) -> State:
    if not isinstance(answer, State):
        raise TypeError(f"a look is answered with a State, not with {answer!r}")
    return answer


def request_of(vmid: int, at: int, *, lock: str = "", migrated_from: str = "") -> Request:
    """The kind of a start, from what Proxmox VE tells: the VM's own lock and the environment of its hook.

    vzdump locks a VM (``backup``) before it starts it; an incoming migration has ``PVE_MIGRATED_FROM`` (QemuServer.pm).
    """
    if migrated_from:
        return Request(vmid, MIGRATION, at)
    return Request(vmid, BACKUP if lock == "backup" else START, at)
