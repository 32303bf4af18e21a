# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trees of /proc/irq, sysfs and network devices in the kernel's shape, with what a test wants in them.

The shapes are those of an i7-8700K host (12 CPUs) with a multiqueue NIC, an NVMe drive and two virtual functions, seen
on Linux 6.12 and 6.18. Modes of ``smp_affinity_list`` are the kernel's: 0444 where it manages a vector.
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


def port(top: Path, name: str, *, rx: int = 1, tx: int = 1, address: str = "0000:03:00.0") -> None:
    """A physical port; a single transmit queue has no xps_cpus, as the kernel has it."""
    device = top / f"sys/devices/pci0000:00/{address}/virtio2"
    device.mkdir(parents=True, exist_ok=True)
    interface(top, name)
    (top / f"sys/class/net/{name}/device").symlink_to(f"../../../devices/pci0000:00/{address}/virtio2")
    if not (device / "driver").is_symlink():
        (device / "driver").symlink_to("../../../../bus/virtio/drivers/virtio_net")
    queues(top, name, rx, tx)


def queues(top: Path, name: str, rx: int, tx: int) -> None:
    """As many queues as said: those that are there keep their values, others come with the kernel's defaults."""
    place = top / f"sys/class/net/{name}/queues"
    for number in range(64):
        for kind, count in (("rx", rx), ("tx", tx)):
            queue = place / f"{kind}-{number}"
            if number >= count and queue.exists():
                for file in queue.iterdir():
                    file.unlink()
                queue.rmdir()
            elif number < count and not queue.exists():
                queue.mkdir(parents=True)
                if kind == "rx":
                    write(queue / "rps_cpus", "000")
                    write(queue / "rps_flow_cnt", "0")
            if number < count and kind == "tx" and tx > 1 and not (queue / "xps_cpus").exists():
                write(queue / "xps_cpus", "000")


def interface(top: Path, name: str, *lowers: str) -> None:
    """A virtual interface that is built on others."""
    place = top / "sys/class/net" / name
    write(place / "ifindex", "7")
    for lower in lowers:
        (place / f"lower_{lower}").symlink_to(f"../{lower}")


def default_route(top: Path, *interfaces: tuple[str, int]) -> None:
    """IPv4 default routes with their metrics."""
    lines = ["Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"]
    lines += [f"{name}\t00000000\t0100000A\t0003\t0\t0\t{metric}\t00000000\t0\t0\t0" for name, metric in interfaces]
    lines.append("vmbr9\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0")
    write(top / "proc/net/route", "\n".join(lines))
