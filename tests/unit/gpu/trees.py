# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trees of sysfs and procfs in the shape in which the kernel has them, with the cards that a test wants.

Shape and numbers follow the reference rig (RX 580: 1002:67df, 8 GiB, no unique_id, power1_average), newer AMD cards
(unique_id, power1_input), and NVIDIA's /proc/driver/nvidia. Written by this file, not recorded: what is in a tree is
what the call says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PCI_IDS = """\
# excerpt of pci.ids
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t67df  Ellesmere [Radeon RX 470/480/570/570X/580/580X/590]
\t\t1043 0519  ROG STRIX RX 470
\t66af  Vega 20 [Radeon VII]
10de  NVIDIA Corporation
\t2335  GH100 [H200 SXM 141GB]
8086  Intel Corporation
\t3e92  CoffeeLake-S GT2 [UHD Graphics 630]
"""


@dataclass
class Card:
    """One PCI function; numbers as sysfs writes them."""

    address: str
    vendor: str = "0x1002"
    device: str = "0x67df"
    kind: str = "0x030000"
    driver: str | None = "amdgpu"
    minor: int | None = None
    """Of the render node; None: no DRM nodes."""
    vram_mb: int | None = 8192
    unique_id: str | None = None
    uuid: str | None = None
    """NVIDIA's, in /proc/driver/nvidia."""


def rx580(address: str, minor: int) -> Card:
    return Card(address, minor=minor)


def make_tree(top: Path, cards: list[Card]) -> Path:
    """The tree below ``top``."""
    write(top / "usr/share/misc/pci.ids", PCI_IDS)
    # a disk controller and an emulated VGA: neither is a GPU of ours
    plain(top, "0000:00:17.0", "0x8086", "0x010601")
    plain(top, "0000:00:01.0", "0x1234", "0x030000")
    for card in cards:
        make_card(top, card)
    return top


def plain(top: Path, address: str, vendor: str, kind: str) -> Path:
    device = top / "sys/bus/pci/devices" / address
    write(device / "vendor", vendor)
    write(device / "class", kind)
    write(device / "device", "0x1111")
    return device


def make_card(top: Path, card: Card) -> Path:
    device = plain(top, card.address, card.vendor, card.kind)
    write(device / "device", card.device)
    if card.driver:
        (device / "driver").symlink_to(f"../../../../bus/pci/drivers/{card.driver}")
    if card.minor is not None:
        (device / f"drm/card{card.minor - 128}").mkdir(parents=True)
        (device / f"drm/renderD{card.minor}").mkdir()
    if card.driver == "amdgpu":
        sensors(device, card)
    if card.uuid:
        text = f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 42\nGPU UUID: \t {card.uuid}\nDevice Minor: \t 0\n"
        write(top / f"proc/driver/nvidia/gpus/{card.address}/information", text)
    return device


def sensors(device: Path, card: Card) -> None:
    write(device / "gpu_busy_percent", "37")
    write(device / "mem_busy_percent", "12")
    if card.vram_mb is not None:
        write(device / "mem_info_vram_total", str(card.vram_mb * 1024 * 1024))
        write(device / "mem_info_vram_used", str(512 * 1024 * 1024))
    if card.unique_id:
        write(device / "unique_id", card.unique_id)
    hwmon = device / "hwmon/hwmon3"
    write(hwmon / "name", "amdgpu")
    write(hwmon / "temp1_input", "54000")
    write(hwmon / "fan1_input", "1180")
    write(hwmon / "power1_average", "87123000")


def kfd_node(top: Path, number: int, *, simd: int, minor: int = 0) -> None:
    """One node of KFD's topology; a CPU has no SIMD units."""
    text = f"cpu_cores_count 0\nsimd_count {simd}\nmem_banks_count 1\ndrm_render_minor {minor}\n"
    write(top / f"sys/class/kfd/kfd/topology/nodes/{number}/properties", text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
