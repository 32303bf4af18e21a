# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small ACPI table that gives the emulated processors frequencies and an idle state, as a desktop's firmware would.

The guest's acpi-cpufreq and cpuidle drivers find them by ``_PSS`` and ``_CST`` (ACPI specification 6.5, chapter 8.4).
Writing a frequency goes to I/O port 0x2FF: the scratch register of the second serial port, which remembers it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from .errors import RigError
from .hardware import CPUS

# MHz, milliwatts, latencies in microseconds, control and status value; the first stands for turbo
STATES = ((3701, 95000, 0x25), (3700, 90000, 0x24), (2400, 50000, 0x18), (800, 15000, 0x08))


def source(cpus: int = CPUS) -> str:
    """The table in ASL, for processors named as QEMU's q35 does (\\_SB.CPUS.C000 and so on)."""
    package = ", ".join(
        f"Package (6) {{{mhz}, {power}, 10, 10, {value:#x}, {value:#x}}}" for mhz, power, value in STATES
    )
    port = "ResourceTemplate () { Register (SystemIO, 8, 0, 0x2FF) }"
    idle = "Package (4) { ResourceTemplate () { Register (FFixedHW, 0, 0, 0) }, 1, 1, 1000 }"
    lines = ['DefinitionBlock ("rig.aml", "SSDT", 2, "RIG", "CPUFREQ", 1) {']
    lines += [f"  External (\\_SB.CPUS.C{number:03X}, DeviceObj)" for number in range(cpus)]
    for number in range(cpus):
        lines += [
            f"  Scope (\\_SB.CPUS.C{number:03X}) {{",
            f"    Name (_PCT, Package (2) {{ {port}, {port} }})",
            f"    Name (_PSS, Package ({len(STATES)}) {{ {package} }})",
            "    Method (_PPC, 0) { Return (0) }",
            f"    Name (_PSD, Package (1) {{ Package (5) {{5, 0, {number}, 0xFC, 1}} }})",
            f"    Name (_CST, Package (2) {{ 1, {idle} }})",
            "  }",
        ]
    return "\n".join([*lines, "}", ""])


def table(folder: Path) -> Path:
    """The compiled table in ``folder``, made with iasl (acpica-tools) unless it is there."""
    compiled = folder / "rig.aml"
    text = source()
    written = folder / "rig.asl"
    if compiled.exists() and written.exists() and written.read_text(encoding="utf-8") == text:
        return compiled
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(text, encoding="utf-8")
    done = subprocess.run(["iasl", "-p", folder / "rig", written], capture_output=True, text=True, check=False)
    if done.returncode or not compiled.exists():
        raise RigError(f"iasl ended with {done.returncode}:\n{done.stdout[-1500:]}", "apt-get install acpica-tools")
    return compiled
