# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Start, stop, shutdown, reboot and what happens when a VM ends by itself (PVE::QemuServer, qm cleanup)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from . import hooks, process, startcheck
from .access import ROOT, Caller
from .conf import Conf
from .errors import ApiError, Died
from .node import Node
from .process import Machine
from .tasks import Task
from .vmconfig import apply_pending


@dataclass(frozen=True)
class Stop:
    """How to stop. ``timeout`` None: the VM's ``startup`` says (``down``), else 60 s. ``force`` None: as stop does."""

    shutdown: bool = False
    timeout: float | None = None
    force: bool | None = None
    skiplock: bool = False


def check_lock(conf: Conf) -> None:
    if "lock" in conf.values:
        raise Died(f"VM is locked ({conf.values['lock']})")


def start(
    node: Node, vmid: int, task: Task, *, skiplock: bool = False, paused: bool = False, migrated_from: str = ""
) -> None:
    """PVE::QemuServer::vm_start. ``migrated_from``: the node that a running VM comes from, which hooks are told.

    Raises ApiError with the task's exit status.
    """
    with node.vm_lock(vmid, say=task.log):
        conf = node.configs.load(vmid)
        if conf.values.get("template") == "1" and not paused:
            raise Died("you can't start a vm if it's a template")
        running = node.machine(vmid)
        if running is not None and conf.values.get("lock") == "backup":
            running.resume()
            return
        if not skiplock and conf.values.get("lock") != "suspended":
            check_lock(conf)
        if running is not None:
            raise Died(f"VM {vmid} already running")
        _start(node, vmid, conf, task, paused=paused, migrated_from=migrated_from)


def _start(node: Node, vmid: int, conf: Conf, task: Task, *, paused: bool, migrated_from: str) -> None:
    extra = {"PVE_MIGRATED_FROM": migrated_from} if migrated_from else {}
    node.reboot_requests.discard(vmid)
    if conf.has_pending:
        apply_pending(node, vmid, conf)
    config = dict(conf.values)
    hooks.run(node, config, vmid, "pre-start", task, stop_on_error=True, extra=extra)
    try:
        choices = startcheck.check(node, config)
        addresses = node.reservations.choose(choices, vmid)
        node.reservations.reserve(addresses, vmid, timeout=30)
    except ApiError:
        node.reservations.release(vmid)
        raise
    try:
        startcheck.check_affinity(node, config)
        _take_hugepages(node, config)
        run = node.top / "run/qemu-server"
        log = node.top / f"var/log/vm-{vmid}.log"
        machine = process.start(
            node.settings.vm_kind, vmid, config, addresses, run, log, node.behaviour(vmid), paused=paused
        )
    except ApiError:
        node.reservations.release(vmid)
        raise
    with node.guard:
        node.machines[vmid] = machine
        node.starts.append({each.vmid: each.devices for each in node.machines.values() if each.exists})
    node.reservations.reserve(addresses, vmid, pid=machine.pid)
    node.host.bind(node.top / "sys", addresses)
    (node.top / f"run/qemu-server/{vmid}.cleanup").touch()
    threading.Thread(target=_watch, args=(node, machine), name=f"qmeventd-{vmid}", daemon=True).start()
    hooks.run(node, config, vmid, "post-start", task, extra=extra)


def _take_hugepages(node: Node, config: dict[str, str]) -> None:
    needed = startcheck.hugepages_needed(node, config)
    if needed and needed[1] > node.host.hugepages[needed[0]]:
        raise Died("start failed: hugepage allocation failed")


def stop(node: Node, vmid: int, task: Task, how: Stop) -> None:
    """PVE::QemuServer::vm_stop; a VM that does not run is stopped already. Raises ApiError."""
    with node.vm_lock(vmid, say=task.log):
        _stop(node, vmid, task, how)


