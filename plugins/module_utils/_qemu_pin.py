# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pinning a VM's threads, reading back what the kernel made of it, and taking it back.

A vCPU gets one CPU of the VCPU zone, everything else of QEMU the whole IO zone. A thread that QEMU starts later
inherits the mask of the one that starts it, which is why the main thread's mask matters most.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _cpu_list, _qemu, _qemu_plan, _qemu_records, _qemu_scope
from ._difference import Difference
from ._qemu import FIXED, VCPU, Machine, QemuError, Target, Thread
from ._qemu_plan import Zones
from ._qemu_records import Record, Wish
from ._root import Root
from ._systemd import Runner, booted, run_command

_ROUNDS = 5  # QEMU may start helpers while it is being pinned


class PinError(QemuError):
    """The kernel did not do what was asked; the text names each thread."""


@dataclass(frozen=True)
class Hands:
    """What touches the system, so that a test can stand in for it."""

    root: Root = field(default_factory=Root)
    get: Callable[[int], Iterable[int]] = os.sched_getaffinity
    set: Callable[[int, Iterable[int]], None] = os.sched_setaffinity
    ask: _qemu.Ask = _qemu.ask
    run: Runner = run_command

    def mask(self, tid: int) -> str | None:
        """A thread's mask as a CPU list, None when it has ended."""
        try:
            return _cpu_list.render(self.get(tid))
        except ProcessLookupError:
            return None


@dataclass(frozen=True)
class Pin:
    """A thread: its CPUs (lists) before, as wanted, and as read back (None: not looked at, or ended)."""

    thread: Thread
    before: str
    wanted: str
    now: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "tid": self.thread.tid,
            "name": self.thread.name,
            "role": self.thread.role,
            "vcpu": self.thread.index,
            "before": self.before,
            "wanted": self.wanted,
            "now": self.now,
        }


@dataclass(frozen=True)
class Result:
    """A VM after (or, when only planned, before) it was pinned. ``pid`` None: it does not run.

    ``known``: its process had been pinned before, so a difference is a drift. ``scope``: CPU lists before and wanted of
    its control group, None where there is none. ``notes``: what is as it should be and yet worth telling.
    """

    name: str
    difference: Difference
    pid: int | None = None
    vcpus: Mapping[int, int] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()
    scope: tuple[str, str] | None = None
    known: bool = False
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "running": self.pid is not None,
            "pid": self.pid,
            "vcpus": {str(index): cpu for index, cpu in self.vcpus.items()},
            "threads": [pin.as_dict() for pin in self.pins],
            "scope": None if self.scope is None else {"before": self.scope[0], "wanted": self.scope[1]},
            "drifted": [pin.thread.label for pin in self.pins if pin.before != pin.wanted] if self.known else [],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Plan:
    """What pinning a VM would change. ``machine`` and ``record`` are None when it does not run."""

    result: Result
    machine: Machine | None = None
    record: Record | None = None


def pin(hands: Hands, wish: Wish, zones: Zones, *, confine: bool = True, dry: bool = False) -> Result:
    """Pin a VM, or (``dry``) say what that would change.

    Raises PinRefusedError before anything has changed, QmpError, QemuError, PinError, CommandError, OSError.
    """
    (planned,) = plan_all(hands, [wish], zones, confine=confine, dry=dry)
    return planned.result if dry else carry_out(hands, planned, zones)


def plan_all(
    hands: Hands,
    wishes: Sequence[Wish],
    zones: Zones,
    *,
    confine: bool = True,
    dry: bool = False,
    leaving: Iterable[str] = (),
) -> list[Plan]:
    """Plans of several VMs, each around the others'; unless ``dry``, what each has now is recorded.

    All of them are looked at before the first is changed: once systemd knows the drop-ins, limiting one scope makes it
    realise those beside it too, and what these had before is gone then (systemd 257, src/core/cgroup.c,
    unit_realize_cgroup; observed).

    ``leaving``: names of VMs that give up their CPUs in the same run.

    Raises PinRefusedError before anything is recorded, QmpError, QemuError, OSError.
    """
    plans: list[Plan] = []
    pending: dict[str, Sequence[int]] = {}
    with contextlib.nullcontext() if dry else _qemu_records.locked(hands.root):
        for wish in wishes:
            machine = _qemu.find(hands.root, wish.target)
            if machine is None:
                notes = ("it does not run, and will be pinned at its start",)
                plans.append(Plan(Result(wish.target.name, Difference(), notes=notes)))
                continue
            used = {**_qemu_records.holders(hands.root, wish.target.name, *leaving), **pending}
            plans.append(_plan(hands, machine, wish, zones, confine, used))
            pending[wish.target.label] = list(plans[-1].result.vcpus.values())
        if not dry:
            for record in (each.record for each in plans if each.record is not None):
                _qemu_records.save(hands.root, record)
    return plans


