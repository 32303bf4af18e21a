# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the stacks' tools print, for the cards that a test wants.

Written after the sources of clinfo 3.0 (``PCI-E, %04x:%02x:%02x.%u``), Vulkan-Tools, rocminfo, and NVIDIA's
``nvidia-smi -q``, shortened to what surrounds the lines that matter. The two of CPU devices in
tests/unit/fixtures/stacks were recorded on Debian 12 (pocl 3.1, Mesa 22.3.6); the second is cut off at the extensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECORDED = Path(__file__).resolve().parents[1] / "fixtures/stacks"


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


@dataclass
class Cl:
    """One OpenCL device; ``place`` are the lines by which the platform tells the address."""

    name: str
    vendor: str = "0x1002"
    place: str = ""
    kind: str = "CL_DEVICE_TYPE_GPU"
    available: bool = True
    compiler: bool = True


def clinfo(platforms: dict[str, list[Cl]], suffix: str = "MESA") -> str:
    """All platforms share the suffix, as Mesa's two do."""
    lines = [f"#PLATFORMS                                        {len(platforms)}"]
    lines += [f"  CL_PLATFORM_NAME                                {platform}" for platform in platforms]
    for platform, devices in platforms.items():
        lines += ["", f"[{suffix}/*]    CL_PLATFORM_NAME                                {platform}"]
        lines += [f"[{suffix}/*]  #DEVICES                                          {len(devices)}"]
        for number, device in enumerate(devices):
            at = f"[{suffix}/{number}]    "
            lines += [
                f"{at}CL_DEVICE_NAME                                  {device.name}",
                f"{at}CL_DEVICE_VENDOR                                AMD",
                f"{at}CL_DEVICE_VENDOR_ID                             {device.vendor}",
                *(f"{at}{line}" for line in device.place.splitlines()),
                f"{at}CL_DRIVER_VERSION                               22.3.6",
                f"{at}CL_DEVICE_TYPE                                  {device.kind}",
                f"{at}CL_DEVICE_AVAILABLE                             {_bool(device.available)}",
                f"{at}CL_DEVICE_COMPILER_AVAILABLE                    {_bool(device.compiler)}",
                f"{at}CL_DEVICE_PARTITION_AFFINITY_DOMAIN             ",
            ]
    return "\n".join([*lines, "", "[OCLICD/*]   CL_ICDL_NAME                                    OpenCL ICD Loader", ""])


def _bool(value: bool) -> str:
    return "CL_TRUE" if value else "CL_FALSE"


def khr(address: str) -> str:
    return f"CL_DEVICE_PCI_BUS_INFO_KHR                      PCI-E, {address}"


def vulkaninfo(
    addresses: list[str], name: str = "AMD Radeon RX 580 Series (RADV POLARIS10)", *, pci: bool = True
) -> str:
    """Whole text; without ``pci`` the address is only in the UUID, as in ``--summary``."""
    text = "==========\nVULKANINFO\n==========\n\nVulkan Instance Version: 1.3.239\n\nDevice Groups:\n==============\n"
    text += "\nDevice Properties and Extensions:\n=================================\n"
    for number, address in enumerate(addresses):
        domain, bus, rest = address.split(":")
        slot, function = rest.split(".")
        text += (
            f"GPU{number}:\nVkPhysicalDeviceProperties:\n---------------------------\n"
            "\tapiVersion        = 1.3.230 (4206822)\n\tvendorID          = 0x1002\n\tdeviceID          = 0x67df\n"
            f"\tdeviceType        = PHYSICAL_DEVICE_TYPE_DISCRETE_GPU\n\tdeviceName        = {name}\n\n"
            "VkPhysicalDeviceDriverProperties:\n---------------------------------\n"
            "\tdriverID        = DRIVER_ID_MESA_RADV\n\tdriverName      = radv\n\tdriverInfo      = Mesa 22.3.6\n\n"
            "VkPhysicalDeviceIDProperties:\n-----------------------------\n"
            f"\tdeviceUUID      = 00000000-{bus}00-0000-0000-000000000000\n\n"
        )
        if pci:
            text += (
                "VkPhysicalDevicePCIBusInfoPropertiesEXT:\n----------------------------------------\n"
                f"\tpciDomain   = {int(domain, 16)}\n\tpciBus      = {int(bus, 16)}\n"
                f"\tpciDevice   = {int(slot, 16)}\n\tpciFunction = {function}\n\n"
            )
    return text


def rocminfo(addresses: list[str], isa: str = "gfx803") -> str:
    text = "ROCk module is loaded\n=====================    \nHSA System Attributes    \n=====================    \n"
    text += "Runtime Version:         1.1\n\n"
    text += "==========               \nHSA Agents               \n==========               \n"
    text += _agent(1, "Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "CPU", 0, "")
    for number, address in enumerate(addresses, 2):
        _domain, bus, rest = address.split(":")
        slot, function = rest.split(".")
        bdf = int(bus, 16) << 8 | int(slot, 16) << 3 | int(function)
        text += _agent(number, isa, "GPU", bdf, "Radeon RX 580 Series")
    return text + "*** Done ***             \n"


def _agent(number: int, name: str, kind: str, bdf: int, marketing: str) -> str:
    return (
        f"*******                  \nAgent {number}                  \n*******                  \n"
        f"  Name:                    {name:<35}\n  Uuid:                    {kind}-XX                             \n"
        f"  Marketing Name:          {marketing or name:<35}\n"
        "  Vendor Name:             AMD                                \n"
        f"  Node:                    {number - 1}                                  \n"
        f"  Device Type:             {kind}                                \n"
        "  Cache Info:              \n    L1:                      16(0x10) KB                        \n"
        f"  BDFID:                   {bdf:<35}\n  ISA Info:                \n    ISA 1                    \n"
        f"      Name:                    amdgcn-amd-amdhsa--{name}          \n"
    )


def nvidia_smi(addresses: list[str], cuda: str = "12.4") -> str:
    text = "\n==============NVSMI LOG==============\n\n"
    text += "Timestamp                                 : Sun Nov 22 18:00:00 2026\n"
    text += "Driver Version                            : 550.54.15\n"
    text += f"CUDA Version                              : {cuda}\n\n"
    text += f"Attached GPUs                             : {len(addresses)}\n"
    for address in addresses:
        text += (
            f"GPU 0000{address.upper()}\n    Product Name                          : NVIDIA H200\n"
            "    Product Brand                         : NVIDIA\n    MIG Mode\n"
            "        Current                           : Disabled\n\n"
        )
    return text
