# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the rig's machine is made of, as facts: processors, functions on the PCI bus, network ports, disks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .errors import UsageError

MANAGEMENT_MAC = "52:54:00:0a:00:01"
PORT_MAC = "52:54:00:0a:00:04"
SHARED_MAC = "52:54:00:0a:00:0d"
INTEL_MAC = "52:54:00:0a:00:0e"
PORT_QUEUES = 4
CPUS = 12
# An i7-8700K: six cores of two threads, one last-level cache. QEMU numbers siblings next to each other (0-1, 2-3, ...);
# a real one has 0,6 1,7 and so on. Without cmpxchg16b: QEMU 7.2 emulates it with stray flags when several processors
# share a thread, and kernels die of that at random.
CPU = "Skylake-Client,-cx16,model=158,stepping=10,model-id=Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz"
SMP = "12,sockets=1,cores=6,threads=2"
GPU_SLOTS = 12
NVME_PORT, NIC_PORT, SHARED_PORT, INTEL_PORT = (f"rp{number}" for number in range(GPU_SLOTS, GPU_SLOTS + 4))
ROOT_PORTS = GPU_SLOTS + 4
LOADERS = ("grub", "grub-efi")
"""GRUB under SeaBIOS, GRUB under OVMF (the guest has /sys/firmware/efi then)."""
GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Disk:
    """A data disk: a fresh sparse file of ``size`` bytes in the rig's folder, or the file that ``path`` names (kept).

    ``kind`` is nvme or scsi; ``rotational`` is what the kernel is told of a scsi disk. The guest sees ``name`` as the
    serial number: /dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_NAME or /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_NAME.
    """

    name: str
    size: int = 4 * GIB
    kind: str = "scsi"
    rotational: bool = False
    path: Path | None = None


DISKS = (
    Disk("fast", kind="nvme"),
    Disk("scratch"),
    Disk("archive", rotational=True),
)


@dataclass(frozen=True)
class Machine:
    """What one rig shall be. ``cold``: boot through the boot loader instead of starting from the snapshot."""

    gpus: int = GPU_SLOTS
    memory: int = 3072
    flavour: str = "cloud-amd64"
    cold: bool = False
    shared_group: bool = False
    """A thirteenth GPU behind one PCIe switch with a network card: one IOMMU group (cold boots only)."""
    loader: str = "grub"
    append: str | None = None
    """Boot the image's kernel directly with this command line (root= is put before it) instead of the boot loader."""
    disks: tuple[Disk, ...] = field(default=DISKS)

    def __post_init__(self) -> None:
        if self.loader not in LOADERS:
            raise UsageError(f"there is no loader {self.loader!r}", f"loaders are {', '.join(LOADERS)}")
        if not 0 <= self.gpus <= GPU_SLOTS:
            raise UsageError(f"{self.gpus} GPUs: the machine has {GPU_SLOTS} slots", "ask for 0 to 12")
        if not 1024 <= self.memory <= 65536:
            raise UsageError(f"{self.memory} MiB of memory", "ask for 1024 to 65536")
        if len([disk for disk in self.disks if disk.kind == "nvme"]) > 1:
            raise UsageError("there is one slot for an NVMe disk", "make the others scsi")
        for disk in self.disks:
            if disk.kind not in ("nvme", "scsi"):
                raise UsageError(f"disk {disk.name} is of kind {disk.kind!r}", "kinds are nvme and scsi")
        if not self.cold and (self.shared_group or self.append is not None or self.loader != "grub"):
            raise UsageError("a shared group, another loader and a command line need a boot", "ask for a cold boot")


@dataclass(frozen=True)
class Function:
    """One emulated PCI function: what it says of itself in its configuration space. ``bars``: number and bytes."""

    id: str
    bus: str
    addr: str
    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subvendor: int = 0
    subdevice: int = 0
    bars: tuple[tuple[int, int], ...] = ()
    io_bars: tuple[tuple[int, int], ...] = ()
    multifunction: bool = False


