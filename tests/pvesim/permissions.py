# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may change which key of a VM: allow-lists and value-dependent checks of PVE::API2::Qemu."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .access import Caller
from .errors import Died, bad_parameters, forbidden
from .node import Node
from .pci import fields, hostpci

DRIVE = re.compile(r"(ide|sata|scsi|virtio|efidisk|tpmstate)\d+")

_LISTS = {
    "VM.Config.CPU": "cores cpu runningcpu cpulimit cpuunits numa smp sockets vcpus",
    "VM.Config.Memory": "memory balloon shares allow-ksm",
    "VM.Config.HWType": "acpi hotplug kvm machine runningmachine scsihw smbios1 tablet vga watchdog audio0 rng0",
    "VM.Config.Options": "agent autostart bios description keyboard localtime migrate_downtime migrate_speed name "
    "onboot ostype protection reboot startdate startup tdf template",
    "VM.PowerMgmt": "freeze",
    "VM.Config.Disk": "boot bootdisk vmstatestorage",
    "VM.Config.Cloudinit": "cicustom cipassword citype ciuser ciupgrade nameserver searchdomain sshkeys",
}
PRIVILEGE = {key: privilege for privilege, keys in _LISTS.items() for key in keys.split()}


def check_keys(node: Node, caller: Caller, vmid: int, keys: Iterable[str]) -> None:
    """Raises 403 for a missing privilege, Died for what only root@pam may set."""
    if caller.is_root:
        return
    path = f"/vms/{vmid}"
    for key in keys:
        if DRIVE.fullmatch(key) or key in ("cdrom", "tags"):
            continue
        if re.fullmatch(r"(unused|serial|usb|hostpci|virtiofs)\d+", key):
            continue
        privilege = "VM.Config.CPU" if re.fullmatch(r"numa\d+", key) else PRIVILEGE.get(key)
        if re.fullmatch(r"net\d+", key):
            privilege = "VM.Config.Network"
        if privilege == "VM.Config.Cloudinit" or re.fullmatch(r"ipconfig\d+", key):
            node.access.check(caller, path, ["VM.Config.Cloudinit", "VM.Config.Network"], any_of=True)
            continue
        if privilege is None:
            raise Died(f"only root can set '{key}' config")
        node.access.check(caller, path, [privilege])
        if key == "startup":
            node.access.check(caller, "/", ["Sys.Modify"])


def check_value(node: Node, caller: Caller, vmid: int, key: str, value: str) -> None:
    """Checks that depend on the value, for hostpci, usb and serial; for old values as for new ones."""
    if caller.is_root:
        return
    path = f"/vms/{vmid}"
    if re.fullmatch(r"hostpci\d+", key):
        device = hostpci(value)
        if "host" in device:
            raise Died(f"only root can set '{key}' config for non-mapped devices")
        if "mapping" not in device:
            raise Died("either 'host' or 'mapping' must be set.")
        node.access.check(caller, f"/mapping/pci/{device['mapping']}", ["Mapping.Use"])
        node.access.check(caller, path, ["VM.Config.HWType"])
        if "romfile" in device:
            raise bad_parameters({key: "only root@pam can set 'romfile' option"})
    elif re.fullmatch(r"usb\d+", key):
        node.access.check(caller, path, ["VM.Config.HWType"])
        device = fields(value)
        if device.get("host", device.get("_", "")).lower() != "spice":
            raise Died(f"only root can set '{key}' config for real devices")
    elif re.fullmatch(r"serial\d+", key):
        if value != "socket":
            raise Died(f"only root can set '{key}' config for real devices")
        node.access.check(caller, path, ["VM.Config.HWType"])


def check_drive(node: Node, caller: Caller, vmid: int, value: str) -> None:
    """The VM's side of a drive (the storage's is checked where a volume is made)."""
    if "cloudinit" in value.partition(",")[0]:
        node.access.check(caller, f"/vms/{vmid}", ["VM.Config.Cloudinit", "VM.Config.CDROM"])
    elif "media=cdrom" in value:
        node.access.check(caller, f"/vms/{vmid}", ["VM.Config.CDROM"])
    else:
        node.access.check(caller, f"/vms/{vmid}", ["VM.Config.Disk"])


def check_storage(node: Node, caller: Caller, params: Mapping[str, str]) -> None:
    """New volumes need room: Datastore.AllocateSpace on their storage."""
    for key, value in params.items():
        found = re.match(r"([a-z][\w.-]*):(\d+(\.\d+)?|cloudinit)(,|$)", value) if DRIVE.fullmatch(key) else None
        if found and not caller.is_root:
            node.access.check(caller, f"/storage/{found[1]}", ["Datastore.AllocateSpace"])


def check_bridges(node: Node, caller: Caller, params: Mapping[str, str]) -> None:
    """SDN.Use on each bridge, or on the VLAN of it."""
    if caller.is_root:
        return
    for key, value in sorted(params.items()):
        if not re.fullmatch(r"net\d+", key):
            continue
        net = fields(value)
        if "bridge" in net:
            zone = f"/sdn/zones/localnetwork/{net['bridge']}"
            node.access.check(caller, f"{zone}/{net['tag']}" if "tag" in net else zone, ["SDN.Use"])


def check_create(node: Node, caller: Caller, vmid: int, params: Mapping[str, str]) -> None:
    """All of them for a new VM."""
    if not node.access.may(caller, f"/vms/{vmid}", ["VM.Allocate"]):
        raise forbidden()
    check_storage(node, caller, params)
    check_keys(node, caller, vmid, params)
    for key, value in params.items():
        check_value(node, caller, vmid, key, value)
    check_bridges(node, caller, params)
