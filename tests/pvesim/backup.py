# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Backups, as far as VMs notice them: the lock, stops and starts, and the hooks that these run (PVE::VZDump).

A stopped VM is started paused for its backup, so that its pre-start and post-start run and its PCI devices are taken.
"""

from __future__ import annotations

from . import lifecycle
from .errors import ApiError, Died, Unknown
from .lifecycle import Stop
from .locks import locked
from .node import Node
from .tasks import Task

STOPWAIT_S = 600
LOCKWAIT_S = 180 * 60


def run(node: Node, vmid: int, mode: str, stamp: str, task: Task) -> None:
    """Back one VM up; one backup at a time on a node. Raises Died; the VM's lock goes away either way."""
    if mode not in ("stop", "snapshot"):
        raise Unknown(f"a backup in mode {mode}")
    with locked(node.top / "run/vzdump.lock", "/var/run/vzdump.lock", LOCKWAIT_S, task.log):
        _run(node, vmid, mode, stamp, task)


def _run(node: Node, vmid: int, mode: str, stamp: str, task: Task) -> None:
    task.log(f"INFO: Starting Backup of VM {vmid} (qemu)")
    was_running = node.machine(vmid) is not None
    task.log(f"INFO: status = {'running' if was_running else 'stopped'}")
    _lock(node, vmid, task)
    restart = False
    try:
        actual = mode if was_running else "stop"
        task.log(f"INFO: backup mode: {actual}")
        if actual == "stop" and was_running:
            task.log("INFO: stopping virtual guest")
            lifecycle.stop(node, vmid, task, Stop(shutdown=True, timeout=STOPWAIT_S, skiplock=True))
            restart = True
        _archive(node, vmid, stamp, task, was_running=was_running)
    except ApiError as error:
        task.log(f"ERROR: Backup of VM {vmid} failed - {error.message.rstrip()}")
        raise Died("job errors") from None
    finally:
        if restart:
            task.log("INFO: restarting vm")
            lifecycle.start(node, vmid, task, skiplock=True)
        _unlock(node, vmid, task)
    task.log(f"INFO: Finished Backup of VM {vmid}")
    task.log("INFO: Backup job finished successfully")


def _lock(node: Node, vmid: int, task: Task) -> None:
    with node.vm_lock(vmid, say=task.log):
        conf = node.configs.load(vmid)
        lifecycle.check_lock(conf)
        conf.values["lock"] = "backup"
        node.configs.write(vmid, conf)


def _unlock(node: Node, vmid: int, task: Task) -> None:
    with node.vm_lock(vmid, say=task.log):
        conf = node.configs.load(vmid)
        if conf.values.get("lock") == "backup":
            del conf.values["lock"]
            node.configs.write(vmid, conf)


def _archive(node: Node, vmid: int, stamp: str, task: Task, *, was_running: bool) -> None:
    runs = node.machine(vmid) is not None
    if not runs:
        task.log("INFO: starting kvm to execute backup task")
        lifecycle.start(node, vmid, task, skiplock=True, paused=True)
    if was_running:
        machine = node.machine(vmid)
        if machine is not None and machine.paused:
            task.log("INFO: resuming VM again")
            machine.resume()
    target = node.top / f"var/lib/vz/dump/vzdump-qemu-{vmid}-{stamp}.vma"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    task.interrupted()
    if not was_running:
        task.log("INFO: stopping kvm after backup task")
        lifecycle.stop(node, vmid, task, Stop(skiplock=True))
