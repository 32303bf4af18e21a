# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A node of Proxmox VE as the guard sees it, in memory: tasks that take turns, locks, and kills between any two steps.

Nothing here gives up waiting: where the real thing has a time limit, the model waits for ever, so that two who wait for
each other are found as a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace

from organism.core import _guard, _guard_steps
from organism.core._guard import Announced, Decision, Group, Memory, Reason, Request, State, Vm

Turns = Generator[Callable[[], bool] | None, None, None]
"""A task: yields what it waits for (None: nothing, it only lets others go first)."""


@dataclass(eq=False)
class Task:
    what: str
    turns: Turns
    waits: Callable[[], bool] | None = None
    done: bool = False

    @property
    def ready(self) -> bool:
        return not self.done and (self.waits is None or self.waits())


@dataclass(eq=False)
class Lease:
    decision: Decision
    starter: Task


@dataclass
class Node:
    vms: dict[int, Vm]
    groups: tuple[Group, ...]
    memory: Memory
    running: dict[int, frozenset[str]] = field(default_factory=dict)
    since: dict[int, int] = field(default_factory=dict)
    vm_locks: dict[int, Task] = field(default_factory=dict)
    config_locks: dict[int, Task] = field(default_factory=dict)
    guard_lock: Task | None = None
    leases: dict[int, Lease] = field(default_factory=dict)
    reserved: dict[int, frozenset[str]] = field(default_factory=dict)
    announced: dict[int, tuple[int, Task]] = field(default_factory=dict)
    stops: dict[str, int] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    refusals: list[tuple[int, tuple[Reason, ...]]] = field(default_factory=list)
    clock: int = 0
    log: list[str] = field(default_factory=list)

    # The scheduler --------------------------------------------------------------------------------------------------

    def spawn(self, what: str, make: Callable[[Task], Turns]) -> Task:
        task = Task(what, iter(()))
        task.turns = make(task)
        self.tasks.append(task)
        return task

    def ready(self) -> list[Task]:
        return [task for task in self.tasks if task.ready]

    def step(self, task: Task) -> None:
        try:
            task.waits = next(task.turns)
        except StopIteration:
            self.end(task)

    def end(self, task: Task) -> None:
        """A process that ends or is killed: the kernel takes its locks."""
        task.done = True
        self.tasks = [each for each in self.tasks if each is not task]
        for locks in (self.vm_locks, self.config_locks):
            for vmid in [vmid for vmid, holder in locks.items() if holder is task]:
                del locks[vmid]
        if self.guard_lock is task:
            self.guard_lock = None

    def now(self) -> int:
        self.clock += 1
        return self.clock

    # What the guard sees ----------------------------------------------------------------------------------------------

    def phase(self, vmid: int) -> str:
        if vmid in self.running:
            return _guard.RUNNING
        lease = self.leases.get(vmid)
        if lease and not lease.starter.done and self.vm_locks.get(vmid) is lease.starter:
            return _guard.STARTING
        if lease and vmid in self.config_locks:
            return _guard.KEPT
        return _guard.STOPPED

    def held(self, vmid: int) -> frozenset[str] | None:
        if vmid in self.running or vmid in self.reserved:
            return self.running.get(vmid) or self.reserved.get(vmid)
        lease = self.leases.get(vmid)
        return lease.decision.keys if lease else None

    def state(self) -> State:
        vms = {
            vmid: replace(
                vm,
                phase=self.phase(vmid),
                held=self.held(vmid),
                lock="backup" if vmid in self.config_locks else "",
                since=self.since.get(vmid, 0),
            )
            for vmid, vm in self.vms.items()
        }
        announced = {vmid: Announced(vmid, at, alive=not hook.done) for vmid, (at, hook) in self.announced.items()}
        return State(vms, self.groups, self.memory, announced, self.stops)

    def look(self) -> State:
        for vmid in [vmid for vmid in self.leases if self.phase(vmid) == _guard.STOPPED]:
            del self.leases[vmid]
        return self.state()

    # Carrying out the guard's steps -----------------------------------------------------------------------------------

    def run(
        self, task: Task, steps: _guard_steps.Steps, starter: Task, asked: Request | None = None
    ) -> Generator[Callable[[], bool] | None, None, tuple[Reason, ...]]:
        answer: object = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as ended:
                return ended.value
            answer = None
            match step:
                case _guard_steps.Acquire():
                    yield lambda: self.guard_lock is None
                    self.guard_lock = task
                case _guard_steps.Release():
                    assert self.guard_lock is task
                    self.guard_lock = None
                case _guard_steps.Look():
                    assert self.guard_lock is task, "looks without the lock"
                    answer = self.look()
                case _guard_steps.Settle(vmid):
                    yield lambda vmid=vmid: self.phase(vmid) != _guard.STARTING
                case _guard_steps.Stop(vmid):
                    self.may_be_stopped(vmid, asked)
                    child = self.spawn(f"qm shutdown {vmid}", lambda me, vmid=vmid: self.stopping(me, vmid))
                    # Proxmox VE gives up after 10 s when the VM went by itself and a new start of it has its lock
                    yield lambda child=child, vmid=vmid: child.done or vmid not in self.running
                    self.end(child)
                    answer = "it still runs" if vmid in self.running else None
                case _guard_steps.Grant(decision):
                    assert self.guard_lock is task, "grants without the lock"
                    if starter.done:
                        answer = "the task that starts it has ended"
                    else:
                        self.leases[decision.request.vmid] = Lease(decision, starter)
            yield None

    # Proxmox VE's tasks -----------------------------------------------------------------------------------------------

    def start(self, vmid: int) -> Task:
        return self.spawn(f"qm start {vmid}", lambda me: self.starting(me, vmid))

    def stop(self, vmid: int) -> Task:
        return self.spawn(f"qm stop {vmid}", lambda me: self.stopping(me, vmid))

    def starting(self, me: Task, vmid: int, backup: Task | None = None) -> Turns:
        yield lambda: vmid not in self.vm_locks
        self.vm_locks[vmid] = me
        yield None
        if vmid in self.running or self.config_locks.get(vmid) is not backup:
            self.end(me)
            return
        outcome: list[tuple[Reason, ...] | None] = [None]
        hook = self.spawn(f"hook of {vmid}", lambda task: self.hook(task, me, vmid, backup is not None, outcome))
        yield lambda: hook.done
        if outcome[0] is None or outcome[0]:  # killed, or refused
            if outcome[0]:
                self.refusals.append((vmid, outcome[0]))
            self.end(me)
            return
        yield None
        taken = frozenset[str]().union(*self.running.values(), *self.reserved.values())
        mine: set[str] = set()
        for device in self.vms[vmid].devices:  # as Proxmox VE chooses: the first that is free
            free = [keys for keys in device.alternatives if not keys & (taken | mine)]
            if not free:
                self.log.append(f"Proxmox VE had no {device.label} for {vmid}")
                self.end(me)
                return
            mine |= free[0]
        self.reserved[vmid] = frozenset(mine)
        yield None
        self.running[vmid] = self.reserved.pop(vmid)
        self.since[vmid] = self.now()
        yield None
        self.end(me)

    def hook(self, me: Task, starter: Task, vmid: int, backup: bool, outcome: list[tuple[Reason, ...] | None]) -> Turns:
        request = Request(vmid, _guard.BACKUP if backup else _guard.START, self.now())
        if not backup:
            self.announced[vmid] = (request.at, me)
        self.leases.pop(vmid, None)  # of an earlier start: it neither runs nor starts
        yield None
        outcome[0] = yield from self.run(me, _guard_steps.start(request), starter, request)

    def stopping(self, me: Task, vmid: int, backup: Task | None = None) -> Turns:
        yield lambda: vmid not in self.vm_locks
        self.vm_locks[vmid] = me
        yield None
        if self.config_locks.get(vmid) is backup:
            self.running.pop(vmid, None)
            yield None
            if backup is None:
                self.leases.pop(vmid, None)  # post-stop
        self.end(me)

    def power_off(self, vmid: int) -> None:
        """The guest, or a crash: without any task."""
        self.running.pop(vmid, None)

    def backup(self, vmid: int) -> Task:
        return self.spawn(f"vzdump {vmid}", lambda me: self.backing_up(me, vmid))

    def backing_up(self, me: Task, vmid: int) -> Turns:
        yield lambda: vmid not in self.vm_locks
        if vmid in self.config_locks:
            return
        self.config_locks[vmid] = me
        was_running = vmid in self.running
        if was_running:  # mode stop
            child = self.spawn("stop of vzdump", lambda task: self.stopping(task, vmid, me))
            yield lambda: child.done
        child = self.spawn("start of vzdump", lambda task: self.starting(task, vmid, me))
        yield lambda: child.done
        yield None
        if not was_running:
            child = self.spawn("end of vzdump", lambda task: self.stopping(task, vmid, me))
            yield lambda: child.done
        del self.config_locks[vmid]

    def command_stop(self, group: str) -> Task:
        """mlmode stop."""

        def turns(me: Task) -> Turns:
            self.stops[group] = self.now()
            yield None
            yield from self.run(me, _guard_steps.stop_group(group), me)

        return self.spawn(f"stop {group}", turns)

    def watch(self) -> Task:
        def turns(me: Task) -> Turns:
            yield from self.run(me, _guard_steps.watch(enforce=True), me)

        return self.spawn("watchdog", turns)

    # What must hold at every instant ----------------------------------------------------------------------------------

    def check(self) -> None:
        owner: dict[str, int] = {}
        for vmid, keys in self.running.items():
            for key in keys:
                assert owner.setdefault(key, vmid) == vmid, f"{key} has two VMs: {owner[key]} and {vmid}"
        for group in self.groups:
            members = sorted(group.members & self.running.keys())
            assert len(members) < 2, f"group {group.name} has two running VMs: {members}"
        total = sum(self.vms[vmid].memory for vmid in self.running)
        assert total + self.memory.reserve + self.memory.arc <= self.memory.total, f"{total} MiB of VMs run"
        for vmid, reasons in self.refusals:
            assert reasons and all(reason.text and reason.next for reason in reasons), f"{vmid}: {reasons}"

    def may_be_stopped(self, vmid: int, asked: Request | None) -> None:
        """Only a start by somebody stops another, and only one of a group that preempts."""
        if asked is None:
            return
        assert asked.kind == _guard.START, f"a backup of {asked.vmid} stops {vmid}"
        shared = [group for group in self.groups if {vmid, asked.vmid} <= group.members]
        assert {group.policy for group in shared} == {_guard.PREEMPT}, f"{vmid} is stopped for {asked.vmid}: {shared}"

    def leftovers(self) -> Iterable[int]:
        """Leases of VMs that do not run, after all has come to rest and somebody has looked once."""
        self.look()
        return self.leases.keys() - self.running.keys()
