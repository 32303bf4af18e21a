# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""May this VM start now? The rules of the guard as a pure function: state and request in, decision out.

Three rules, asked before each start, from wherever it comes (GUI, command line, API, boot, HA):

1. **Exclusive groups.** Of a group one VM runs. Policy ``preempt``: the others are stopped first; ``refuse``: the start
   is refused. Of several requests for one group the last wins.
2. **GPUs.** A GPU belongs to one running VM (`_guard_devices`).
3. **Memory.** All that may be claimed at once fits into the host: VMs that run or start, the ARC at its upper limit,
   hugepages, this VM, and the host's reserve (S0-D02, S0-D03).

A backup and an incoming migration never stop another VM (S0-D07). Nothing here ever starts a VM: idle stays idle.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from . import _guard_devices as devices
from ._guard_devices import Device
from ._memory_budget import Budget, Claim

PREEMPT, REFUSE = "preempt", "refuse"
POLICIES = (PREEMPT, REFUSE)

STOPPED, STARTING, RUNNING, KEPT = "stopped", "starting", "running", "kept"
"""Phases. STARTING: past its pre-start hook, and the task that starts it is alive. KEPT: stopped for a moment by its
own
backup, which starts it again."""

START, MIGRATION, BACKUP = "start", "migration", "backup"
"""Kinds of a request. MIGRATION: arrives from another node. BACKUP: Proxmox VE runs the VM to read its disks."""

SUPERSEDED, GROUP, GPU, MEMORY, UNKNOWN = "superseded", "group", "gpu", "memory", "unknown"
"""Rules, as they are named in reasons."""


@dataclass(frozen=True)
class Vm:
    """A VM of this node. ``memory``: MiB. ``lock``: Proxmox VE's own (``backup``, ``migrate``), else empty.

    ``held``: keys of the devices that it is known to have; None: not known, then it may have any that its configuration
    allows. ``since``: orders running VMs by the time of their start. ``fault``: why its devices cannot be understood.
    """

    vmid: int
    name: str = ""
    memory: int = 0
    hugepages: bool = False
    devices: tuple[Device, ...] = ()
    phase: str = STOPPED
    held: frozenset[str] | None = None
    lock: str = ""
    since: float = 0.0
    fault: str = ""

    @property
    def label(self) -> str:
        return f"VM {self.vmid} ({self.name})" if self.name else f"VM {self.vmid}"

    @property
    def active(self) -> bool:
        return self.phase != STOPPED


@dataclass(frozen=True)
class Group:
    """VMs of which one runs at a time."""

    name: str
    policy: str
    members: frozenset[int]


@dataclass(frozen=True)
class Memory:
    """MiB. ``pool``: hugepages that exist, ``pool_free``: those of them that nobody uses. ``limit``: for the sum of VMs
    alone, 0: none. ``extra``: further claims by name.
    """

    total: int
    reserve: int = 0
    arc: int = 0
    pool: int = 0
    pool_free: int = 0
    limit: int = 0
    extra: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Announced:
    vmid: int
    at: int
    alive: bool


@dataclass(frozen=True)
class State:
    """``stops``: group to the time of the last wish that none of it runs. ``memory`` None: that rule is off."""

    vms: Mapping[int, Vm]
    groups: tuple[Group, ...] = ()
    memory: Memory | None = None
    announced: Mapping[int, Announced] = field(default_factory=dict)
    stops: Mapping[str, int] = field(default_factory=dict)

    def groups_of(self, vmid: int) -> list[Group]:
        return [group for group in self.groups if vmid in group.members]

    def active(self, but: Iterable[int] = ()) -> list[Vm]:
        left = set(but)
        return [vm for vmid, vm in sorted(self.vms.items()) if vm.active and vmid not in left]


@dataclass(frozen=True)
class Request:
    """``at``: when it was made, on the scale of `Announced`."""

    vmid: int
    kind: str = START
    at: int = 0


@dataclass(frozen=True)
class Reason:
    """Why not: the rule, what is in the way, and what an operator can do."""

    rule: str
    text: str
    next: str

    def __str__(self) -> str:
        return f"{self.text}. {self.next}" if self.next else self.text


@dataclass(frozen=True)
class Decision:
    """``reasons``: why it is refused, empty: it is not. ``stop``: VMs that have to be stopped first.

    ``keys``: devices that it will have (for alternatives of a mapping: those that are foreseen).
    """

    request: Request
    reasons: tuple[Reason, ...] = ()
    stop: tuple[int, ...] = ()
    keys: frozenset[str] = frozenset()

    @property
    def refused(self) -> bool:
        return bool(self.reasons)

    @property
    def allowed(self) -> bool:
        """At once."""
        return not self.reasons and not self.stop


