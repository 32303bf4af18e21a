# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Methods of virtual machines: ``/nodes/{node}/qemu`` and ``/nodes/{node}/vzdump``."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from . import backup, hooks, lifecycle, permissions, vmconfig
from .conf import Conf
from .devices import with_mac
from .errors import ApiError, Died, Unknown, bad_parameters
from .lifecycle import Stop
from .routing import ALL, Call, Router, perm
from .schema import expanded

VM = "/nodes/{node}/qemu/{vmid}"
ANY_CONFIG = perm(
    "/vms/{vmid}",
    "VM.Config.Disk",
    "VM.Config.CDROM",
    "VM.Config.CPU",
    "VM.Config.Memory",
    "VM.Config.Network",
    "VM.Config.HWType",
    "VM.Config.Options",
    "VM.Config.Cloudinit",
    any_of=True,
)
AUDIT, POWER = perm("/vms/{vmid}", "VM.Audit"), perm("/vms/{vmid}", "VM.PowerMgmt")

CREATE_ONLY = ("archive", "force", "pool", "start", "ha-managed", "storage", "unique", "live-restore", "bwlimit")


def register(router: Router) -> None:
    router.on("GET", "/nodes/{node}/qemu", ALL)(listing)
    router.on("POST", "/nodes/{node}/qemu", ALL)(create)
    router.on("DELETE", VM, perm("/vms/{vmid}", "VM.Allocate"))(destroy)
    router.on("GET", f"{VM}/config", AUDIT)(config)
    router.on("PUT", f"{VM}/config", ANY_CONFIG)(update)
    router.on("POST", f"{VM}/config", ANY_CONFIG)(update_in_background)
    router.on("GET", f"{VM}/pending", AUDIT)(pending)
    router.on("GET", f"{VM}/status/current", AUDIT)(current)
    router.on("POST", f"{VM}/status/start", POWER)(start)
    router.on("POST", f"{VM}/status/stop", POWER)(stop)
    router.on("POST", f"{VM}/status/shutdown", POWER)(shutdown)
    router.on("POST", f"{VM}/status/reboot", POWER)(reboot)
    router.on("POST", "/nodes/{node}/vzdump", ALL)(vzdump)


def visible(call: Call) -> list[int]:
    return [
        vmid for vmid in call.node.configs.vmids() if call.node.access.may(call.caller, f"/vms/{vmid}", ["VM.Audit"])
    ]


def listing(call: Call) -> list[dict[str, Any]]:
    found = []
    for vmid in visible(call):
        try:
            found.append(lifecycle.status(call.node, vmid))
        except Died:
            continue  # destroyed in between
    return found


# ---- configuration ---------------------------------------------------------------------------------------------------


def typed(call: Call, values: dict[str, str]) -> dict[str, Any]:
    """Integers and booleans as numbers, as parsing the file makes them; without the schema all stays text."""
    method = call.schema.find("PUT", f"{VM}/config") if call.schema else None
    known = expanded(json.dumps(method.parameters["properties"], sort_keys=True)) if method else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        is_number = known.get(key, {}).get("type") in ("integer", "boolean") and re.fullmatch(r"-?\d+", value)
        found[key] = int(value) if is_number else value
    if "cipassword" in found:
        found["cipassword"] = "**********"
    return found


def config(call: Call) -> dict[str, Any]:
    if call.text("snapshot"):
        raise Died(f"snapshot '{call.text('snapshot')}' does not exist")
    conf = call.node.configs.load(call.vmid)
    values = conf.values if call.flag("current") else conf.merged()
    return {**typed(call, values), "digest": conf.digest}


def pending(call: Call) -> list[dict[str, Any]]:
    conf = call.node.configs.load(call.vmid)
    current, waiting = typed(call, conf.values), typed(call, conf.pending)
    found: list[dict[str, Any]] = []
    for key in sorted({*current, *waiting}):
        item: dict[str, Any] = {"key": key}
        if key in current:
            item["value"] = current[key]
        if key in waiting:
            item["pending"] = waiting[key]
        if key in conf.delete:
            item["delete"] = 2 if conf.delete[key] else 1
        found.append(item)
    return [*found, {"key": "digest", "value": conf.digest}]


