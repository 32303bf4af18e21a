# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Drives and network devices in a configuration: normal form, and new volumes where one is asked for."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

from .errors import Died, Unknown
from .node import Node
from .pci import fields
from .storage import UNITS, format_size, parse_size

DRIVE = re.compile(r"(ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+")
MODELS = (
    "e1000",
    "e1000-82540em",
    "e1000-82544gc",
    "e1000-82545em",
    "e1000e",
    "i82551",
    "i82557b",
    "i82559er",
    "ne2k_isa",
    "ne2k_pci",
    "pcnet",
    "rtl8139",
    "virtio",
    "vmxnet3",
)

_NEW = re.compile(r"([a-z][\w.-]*):(\d+(?:\.\d+)?)")
_EFI_VARIABLES = 540672  # OVMF_VARS_4M, 528 KiB; a ZFS volume is rounded to whole blocks of 1 MiB


def parse_net(text: str) -> dict[str, str]:
    """``model`` and ``macaddr`` whatever the writing."""
    net = fields(text)
    for model in MODELS:
        if model in net:
            net["model"], net["macaddr"] = model, net.pop(model)
    if "_" in net:
        net["model"] = net.pop("_")
    return net


def print_net(net: Mapping[str, str]) -> str:
    """As PVE writes it: ``MODEL=MAC`` first, then the other keys in order of the alphabet."""
    rest = [f"{key}={value}" for key, value in sorted(net.items()) if key not in ("model", "macaddr")]
    return ",".join([f"{net['model']}={net['macaddr']}", *rest])


def with_mac(text: str) -> str:
    """A net device without a MAC address gets a new one, at every change."""
    net = parse_net(text)
    if "macaddr" not in net:
        tail = ":".join(f"{byte:02X}" for byte in secrets.token_bytes(3))
        net["macaddr"] = f"BC:24:11:{tail}"
    return print_net(net)


def parse_drive(text: str) -> dict[str, str]:
    drive = fields(text)
    for key in ("_", "volume"):
        if key in drive:
            drive["file"] = drive.pop(key)
    return drive


def print_drive(drive: Mapping[str, str]) -> str:
    rest = [f"{key}={value}" for key, value in sorted(drive.items()) if key != "file"]
    return ",".join([drive["file"], *rest])


def is_cdrom(drive: Mapping[str, str]) -> bool:
    return drive.get("media") == "cdrom"


def make_volume(node: Node, vmid: int, key: str, text: str) -> tuple[str, str | None]:
    """The drive's final text, and the volume that was made for it. Raises Died."""
    drive = parse_drive(text)
    file = drive.get("file", "")
    if file in ("none", "cdrom"):
        return print_drive(drive), None
    if file.endswith(":cloudinit"):
        storage_id = file.removesuffix(":cloudinit")
        suffix = "" if node.storages.find(storage_id).kind == "zfspool" else ".qcow2"
        if suffix:
            raise Unknown("a cloud-init drive on a directory storage")
        volume = node.storages.allocate(storage_id, vmid, 4 * UNITS["M"], f"vm-{vmid}-cloudinit")
        return print_drive({**drive, "file": volume, "media": "cdrom"}), volume
    source = drive.pop("import-from", None)
    if found := _NEW.fullmatch(file):
        size = int(float(found[2]) * UNITS["G"])
        if source:
            if source.startswith("/"):
                raise Unknown("import-from with a path")
            size = node.storages.size(source)
        elif key.startswith("efidisk"):
            size = _EFI_VARIABLES if node.storages.find(found[1]).kind == "dir" else UNITS["M"]
        elif key.startswith("tpmstate"):
            size = 4 * UNITS["M"]
        elif size == 0:
            raise Died(f"unable to create VM {vmid} - disk size must be greater than zero")
        volume = node.storages.allocate(found[1], vmid, size)
        drive.pop("format", None)
        return print_drive({**drive, "file": volume, "size": format_size(size)}), volume
    if file.startswith("/"):
        return print_drive(drive), None
    size = node.storages.size(file)
    if not is_cdrom(drive) or parse_size(drive.get("size", "")) is None:
        drive["size"] = format_size(size)
    return print_drive(drive), None


def add_unused(node: Node, values: dict[str, str], text: str) -> None:
    """A drive that was replaced or removed stays as ``unusedN``, unless it is a CD or another VM's."""
    drive = parse_drive(text)
    if is_cdrom(drive) or ":" not in drive.get("file", "") or drive["file"] in values.values():
        return
    for index in range(256):
        if f"unused{index}" not in values:
            values[f"unused{index}"] = drive["file"]
            return
    raise Died("Too many unused volumes - please delete them first.")


def default_boot(values: Mapping[str, str]) -> str:
    """First disk, first CD, first network device (PVE::QemuServer, get_default_bootdevices)."""
    drives = [
        (key, parse_drive(values[key]))
        for kind in ("ide", "scsi", "virtio", "sata")
        for key in (f"{kind}{index}" for index in range(31))
        if key in values
    ]
    found = []
    for cd in (False, True):
        found += [key for key, drive in drives if is_cdrom(drive) == cd][:1]
    found += sorted(key for key in values if re.fullmatch(r"net\d+", key))[:1]
    return f"order={';'.join(found)}" if found else ""
