# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Interrupts of a host: which device each vector belongs to, where it may run, where it runs, and whether that is ours.

A device's vectors are found through sysfs (``msi_irqs``, or ``irq`` for a legacy line), never by their names alone:
names of drivers differ (``mlx5_comp0@pci:...``), and ``eno1`` is the beginning of ``eno10``.

A vector that the kernel manages, or that is bound to a CPU, refuses every write (``irq_can_set_affinity_usr`` in
kernel/irq/manage.c). Newer kernels show that by the mode of ``smp_affinity_list`` (0444); where the mode says nothing,
debugfs may (``/sys/kernel/debug/irq``), and NVMe's I/O queues are known to be managed (pci_alloc_irq_vectors_affinity
in drivers/nvme/host/pci.c: every vector but the first).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from . import _cpu_list
from ._root import Root

PROC = "/proc/irq"
DEFAULT_MASK = "/proc/irq/default_smp_affinity"
DEBUG = "/sys/kernel/debug/irq/irqs"
PCI = "/sys/bus/pci/devices"
KINDS = ("nic", "nvme", "passthrough", "other")

_NVME_IO_QUEUE = re.compile(r"nvme\d+q[1-9]\d*")
_LOCKED_FLAGS = ("IRQD_AFFINITY_MANAGED", "IRQD_PER_CPU", "IRQD_NO_BALANCING")


@dataclass(frozen=True)
class Device:
    """A PCI function. ``names``: its network interfaces or NVMe controllers; ``physfn``: the parent of a VF."""

    address: str
    kind: str
    driver: str = ""
    names: tuple[str, ...] = ()
    physfn: str = ""


@dataclass(frozen=True)
class Vector:
    """One interrupt that a driver has requested.

    ``index``: position among the device's vectors, or, without a device, among those of its name: numbers change at
    every boot, positions do not. ``locked``: True when the kernel refuses to move it, None when only a write will tell.
    ``effective`` is None where it is not told.
    """

    irq: int
    actions: tuple[str, ...]
    affinity: tuple[int, ...]
    effective: tuple[int, ...] | None = None
    hint: tuple[int, ...] = ()
    chip: str = ""
    device: Device | None = None
    index: int = 0
    locked: bool | None = None

    @property
    def name(self) -> str:
        return ",".join(self.actions)

    @property
    def key(self) -> str:
        """The vector's name in the record of earlier state: it survives a reboot, its number does not."""
        return f"irq:{self.device.address if self.device else '-'}/{self.index}/{self.name}"

    @property
    def owner(self) -> str:
        """The device as people call it."""
        if self.device is None:
            return ""
        return self.device.names[0] if self.device.names else self.device.address


@dataclass(frozen=True)
class Interrupts:
    """All that was found. ``default``: where the kernel puts new vectors; None when it does not say."""

    vectors: tuple[Vector, ...]
    devices: tuple[Device, ...]
    default: tuple[int, ...] | None
    online: tuple[int, ...]


def observe(root: Root) -> Interrupts:
    """The interrupts of now. A vector that vanishes meanwhile is left out. Raises CpuListError."""
    devices = _devices(root)
    owners = _owners(root, devices)
    names = parse_interrupts(root.read_or_none("/proc/interrupts") or "")
    vectors = []
    for entry in root.listdir(PROC):
        if entry.isdigit():
            vector = _vector(root, int(entry), owners.get(int(entry)), names.get(int(entry), ()))
            if vector is not None:
                vectors.append(vector)
    vectors = _numbered(sorted(vectors, key=lambda vector: vector.irq))
    default = root.read_or_none(DEFAULT_MASK)
    return Interrupts(
        tuple(vectors),
        tuple(devices),
        _cpu_list.from_mask(default) if default else None,
        _cpu_list.parse(root.read_or_none("/sys/devices/system/cpu/online") or ""),
    )


def _numbered(vectors: list[Vector]) -> list[Vector]:
    """Vectors without a PCI device get a position among those of the same name (ACPI brings several)."""
    seen: Counter[str] = Counter()
    result = []
    for vector in vectors:
        if vector.device is None:
            result.append(replace(vector, index=seen[vector.name]))
            seen[vector.name] += 1
        else:
            result.append(vector)
    return result


