# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PCI functions and the IOMMU groups that they are in, by sysfs alone (never by the text of ``lspci``: S1h-D01, D02).

A group is the smallest set that a virtual machine can get: functions of one group can reach each other past the IOMMU,
so the kernel hands out all of them or none (Documentation/driver-api/vfio.rst).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ._gpu import PCI_IDS
from ._root import Root

DEVICES = "/sys/bus/pci/devices"
GROUPS = "/sys/kernel/iommu_groups"
VFIO = "vfio-pci"
ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_GIVEN = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])(?:\.([0-7]))?")

CLASSES = {
    "0100": "SCSI controller",
    "0104": "RAID controller",
    "0106": "SATA controller",
    "0108": "NVMe drive",
    "0200": "network card",
    "0280": "network card",
    "0300": "VGA",
    "0302": "3D controller",
    "0380": "display",
    "0403": "audio",
    "0500": "memory",
    "0580": "memory",
    "0600": "host bridge",
    "0601": "ISA bridge",
    "0604": "PCI bridge",
    "0c03": "USB controller",
    "0c05": "SMBus",
    "0c80": "serial bus",
    "1080": "encryption",
    "1200": "accelerator",
}
"""First two bytes of the class to a word for people (PCI Code and ID Assignment Specification)."""


class AddressError(ValueError):
    """A text that is no PCI address."""


@dataclass(frozen=True)
class Function:
    """One function on the PCI bus, as sysfs tells it. Ids are four hexadecimal digits, ``kind`` is the class in six."""

    address: str
    vendor: str
    device: str
    kind: str
    subvendor: str = ""
    subdevice: str = ""
    driver: str | None = None
    override: str = ""
    """``driver_override``; empty when there is none (the kernel prints ``(null)`` then)."""
    group: int | None = None
    boot_vga: bool = False
    """The adapter that the firmware showed its own screen on."""
    physical: str | None = None
    """Of a virtual function (SR-IOV): the address of the function that it is a part of."""
    virtual: tuple[str, ...] = ()
    """Of a physical function: its virtual ones that exist now."""
    reset: tuple[str, ...] = ()
    """Ways to reset it that the kernel would try, in its order (``flr``, ``pm``, ``bus``, ``device_specific``)."""

    @property
    def id(self) -> str:
        return f"{self.vendor}:{self.device}"

    @property
    def slot(self) -> str:
        """Domain, bus and device without the function: ``0000:03:00``."""
        return self.address.rsplit(".", 1)[0]

    @property
    def is_display(self) -> bool:
        return self.kind.startswith("03")

    @property
    def is_bridge(self) -> bool:
        """Bridges are never given away; a group with one is whole without it."""
        return self.kind.startswith("06")

    @property
    def sysfs(self) -> str:
        return f"{DEVICES}/{self.address}"

    def __str__(self) -> str:
        word = CLASSES.get(self.kind[:4], f"class {self.kind[:4]}")
        return f"{self.address} {word} [{self.id}] ({self.driver or 'no driver'})"


def normal(text: str) -> str:
    """A PCI address or slot in full and lower case: ``03:00.0`` is ``0000:03:00.0``. Raises AddressError."""
    match = _GIVEN.fullmatch(text.strip().lower())
    if not match:
        raise AddressError(f"{text!r} is no PCI address: write 0000:03:00.0, or 0000:03:00 for all its functions")
    domain, bus, device, function = match.groups()
    return f"{domain or '0000'}:{bus}:{device}" + (f".{function}" if function else "")


def functions(root: Root) -> dict[str, Function]:
    """All functions by address, in the order of their addresses."""
    return {name: _function(root, name) for name in root.listdir(DEVICES) if ADDRESS.fullmatch(name)}


def _function(root: Root, address: str) -> Function:
    at = f"{DEVICES}/{address}"

    def number(name: str) -> str:
        return (root.read_or_none(f"{at}/{name}") or "").strip().removeprefix("0x").lower()

    group = root.link_name(f"{at}/iommu_group")
    override = (root.read_or_none(f"{at}/driver_override") or "").strip()
    virtual = [root.link_name(f"{at}/{name}") for name in root.listdir(at) if re.fullmatch(r"virtfn\d+", name)]
    return Function(
        address,
        number("vendor"),
        number("device"),
        number("class"),
        number("subsystem_vendor"),
        number("subsystem_device"),
        root.link_name(f"{at}/driver"),
        "" if override == "(null)" else override,
        int(group) if group and group.isdecimal() else None,
        root.read_int(f"{at}/boot_vga") == 1,
        root.link_name(f"{at}/physfn"),
        tuple(sorted(name for name in virtual if name)),
        tuple((root.read_or_none(f"{at}/reset_method") or "").split()),
    )


def groups(found: Mapping[str, Function]) -> dict[int, tuple[Function, ...]]:
    """The members of each group, by number."""
    made: dict[int, list[Function]] = {}
    for function in found.values():
        if function.group is not None:
            made.setdefault(function.group, []).append(function)
    return {number: tuple(made[number]) for number in sorted(made)}


def members(found: Mapping[str, Function], of: Function) -> tuple[Function, ...]:
    """All of the group that a function is in; itself alone without an IOMMU."""
    if of.group is None:
        return (of,)
    return tuple(function for function in found.values() if function.group == of.group)


def listed(members: Iterable[Function]) -> str:
    """Functions one after the other, for a message."""
    return ", ".join(str(function) for function in members)


def behind(root: Root, path: str) -> tuple[str, ...]:
    """The PCI functions that a device of sysfs hangs on, outermost first: all of them count, bridges and VMD too.

    A drive of a subsystem with several controllers (NVMe multipath) is in no controller's folder; then those of all
    its controllers.
    """
    real = root.path(path).resolve()
    found = [part for part in real.parts if ADDRESS.fullmatch(part)]
    if not found and "nvme-subsystem" in real.parts:
        for controller in sorted(real.parent.glob("nvme*")):
            found += [part for part in controller.resolve().parts if ADDRESS.fullmatch(part)]
    return tuple(dict.fromkeys(found))


def models(root: Root, found: Iterable[Function]) -> dict[str, str]:
    """The cards' names by address, from the hwdata file; missing where that has none."""
    found = list(found)
    wanted = {(function.vendor, function.device) for function in found}
    names: dict[tuple[str, str], str] = {}
    for path in PCI_IDS:
        vendor = ""
        for line in (root.read_or_none(path) or "").splitlines():
            if not line or line[0] == "#" or line.startswith("\t\t"):
                continue
            if line[0] != "\t":
                vendor = line[:4]
            elif (vendor, line[1:5]) in wanted:
                names.setdefault((vendor, line[1:5]), line[5:].strip())
    return {f.address: names[f.vendor, f.device] for f in found if (f.vendor, f.device) in names}