def update(call: Call) -> None:
    """PUT: at once, under the lock."""
    call.root_only("skiplock")
    work = vmconfig.prepare(call.node, call.caller, call.vmid, call.params)
    with call.node.vm_lock(call.vmid):
        work(call.node.syslog)


def update_in_background(call: Call) -> str | None:
    """POST: a task ``qmconfig``; with background_delay it may be over before the answer."""
    call.root_only("skiplock")
    work = vmconfig.prepare(call.node, call.caller, call.vmid, call.params)
    node, vmid = call.node, call.vmid

    def run(task: Any) -> None:
        with node.vm_lock(vmid, say=task.log):
            work(task.log)

    task = node.tasks.run("qmconfig", str(vmid), call.caller, run)
    delay = call.number("background_delay")
    if delay and task.wait(delay):
        if task.failed:
            raise Died(f"failed to update VM {vmid}: {task.exitstatus}")
        return None
    return task.upid


def create(call: Call) -> str:
    node, vmid = call.node, call.vmid
    for name in ("archive", "pool", "ha-managed", "live-restore", "import-working-storage"):
        if call.params.get(name):
            raise Unknown(f"creating a VM with {name}")
    skip = {*CREATE_ONLY, "node", "vmid"}
    options = {key: str(value) for key, value in call.params.items() if key not in skip}
    if call.flag("start"):
        node.access.check(call.caller, f"/vms/{vmid}", ["VM.PowerMgmt"])
    permissions.check_create(node, call.caller, vmid, options)
    for key, value in options.items():
        if re.fullmatch(r"net\d+", key):
            options[key] = with_mac(value)
    if "hookscript" in options:
        try:
            hooks.check(node, options["hookscript"])
        except ApiError as error:
            raise bad_parameters({"hookscript": error.message}) from None
    with node.guard:
        if node.configs.exists(vmid):
            raise Died(f"unable to create VM {vmid} - VM {vmid} already exists on node '{node.name}'")
        node.configs.write(vmid, Conf({"lock": "create"}))

    def run(task: Any) -> None:
        with node.vm_lock(vmid, 1, say=task.log):
            try:
                vmconfig.create(node, vmid, options)
            except ApiError:
                node.configs.path(vmid).unlink()
                raise
        if call.flag("start"):
            task.log("Execute autostart")
            started = node.tasks.run(
                "qmstart", str(vmid), call.caller, lambda inner: lifecycle.start(node, vmid, inner)
            )
            started.wait()

    return node.tasks.run("qmcreate", str(vmid), call.caller, run).upid


def destroy(call: Call) -> str:
    call.root_only("skiplock")
    node, vmid = call.node, call.vmid

    def early() -> None:
        conf = node.configs.load(vmid)
        if conf.values.get("protection") == "1":
            raise Died(f"can't remove VM {vmid} - protection mode enabled")
        if call.ha.manages(vmid):
            if not call.flag("purge"):
                raise Died(f"unable to remove VM {vmid} - used in HA resources and purge parameter not set.")
            raise Unknown("purging a VM from HA")
        if node.machine(vmid) is not None:
            raise Died(f"VM {vmid} is running - destroy failed")

    early()

    def run(task: Any) -> None:
        with node.vm_lock(vmid, say=task.log):
            early()
            if not call.flag("skiplock"):
                lifecycle.check_lock(node.configs.load(vmid))
            vmconfig.destroy(node, vmid)

    return node.tasks.run("qmdestroy", str(vmid), call.caller, run).upid


# ---- power -----------------------------------------------------------------------------------------------------------


def current(call: Call) -> dict[str, Any]:
    conf = call.node.configs.load(call.vmid)
    machine = call.node.machine(call.vmid)
    found = lifecycle.status(call.node, call.vmid, conf)
    found["ha"] = call.ha.shown(call.vmid)
    found["qmpstatus"] = "stopped" if machine is None else "prelaunch" if machine.paused else "running"
    if re.match(r"(enabled=)?1", conf.values.get("agent", "")):
        found["agent"] = 1
    return found


