# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""VMs under high availability, on a cluster of one: the API only asks, the local resource manager does it.

``qm start`` of such a VM is a task ``hastart`` that ends when the request is noted, long before the VM runs
(PVE::API2::Qemu). A VM that shall run and does not is started by the resource manager, one time more when that fails;
then its state is ``error`` and nobody touches it. Relocation, fencing and rules are not simulated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from . import lifecycle
from .access import ROOT, Caller
from .errors import ApiError, Unknown
from .lifecycle import Stop
from .node import Node
from .pci import replace_file
from .tasks import Task

MAX_RESTART = 1
CYCLE_S = 0.2
"""How often the resource manager looks; on a node about ten seconds."""


@dataclass
class Resource:
    """``state``: started, stopped, ignored or error. ``stop_timeout`` 0: pull the plug."""

    state: str = "started"
    stop_timeout: float = 60.0
    failures: int = 0
    busy: bool = False


@dataclass
class Ha:
    """``/etc/pve/ha/resources.cfg`` and the local resource manager."""

    node: Node
    by_vmid: dict[int, Resource] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def manages(self, vmid: int) -> bool:
        with self.lock:
            found = self.by_vmid.get(vmid)
            return found is not None and found.state != "ignored"

    def shown(self, vmid: int) -> dict[str, object]:
        """As ``status/current`` tells it."""
        with self.lock:
            found = self.by_vmid.get(vmid)
            return {"managed": 1, "state": found.state} if found else {"managed": 0}

    def set(self, vmid: int, state: str | None) -> None:
        """Add a VM or change its state; None takes it out."""
        with self.lock:
            if state is None:
                self.by_vmid.pop(vmid, None)
            else:
                self.by_vmid[vmid] = Resource(state)
            self._write()

    def _write(self) -> None:
        text = "".join(f"vm: {vmid}\n\tstate {each.state}\n\n" for vmid, each in sorted(self.by_vmid.items()))
        folder = self.node.top / "etc/pve/ha"
        folder.mkdir(exist_ok=True)
        replace_file(folder / "resources.cfg", text)

    def request(self, vmid: int, caller: Caller, state: str, timeout: float = 60.0) -> str:
        """The task that notes a wish; its UPID."""
        kind, word = ("hastart", "start") if state == "started" else ("hastop", "stop")
        with self.lock:
            if self.by_vmid[vmid].state == "error":
                raise Unknown(f"{word} of a VM whose HA state is error")

        def work(task: Task) -> None:
            task.log(f"Requesting HA {word} for VM {vmid}")
            with self.lock:
                self.by_vmid[vmid].state = state
                self.by_vmid[vmid].stop_timeout = timeout
                self.by_vmid[vmid].failures = 0
                self._write()

        return self.node.tasks.run(kind, str(vmid), caller, work).upid

    # ---- the local resource manager ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Look at all resources, again and again, until the node ends."""
        while not self.ended.wait(CYCLE_S):
            with self.lock:
                found = list(self.by_vmid.items())
            for vmid, resource in found:
                if not resource.busy:
                    self._look(vmid, resource)

    def _look(self, vmid: int, resource: Resource) -> None:
        runs = self.node.machine(vmid) is not None
        if resource.state == "started" and not runs:
            self._do(resource, "qmstart", vmid, lambda task: lifecycle.start(self.node, vmid, task))
        elif resource.state == "stopped" and runs:
            how = Stop(shutdown=resource.stop_timeout > 0, timeout=resource.stop_timeout or None, force=True)
            kind = "qmshutdown" if how.shutdown else "qmstop"
            self._do(resource, kind, vmid, lambda task: lifecycle.stop(self.node, vmid, task, how))

    def _do(self, resource: Resource, kind: str, vmid: int, work: Callable[[Task], None]) -> None:
        resource.busy = True

        def run(task: Task) -> None:
            task.log("task started by HA resource agent")
            try:
                work(task)
            except ApiError:
                resource.failures += 1
                if resource.failures > MAX_RESTART:
                    with self.lock:
                        resource.state = "error"
                        self._write()
                raise
            finally:
                resource.busy = False

        self.node.tasks.run(kind, str(vmid), Caller(ROOT), run)
