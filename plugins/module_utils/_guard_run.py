# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Carrying out the guard's steps on a node: the lock, the look, and stopping VMs with ``qm``.

A VM is stopped as S0-D05 wants it: ``qm shutdown``, then ``qm stop``, then the request fails; and what counts is that
its process has ended, not what a command says, since for a VM under high availability ``qm`` only asks for it.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from . import _guard, _guard_pve, _guard_records, _guard_steps
from ._guard import Decision, Reason, Request, State
from ._guard_config import Config
from ._guard_records import HostLock, Lease, Process, Records
from ._root import Root
from ._systemd import CommandError, run_command

QM = "/usr/sbin/qm"
_POLL_S = 0.1
_QM_SLACK_S = 30.0
"""Beyond the time limit that qm itself was given: its own start, its waiting for a VM's lock (10 s)."""


def say(_text: str) -> None:
    """Says nothing."""


@dataclass
class Guard:
    """The guard on one node. ``say``: gets each line for the log. ``asked_for``: the VM whose hook we are in."""

    root: Root
    config: Config
    say: Callable[[str], None] = say
    run: Callable[..., str] = run_command
    records: Records = field(init=False)
    lock: HostLock = field(init=False)
    asked_for: int | None = None

    def __post_init__(self) -> None:
        self.records = Records(self.root)
        self.lock = HostLock(self.root)

    # Reading ----------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """What is, and nothing put right. Raises BudgetError, OSError."""
        also = () if self.asked_for is None else (self.asked_for,)
        return _guard_pve.read_state(self.root, self.config, self.records, also)

    def look(self) -> State:
        """What is, and the records put right: only under the lock. Raises BudgetError, OSError."""
        state = self.state()
        leases = self.records.leases()
        for vmid in self.records.lease_names():
            if vmid not in state.vms or not state.vms[vmid].active:
                self.records.drop_lease(vmid)
        for vm in state.active():
            lease = leases.get(vm.vmid)
            keys = tuple(sorted(vm.held)) if vm.held is not None else None
            if lease is None or (vm.phase == _guard.RUNNING and keys is not None and keys != lease.keys):
                self._write_lease(state, vm.vmid, keys or (), None if lease is None else lease.starter, "found")
        for vmid, asked in state.announced.items():
            if not asked.alive and not (vmid in state.vms and state.vms[vmid].active):
                self.records.forget_request(vmid)
        return state

    def _write_lease(self, state: State, vmid: int, keys: tuple[str, ...], starter: Process | None, kind: str) -> None:
        vm = state.vms[vmid]
        self.records.write_lease(
            Lease(
                vmid,
                keys,
                self.records.next_generation(),
                _guard_records.now(),
                vm.name,
                tuple(group.name for group in state.groups_of(vmid)),
                vm.memory,
                kind,
                starter,
            )
        )

    # The steps --------------------------------------------------------------------------------------------------------

    def carry_out(
        self, steps: _guard_steps.Steps, what: str, *, starter: Process | None = None, wait: float | None = None
    ) -> tuple[Reason, ...]:
        """Run a protocol to its end; the reasons why it was not served. ``what``: for those who wait for the lock.

        Raises BudgetError, OSError; the lock is free afterwards in any case.
        """
        ends = time.monotonic() + self.config.deadline
        answer: object = None
        last: State | None = None
        try:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as ended:
                    reasons: tuple[Reason, ...] = ended.value
                    return reasons
                left = max(0.0, ends - time.monotonic())
                answer = None
                match step:
                    case _guard_steps.Acquire():
                        patience = self.config.lock_wait if wait is None else wait
                        answer = self.lock.acquire(what, min(left, patience))
                    case _guard_steps.Release():
                        self.lock.release()
                    case _guard_steps.Look():
                        answer = last = self.look()
                    case _guard_steps.Settle(vmid):
                        answer = self._settle(vmid, min(left, self.config.start_wait))
                    case _guard_steps.Stop(vmid, why):
                        answer = self.stop_vm(vmid, why, left)
                    case _guard_steps.Grant(decision):
                        answer = self._grant(last, decision, starter)
                    case _guard_steps.Say(text):
                        self.say(text)
        finally:
            self.lock.release()

    def _grant(self, state: State | None, decision: Decision, starter: Process | None) -> str | None:
        vmid = decision.request.vmid
        if state is None or starter is None or not starter.alive(self.root):
            return f"the task that starts VM {vmid} has ended"
        path = _guard_pve.lock_path(vmid)
        if self.root.exists(path) and _guard_pve.lock_holder(self.root, path) is None:
            return f"the task that starts VM {vmid} has given back the VM's lock"
        self._write_lease(state, vmid, tuple(sorted(decision.keys)), starter, decision.request.kind)
        return None

    def _settle(self, vmid: int, wait: float) -> str | None:
        """Wait for another start. Nothing tells of its end, so it is looked for."""
        ends = time.monotonic() + wait
        while True:
            lease = self.records.leases().get(vmid)
            running = _guard_pve.machine(self.root, vmid) is not None
            if running or lease is None or not _guard_pve.starting(self.root, lease):
                return None
            if time.monotonic() >= ends:
                return f"its start has not ended within {wait:.0f} s"
            time.sleep(_POLL_S)

    def stop_vm(self, vmid: int, why: str, left: float) -> str | None:
        """Shut a VM down, then stop it; None when its process has ended, else why it still runs."""
        ends = time.monotonic() + left
        said: list[str] = []
        grace, hard = self.config.shutdown_timeout, self.config.stop_timeout
        for verb, limit in (("shutdown", grace), ("stop", hard)):
            if _guard_pve.machine(self.root, vmid) is None:
                return None
            limit = min(limit, max(1.0, ends - time.monotonic()))
            argv = [str(self.root.path(QM)), verb, str(vmid), "--timeout", str(max(1, int(limit)))]
            try:
                self.run(argv, timeout=limit + _QM_SLACK_S)
            except CommandError as error:
                said.append(str(error))
            asked_only = _guard_pve.is_ha(self.root, vmid) or verb == "stop"
            if self._ended(vmid, limit if asked_only else 0.0):
                return None
            self.say(f"qm {verb} {vmid} ({why}) has not stopped it within {limit:.0f} s")
        return "it still runs after qm shutdown and qm stop" + (f" ({said[-1]})" if said else "")

    def _ended(self, vmid: int, wait: float) -> bool:
        """Has the VM's process ended, now or within so many seconds? Its devices are free then, too."""
        running = _guard_pve.machine(self.root, vmid)
        if running is None:
            return True
        try:
            descriptor = os.pidfd_open(running.pid)
        except ProcessLookupError:
            return True
        try:
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            waiting.poll(wait * 1000)
        finally:
            os.close(descriptor)
        return _guard_pve.machine(self.root, vmid) is None

    def start_vm(self, vmid: int, timeout: float) -> tuple[bool, list[str]]:
        """``qm start``: did it end well, and the lines of the task's log, which have the reason when it did not."""
        argv = [str(self.root.path(QM)), "start", str(vmid)]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
        except FileNotFoundError:
            return False, [f"{argv[0]} is not installed on this host"]
        except subprocess.TimeoutExpired:
            return False, [f"qm start {vmid} did not end within {timeout:g} s"]
        return done.returncode == 0, done.stdout.splitlines()

    # What calls it ----------------------------------------------------------------------------------------------------

    def before_start(self, vmid: int, *, migrated_from: str = "") -> tuple[Reason, ...]:
        """Phase pre-start, under the VM's lock: the reasons why it must not start, none when it may."""
        self.asked_for = vmid
        starter = _guard_pve.starter_of(self.root, vmid)
        config = _guard_pve.configs(self.root, [vmid]).get(vmid)
        request = _guard_steps.request_of(vmid, 0, lock=config.lock if config else "", migrated_from=migrated_from)
        if _guard_pve.machine(self.root, vmid) is None:
            self.records.drop_lease(vmid)  # of an earlier start: nobody else can be starting it
        if request.kind == _guard.START:
            own = Process.of(self.root, os.getpid())
            request = Request(vmid, request.kind, self.records.announce(vmid, own))
        return self.carry_out(_guard_steps.start(request), f"start of VM {vmid}", starter=starter)

    def after_stop(self, vmid: int) -> None:
        """Phase post-stop, under the VM's lock: its lease ends, unless its own backup starts it again."""
        config = _guard_pve.configs(self.root).get(vmid)
        kept = config is not None and _guard_pve.in_backup(self.root, config)
        if not kept and _guard_pve.machine(self.root, vmid) is None:
            self.records.drop_lease(vmid)

    def stop_group(self, name: str) -> tuple[Reason, ...]:
        """Nothing of the group runs afterwards; starts of it that wait are refused."""
        self.records.announce_stop(name)
        return self.carry_out(_guard_steps.stop_group(name), f"stop of group {name}")

    def watch(self, *, wait: float = 0.0) -> tuple[Reason, ...]:
        """One look of the watchdog; what is not as it should be. While a request is being served it does not look."""
        enforce = self.config.watchdog == "enforce"
        return self.carry_out(_guard_steps.watch(enforce=enforce), "watchdog", wait=wait)

    def keep_only(self, vmid: int) -> tuple[Reason, ...]:
        """Of the groups of a VM that runs, nothing else runs afterwards: it is the last that was asked for."""
        self.records.announce(vmid, None)
        return self.carry_out(_guard_steps.watch(enforce=True), f"switch to VM {vmid}")
