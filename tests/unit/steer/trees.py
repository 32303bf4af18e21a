# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trees of /proc/irq, sysfs and network devices in the kernel's shape, with what a test wants in them.

The shapes are those of an i7-8700K host (12 CPUs) with a multiqueue NIC, an NVMe drive and two virtual functions, seen on
Linux 6.12 and 6.18. Modes of ``smp_affinity_list`` are the kernel's: 0444 where it manages a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ONLINE = "0-11"
ZONES = {"host": (0, 6), "vcpu": (2, 3, 4, 5, 8, 9, 10, 11), "io": (1, 7)}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@dataclass
class Pci:
    """A PCI function; ``vectors``: number to action names."""

    address: str
    kind: str
    vectors: dict[int, str] = field(default_factory=dict)
    driver: str = ""
    net: str = ""
    nvme: str = ""
    physfn: str = ""
    line: int = 0
    locked: tuple[int, ...] = ()


NIC = Pci(
    "0000:03:00.0",
    "0x020000",
    {
        40: "virtio2-config",
        41: "virtio2-input.0",
        42: "virtio2-output.0",
        43: "virtio2-input.1",
        44: "virtio2-output.1",
    },
    driver="virtio-pci",
    net="eno1",
)
NVME = Pci(
    "0000:01:00.0",
    "0x010802",
    {30: "nvme0q0", **{30 + queue: f"nvme0q{queue}" for queue in (1, 2, 3)}},
    driver="nvme",
    nvme="nvme0",
    locked=(31, 32, 33),
)
SATA = Pci("0000:00:17.0", "0x010601", {25: "ahci[0000:00:17.0]"}, driver="ahci")


def machine(top: Path, *functions: Pci, online: str = ONLINE, modes: bool = True) -> Path:
    """``modes=False``: a kernel before 6.12, which shows every mask as writable."""
    write(top / "sys/devices/system/cpu/online", online)
    write(top / "proc/irq/default_smp_affinity", "fff")
    # the timer: no device, and bound to its CPU
    vector(top, 0, "timer", locked=True, modes=modes)
    vector(top, 9, "acpi")
    # allocated, but requested by nobody
    vector(top, 60, "")
    for function in functions:
        device = top / "sys/bus/pci/devices" / function.address
        write(device / "class", function.kind)
        write(device / "irq", str(function.line))
        if function.driver:
            (device / "driver").symlink_to(f"../../../bus/pci/drivers/{function.driver}")
        if function.physfn:
            (device / "physfn").symlink_to(f"../{function.physfn}")
        if function.net:
            (device / "virtio2/net" / function.net).mkdir(parents=True)
        if function.nvme:
            (device / "nvme" / function.nvme).mkdir(parents=True)
        for number, name in function.vectors.items():
            if not function.line:
                write(device / "msi_irqs" / str(number), "msix")
            vector(top, number, name, locked=number in function.locked, modes=modes)
    return top


def vector(top: Path, number: int, name: str, *, locked: bool = False, modes: bool = True, runs: str = "3") -> None:
    write(top / f"sys/kernel/irq/{number}/actions", name)
    write(top / f"sys/kernel/irq/{number}/chip_name", "PCI-MSIX")
    place = top / f"proc/irq/{number}"
    write(place / "smp_affinity_list", ONLINE)
    write(place / "effective_affinity_list", runs)
    write(place / "affinity_hint", "000")
    if locked and modes:
        (place / "smp_affinity_list").chmod(0o444)


def mask(top: Path, number: int) -> str:
    return (top / f"proc/irq/{number}/smp_affinity_list").read_text().strip()