def decide(state: State, request: Request) -> Decision:
    """What is to be done about a request, in this state. Every reason is given, not only the first."""
    vm = state.vms.get(request.vmid)
    if vm is None:
        text = f"VM {request.vmid} has no configuration on this node"
        return Decision(request, (Reason(UNKNOWN, text, "See: qm list"),))
    reasons: list[Reason] = []
    stop: list[int] = []
    later = _later(state, request) if request.kind == START else None
    if later:
        reasons.append(Reason(SUPERSEDED, later, f"Ask again if it shall be {vm.label} now"))
    for group in state.groups_of(vm.vmid):
        for rival in state.active(but=[vm.vmid]):
            if rival.vmid not in group.members:
                continue
            reason = _obstacle(group, vm, rival, request)
            if reason is not None:
                reasons.append(reason)
            elif rival.vmid not in stop:
                stop.append(rival.vmid)
    staying = state.active(but=[vm.vmid, *stop])
    fitting = devices.fit(vm.devices, [_holding(other) for other in staying])
    if vm.fault:
        reasons.append(Reason(GPU, f"{vm.label}: {vm.fault}", f"See: qm config {vm.vmid}"))
    reasons += [_device_reason(state, vm, clash) for clash in fitting.clashes]
    if state.memory is not None:
        reasons += _memory_reasons(state.memory, vm, staying)
    if reasons:
        return Decision(request, tuple(reasons))
    return Decision(request, stop=tuple(stop), keys=fitting.keys)


def _later(state: State, request: Request) -> str | None:
    """Who has asked after this request for a VM that excludes this one, and is served, or None.

    A later request that is itself refused, or whose asker has died without result, takes nothing from an earlier one.
    """
    for group in state.groups_of(request.vmid):
        if group.policy != PREEMPT:
            continue
        if state.stops.get(group.name, -1) > request.at:
            return f"after this start was asked for, it was asked that no VM of group {group.name} runs"
        for other in state.announced.values():
            rival = state.vms.get(other.vmid)
            if other.vmid not in group.members or other.vmid == request.vmid or other.at <= request.at or not rival:
                continue
            # times rise with each step of this recursion, so it ends
            if rival.active or (other.alive and not decide(state, Request(other.vmid, START, other.at)).refused):
                return f"{rival.label} of the same group {group.name} was asked for later, and the last request wins"
    return None


def _obstacle(group: Group, vm: Vm, rival: Vm, request: Request) -> Reason | None:
    """Why a rival cannot be stopped for this VM, or None when it can."""
    both = f"{rival.label} {_is(rival)}, and of group {group.name} only one VM runs"
    if group.policy == REFUSE:
        return Reason(GROUP, both, f"Stop it first: qm shutdown {rival.vmid}")
    if rival.lock or rival.phase == KEPT:
        what = rival.lock or "backup"
        after = f"Try again when that is done; qm unlock {rival.vmid} if nothing works on it any more"
        return Reason(GROUP, f"{both}; it is locked ({what}) and cannot be stopped now", after)
    if request.kind == BACKUP:
        after = f"Back {vm.label} up when {rival.label} does not run"
        return Reason(GROUP, f"{both}; a backup of {vm.label} does not stop it", after)
    if request.kind == MIGRATION:
        after = f"Stop it first: qm shutdown {rival.vmid}; {vm.label} goes on where it is"
        return Reason(GROUP, f"{both}; an incoming migration does not stop it", after)
    return None


def _is(vm: Vm) -> str:
    return {STARTING: "is starting", KEPT: "is being backed up"}.get(vm.phase, "runs")


# Devices --------------------------------------------------------------------------------------------------------------


def _holding(vm: Vm) -> devices.Holding:
    return devices.Holding(vm.vmid, vm.devices, vm.held, settled=vm.phase != STARTING)