def gpu(number: int, bus: str) -> tuple[Function, Function]:
    """A Radeon RX 580 (Sapphire) and its HDMI audio; ids from pci.ids. BAR 0 is small: windows have 32 bits."""
    video = Function(
        f"gpu{number}", bus, "0.0", 0x1002, 0x67DF, 0x030000, revision=0xE7, subvendor=0x1DA2, subdevice=0xE366,
        bars=((0, 16 * MIB), (2, 2 * MIB), (5, 1 * MIB)), io_bars=((4, 256),), multifunction=True,
    )  # fmt: skip
    audio = Function(
        f"audio{number}", bus, "0.1", 0x1002, 0xAAF0, 0x040300, subvendor=0x1DA2, subdevice=0xAAF0, bars=((0, 16384),)
    )
    return video, audio


def functions(machine: Machine) -> list[Function]:
    """All emulated functions, function 1 of a slot before function 0: hot-plugging the latter completes the slot."""
    found: list[Function] = []
    for number in range(machine.gpus):
        found += reversed(gpu(number, f"rp{number}"))
    if machine.shared_group:
        found += reversed(gpu(GPU_SLOTS, "switch0"))
    return found


Properties = dict[str, str | int | bool]


def root_ports() -> list[Properties]:
    """Sixteen PCIe root ports: twelve for GPUs, then NVMe, the network port, the shared group, an Intel card.

    Their windows are reserved ahead (mem-reserve, io-reserve), so that functions can be plugged in later.
    """
    ports: list[Properties] = []
    for number in range(ROOT_PORTS):
        slot, function = 4 + number // 8, number % 8
        port: Properties = {
            "driver": "pcie-root-port",
            "id": f"rp{number}",
            "bus": "pcie.0",
            "addr": f"{slot:x}.{function:x}",
        }
        port |= {"chassis": number + 1, "slot": number + 1, "mem-reserve": "32M"}
        if number < GPU_SLOTS:
            port["io-reserve"] = 4096  # there are 64 KiB of I/O addresses: not enough for sixteen
        if function == 0:
            port["multifunction"] = True
        ports.append(port)
    return ports


def port_device() -> Properties:
    """The physical-looking network port: a virtio card with four queue pairs (and two vectors more)."""
    return {
        "driver": "virtio-net-pci", "id": "port0", "netdev": "port0", "mac": PORT_MAC, "bus": NIC_PORT,
        "mq": True, "vectors": 2 * PORT_QUEUES + 2, "romfile": "",
    }  # fmt: skip


def disk_device(disk: Disk) -> Properties:
    if disk.kind == "nvme":
        # one queue pair for each processor, and a vector more for the admin queue
        return {
            "driver": "nvme", "id": disk.name, "drive": f"file-{disk.name}", "serial": disk.name, "bus": NVME_PORT,
            "max_ioqpairs": CPUS, "msix_qsize": CPUS + 1,
        }  # fmt: skip
    return {
        "driver": "scsi-hd", "id": disk.name, "drive": f"file-{disk.name}", "serial": disk.name, "bus": "scsi0.0",
        "device_id": disk.name,
        "rotation_rate": 7200 if disk.rotational else 1,
    }  # fmt: skip


def shared_devices() -> list[Properties]:
    """A PCIe switch without access control: what is behind its two ports is one IOMMU group.

    The ports are functions of one device, or Linux gives each a group of its own (drivers/iommu/iommu.c).
    """
    port: Properties = {"driver": "xio3130-downstream", "bus": "switch"}
    card: Properties = {"driver": "virtio-net-pci", "id": "shared", "netdev": "shared", "mac": SHARED_MAC}
    return [
        {"driver": "x3130-upstream", "id": "switch", "bus": SHARED_PORT},
        port | {"id": "switch0", "chassis": 40, "slot": 40, "addr": "0.0", "multifunction": True},
        port | {"id": "switch1", "chassis": 41, "slot": 41, "addr": "0.1"},
        card | {"bus": "switch1", "romfile": ""},
    ]


def text(device: Properties) -> str:
    """``device`` as -device wants it."""
    words = [str(device["driver"])]
    for key, value in device.items():
        if key != "driver":
            words.append(f"{key}={'on' if value is True else 'off' if value is False else value}")
    return ",".join(words)
