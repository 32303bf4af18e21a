# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""EFI firmware for the boot loaders that need it."""

from __future__ import annotations

import shutil
from pathlib import Path

from .config import Settings
from .errors import Unavailable
from .launch import Firmware

FOLDER = Path("/usr/share/OVMF")


def prepare(where: Settings) -> Firmware:
    """The host's OVMF and the rig's own copy of its variables. Raises `Unavailable` without the package ovmf."""
    code, variables = FOLDER / "OVMF_CODE_4M.fd", FOLDER / "OVMF_VARS_4M.fd"
    if not code.exists():
        raise Unavailable(f"there is no {code}", "apt-get install ovmf")
    mine = where.run / "efi-variables.fd"
    if not mine.exists():
        shutil.copy(variables, mine)
    return Firmware(code, mine)