def _unsimulated(call: Call, *names: str) -> None:
    for name in names:
        if call.params.get(name):
            raise Unknown(f"the parameter {name} here")


def start(call: Call) -> str:
    call.root_only(
        *("stateuri", "skiplock", "migratedfrom", "migration_type", "migration_network", "targetstorage", "force-cpu"),
        *("with-conntrack-state", "nets-host-mtu"),
    )
    _unsimulated(call, "stateuri", "migratedfrom", "targetstorage", "machine", "force-cpu")
    node, vmid, skiplock = call.node, call.vmid, call.flag("skiplock")
    if call.ha.manages(vmid):
        return call.ha.request(vmid, call.caller, "started")
    return node.tasks.run(
        "qmstart", str(vmid), call.caller, lambda task: lifecycle.start(node, vmid, task, skiplock=skiplock)
    ).upid


def stop(call: Call) -> str:
    call.root_only("skiplock", "keepActive", "migratedfrom")
    _unsimulated(call, "migratedfrom")
    node, vmid = call.node, call.vmid
    if call.ha.manages(vmid):
        if call.params.get("overrule-shutdown"):
            raise bad_parameters({"overrule-shutdown": "Not applicable for HA resources."})
        return call.ha.request(vmid, call.caller, "stopped", 0)
    timeout = float(call.number("timeout")) if "timeout" in call.params else None
    how = Stop(timeout=timeout, force=True, skiplock=call.flag("skiplock"))

    def run(task: Any) -> None:
        if call.flag("overrule-shutdown"):
            overruled = [each for each in node.tasks.running() if each.type == "qmshutdown" and each.id == str(vmid)]
            for each in overruled:
                node.tasks.abort(each)
            if overruled:
                task.log(f"overruled qmshutdown tasks: {', '.join(each.upid for each in overruled)}")
        lifecycle.stop(node, vmid, task, how)

    return node.tasks.run("qmstop", str(vmid), call.caller, run).upid


def shutdown(call: Call) -> str:
    call.root_only("skiplock", "keepActive")
    node, vmid = call.node, call.vmid
    force, press = call.flag("forceStop"), True
    machine = node.machine(vmid)
    if machine is not None and machine.paused:
        if not force:
            raise Died("VM is paused - cannot shutdown")
        press = False
    timeout = float(call.number("timeout")) if "timeout" in call.params else None
    if call.ha.manages(vmid):
        return call.ha.request(vmid, call.caller, "stopped", 60 if timeout is None else timeout)
    how = Stop(shutdown=press, timeout=timeout, force=force, skiplock=call.flag("skiplock"))
    return node.tasks.run("qmshutdown", str(vmid), call.caller, lambda task: lifecycle.stop(node, vmid, task, how)).upid


def reboot(call: Call) -> str:
    node, vmid = call.node, call.vmid
    machine = node.machine(vmid)
    if machine is not None and machine.paused:
        raise Died("VM is paused - cannot shutdown")
    if machine is None:
        raise Died(f"VM {vmid} not running")
    timeout = float(call.number("timeout")) if "timeout" in call.params else None
    return node.tasks.run(
        "qmreboot", str(vmid), call.caller, lambda task: lifecycle.reboot(node, vmid, task, timeout)
    ).upid


def vzdump(call: Call) -> str:
    """One VM, mode stop or snapshot; the archive is an empty file."""
    node, words = call.node, vmconfig.split(call.text("vmid"))
    allowed = {"vmid", "mode", "node", "storage", "compress", "remove"}
    _unsimulated(call, *(name for name in call.params if name not in allowed))
    if len(words) != 1:
        raise Unknown("a backup of more or fewer than one VM")
    vmid = int(words[0])
    if not call.caller.is_root:
        node.access.check(call.caller, f"/vms/{vmid}", ["VM.Backup"])
    mode = call.text("mode", "snapshot")
    stamp = time.strftime("%Y_%m_%d-%H_%M_%S")
    return node.tasks.run("vzdump", str(vmid), call.caller, lambda task: backup.run(node, vmid, mode, stamp, task)).upid