def carry_out(hands: Hands, plan: Plan, zones: Zones) -> Result:
    """Do what was planned and recorded. Raises PinError, CommandError, OSError."""
    planned, machine = plan.result, plan.machine
    if machine is None:
        return planned
    if planned.scope is not None and planned.scope[0] != planned.scope[1] and machine.target.vmid is not None:
        _check_it_runs(hands, machine)
        _qemu_scope.limit(machine.target.vmid, planned.scope[1], hands.run)
    return _carry_out(hands, machine, planned, zones)


def _check_it_runs(hands: Hands, machine: Machine) -> None:
    if not _qemu.same(hands.root, machine):
        label = machine.target.label
        raise PinError(f"{label} ended while it was being pinned; it will be pinned at its next start")


def _plan(
    hands: Hands, machine: Machine, wish: Wish, zones: Zones, confine: bool, used: Mapping[str, Sequence[int]]
) -> Plan:
    root, target = hands.root, wish.target
    old = _qemu_records.load_record(root, target.name)
    threads = _qemu.threads(root, machine, hands.ask)
    vcpus = _qemu_plan.assign(target.label, threads, zones, used, wish.ratio, old.vcpus if old else None)
    known = old is not None and old.of(machine)
    difference, pins = Difference(), []
    for thread in threads:
        before = hands.mask(thread.tid)
        if before is None:
            continue
        wanted = _wanted(thread, vcpus, zones, before)
        pins.append(Pin(thread, before, wanted))
        difference.add(f"{target.label}: CPUs of {thread.label}", before, wanted)
    scope = _scope(root, target, zones) if confine else None
    if scope is not None:
        difference.add(f"{target.label}: AllowedCPUs of {target.scope}", scope[0], scope[1])
    kept = _again(old, pins, scope) if old is not None and known else _first(root, target, pins, scope)
    record = Record(target.name, machine.pid, machine.start, vcpus, zones.io, *kept)
    notes = _notes(pins, zones)
    result = Result(target.name, difference, machine.pid, vcpus, tuple(pins), scope, known, notes)
    return Plan(result, machine, record)


def _wanted(thread: Thread, vcpus: Mapping[int, int], zones: Zones, before: str) -> str:
    if thread.role == FIXED:
        return before
    if thread.role == VCPU and thread.index is not None:
        return str(vcpus[thread.index])
    return _cpu_list.render(zones.io)


def _scope(root: Root, target: Target, zones: Zones) -> tuple[str, str] | None:
    if target.vmid is None or not booted(root):
        return None
    now = _qemu_scope.current(root, target.vmid)
    return None if now is None else (now, _cpu_list.render(zones.all))


def _first(
    root: Root, target: Target, pins: Iterable[Pin], scope: tuple[str, str] | None
) -> tuple[dict[int, str], str | None]:
    """What a process had when it was first seen: masks of its threads, and the CPUs of its control group.

    A VM that was started under our drop-in has had our limit from its first moment on. Without us it would have had
    none, and its threads whatever the slice allows, so that is what it gets back.
    """
    masks = {pin.thread.tid: pin.before for pin in pins}
    if scope is None or target.vmid is None:
        return masks, None
    ours = scope[0] if scope[0] and scope[0] == _qemu_scope.at_start(root, target.vmid) else None
    if ours is None:
        return masks, scope[0]
    wide = _qemu_scope.allowed(root) or ours
    return {tid: wide if cpus == ours else cpus for tid, cpus in masks.items()}, ""


def _again(old: Record, pins: Iterable[Pin], scope: tuple[str, str] | None) -> tuple[dict[int, str], str | None]:
    """The first masks of a process are kept; a thread that came later had what its main thread had at first."""
    first = old.earlier.get(old.pid)
    masks = {pin.thread.tid: old.earlier.get(pin.thread.tid) or first or pin.before for pin in pins}
    return masks, old.scope if old.scope is not None else (scope[0] if scope is not None else None)


def _notes(pins: Iterable[Pin], zones: Zones) -> tuple[str, ...]:
    notes = []
    fixed = sum(pin.thread.role == FIXED for pin in pins)
    if fixed:
        notes.append(f"{fixed} threads (io_uring's) whose CPUs the kernel chooses itself are left alone")
    if zones.shared:
        notes.append("VCPU and IO zone are the same on this machine, so pinning keeps nothing apart")
    return tuple(notes)


