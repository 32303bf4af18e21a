# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How hot the processors are, as far as the kernel has a sensor for it.

Sources: Documentation/hwmon/sysfs-interface.rst (``temp*_input`` in thousandths of a degree Celsius), and
Documentation/driver-api/thermal/sysfs-api.rst (``temp`` likewise).

PRIVATE to the organism.proxmox collection.
"""

from __future__ import annotations

from ._root import Root

CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "scpi_sensors")
"""Names of hwmon chips that measure processors."""
ZONES = ("x86_pkg_temp", "cpu-thermal", "cpu_thermal")
"""Types of thermal zones that do."""


def processors(root: Root | None = None) -> dict[str, float]:
    """Sensor to degrees Celsius; empty where the kernel knows no temperature of a processor (most virtual machines)."""
    root = root or Root()
    found: dict[str, float] = {}
    for chip in root.glob("/sys/class/hwmon/hwmon*"):
        name = root.read_or_none(f"{chip}/name")
        if name not in CHIPS:
            continue
        for path in root.glob(f"{chip}/temp*_input"):
            value = root.read_int(path)
            label = root.read_or_none(path.replace("_input", "_label")) or path.rsplit("/", 1)[1].removesuffix("_input")
            if value is not None:
                found[f"{name} {label}"] = value / 1000
    for zone in root.glob("/sys/class/thermal/thermal_zone*"):
        kind = root.read_or_none(f"{zone}/type")
        value = root.read_int(f"{zone}/temp")
        if kind in ZONES and value is not None:
            found[f"{kind} {zone.rsplit('thermal_zone', 1)[1]}"] = value / 1000
    return found
