# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A mount namespace of one's own: nobody else can hold what is mounted here, and it goes with the process."""

from __future__ import annotations

import ctypes
import os
import subprocess

_NEWNS = 0x20000


def alone() -> None:
    """Leave the machine's mounts to the machine. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEWNS) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"no mount namespace of its own: {os.strerror(code)}")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