def _stop(node: Node, vmid: int, task: Task, how: Stop) -> None:
    machine = node.machine(vmid)
    if machine is None:
        return
    conf = node.configs.load(vmid)
    if not how.skiplock:
        check_lock(conf)
    timeout = how.timeout
    if timeout is None and how.shutdown:
        timeout = _down(conf.values.get("startup", ""))
    force = how.force if how.force is not None else not how.shutdown
    hooks.run(node, conf.values, vmid, "pre-stop", task)
    try:
        if how.shutdown:
            machine.press_power_button()
        else:
            machine.quit()
    except (OSError, ValueError):
        if not force:
            raise Died("VM quit/powerdown failed") from None
        task.log("VM quit/powerdown failed - terminating now with SIGTERM")
        machine.terminate()
    else:
        if _ended(machine, 60 if timeout is None else timeout, node.settings.poll, task):
            _clean(node, vmid, conf, task, apply=True)
            return
        if not force:
            raise Died("VM quit/powerdown failed - got timeout")
        task.log("VM still running - terminating now with SIGTERM")
        machine.terminate()
    if not _ended(machine, 10, node.settings.poll, task):
        task.log("VM still running - terminating now with SIGKILL")
        machine.kill()
        machine.wait(10)
    _clean(node, vmid, conf, task, apply=True)


def _down(startup: str) -> float | None:
    for part in startup.split(","):
        if part.startswith("down="):
            return float(part.removeprefix("down="))
    return None


def _ended(machine: Machine, timeout: float, poll: float, task: Task) -> bool:
    deadline = time.monotonic() + timeout
    while True:
        if machine.wait(min(poll, max(0.0, deadline - time.monotonic()))):
            return True
        task.interrupted()
        if time.monotonic() >= deadline:
            return False


def _clean(node: Node, vmid: int, conf: Conf, task: Task | None, *, apply: bool) -> None:
    """PVE's vm_stop_cleanup: once for each run of the VM, which the flag's file sees to."""
    flag = node.top / f"run/qemu-server/{vmid}.cleanup"
    if not flag.exists():
        return
    for suffix in ("pid", "qmp", "console"):
        (node.top / f"run/qemu-server/{vmid}.{suffix}").unlink(missing_ok=True)
    held = [address for address, each in list(node.reservations.by_address.items()) if each.vmid == vmid]
    node.host.give_back(node.top / "sys", held)
    node.reservations.release(vmid)
    if apply and conf.has_pending:
        apply_pending(node, vmid, conf)
    hooks.run(node, conf.values, vmid, "post-stop", task)
    flag.unlink(missing_ok=True)


def _watch(node: Node, machine: Machine) -> None:
    """qmeventd, which calls ``qm cleanup`` when QEMU is gone, however it went."""
    machine.wait(None)
    vmid = machine.vmid
    restart = False
    try:
        with node.vm_lock(vmid, 60):
            if node.machine(vmid) is not None or not node.configs.exists(vmid):
                return
            _clean(node, vmid, node.configs.load(vmid), None, apply=False)
            restart = vmid in node.reboot_requests
            node.reboot_requests.discard(vmid)
    except ApiError as error:
        node.syslog(f"cleanup of VM {vmid}: {error.message}")
    if restart:
        # the worker belongs to root@pam, who runs qm cleanup
        node.tasks.run("qmstart", str(vmid), Caller(ROOT), lambda task: start(node, vmid, task))


def reboot(node: Node, vmid: int, task: Task, timeout: float | None) -> None:
    """Shut down, with a note for the cleanup to start the VM again."""
    with node.vm_lock(vmid, say=task.log):
        if node.machine(vmid) is None:
            return
        node.reboot_requests.add(vmid)
        try:
            _stop(node, vmid, task, Stop(shutdown=True, timeout=timeout))
        except ApiError:
            node.reboot_requests.discard(vmid)
            raise


def status(node: Node, vmid: int, conf: Conf | None = None) -> dict[str, Any]:
    """One VM as the lists show it (PVE::QemuServer, vmstatus)."""
    values = (conf or node.configs.load(vmid)).values
    machine = node.machine(vmid)
    threads = min(int(values.get("sockets", 1)) * int(values.get("cores", 1)), node.host.cpus)
    found: dict[str, Any] = {
        "vmid": vmid,
        "name": values.get("name", f"VM {vmid}"),
        "status": "running" if machine else "stopped",
        "cpus": int(values.get("vcpus", threads)),
        "maxmem": startcheck.memory_of(values) * 1024 * 1024,
        "maxdisk": 0,
        "disk": 0,
        "cpu": 0,
        "mem": 0,
        "memhost": 0,
        "uptime": 0,
        "netin": 0,
        "netout": 0,
        "diskread": 0,
        "diskwrite": 0,
    }
    if machine:
        found["pid"] = machine.pid
        found["uptime"] = int(time.monotonic() - machine.since)
    for key in ("lock", "tags"):
        if key in values:
            found[key] = values[key]
    if values.get("template") == "1":
        found["template"] = 1
    return found