def _carry_out(hands: Hands, machine: Machine, planned: Result, zones: Zones) -> Result:
    """Set masks until the kernel shows them all, new threads included. Raises PinError."""
    target = machine.target
    pins = {pin.thread.tid: pin for pin in planned.pins}
    problems: dict[int, str] = {}
    for _round in range(_ROUNDS):
        wrong = [pin for pin in pins.values() if hands.mask(pin.thread.tid) not in (pin.wanted, None)]
        problems = {pin.thread.tid: problem for pin in wrong if (problem := _set(hands, machine, pin))}
        fresh = _fresh(hands, machine, pins, zones)
        pins.update(fresh)
        _check_it_runs(hands, machine)
        if not fresh:
            break
    read = [Pin(pin.thread, pin.before, pin.wanted, hands.mask(pin.thread.tid)) for pin in pins.values()]
    bad = [pin for pin in read if pin.now not in (pin.wanted, None)]
    if bad:
        told = "; ".join(
            f"{pin.thread.label} has {pin.now or 'none'} and not {pin.wanted}{problems.get(pin.thread.tid, '')}"
            for pin in bad
        )
        raise PinError(f"{target.label}: the kernel keeps threads elsewhere: {told}; does its control group allow it?")
    return Result(
        planned.name,
        planned.difference,
        planned.pid,
        planned.vcpus,
        tuple(sorted(read, key=lambda pin: pin.thread.tid)),
        planned.scope,
        planned.known,
        planned.notes,
    )


def _set(hands: Hands, machine: Machine, pin: Pin) -> str | None:
    """Set one mask; the reason why it could not be, None when it could or the thread has ended."""
    tid = pin.thread.tid
    ours = hands.root.exists(f"/proc/{machine.pid}/task/{tid}") or (
        hands.root.read_or_none(f"/proc/{tid}/comm") == f"vhost-{machine.pid}"
    )
    if not ours:
        return None  # it has ended; its number may be another program's by now
    try:
        hands.set(tid, _cpu_list.parse(pin.wanted))
    except ProcessLookupError:
        return None
    except OSError as error:
        return f" ({error.strerror})"
    return None


def _fresh(hands: Hands, machine: Machine, pins: Mapping[int, Pin], zones: Zones) -> dict[int, Pin]:
    """Threads that QEMU has started since the monitor was asked: none is a vCPU, those are in its answer."""
    found = {}
    for thread in _qemu.helpers(hands.root, machine.pid):
        before = None if thread.tid in pins else hands.mask(thread.tid)
        if before is not None:
            found[thread.tid] = Pin(thread, before, _wanted(thread, {}, zones, before))
    return found


# Taking back ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """``others``: threads (by label) whose masks somebody else has changed since; they stay."""

    name: str
    difference: Difference
    others: Mapping[str, str] = field(default_factory=dict)


def release(hands: Hands, name: str, *, dry: bool = False) -> Release:
    """Give a VM's threads the masks that they had before they were pinned. Raises CommandError, OSError, PinError."""
    record = _qemu_records.load_record(hands.root, name)
    difference = Difference()
    if record is None:
        return Release(name, difference)
    others: dict[str, str] = {}
    if _qemu.start_of(hands.root, record.pid) == record.start:
        scoped = name.isdigit() and record.scope is not None
        before = _qemu_scope.current(hands.root, int(name)) if scoped else None
        if before is not None and record.scope is not None:
            difference.add(f"VM {name}: AllowedCPUs of {name}.scope", before, record.scope)
            if difference and not dry:
                _qemu_scope.limit(int(name), record.scope, hands.run)
        back = _masks_back(hands, record, others, difference)
        if not dry:
            _give_back(hands, record, back)
    difference.add(f"{_qemu_records.RECORDS}/{name}.json", "a record", None)
    if not dry:
        _qemu_records.drop(hands.root, name)
    return Release(name, difference, others)


def _masks_back(hands: Hands, record: Record, others: dict[str, str], difference: Difference) -> dict[int, str]:
    """Thread to the mask that it gets back."""
    back = {}
    ours = {_cpu_list.render(record.io), *(str(cpu) for cpu in record.vcpus.values())}
    first = record.earlier.get(record.pid)
    threads = [*_qemu.helpers(hands.root, record.pid), *_qemu.kernel_vhosts(hands.root, record.pid)]
    for thread in threads:
        now, before = hands.mask(thread.tid), record.earlier.get(thread.tid) or first
        if now is None or before is None or now == before or thread.role == FIXED:
            continue
        label = f"VM {record.name}: CPUs of thread {thread.tid} ({thread.name})"
        if now not in ours:
            others[label] = now
            continue
        difference.add(label, now, before)
        back[thread.tid] = before
    return back


def _give_back(hands: Hands, record: Record, back: Mapping[int, str]) -> None:
    failed = {}
    for tid, cpus in back.items():
        try:
            hands.set(tid, _cpu_list.parse(cpus))
        except ProcessLookupError:
            continue
        except OSError as error:
            failed[tid] = error.strerror
    if failed:
        raise PinError(f"VM {record.name}: threads keep their CPUs: {failed}; restart the VM to be rid of them")
