# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A GPU's sensors from sysfs: amdgpu's own files and hwmon (kernel: Documentation/gpu/amdgpu/thermal.rst).

What a card cannot tell is None, never 0: a node that exists but fails would otherwise make its GPU the "least busy" one
for ever.

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._root import Root

MIB = 1024 * 1024


@dataclass(frozen=True)
class Readings:
    """Percent, degrees Celsius, revolutions a minute, watts and MiB."""

    gpu_busy_percent: float | None = None
    mem_busy_percent: float | None = None
    temp_c: float | None = None
    fan_rpm: float | None = None
    power_w: float | None = None
    vram_total_mb: float | None = None
    vram_used_mb: float | None = None


def read_sysfs(root: Root, device: str) -> Readings:
    """Sensors of the card whose sysfs directory is ``device`` (``/sys/bus/pci/devices/0000:03:00.0``)."""
    hwmon = hwmon_of(root, device)
    power = _number(root, f"{hwmon}/power1_average") if hwmon else None
    if power is None and hwmon:  # newer cards have no average
        power = _number(root, f"{hwmon}/power1_input")
    return Readings(
        gpu_busy_percent=_percent(root, f"{device}/gpu_busy_percent"),
        mem_busy_percent=_percent(root, f"{device}/mem_busy_percent"),
        temp_c=_scaled(_number(root, f"{hwmon}/temp1_input") if hwmon else None, 1000),
        fan_rpm=_number(root, f"{hwmon}/fan1_input") if hwmon else None,
        power_w=_scaled(power, 1_000_000),
        vram_total_mb=_scaled(_number(root, f"{device}/mem_info_vram_total"), MIB),
        vram_used_mb=_scaled(_number(root, f"{device}/mem_info_vram_used"), MIB),
    )


def hwmon_of(root: Root, device: str) -> str | None:
    """The card's hwmon directory; its number changes from boot to boot."""
    names = root.listdir(f"{device}/hwmon")
    return f"{device}/hwmon/{names[0]}" if names else None


def _number(root: Root, path: str) -> int | None:
    return root.read_int(path)


def _percent(root: Root, path: str) -> float | None:
    value = root.read_int(path)
    # some firmware answers 65535 or a negative number for "I do not know"
    return float(value) if value is not None and 0 <= value <= 100 else None


def _scaled(value: int | None, divisor: int) -> float | None:
    return None if value is None else round(value / divisor, 3)
