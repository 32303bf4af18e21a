# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The machine under the node: processors, memory, huge pages, bridges, and PCI devices with their IOMMU groups."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG_BYTES = 64


@dataclass(frozen=True)
class PciDevice:
    """One function. Numbers as sysfs writes them, without 0x. ``group`` None: no IOMMU."""

    address: str
    vendor: str
    device: str
    pci_class: str
    group: int | None
    subsystem: tuple[str, str] | None = None
    name: str = ""
    mdev: bool = False

    def listed(self) -> dict[str, Any]:
        """As ``/nodes/{node}/hardware/pci`` lists it."""
        found: dict[str, Any] = {
            "id": self.address,
            "class": f"0x{self.pci_class}",
            "vendor": f"0x{self.vendor}",
            "device": f"0x{self.device}",
            "iommugroup": -1 if self.group is None else self.group,
            "device_name": self.name,
        }
        if self.subsystem:
            found["subsystem_vendor"] = f"0x{self.subsystem[0]}"
            found["subsystem_device"] = f"0x{self.subsystem[1]}"
        if self.mdev:
            found["mdev"] = 1
        return found


def graphics_cards(count: int, first_group: int = 10) -> list[PciDevice]:
    """AMD RX 580 with their audio function, each card in a group of its own, on buses 01 upwards."""
    found = []
    for index in range(count):
        bus = f"0000:{index + 1:02x}:00"
        group = first_group + index
        ours = ("1da2", "e353")
        found.append(PciDevice(f"{bus}.0", "1002", "67df", "030000", group, ours, "Ellesmere [Radeon RX 580]"))
        found.append(PciDevice(f"{bus}.1", "1002", "aaf0", "040300", group, ("1da2", "aaf0"), "Ellesmere HDMI Audio"))
    return found


@dataclass
class Host:
    """``memory``: MiB. ``numa_nodes``: how many. ``hugepages``: sizes in MiB that the kernel supports, each with how
    many pages can still be had on node 0."""

    cpus: int = 12
    memory: int = 32768
    numa_nodes: int = 1
    hugepages: dict[int, int] = field(default_factory=lambda: {2: 16384, 1024: 24})
    bridges: tuple[str, ...] = ("vmbr0",)
    devices: dict[str, PciDevice] = field(default_factory=dict)
    stops_left: dict[str, int] = field(default_factory=dict)
    """Cards that do not come back from a reset, by slot: after how many stops of their VM."""

    @classmethod
    def standard(cls, gpus: int = 12) -> Host:
        """The reference machine: 12 threads, 32 GiB, twelve cards."""
        return cls(devices={card.address: card for card in graphics_cards(gpus)})

    def replace(self, devices: Iterable[PciDevice]) -> None:
        self.devices = {each.address: each for each in devices}

    def write_sysfs(self, top: Path) -> None:
        """The devices as ``/sys`` shows them, for what reads there: identity, class and IOMMU group."""
        shutil.rmtree(top / "bus/pci", ignore_errors=True)
        shutil.rmtree(top / "kernel/iommu_groups", ignore_errors=True)
        for each in self.devices.values():
            folder = top / "bus/pci/devices" / each.address
            folder.mkdir(parents=True)
            numbers = {"vendor": each.vendor, "device": each.device, "class": each.pci_class}
            if each.subsystem:
                numbers |= {"subsystem_vendor": each.subsystem[0], "subsystem_device": each.subsystem[1]}
            for name, number in numbers.items():
                (folder / name).write_text(f"0x{number}\n", encoding="ascii")
            (folder / "reset_method").write_text("bus\n", encoding="ascii")
            (folder / "current_link_width").write_text("16\n", encoding="ascii")
            identity = int(each.vendor, 16).to_bytes(2, "little") + int(each.device, 16).to_bytes(2, "little")
            (folder / "config").write_bytes(identity.ljust(CONFIG_BYTES, b"\0"))
            if each.group is not None:
                members = top / f"kernel/iommu_groups/{each.group}/devices"
                members.mkdir(parents=True, exist_ok=True)
                (members / each.address).symlink_to(f"../../../../bus/pci/devices/{each.address}")
                (folder / "iommu_group").symlink_to(f"../../../../kernel/iommu_groups/{each.group}")

    def bind(self, top: Path, addresses: Iterable[str]) -> None:
        """A VM gets them, and Proxmox VE binds them to vfio-pci, where they stay."""
        for address in addresses:
            link = top / "bus/pci/devices" / address / "driver"
            if not link.is_symlink():
                link.symlink_to("../../drivers/vfio-pci")

    def give_back(self, top: Path, addresses: Iterable[str]) -> None:
        """Their VM has ended, and the kernel resets them. One that does not come back reads as all ones."""
        for slot in sorted({address.partition(".")[0] for address in addresses} & set(self.stops_left)):
            self.stops_left[slot] -= 1
            if self.stops_left[slot] == 0:
                for folder in (top / "bus/pci/devices").glob(f"{slot}.*"):
                    (folder / "config").write_bytes(b"\xff" * CONFIG_BYTES)

    def functions(self, path: str) -> list[PciDevice]:
        """Of a path as ``hostpci`` names it: one function, or without one all that the device has."""
        full = path if re.match(r"[0-9a-f]{4,}:", path) and path.count(":") == 2 else f"0000:{path}"
        return [
            device
            for address, device in sorted(self.devices.items())
            if address == full or ("." not in full and address.startswith(f"{full}."))
        ]
