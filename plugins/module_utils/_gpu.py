# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which GPUs this machine has, from sysfs: by PCI address, never by the order in which they were found (S1i-D09).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._root import Root

PCI_DEVICES = "/sys/bus/pci/devices"
PCI_IDS = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids")
DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380")
"""VGA controller, 3D controller, other display controller (PCI Code and ID Assignment, class 03)."""
VENDORS = {"0x1002": "amd", "0x10de": "nvidia", "0x8086": "intel"}
BACKENDS = {"amd": "amdgpu", "nvidia": "nvml", "intel": "intel"}
DRIVERS = {"amd": ("amdgpu",), "nvidia": ("nvidia",), "intel": ("i915", "xe")}
"""Kernel drivers behind which a worker can use a card; ``vfio-pci`` means that a virtual machine has it."""
ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
MIB = 1024 * 1024


@dataclass(frozen=True)
class Gpu:
    """One physical card (or one NVIDIA MIG instance of it)."""

    address: str
    """PCI address in full, lower case: ``0000:03:00.0``."""
    vendor: str
    driver: str | None
    model: str
    uuid: str | None = None
    """What the maker calls unique: amdgpu's ``unique_id`` (Vega and later), NVIDIA's ``GPU-...`` or ``MIG-...``."""
    card: str | None = None
    """DRM primary node, ``card0``."""
    render: str | None = None
    """DRM render node, ``renderD128``: what a job opens."""
    vram_mb: int = 0
    """0: not told."""

    @property
    def backend(self) -> str:
        return BACKENDS[self.vendor]

    @property
    def sysfs(self) -> str:
        return f"{PCI_DEVICES}/{self.address}"

    @property
    def unusable(self) -> str:
        """Why no worker can serve this card now; empty when one can."""
        if self.driver == "vfio-pci":
            return "it is reserved for a virtual machine (driver vfio-pci)"
        if self.driver is None:
            return f"no driver is bound to it ({' or '.join(DRIVERS[self.vendor])} is needed)"
        if self.driver not in DRIVERS[self.vendor]:
            return f"driver {self.driver} cannot compute ({' or '.join(DRIVERS[self.vendor])} is needed)"
        return ""


def discover(root: Root) -> list[Gpu]:
    """All cards of the known makers, by PCI address. Emulated VGA and management controllers are of other makers."""
    found = []
    for address in root.listdir(PCI_DEVICES):
        device = f"{PCI_DEVICES}/{address}"
        kind = root.read_or_none(f"{device}/class") or ""
        vendor_id = (root.read_or_none(f"{device}/vendor") or "").strip()
        if kind.strip()[:6] not in DISPLAY_CLASSES or vendor_id not in VENDORS:
            continue
        found.append(_gpu(root, address.lower(), device, vendor_id))
    return found


def _gpu(root: Root, address: str, device: str, vendor_id: str) -> Gpu:
    vendor = VENDORS[vendor_id]
    nodes = root.listdir(f"{device}/drm")
    vram = root.read_int(f"{device}/mem_info_vram_total")
    device_id = (root.read_or_none(f"{device}/device") or "").strip()
    model = model_name(root, vendor_id, device_id)
    uuid = (root.read_or_none(f"{device}/unique_id") or "").strip() or None
    if vendor == "nvidia":
        told = nvidia_information(root, address)
        model, uuid = told.get("Model", model), told.get("GPU UUID", uuid)
    return Gpu(
        address=address,
        vendor=vendor,
        driver=root.link_name(f"{device}/driver"),
        model=model,
        uuid=uuid,
        card=next((name for name in nodes if re.fullmatch(r"card\d+", name)), None),
        render=next((name for name in nodes if re.fullmatch(r"renderD\d+", name)), None),
        vram_mb=vram // MIB if vram else 0,
    )


def nvidia_information(root: Root, address: str) -> dict[str, str]:
    """What NVIDIA's driver tells in /proc about a card: ``Model``, ``GPU UUID``, ``Device Minor``; empty without it."""
    text = root.read_or_none(f"/proc/driver/nvidia/gpus/{address}/information") or ""
    pairs = (line.partition(":") for line in text.splitlines())
    told = {name.strip(): value.strip() for name, _sign, value in pairs}
    if "?" in told.get("GPU UUID", ""):  # the driver has not initialised the card yet
        del told["GPU UUID"]
    return told


def model_name(root: Root, vendor_id: str, device_id: str) -> str:
    """The card's name from the hwdata file, or its numbers where there is none."""
    vendor, device = vendor_id.removeprefix("0x"), device_id.removeprefix("0x")
    for path in PCI_IDS:
        text = root.read_or_none(path)
        if text is not None:
            name = _look_up(text, vendor, device)
            if name:
                return name
    return f"{vendor}:{device}"


def _look_up(text: str, vendor: str, device: str) -> str | None:
    inside = False
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if not line.startswith("\t"):
            inside = line.startswith(vendor + " ")
        elif inside and not line.startswith("\t\t") and line[1:].startswith(device + " "):
            return line.strip().partition(" ")[2].strip()
    return None


def visible_index(root: Root, gpu: Gpu) -> int | None:
    """The position at which AMD's runtime counts this card when it can see all of them.

    ROCr enumerates the KFD topology's GPU nodes in their order (``simd_count`` is 0 for a CPU node) and each names the
    render node that belongs to it. None when the kernel has no KFD or does not know the card.
    """
    if gpu.render is None:
        return None
    position = 0
    nodes = [node for node in root.listdir("/sys/class/kfd/kfd/topology/nodes") if node.isdecimal()]
    for node in sorted(nodes, key=int):
        text = root.read_or_none(f"/sys/class/kfd/kfd/topology/nodes/{node}/properties") or ""
        pairs = dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
        if pairs.get("simd_count", "0").strip() == "0":
            continue
        if f"renderD{pairs.get('drm_render_minor', '').strip()}" == gpu.render:
            return position
        position += 1
    return None


MIG_LINE = re.compile(r"^\s+MIG (?P<profile>\S+)\s+Device\s+(?P<number>\d+): \(UUID: (?P<uuid>MIG-[^)\s]+)\)")
GPU_LINE = re.compile(r"^GPU \d+: (?P<model>.*?) \(UUID: (?P<uuid>GPU-[^)\s]+)\)")


def mig_instances(listing: str, gpus: list[Gpu]) -> list[Gpu]:
    """The devices behind ``nvidia-smi -L``: a card that is split into MIG instances gives way to them.

    ``listing`` is the command's output (empty where it is not installed).
    """
    instances: dict[str, list[Gpu]] = {}
    by_uuid = {gpu.uuid: gpu for gpu in gpus if gpu.vendor == "nvidia"}
    parent: Gpu | None = None
    for line in listing.splitlines():
        whole = GPU_LINE.match(line)
        if whole:
            parent = by_uuid.get(whole["uuid"])
            continue
        part = MIG_LINE.match(line)
        if part and parent is not None:
            instance = Gpu(
                address=parent.address,
                vendor="nvidia",
                driver=parent.driver,
                model=f"{parent.model} MIG {part['profile']}",
                uuid=part["uuid"],
                vram_mb=_mig_vram(part["profile"]),
            )
            instances.setdefault(parent.address, []).append(instance)
    result: list[Gpu] = []
    for gpu in gpus:
        result += instances.get(gpu.address, [gpu]) if gpu.vendor == "nvidia" else [gpu]
    return result


def _mig_vram(profile: str) -> int:
    """Profiles say their memory: ``1g.10gb`` has 10 GB."""
    size = re.search(r"\.(\d+)gb", profile)
    return int(size[1]) * 1024 if size else 0
