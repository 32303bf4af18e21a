# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Full clones and larger disks (PVE::API2::Qemu, clone_vm and resize_vm). Linked clones are not simulated."""

from __future__ import annotations

import re
import uuid
from typing import Any

from . import lifecycle, permissions
from .conf import Conf
from .devices import DRIVE, is_cdrom, parse_drive, parse_net, print_drive, with_mac
from .errors import ApiError, Died, Unknown
from .routing import Call, Permission, Router, perm
from .storage import UNITS, format_size

VM = "/nodes/{node}/qemu/{vmid}"
MAY_CLONE = Permission(
    (
        "and",
        ("perm", "/vms/{vmid}", ("VM.Clone",)),
        (
            "or",
            ("perm", "/vms/{newid}", ("VM.Allocate",)),
            ("perm", "/pool/{pool}", ("VM.Allocate",), "require_param", "pool"),
        ),
    )
)


def register(router: Router) -> None:
    router.on("POST", f"{VM}/clone", MAY_CLONE)(clone)
    router.on("PUT", f"{VM}/resize", perm("/vms/{vmid}", "VM.Config.Disk"))(resize)


def clone(call: Call) -> str:
    node, vmid, new = call.node, call.vmid, call.number("newid")
    for name in ("snapname", "format", "pool", "bwlimit"):
        if call.params.get(name):
            raise Unknown(f"cloning with {name}")
    if call.params.get("target") not in (None, node.name, "localhost"):
        raise Unknown("cloning to another node")
    source = node.configs.load(vmid)
    if not call.flag("full", source.values.get("template") != "1"):
        raise Unknown("a linked clone")
    lifecycle.check_lock(source)
    permissions.check_bridges(node, call.caller, source.values)
    for key, value in source.values.items():
        permissions.check_value(node, call.caller, vmid, key, value)
    with node.guard:
        if node.configs.exists(new):
            raise Died(f"unable to create VM {new}: config file already exists")
        node.configs.write(new, Conf({"lock": "clone"}))

    def run(task: Any) -> None:
        task.log(f"creating a clone of VM {vmid} with ID {new}")
        made: list[str] = []
        try:
            values = _copied(call, source, made)
        except ApiError as error:
            for volume in made:
                node.storages.free(volume)
            node.configs.path(new).unlink()
            raise Died(f"clone failed: {error.message}") from None
        node.configs.write(new, Conf(values))

    return node.tasks.run("qmclone", str(vmid), call.caller, run).upid


def _copied(call: Call, source: Conf, made: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    new = call.number("newid")
    for key, value in sorted(source.values.items()):
        if key in ("template", "lock", "parent", "snaptime", "vmstate") or re.fullmatch(r"unused\d+", key):
            continue
        if re.fullmatch(r"net\d+", key):
            net = parse_net(value)
            net.pop("macaddr", None)
            value = with_mac(",".join(f"{name}={text}" for name, text in net.items()))
        elif DRIVE.fullmatch(key):
            value = _copied_drive(call, new, value, made)
        values[key] = value
    rest = [part for part in values.get("smbios1", "").split(",") if part and not part.startswith("uuid=")]
    values["smbios1"] = ",".join([f"uuid={uuid.uuid4()}", *rest])
    if "vmgenid" in values:
        values["vmgenid"] = str(uuid.uuid4())
    values["name"] = call.text("name") or f"Copy-of-VM-{source.values.get('name', call.vmid)}"
    if call.params.get("description"):
        values["description"] = call.text("description")
    return values


def _copied_drive(call: Call, new: int, value: str, made: list[str]) -> str:
    drive, storages = parse_drive(value), call.node.storages
    is_cloudinit = "cloudinit" in drive["file"]
    if is_cdrom(drive) and not is_cloudinit:
        return value
    target = call.text("storage") or drive["file"].partition(":")[0]
    size = storages.size(drive["file"])
    volume = storages.allocate(target, new, size, f"vm-{new}-cloudinit" if is_cloudinit else None)
    made.append(volume)
    if not is_cloudinit:
        drive["size"] = format_size(size)
    return print_drive({**drive, "file": volume})


def resize(call: Call) -> str:
    call.root_only("skiplock")
    node, vmid, disk, wanted = call.node, call.vmid, call.text("disk"), call.text("size")

    def run(task: Any) -> None:
        with node.vm_lock(vmid, say=task.log):
            conf = node.configs.load(vmid)
            if call.params.get("digest") and call.text("digest") != conf.digest:
                raise Died("checksum mismatch (file change by other user?)")
            if not call.flag("skiplock"):
                lifecycle.check_lock(conf)
            if disk not in conf.values:
                raise Died(f"disk '{disk}' does not exist")
            drive = parse_drive(conf.values[disk])
            if is_cdrom(drive):
                raise Died("you can't resize a cdrom")
            storage = drive["file"].partition(":")[0]
            node.access.check(call.caller, f"/storage/{storage}", ["Datastore.AllocateSpace"])
            size = node.storages.size(drive["file"])
            found = re.fullmatch(r"(\+?)(\d+(?:\.\d+)?)([KMGT]?)", wanted)
            if found is None:
                raise Died("internal error")
            new = int(float(found[2]) * UNITS[found[3]]) + (size if found[1] else 0)
            if new < size:
                raise Died("shrinking disks is not supported")
            if new == size:
                return
            path, _kind = node.storages.path(drive["file"])
            with path.open("rb+") as image:
                image.truncate(new)
            conf.values[disk] = print_drive({**drive, "size": format_size(new)})
            node.configs.write(vmid, conf)

    return node.tasks.run("resize", str(vmid), call.caller, run).upid