def _device_reason(state: State, vm: Vm, clash: devices.Clash) -> Reason:
    wanted = f"{clash.device} of {vm.label}"
    if clash.owner is None:
        text = f"{wanted}: no device of {clash.label} is left for it"
        return Reason(GPU, text, "Try again when the other start is done, or give the mapping more devices")
    if clash.owner == devices.OWN:
        text = f"{wanted} is {clash.key}, which the same VM has already been given"
        return Reason(GPU, text, f"Remove one of them: qm set {vm.vmid} --delete {clash.device}")
    owner = state.vms[clash.owner]
    text = f"{owner.label} {_is(owner)} and has {devices.told(clash.key)}, which is {wanted} ({clash.label})"
    return Reason(GPU, text, f"Stop it first: qm shutdown {owner.vmid}")


# Memory ---------------------------------------------------------------------------------------------------------------


def budget(memory: Memory, vm: Vm | None, staying: Iterable[Vm]) -> Budget:
    """What may be claimed at once when this VM starts beside those that stay (None: what is claimed now)."""
    others = list(staying)
    everybody = [*others, *([vm] if vm is not None else [])]
    claims = [Claim("ZFS ARC at most", memory.arc, "a lower ARC limit (zfs_arc_max)")] if memory.arc else []
    paged = [each for each in everybody if each.hugepages]
    # pages of VMs that run are in the pool; PVE adds at a start what is missing there
    coming = sum(each.memory for each in paged if each.phase in (STOPPED, STARTING, KEPT))
    present = sum(each.memory for each in paged if each.phase == RUNNING)
    pages = max(memory.pool, present) + max(0, coming - memory.pool_free)
    if pages:
        claims.append(Claim("hugepages, with the VMs on them", pages, "fewer hugepages, or less memory for those VMs"))
    claims += [
        Claim(each.label, each.memory, "less memory (qm set ... --memory), or stop it")
        for each in everybody
        if not each.hugepages
    ]
    claims += [Claim(name, size, "less of it") for name, size in memory.extra]
    claims.append(Claim("the host itself", memory.reserve, "nothing: it is what the system needs to live"))
    return Budget(memory.total, tuple(claims))


def _memory_reasons(memory: Memory, vm: Vm, staying: list[Vm]) -> list[Reason]:
    reasons = []
    sums = budget(memory, vm, staying)
    if not sums.fits:
        parts = ", ".join(f"{claim.name} {claim.mib}" for claim in sums.claims)
        text = f"with {vm.label} {sums.total} MiB may be claimed, and this host has {sums.memory} ({parts})"
        after = f"Make {-sums.free} MiB free: stop a VM, or give one less memory"
        reasons.append(Reason(MEMORY, text, after))
    whole = sum(each.memory for each in staying) + vm.memory
    if memory.limit and whole > memory.limit:
        running = ", ".join(f"{each.label} {each.memory}" for each in [*staying, vm])
        text = f"the VMs would have {whole} MiB together, and their limit is {memory.limit} ({running})"
        reasons.append(Reason(MEMORY, text, "Stop a VM, or give one less memory"))
    return reasons


# What should not be ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conflict:
    """More than one VM of a group, or of a GPU, runs. ``losers`` can be stopped; ``winner`` goes on."""

    rule: str
    text: str
    winner: int
    losers: tuple[int, ...]


def conflicts(state: State) -> list[Conflict]:
    """What the rules do not allow and yet is: somebody got past the hook.

    The winner of a group is the last that was asked for; where nobody knows, the last that started (with policy
    ``refuse``: the first).
    """
    found = []
    for group in state.groups:
        running = [vm for vm in state.active() if vm.vmid in group.members and vm.phase == RUNNING]
        if len(running) < 2:
            continue
        winner = _winner(state, group, running)
        losers = tuple(vm.vmid for vm in running if vm is not winner)
        names = " and ".join(vm.label for vm in running)
        text = f"{names} run, and of group {group.name} only one may; {winner.label} stays"
        found.append(Conflict(GROUP, text, winner.vmid, losers))
    owners: dict[str, Vm] = {}
    for vm in state.active():
        for key in sorted(vm.held or ()) if vm.phase == RUNNING else ():
            first = owners.setdefault(key, vm)
            if first is not vm:
                text = f"{first.label} and {vm.label} both have {devices.told(key)}"
                found.append(Conflict(GPU, text, first.vmid, (vm.vmid,)))
    return found


def _winner(state: State, group: Group, running: list[Vm]) -> Vm:
    if group.policy == REFUSE:
        return min(running, key=lambda vm: (vm.since, vm.vmid))
    asked = {vm.vmid: state.announced[vm.vmid].at for vm in running if vm.vmid in state.announced}
    return max(running, key=lambda vm: (asked.get(vm.vmid, -1), vm.since, vm.vmid))
