# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's command line for a rig: pure, from what the machine shall be and where its files lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .hardware import (
    CPU,
    INTEL_MAC,
    INTEL_PORT,
    MANAGEMENT_MAC,
    SMP,
    Disk,
    Function,
    Machine,
    Properties,
    disk_device,
    functions,
    port_device,
    root_ports,
    shared_devices,
    text,
)

SNAPSHOT = "ready"


@dataclass(frozen=True)
class Direct:
    """A kernel started by QEMU itself."""

    kernel: Path
    initrd: Path
    command_line: str


@dataclass(frozen=True)
class Firmware:
    """EFI firmware: its code, and the rig's own copy of its variables."""

    code: Path
    variables: Path


def base(machine: Machine, system: Path, table: Path, port: int, accel: str) -> list[str]:
    """What each start has, also the one that makes the snapshot: the snapshot holds exactly these devices' state.

    Sockets, logs and the pid file are relative: QEMU runs in the rig's folder, whose path may be too long for a socket.
    """
    chip = ",kernel-irqchip=split" if accel == "kvm" else ""  # interrupt remapping needs it
    words = ["-name", "rig,debug-threads=on", "-machine", f"q35,memory-backend=memory{chip}", "-accel", accel]
    words += ["-object", f"memory-backend-memfd,id=memory,size={machine.memory}M,share=on", "-m", f"{machine.memory}M"]
    words += ["-cpu", CPU, "-smp", SMP, "-nodefaults", "-display", "none", "-no-user-config", "-rtc", "base=utc"]
    words += ["-device", "intel-iommu,intremap=on,caching-mode=on", "-no-reboot", "-pidfile", "qemu.pid"]
    # flushes are honoured: cutting the power must lose what a disk would lose, and nothing that it has confirmed
    words += ["-drive", f"if=none,id=system,file={system},format=qcow2,cache=writeback,discard=unmap"]
    words += ["-device", "virtio-blk-pci,drive=system,bus=pcie.0,addr=2,bootindex=1"]
    words += ["-netdev", f"user,id=management,hostfwd=tcp:127.0.0.1:{port}-:22"]
    words += ["-device", f"virtio-net-pci,netdev=management,mac={MANAGEMENT_MAC},bus=pcie.0,addr=3,romfile="]
    words += ["-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=6", "-device", "virtio-rng-pci,bus=pcie.0,addr=7"]
    for device in root_ports():
        words += ["-device", text(device)]
    words += ["-acpitable", f"file={table}"]
    words += ["-chardev", "file,id=serial,path=serial.log,append=on", "-serial", "chardev:serial", "-serial", "null"]
    for name in ("qmp.sock", "keeper.sock"):
        words += ["-qmp", f"unix:{name},server=on,wait=off"]
    return words


def block_node(disk: Disk, path: Path) -> dict[str, object]:
    """A data disk's back end, for blockdev-add."""
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return {"node-name": f"file-{disk.name}", "driver": "raw", "discard": "unmap", "file": file}


def plugged(machine: Machine) -> list[Properties]:
    """The network cards that a snapshot start plugs in, and a boot finds."""
    cards = [port_device()]
    if machine.flavour == "amd64":  # the cloud kernel has no driver for it
        cards.append(
            {"driver": "e1000e", "id": "intel", "netdev": "intel", "mac": INTEL_MAC, "bus": INTEL_PORT, "romfile": ""}
        )
    return cards


def proxy(function: Function, fd: str) -> Properties:
    device: Properties = {
        "driver": "x-pci-proxy-dev",
        "id": function.id,
        "fd": fd,
        "bus": function.bus,
        "addr": function.addr,
    }
    if function.multifunction:
        device["multifunction"] = True
    return device


def cold(machine: Machine, disks: Mapping[str, Path], queues: Sequence[int], sockets: Mapping[str, int]) -> list[str]:
    """The devices that a boot finds. ``queues``: the port's tap descriptors; ``sockets``: by function."""
    words: list[str] = []
    if machine.shared_group:
        words += ["-netdev", "user,id=shared,restrict=on"]
        for device in shared_devices():
            words += ["-device", text(device)]
    for function in functions(machine):
        words += ["-device", text(proxy(function, str(sockets[function.id])))]
    words += ["-netdev", f"tap,id=port0,fds={':'.join(map(str, queues))},vhost=off"]
    if machine.flavour == "amd64":
        words += ["-netdev", "user,id=intel,restrict=on"]
    for device in plugged(machine):
        words += ["-device", text(device)]
    for disk in machine.disks:
        name = f"file-{disk.name}"
        words += ["-drive", f"if=none,id={name},file={disks[disk.name]},format=raw,cache=writeback,discard=unmap"]
        words += ["-device", text(disk_device(disk))]
    return words


def start(direct: Direct | None, firmware: Firmware | None) -> list[str]:
    """How it comes up: through the boot loader on the disk (BIOS, or EFI with ``firmware``), or a kernel directly."""
    words: list[str] = []
    if firmware is not None:
        words += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={firmware.code}"]
        words += ["-drive", f"if=pflash,unit=1,format=raw,file={firmware.variables}"]
    if direct is not None:
        words += ["-kernel", str(direct.kernel), "-initrd", str(direct.initrd), "-append", direct.command_line]
    return words
