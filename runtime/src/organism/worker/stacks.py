# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the compute stacks' own tools say of the devices that they see: texts in, devices out.

A stack that is installed need not reach a card, and one that reached it may drop it with an update (ROCm did with
gfx803), so nothing is concluded from packages or models (S1h-028, S1h-D17).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from organism.core._gpu import VENDORS

CPU_NAMES = re.compile(r"llvmpipe|lavapipe|softpipe|swiftshader|\bpocl\b|pthread-", re.IGNORECASE)
ADDRESS = re.compile(r"\b(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])\b", re.IGNORECASE)
MESA_UUID = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{12})")
DROPPED = "gfx803"


@dataclass(frozen=True)
class Device:
    """One device of one stack, as its tool tells it."""

    stack: str
    name: str
    driver: str = ""
    """The implementation behind it: ``rusticl``, ``radv``, ``CUDA 12.4``."""
    address: str = ""
    """``0000:03:00.0``, ``03:00.0`` where the tool keeps the domain to itself, empty where it tells nothing."""
    vendor: str = ""
    """``amd``, ``nvidia``, ``intel``; empty: another one, or not told."""
    cpu: bool = False
    broken: str = ""
    """Why it cannot be used though it is listed."""
    note: str = ""


def parse_clinfo(text: str) -> list[Device]:
    """``clinfo --raw``. A device begins with its name, as platforms may share the suffix in the brackets (``MESA``)."""
    found: list[dict[str, str]] = []
    platform = ""
    for line in text.splitlines():
        words = line.partition("]")[2].split(None, 1) if line.startswith("[") else []
        if len(words) < 2:
            continue
        key, value = words[0], words[1].strip()
        if key == "CL_PLATFORM_NAME":
            platform = value
        elif key == "CL_DEVICE_NAME":
            found.append({"platform": platform, key: value})
        elif found and key.startswith(("CL_DEVICE_", "CL_DRIVER_")):
            found[-1].setdefault(key, value)
    return [_opencl(values) for values in found]


def _opencl(values: dict[str, str]) -> Device:
    vendor = _vendor(values.get("CL_DEVICE_VENDOR_ID", ""))
    kind = values.get("CL_DEVICE_TYPE", "")
    name = values.get("CL_DEVICE_BOARD_NAME_AMD") or values["CL_DEVICE_NAME"]
    broken = ""
    if values.get("CL_DEVICE_AVAILABLE") == "CL_FALSE":
        broken = "it says that it is not available"
    elif values.get("CL_DEVICE_COMPILER_AVAILABLE") == "CL_FALSE":
        broken = "it has no compiler for kernels"
    return Device(
        "opencl",
        name,
        values["platform"],
        _opencl_address(values, vendor),
        vendor,
        cpu="CL_DEVICE_TYPE_CPU" in kind or bool(CPU_NAMES.search(name)),
        broken=broken,
    )


def _opencl_address(values: dict[str, str], vendor: str) -> str:
    """By cl_khr_pci_bus_info, by AMD's or NVIDIA's own attribute, or by the UUID that Mesa makes of the address."""
    for key in ("CL_DEVICE_PCI_BUS_INFO_KHR", "CL_DEVICE_TOPOLOGY_AMD"):
        if told := _address(values.get(key, "")):
            return told
    bus, slot = values.get("CL_DEVICE_PCI_BUS_ID_NV", ""), values.get("CL_DEVICE_PCI_SLOT_ID_NV", "")
    if bus.isdecimal() and slot.isdecimal():
        domain = values.get("CL_DEVICE_PCI_DOMAIN_ID_NV", "")
        place = f"{int(bus):02x}:{int(slot) >> 3:02x}.{int(slot) & 7}"
        return f"{int(domain):04x}:{place}" if domain.isdecimal() else place
    return _mesa_address(values.get("CL_DEVICE_UUID_KHR", "")) if vendor == "amd" else ""


def parse_vulkaninfo(text: str) -> list[Device]:
    """``vulkaninfo``'s text; ``--summary`` is understood, too, but tells the address only where the UUID has it."""
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"GPU\d+:\s*", line):
            found.append({})
        pair = re.match(r"\s+(\w+)\s+= (.*)", line)
        if found and pair:
            found[-1].setdefault(pair[1], pair[2].strip())
    return [_vulkan(values) for values in found if "deviceName" in values]