def parse_interrupts(text: str) -> dict[int, tuple[str, ...]]:
    """Action names by number, from ``/proc/interrupts``; the lines that have no number are per CPU and left out."""
    lines = text.splitlines()
    cpus = len(lines[0].split()) if lines else 0
    found = {}
    for line in lines[1:]:
        label, _colon, rest = line.partition(":")
        if not label.strip().isdigit():
            continue
        words = rest.split(None, cpus)
        described = words[cpus] if len(words) > cpus else ""
        # "PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0": chip, hardware number and trigger, then the actions
        columns = re.split(r"\s{2,}", described.strip())
        if len(columns) >= 2 and (len(columns) >= 3 or " " in columns[0]):
            found[int(label)] = tuple(name.strip() for name in columns[-1].split(",") if name.strip())
    return found


def _devices(root: Root) -> list[Device]:
    devices = []
    for address in root.listdir(PCI):
        path = f"{PCI}/{address}"
        code = root.read_int(f"{path}/class") or 0
        driver = root.link_name(f"{path}/driver") or ""
        if driver.startswith("vfio"):
            kind = "passthrough"
        elif code >> 16 == 0x02:  # network controllers (PCI Code and ID Assignment Specification, 1.3)
            kind = "nic"
        elif code >> 8 == 0x0108:  # non-volatile memory controllers
            kind = "nvme"
        else:
            kind = "other"
        names = [*root.listdir(f"{path}/net"), *root.listdir(f"{path}/nvme")]
        names += [found.rsplit("/", 1)[1] for found in root.glob(f"{path}/virtio*/net/*")]
        devices.append(Device(address, kind, driver, tuple(names), root.link_name(f"{path}/physfn") or ""))
    return devices


def _owners(root: Root, devices: list[Device]) -> dict[int, tuple[Device, int]]:
    """Device and index by number. A legacy line may be shared: then a NIC or a disk decides where it goes."""
    owners: dict[int, tuple[Device, int]] = {}
    for device in sorted(devices, key=lambda device: (KINDS.index(device.kind), device.address)):
        messages = sorted(int(name) for name in root.listdir(f"{PCI}/{device.address}/msi_irqs") if name.isdigit())
        line = root.read_int(f"{PCI}/{device.address}/irq") or 0
        for index, number in enumerate(messages or ([line] if line else [])):
            owners.setdefault(number, (device, index))
    return owners


def _vector(root: Root, number: int, owner: tuple[Device, int] | None, named: tuple[str, ...]) -> Vector | None:
    """None for a number that no driver has requested: it never fires, and gets the default mask when requested."""
    path = f"{PROC}/{number}"
    actions = root.read_or_none(f"/sys/kernel/irq/{number}/actions")
    names = tuple(name for name in actions.split(",") if name) if actions is not None else named
    affinity = root.read_or_none(f"{path}/smp_affinity_list")
    if not names or affinity is None:
        return None
    effective = root.read_or_none(f"{path}/effective_affinity_list")
    hint = root.read_or_none(f"{path}/affinity_hint")
    device, index = owner or (None, 0)
    return Vector(
        irq=number,
        actions=names,
        affinity=_cpu_list.parse(affinity),
        effective=None if effective is None else _cpu_list.parse(effective),
        hint=_cpu_list.from_mask(hint) if hint else (),
        chip=root.read_or_none(f"/sys/kernel/irq/{number}/chip_name") or "",
        device=device,
        index=index,
        locked=_locked(root, number, device, names),
    )


def _locked(root: Root, number: int, device: Device | None, actions: tuple[str, ...]) -> bool | None:
    try:
        mode = root.path(f"{PROC}/{number}/smp_affinity_list").stat().st_mode
    except OSError:
        return None
    if not mode & 0o222:
        return True
    flags = root.read_or_none(f"{DEBUG}/{number}")
    if flags is not None:
        return any(flag in flags for flag in _LOCKED_FLAGS)
    if device is None and actions == ("timer",):
        return True  # arch/x86/kernel/time.c: IRQF_NOBALANCING
    if device is not None and device.kind == "nvme" and any(_NVME_IO_QUEUE.fullmatch(name) for name in actions):
        return True
    return None