def _vulkan(values: dict[str, str]) -> Device:
    vendor = _vendor(values.get("vendorID", ""))
    place = [values.get(f"pci{part}", "") for part in ("Domain", "Bus", "Device", "Function")]
    if all(part.isdecimal() for part in place):
        domain, bus, device, function = map(int, place)
        address = f"{domain:04x}:{bus:02x}:{device:02x}.{function:x}"
    else:
        address = _mesa_address(values.get("deviceUUID", "")) if vendor == "amd" else ""
    driver = " ".join(part for part in (values.get("driverName", ""), values.get("driverInfo", "")) if part)
    cpu = values.get("deviceType", "").endswith("_TYPE_CPU") or bool(CPU_NAMES.search(values["deviceName"]))
    return Device("vulkan", values["deviceName"], driver, address, vendor, cpu=cpu)


def parse_rocminfo(text: str) -> list[Device]:
    """``rocminfo``. BDFID is bus, device and function in 16 bits, in decimal; the domain is not told."""
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"Agent \d+\s*", line):
            found.append({})
        # only the agent's own lines: caches, pools and ISAs are indented deeper and have names, too
        pair = re.match(r"  ([A-Z][^:]*):\s*(.*)", line)
        if found and pair:
            found[-1].setdefault(pair[1], pair[2].strip())
    return [_rocm(values) for values in found if values.get("Name")]


def _rocm(values: dict[str, str]) -> Device:
    gpu, bdf = values.get("Device Type") == "GPU", values.get("BDFID", "")
    address = ""
    if gpu and bdf.isdecimal():
        address = f"{int(bdf) >> 8 & 255:02x}:{int(bdf) >> 3 & 31:02x}.{int(bdf) & 7}"
    note = ""
    if values["Name"] == DROPPED:
        note = f"ROCm has dropped {DROPPED}: its libraries may lack code for it; pin a container that has it"
    name = values.get("Marketing Name") or values["Name"]
    return Device("rocm", name, values["Name"] if gpu else "", address, "amd" if gpu else "", cpu=not gpu, note=note)


def parse_nvidia_smi(text: str) -> list[Device]:
    """``nvidia-smi -q``: the driver answers by itself; the version of CUDA is libcuda's, ``Not Found`` without it."""
    told = re.search(r"^CUDA (?:\w+ )?Version\s*:\s*(.*)$", text, re.MULTILINE)
    version = told[1].strip() if told else ""
    works = bool(re.match(r"\d", version))
    broken = "" if works else "the driver answers, but libcuda.so.1 is not found (package libcuda1)"
    found = []
    for line in re.finditer(r"^GPU (\S+)\n(?:\s+Product Name\s*:\s*(.*))?", text, re.MULTILINE):
        if address := _address(line[1]):
            name = (line[2] or "").strip() or address
            driver = f"CUDA {version}" if works else ""
            found.append(Device("cuda", name, driver, address, "nvidia", broken=broken))
    return found


def _vendor(text: str) -> str:
    return VENDORS.get(text.strip().lower(), "")


def _address(text: str) -> str:
    """In sysfs's form; NVIDIA writes the domain with eight digits."""
    match = ADDRESS.search(text)
    if match is None:
        return ""
    place = f"{match[2]}:{match[3]}.{match[4]}".lower()
    return f"{int(match[1], 16):04x}:{place}" if match[1] else place


def _mesa_address(uuid: str) -> str:
    """Mesa's radeonsi and RADV put domain, bus, device and function into the UUID as four little-endian words."""
    match = MESA_UUID.fullmatch(uuid.strip().lower())
    if match is None:
        return ""
    raw = bytes.fromhex("".join(match.groups()))
    domain, bus, device, function = (int.from_bytes(raw[at : at + 4], "little") for at in (0, 4, 8, 12))
    if bus > 0xFF or device > 0x1F or function > 7 or domain > 0xFFFFFFFF:
        return ""
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"
